"""The C side of the CPU kernels: structures as native/*.cpp declare them, and weights as they want them."""

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

PANEL = 32
HALF = PANEL // 2
Pointer, Int = ctypes.c_void_p, ctypes.c_int64


class Linear(ctypes.Structure):
    """A packed matrix."""

    _fields_ = (("panels", Pointer), ("bias", Pointer), ("num_panels", Int), ("num_words", Int))


class Layer(ctypes.Structure):
    """One layer."""

    _fields_ = (
        ("input_norm", Pointer),
        ("qkv", Linear),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
        ("output", Linear),
        ("post_norm", Pointer),
        ("gate_up", Linear),
        ("down", Linear),
    )


class Model(ctypes.Structure):
    """A dense decoder."""

    _fields_ = (
        *((name, Int) for name in ("hidden", "num_heads", "num_kv_heads", "head_dim", "inner", "num_layers")),
        ("eps", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", Pointer),
        ("head", Linear),
        ("embedding", Pointer),
    )


class Step(ctypes.Structure):
    """One step; the tensors of `shared.engine.batch.Batch`, rope tables, the pool, results."""

    _fields_ = (
        *((name, Int) for name in ("num_tokens", "num_sequences", "num_sampled")),
        *((name, Pointer) for name in ("token_ids", "positions", "query_starts", "context_lens", "page_starts")),
        *((name, Pointer) for name in ("page_ids", "sampled_rows", "cos", "sin", "pool")),
        *((name, Int) for name in ("page_bytes", "page_size", "layer_stride", "kind_stride", "head_stride")),
        *((name, Pointer) for name in ("logits", "workspace")),
    )


class IndexKeys(ctypes.Structure):
    """A layer's index keys in the pool; `form` is a place in INDEX_KEY_FORMS."""

    _fields_ = (
        *((name, Pointer) for name in ("values", "scales")),
        *((name, Int) for name in ("page_bytes", "page_size", "row_bytes", "dim", "form")),
    )


INDEX_KEY_FORMS = (torch.float32, torch.bfloat16, torch.uint8)


class IndexStep(ctypes.Structure):
    """What of a step's sequences tokens are chosen for, among which, and where the choice goes."""

    _fields_ = (
        *((name, Int) for name in ("num_rows", "num_parts", "num_heads", "top_k", "q_is_bf16")),
        *((name, Pointer) for name in ("q", "head_weights", "positions", "first_pages", "page_ids", "parts")),
        ("keys", IndexKeys),
        *((name, Pointer) for name in ("chosen", "workspace")),
    )


def load(path: Path) -> ctypes.CDLL:
    """The compiled kernels. Calls release the GIL. Raises OSError."""
    library = ctypes.CDLL(str(path))
    model, index_step = ctypes.POINTER(Model), ctypes.POINTER(IndexStep)
    library.forebay_team_create.argtypes = (ctypes.c_int,)
    library.forebay_team_create.restype = Pointer
    library.forebay_team_destroy.argtypes = (Pointer,)
    library.forebay_team_destroy.restype = None
    library.forebay_workspace_bytes.argtypes = (model, Pointer, ctypes.c_int, Int)
    library.forebay_workspace_bytes.restype = Int
    library.forebay_forward.argtypes = (model, Pointer, ctypes.c_int, ctypes.POINTER(Step))
    library.forebay_forward.restype = None
    library.forebay_index_workspace_bytes.argtypes = (index_step, Pointer)
    library.forebay_index_workspace_bytes.restype = Int
    library.forebay_index_choose.argtypes = (index_step, Pointer)
    library.forebay_index_choose.restype = None
    return library


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Weights [N, K] in panels, int32 [N / 32, words of K, 32]: a word is a float32 or two neighbouring bfloat16.

    N and K are filled up with zeros to whole panels and words.
    """
    rows, columns = weight.shape
    fill = (0, -columns % (4 // weight.itemsize), 0, -rows % PANEL)
    words = torch.nn.functional.pad(weight, fill).contiguous().view(torch.int32)
    return words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous()


def interleave(gate_up: torch.Tensor) -> torch.Tensor:
    """[2 I, ...] with gate above up, as rows of 16 of gate, 16 of up, 16 of gate … filled up with zeros."""
    halves = gate_up.view(2, -1, *gate_up.shape[1:])
    num_fill = -halves.shape[1] % HALF
    filled = torch.cat((halves, halves.new_zeros(2, num_fill, *gate_up.shape[1:])), dim=1)
    grouped = filled.view(2, -1, HALF, *gate_up.shape[1:]).transpose(0, 1)
    return grouped.reshape(-1, *gate_up.shape[1:])


class Team:
    """Threads that compute, one caller's at a time, and memory for what is between; it grows and is kept."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self.handle = library.forebay_team_create(num_threads)
        weakref.finalize(self, library.forebay_team_destroy, self.handle)
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def workspace(self, num_bytes: int) -> int:
        """The address of at least so many bytes."""
        if len(self._workspace) < num_bytes:
            self._workspace = torch.empty(num_bytes, dtype=torch.uint8)
        return self._workspace.data_ptr()


class Arena:
    """Keeps the tensors alive whose addresses the structures hold."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def address(self, tensor: torch.Tensor | None) -> int | None:
        """Where the tensor is; it stays there as long as the arena."""
        if tensor is None:
            return None
        kept = tensor.contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def vector(self, values: torch.Tensor | None) -> int | None:
        """The address of a float32 vector, filled up with zeros to whole panels."""
        if values is None:
            return None
        return self.address(torch.nn.functional.pad(values.float(), (0, -len(values) % PANEL)))

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """A matrix [N, K] and its bias [N]."""
        panels = pack(weight)
        return Linear(self.address(panels), self.vector(bias), panels.shape[0], panels.shape[1])

    def linears(self, weights: Iterable[torch.Tensor]) -> Linear:
        """The first of matrices of one shape, [N, K], that lie one behind the other."""
        panels = torch.stack([pack(weight) for weight in weights])
        return Linear(self.address(panels), None, panels.shape[1], panels.shape[2])


def array(layers: Sequence[Layer]) -> "ctypes.Array[Layer]":
    """Layers side by side."""
    return (Layer * len(layers))(*layers)
