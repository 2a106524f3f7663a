"""What a model is to the executor: a pure function of a step and the paged state."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from shared.engine.batch import Batch
from shared.engine.kernels.build import default_cache_dir
from shared.engine.kv.layout import KvLayout


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model computes. `kernels` names a kernel set, or is "auto" for the best that fits; `cache_dir`
    keeps compiled ones."""

    dtype: torch.dtype
    num_threads: int
    kernels: str = "auto"
    cache_dir: Path = field(default_factory=default_cache_dir)


class Model(Protocol):
    """A loaded model."""

    vocab_size: int
    max_position: int
    eos_token_ids: tuple[int, ...]

    def layout(self, page_size: int) -> KvLayout:
        """A page with every state class of the model."""

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """Write the state of the step's tokens into their pages and return logits float32 [R, vocab_size] of the
        sampled rows. `pool` is uint8 [num_pages, page_bytes]."""
