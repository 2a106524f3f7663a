"""Cached state of one layer as rows, one per token, in whichever form the pages hold it."""

import torch

from shared.engine.kernels.sparse_reference import Rows
from shared.engine.kv import view
from shared.engine.kv.formats import FP8_INDEX_KEY, FP8_LATENT
from shared.engine.kv.layout import KvLayout
from shared.engine.quantization import kv_fp8


class FloatRows:
    """state [pages, page_size, D] of a float dtype."""

    def __init__(self, state: torch.Tensor) -> None:
        self.page_size = state.shape[1]
        self.state = state

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """As Rows."""
        self.state[pages, offsets] = rows.to(self.state.dtype)

    def read(self, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As Rows."""
        return self.state[pages, offsets]


class Fp8Latents:
    """state uint8 [pages, page_size, bytes]: `kv_fp8.pack_latents`."""

    def __init__(self, state: torch.Tensor, kv_lora_rank: int) -> None:
        self.page_size = state.shape[1]
        self._state, self._kv_lora_rank = state, kv_lora_rank

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """As Rows."""
        self._state[pages, offsets] = kv_fp8.pack_latents(rows, self._kv_lora_rank)

    def read(self, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As Rows."""
        return kv_fp8.unpack_latents(self._state[pages, offsets], self._kv_lora_rank)


class Fp8IndexKeys:
    """state uint8 [pages, page_size * (D + 4)]: the values of all tokens of a page, then their scales."""

    def __init__(self, state: torch.Tensor, page_size: int, dim: int) -> None:
        self.page_size = page_size
        values, scales = state.split([page_size * dim, state.shape[1] - page_size * dim], dim=1)
        self.values = values.unflatten(1, (page_size, dim))
        self.scales = scales.unflatten(1, (page_size, -1))

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """As Rows."""
        values, scale = kv_fp8.quantize(rows)
        self.values[pages, offsets] = values.view(torch.uint8)
        self.scales[pages, offsets] = scale[:, None].view(torch.uint8)

    def read(self, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As Rows."""
        scale = self.scales[pages, offsets].view(torch.float32)[..., 0]
        return kv_fp8.dequantize(self.values[pages, offsets].view(torch.float8_e4m3fn), scale)


def latents(pool: torch.Tensor, layout: KvLayout, name: str, kv_lora_rank: int) -> list[Rows]:
    """The latents of each layer in the state class `name`. `pool` is uint8 [num_pages, page_bytes]."""
    state = view.state_class(layout, name)
    layers = view.state_view(pool, state, (state.num_layers, layout.page_size, -1)).unbind(1)
    if state.dtype == FP8_LATENT:
        return [Fp8Latents(layer, kv_lora_rank) for layer in layers]
    return [FloatRows(layer) for layer in layers]


def index_keys(pool: torch.Tensor, layout: KvLayout, name: str, dim: int) -> list[Rows]:
    """The index keys of each layer in the state class `name`, as `latents`."""
    state = view.state_class(layout, name)
    if state.dtype == FP8_INDEX_KEY:
        layers = view.state_view(pool, state, (state.num_layers, -1)).unbind(1)
        return [Fp8IndexKeys(layer, layout.page_size, dim) for layer in layers]
    layers = view.state_view(pool, state, (state.num_layers, layout.page_size, dim)).unbind(1)
    return [FloatRows(layer) for layer in layers]
