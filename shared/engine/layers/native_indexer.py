"""The choice of tokens of sparse attention in one native call: twin of `sparse_reference.select`, for the CPU.

Every score is a sum in an order that depends on the model's shape alone, so a choice is the same however a sequence is
chunked, batched or cached.
"""

import ctypes

import torch

from shared.engine.kernels import native
from shared.engine.kernels.sparse_reference import Placed, Rows, Selection
from shared.engine.quantization.rows import FloatRows, Fp8IndexKeys


class Chooser:
    """Satisfies `sparse_reference.Select`, on threads of its own."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._library = library
        self._team = native.Team(library, num_threads)

    def __call__(self, q: torch.Tensor, head_weights: torch.Tensor, keys: Rows, step: Placed, top_k: int) -> Selection:
        """As `sparse_reference.select`; `keys` are one of `quantization.rows`."""
        width = min(top_k, max(step.contexts))
        chosen = (step.positions[:, None] - torch.arange(width - 1, -1, -1)).clamp_min_(-1)
        parts = longer(step, top_k)
        if not parts:
            return chosen
        where = placed(keys)
        if where.form != native.INDEX_KEY_FORMS.index(torch.bfloat16) or where.dim % 2:
            q = q.float()
        q, head_weights = q.contiguous(), (head_weights * q.shape[2] ** -0.5).contiguous()
        ends = torch.tensor(parts)
        tensors = (q, head_weights, step.positions, step.first_pages, step.page_ids, ends)
        sizes = (len(q), len(parts), q.shape[1], width, q.dtype == torch.bfloat16)
        addresses = (tensor.data_ptr() for tensor in tensors)
        native_step = native.IndexStep(*sizes, *addresses, where, chosen.data_ptr())
        which = ctypes.byref(native_step), self._team.handle
        native_step.workspace = self._team.workspace(self._library.forebay_index_workspace_bytes(*which))
        self._library.forebay_index_choose(*which)
        return chosen


def longer(step: Placed, top_k: int) -> list[tuple[int, int]]:
    """Of each sequence with more than `top_k` tokens the first row, and the one behind its last."""
    bounds = zip(step.starts, step.starts[1:], step.contexts, strict=False)
    return [(start, end) for start, end, context in bounds if context > top_k]


def placed(keys: Rows) -> native.IndexKeys:
    """Where keys are: views of the pool, whose pages all have them at the same place."""
    if isinstance(keys, Fp8IndexKeys):
        values, scales = keys.values, keys.scales
    else:
        assert isinstance(keys, FloatRows), "index keys are nothing else"
        values = scales = keys.state
    page_bytes, row_bytes = (stride * values.itemsize for stride in values.stride()[:2])
    form = native.INDEX_KEY_FORMS.index(values.dtype)
    shape = (page_bytes, values.shape[1], row_bytes, values.shape[2], form)
    return native.IndexKeys(values.data_ptr(), scales.data_ptr(), *shape)
