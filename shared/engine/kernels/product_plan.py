"""How products of few tokens are cut up among the warps and blocks of `cuda/products.cu` and `cuda/wide.cu`."""

from collections.abc import Callable
from dataclasses import dataclass

from shared.engine.kernels.w4a16 import CHUNK, ROWS

WARPS = 8
MAX_TOKENS = 64
DENSE_STEP = 64  # columns
MIDDLING, TALL = 5120, 16_384  # rows
MIN_WIDE = 17  # tokens; of fewer, each warp fetches them for itself as fast
WIDE_MULTIPLE = 8  # rows, of gate and up together: a thread finishes four
# Of wide products: blocks that an H100 has at once in clusters of up to seven (of eight: 240); clusters of six leave
# the next kernel some room to begin in; steps for each block.
MAX_BLOCKS, MAX_CLUSTER, MIN_STEPS = 248, 6, 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut up: eights of tokens and tiles of rows for a warp; warps of a block that have rows of their
    own, the others sharing out columns; blocks that share out columns. A wide one is computed by `cuda/wide.cu`."""

    eights: int
    row_tiles: int
    warps_rows: int
    cluster: int
    is_wide: bool = False

    def num_blocks(self, num_rows: int) -> int:
        """Of one matrix."""
        return self._groups(num_rows) * self.cluster

    def num_squares(self, num_rows: int) -> int:
        """How many sums of squares a token has of one matrix: blocks of a cluster share out rows, or in a wide product
        tokens."""
        return self._groups(num_rows) * (1 if self.is_wide else self.cluster)

    def _groups(self, num_rows: int) -> int:
        return -(-num_rows // (ROWS * self.row_tiles * self.warps_rows))


# Of (packed, tokens, rows, columns).
Planned = Callable[[bool, int, int, int], Plan]


def planned(packed: bool, num_tokens: int, num_rows: int, num_columns: int) -> Plan:
    """The cut that was fastest on an H100 (docs/LOG.md): the more tokens, the more rows share what a warp reads of
    them, as far as there are rows enough for all multiprocessors."""
    eights, steps = _eights(num_tokens), -(-num_columns // (CHUNK if packed else DENSE_STEP))
    is_tall = num_rows >= TALL
    row_tiles = 2 if eights == 8 or (packed and num_rows > MIDDLING and eights <= 2) or (eights >= 2 and is_tall) else 1
    warps_rows = 1
    if is_tall and (packed or eights > 1):
        warps_rows = 8 if eights == 8 else 4
    elif num_rows > MIDDLING and eights >= 4:
        warps_rows = 2
    while warps_rows < WARPS and WARPS // warps_rows > steps:
        warps_rows *= 2
    return Plan(eights, row_tiles, warps_rows, 1)


def planned_wide(packed: bool, num_tokens: int, num_rows: int, num_columns: int) -> Plan:
    """The same for a GPU that has wide products: as many blocks share out columns as find a place at once, where that
    gives each some steps."""
    if not packed or num_tokens < MIN_WIDE or num_rows % WIDE_MULTIPLE:
        return planned(packed, num_tokens, num_rows, num_columns)
    groups, steps = -(-num_rows // (ROWS * WARPS)), -(-num_columns // CHUNK)
    most = min(MAX_CLUSTER, MAX_BLOCKS // groups, steps // MIN_STEPS)
    return Plan(_eights(num_tokens), 1, WARPS, max(1, most), is_wide=True)


def _eights(num_tokens: int) -> int:
    return next(eights for eights in (1, 2, 4, 8) if min(num_tokens, MAX_TOKENS) <= 8 * eights)
