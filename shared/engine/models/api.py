"""What a model is to the executor: a pure function of a step and the paged state."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kv.layout import KvLayout
from shared.engine.parallel.group import Alone, Group
from shared.engine.parallel.partition import Shard
from shared.models.store import default_cache

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model computes. `kernels` names a kernel set, or is "auto" for the best that fits; `cache_dir`
    keeps compiled ones. `shard` is the share that this process computes, together with those of `group`,
    on `device`. `kv_dtype` is one of `kv.formats.KV_DTYPES`, or "auto" for `dtype`. With `mtp` a model's layer that
    proposes drafts is loaded, if it has one. `attention` is FlashInfer's name of its kernels for prompts, or "auto".
    `dequantized_bytes` are there for copies of packed weights that prompts are multiplied with."""

    dtype: torch.dtype
    num_threads: int
    kernels: str = "auto"
    cache_dir: Path = field(default_factory=default_cache)
    shard: Shard = field(default_factory=Shard)
    group: Group = field(default_factory=Alone)
    kv_dtype: str = "auto"
    device: torch.device = CPU
    mtp: bool = False
    attention: str = "auto"
    dequantized_bytes: int = 0

    @property
    def dtype_name(self) -> str:
        """The name of `dtype`."""
        return str(self.dtype).removeprefix("torch.")

    def arithmetic(self, *, fp4: bool) -> str:
        """See `Model`; with `fp4`, quantized weights are multiplied with activations in NVFP4."""
        return f"{self.dtype_name}, activations in NVFP4" if fp4 else self.dtype_name

    @property
    def kv_format(self) -> str:
        """One of `kv.formats.KV_DTYPES`."""
        return self.dtype_name if self.kv_dtype == "auto" else self.kv_dtype


@dataclass(frozen=True, slots=True)
class DraftStep:
    """What a step of a draft layer leaves: for each sequence that drafts, logits float32 [S, vocab_size or more] of its
    next draft, its state [S, hidden], and whatever else the layer takes to the step after it."""

    logits: torch.Tensor
    states: torch.Tensor
    carried: Sequence[torch.Tensor]


class DraftLayer(Protocol):
    """A model's own layer that proposes drafts (multi-token prediction)."""

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Model.forward`; also the model's states [T, hidden], of every token of the step."""

    def extend(self, batch: Batch, states: torch.Tensor, pool: torch.Tensor, layout: KvLayout) -> DraftStep:
        """Follow the model: `batch` has for each position the token behind it, `states` [T, hidden] what the model has
        there. The sampled rows draft, one of a sequence at most; which rows, the model's device alone may know."""

    def advance(
        self, batch: Batch, last: DraftStep, going_on: Sequence[int], pool: torch.Tensor, layout: KvLayout
    ) -> DraftStep:
        """Go on alone: `batch` has the last drafts, one for each of the sequences `going_on` of those in `last`."""


class Model(Protocol):
    """A loaded model. `num_torch_threads` is what torch may use during its steps, sampling included: one where kernels
    bring threads of their own, which torch's would only spin against. `recorded` is as in `engine.api.Executor`.
    `arithmetic` says in what states are computed, as far as others of the same model may differ by more than rounding:
    the name of the dtype, and what activations are rounded to beyond it."""

    vocab_size: int
    max_position: int
    eos_token_ids: tuple[int, ...]
    num_torch_threads: int
    recorded: Recorded | None
    arithmetic: str
    draft_layer: DraftLayer | None

    def layout(self, page_size: int) -> KvLayout:
        """A page with every state class of the whole model."""

    def rank_layout(self, page_size: int) -> KvLayout:
        """A page as this rank holds it."""

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """Write the state of the step's tokens into their pages and return logits float32 [R, vocab_size or more]
        of the sampled rows. `batch` is in host memory; `pool`, on the device, is uint8 [num_pages, page_bytes], laid
        out by `layout`, the rank's."""
