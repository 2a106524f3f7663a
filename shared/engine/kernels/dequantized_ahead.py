"""Packed matrices made bf16 for products of many tokens, each while a product before it is still under way.

Such a product is bound by arithmetic and leaves most of the memory's bandwidth unused, of which dequantizing takes all
it can get. So what follows is dequantized on a stream of its own, behind which the product that needs it waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.kernels.w4a16 import PackedWeight

FIRST = -5  # a priority: blocks of what is dequantized get the places that those of a product free


@dataclass(slots=True)
class Room:
    """Where the matrices of one kind lie in turn, and what is there, or will be once `done`."""

    values: torch.Tensor
    done: torch.cuda.Event
    held: PackedWeight | None = None


class DequantizedAhead:
    """Multiplies with the matrices of `layers`, each layer's in the order of use, equally many. Beside each product the
    next one's matrix is dequantized; in the last layer none is, of which few tokens are asked for (decisions/0042).

    There is room for one of each kind, taken when it is first needed.
    """

    def __init__(self, products: CudaProducts, layers: Sequence[Sequence[PackedWeight]]) -> None:
        self._products, self._kinds = products, len(layers[0])
        self._matrices = [matrix for layer in layers for matrix in layer]
        self._places = {id(matrix): place for place, matrix in enumerate(self._matrices)}
        self._rooms: list[Room] = []
        self._side: torch.cuda.Stream | None = None

    def has(self, weight: PackedWeight) -> bool:
        """Whether it is one of ours."""
        return id(weight) in self._places

    def linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """x [M, K] times W' [M, N], plus `bias`, as `CudaProducts.linear` for many tokens. `weight` is one of ours."""
        place, main = self._places[id(weight)], torch.cuda.current_stream(x.device)
        if self._side is None:
            self._side = torch.cuda.Stream(x.device, priority=FIRST)
            self._rooms = [self._room(kind, x.device) for kind in range(self._kinds)]
        room = self._rooms[place % self._kinds]
        if room.held is not weight:
            self._fill(room, weight, main)
        main.wait_event(room.done)
        before = torch.cuda.Event()
        before.record(main)  # whatever reads what is overwritten next was launched before
        out = F.linear(x, _shaped(room, weight), bias)
        if place < len(self._matrices) - self._kinds:
            self._side.wait_event(before)
            self._fill(self._rooms[(place + 1) % self._kinds], self._matrices[place + 1], self._side)
        return out

    def _fill(self, room: Room, weight: PackedWeight, stream: torch.cuda.Stream) -> None:
        stream.wait_event(room.done)
        with torch.cuda.stream(stream):
            self._products.dequantized(weight, _shaped(room, weight))
            room.done.record(stream)
        room.held = weight

    def _room(self, kind: int, device: torch.device) -> Room:
        size = max(matrix.num_rows * matrix.num_columns for matrix in self._matrices[kind :: self._kinds])
        return Room(torch.empty(size, dtype=torch.bfloat16, device=device), torch.cuda.Event())


def _shaped(room: Room, weight: PackedWeight) -> torch.Tensor:
    return room.values[: weight.num_rows * weight.num_columns].view(weight.num_rows, weight.num_columns)
