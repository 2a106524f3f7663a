"""What kernels of a GLM layer take besides its weights: norms, the rows of a step, where these leave their state."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm of x, or of the sum of x and `delta` [T, K]: `gain` [K]."""

    gain: torch.Tensor
    eps: float
    delta: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step, on the device: int32 [T] each but `page_ids`; cos and sin float32 [T, rope / 2].

    A row is a token. It sees the tokens up to its position, its page table begins at `starts[row]` of `page_ids`, and
    its own state belongs into `own_slots[row]`: a page times the page size plus the place within it, -1 for nowhere.
    """

    positions: torch.Tensor
    own_slots: torch.Tensor
    starts: torch.Tensor
    page_ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def part(self, rows: slice) -> "Rows":
        """Those that follow each other."""
        positions, own_slots, starts = (part[rows] for part in (self.positions, self.own_slots, self.starts))
        return Rows(positions, own_slots, starts, self.page_ids, self.cos[rows], self.sin[rows])


@dataclass(frozen=True, slots=True)
class Queries:
    """Of latent attention [T, H, latent] and their rotary part [T, H, rope]; those of the index, or None
    [T, index_heads, index_dim]."""

    latent: torch.Tensor
    rope: torch.Tensor
    index: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Selected:
    """What each row attends to: slots int32 [T, top_k] in the order of their positions, counts int32 [T]."""

    slots: torch.Tensor
    counts: torch.Tensor

    def part(self, rows: slice) -> "Selected":
        """That of rows that follow each other."""
        return Selected(self.slots[rows], self.counts[rows])


@dataclass(frozen=True, slots=True)
class KeyNorm:
    """LayerNorm of index keys, float32 [index_dim]."""

    gain: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class State:
    """Where a layer keeps what, as views of the pool, and the norms before: latents [pages, page_size, latent + rope];
    index keys [pages, page_size, index_dim], None where there are none."""

    latents: torch.Tensor
    latent_gain: torch.Tensor
    latent_eps: float
    keys: torch.Tensor | None = None
    key_norm: KeyNorm | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Many rows of one sequence, `first` to `last` (not in it) of a step, the last of which sees no more than `context`
    tokens, in the pages `pages`, int32 [..].

    With `attended_together` they attend to what of all that they see is marked, and to all where there is no room for
    marks: `bits` int32 [rows, words]; `places` int32 [pages of the pool] says where in `pages` a page is.
    """

    first: int
    last: int
    context: int
    pages: torch.Tensor
    attended_together: bool = False
    places: torch.Tensor | None = None
    bits: torch.Tensor | None = None

    @property
    def rows(self) -> slice:
        """Of the step."""
        return slice(self.first, self.last)
