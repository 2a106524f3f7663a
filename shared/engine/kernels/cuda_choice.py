"""Tokens chosen from logits by a CUDA kernel, `cuda/choose.cu`, in one launch. Its twin is `sampling.batched`."""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.engine.kernels import build
from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.registry import Candidate, choose
from shared.engine.pinned import put

Pointer, Int = ctypes.c_void_p, ctypes.c_int
ASKED = struct.Struct("dddqQ")


@dataclass(frozen=True, slots=True)
class Asked:
    """How a row's token is chosen: as `api.SamplingParams` says, at a temperature of 0 the likeliest, and with noise
    that begins at `begin` (`gumbel.start`)."""

    temperature: float
    min_p: float
    top_p: float
    top_k: int
    begin: int

    def packed(self, num_tokens: int) -> bytes:
        """As choose.cu has it; to keep as many as there are is no cut."""
        top_k = self.top_k if self.top_k < num_tokens else 0
        return ASKED.pack(self.temperature, self.min_p, self.top_p, top_k, self.begin)


class Choose(ctypes.Structure):
    """As choose.cu has it."""

    _fields_ = (
        *((name, Pointer) for name in ("logits", "asked", "out")),
        ("stride", ctypes.c_int64),
        ("num_tokens", Int),
    )


class CudaChoice:
    """Chooses among at most `most_tokens`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.most_tokens: int = library.forebay_choose_most()

    def __call__(
        self,
        logits: torch.Tensor,
        asked: Sequence[Asked],
        in_doubt: tuple[Sequence[int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """A token for each row of logits float32 [R, V], whose rows may be apart: int64 [R]. Of equals the first counts
        as the likelier, and where the likeliest is not finite, it is the answer. Where only the device knows at
        which of N places the noise of a row begins, `in_doubt` are all of them, R * N, and which it is, int64 [R]."""
        num_rows, num_tokens = logits.shape
        words = bytearray().join(each.packed(num_tokens) for each in asked)
        num_words, candidates = len(words) // 8, in_doubt[0] if in_doubt else ()
        words += struct.pack(f"{len(candidates)}q", *candidates)
        rows = put(torch.frombuffer(words, dtype=torch.int64), torch.int64, logits.device)
        if in_doubt is not None:
            places, which = rows[num_words:].view(num_rows, -1), in_doubt[1][:, None]
            torch.gather(places, 1, which, out=rows[:num_words].view(num_rows, -1)[:, -1:])
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        at = (tensor.data_ptr() for tensor in (logits, rows, out))
        arguments = Choose(*at, logits.stride(0), num_tokens)
        call(self._library, "forebay_choose", logits.device, ctypes.byref(arguments), num_rows)
        return out


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes of "choice"."""
    return opened(path, {"forebay_choose": (ctypes.POINTER(Choose), Int, Pointer)})


def find(device: torch.device, cache_dir: Path, num_tokens: int) -> CudaChoice | None:
    """The kernel for a vocabulary of `num_tokens` on a GPU; None where torch has to choose. Compiled ones are kept in
    `cache_dir`."""
    kernel, obstacle = None, None
    try:
        capability = torch.cuda.get_device_capability(device)
        kernel = CudaChoice(load(build.cuda_library(cache_dir, build.cuda_compiler(), capability, "choice")))
    except (build.BuildError, OSError) as error:
        obstacle = str(error)
    if kernel is not None and num_tokens > kernel.most_tokens:
        obstacle = f"the vocabulary has more than {kernel.most_tokens:,} tokens"
    found: Sequence[Candidate[CudaChoice | None]] = (
        Candidate("choice in one launch", obstacle, kernel),
        Candidate("choice by torch", None, None),
    )
    return choose(found, "auto").built
