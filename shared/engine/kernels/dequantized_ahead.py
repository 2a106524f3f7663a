"""Packed matrices made bf16 for products of many tokens, while products before them are still under way.

Such a product is bound by arithmetic and leaves most of the memory's bandwidth unused, of which dequantizing takes all
it can get. So what follows is dequantized on a stream of its own, as far ahead as there is room, and the product that
needs it waits for that. Where memory is given for it, matrices stay dequantized: moving them takes power, which is
what bounds a prompt on a GPU (docs/LOG.md).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.kernels.w4a16 import PackedWeight

log = logging.getLogger(__name__)

FIRST = -5  # a priority: blocks of what is dequantized get the places that those of a product free


@dataclass(slots=True)
class Room:
    """Where the matrices of one kind lie in turn, and what is there, or will be once `done`."""

    values: torch.Tensor
    done: torch.cuda.Event
    held: PackedWeight | None = None


class DequantizedAhead:
    """Has the matrices of `layers`, each layer's in the order of use, equally many, ready for products. Those of the
    last layer, of which few tokens are asked for (decisions/0042), are dequantized when they are asked for.

    There is room for one of each kind, taken when it is first needed: beside a product, what the one before it read is
    overwritten. Besides, the first ones, as many as `kept_bytes` hold, are dequantized now and for good.
    """

    def __init__(self, products: CudaProducts, layers: Sequence[Sequence[PackedWeight]], kept_bytes: int = 0) -> None:
        self._products, self._kinds = products, len(layers[0])
        self._matrices = [matrix for layer in layers for matrix in layer]
        self._places = {id(matrix): place for place, matrix in enumerate(self._matrices)}
        self._kept = [products.dequantized(each) for each in first_of(self._matrices, kept_bytes)]
        self._rooms: list[Room] = []
        self._side: torch.cuda.Stream | None = None
        if kept_bytes:
            log.info("%d of %d packed matrices stay dequantized for prompts", self.num_kept, len(self._matrices))

    @property
    def num_kept(self) -> int:
        """How many matrices are there for good."""
        return len(self._kept)

    def has(self, weight: PackedWeight) -> bool:
        """Whether it is one of ours."""
        return id(weight) in self._places

    @contextmanager
    def dequantized(self, weight: PackedWeight, device: torch.device) -> Iterator[torch.Tensor]:
        """One of ours as bf16 [N, K], for products that are launched within; beside them others are dequantized."""
        place, main = self._places[id(weight)], torch.cuda.current_stream(device)
        matrix = self._kept[place] if place < len(self._kept) else self._awaited(place, main)
        before = torch.cuda.Event()
        before.record(main)  # whatever reads what is overwritten next was launched before
        yield matrix
        following = range(place + 1, min(place + self._kinds, len(self._matrices) - self._kinds))
        for later in following[max(0, len(self._kept) - following.start) :]:
            side, rooms = self._beside(device)
            if rooms[later % self._kinds].held is not self._matrices[later]:
                side.wait_event(before)
                self._fill(rooms[later % self._kinds], self._matrices[later], side)

    def _awaited(self, place: int, stream: torch.cuda.Stream) -> torch.Tensor:
        """The matrix at `place` for what is launched on `stream` from now on."""
        weight, room = self._matrices[place], self._beside(stream.device)[1][place % self._kinds]
        if room.held is not weight:
            self._fill(room, weight, stream)
        stream.wait_event(room.done)
        return _shaped(room, weight)

    def _beside(self, device: torch.device) -> tuple[torch.cuda.Stream, Sequence[Room]]:
        """Where matrices are dequantized, and where they lie."""
        if self._side is None:
            self._side = torch.cuda.Stream(device, priority=FIRST)
            self._rooms = [self._room(kind, device) for kind in range(self._kinds)]
        return self._side, self._rooms

    def _fill(self, room: Room, weight: PackedWeight, stream: torch.cuda.Stream) -> None:
        stream.wait_event(room.done)
        with torch.cuda.stream(stream):
            self._products.dequantized(weight, _shaped(room, weight))
            room.done.record(stream)
        room.held = weight

    def _room(self, kind: int, device: torch.device) -> Room:
        size = max(matrix.num_rows * matrix.num_columns for matrix in self._matrices[kind :: self._kinds])
        return Room(torch.empty(size, dtype=torch.bfloat16, device=device), torch.cuda.Event())


def first_of(matrices: Sequence[PackedWeight], num_bytes: int) -> Sequence[PackedWeight]:
    """As many of the first ones as so many bytes hold in bf16."""
    sizes = (2 * matrix.num_rows * matrix.num_columns for matrix in matrices)
    return matrices[: sum(end <= num_bytes for end in accumulate(sizes))]


def _shaped(room: Room, weight: PackedWeight) -> torch.Tensor:
    return room.values[: weight.num_rows * weight.num_columns].view(weight.num_rows, weight.num_columns)
