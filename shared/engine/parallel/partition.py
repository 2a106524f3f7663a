"""Which part of each tensor a rank holds: pure functions of a configuration and a rank.

Columns and rows as in Megatron-LM (Shoeybi et al. 2019, section 3): what makes heads, the inner dimension of an MLP or
vocabulary is cut along its outputs, what consumes them along its inputs, so one sum over ranks ends each block. What
is small and feeds every head is on every rank: norms, the low-rank projections, the indexer, the expert router.

A rank's share of a model is a smaller model: `of_dense` and `of_glm` say which, and the layers do not know the rest.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from shared.engine.models.config import DenseConfig
from shared.engine.models.glm_config import GlmConfig
from shared.errors import Unsupported

# Routed experts: each on one rank, or a slice of every one on every rank.
ExpertSplit = Literal["experts", "matrices"]

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Part:
    """Indices [start, start + length) of dimension `dim` of a tensor."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's place among those that compute a model together."""

    rank: int = 0
    num_ranks: int = 1
    expert_split: ExpertSplit = "experts"

    def share(self, total: int) -> range:
        """This rank's share of `total` things: consecutive, equal but for the last ones, which may be smaller."""
        size = -(-total // self.num_ranks)
        return range(min(self.rank * size, total), min((self.rank + 1) * size, total))

    def kv_heads(self, total: int) -> range:
        """This rank's KV heads. Fewer heads than ranks: several ranks have the same one."""
        if total >= self.num_ranks:
            return self.share(total)
        head = self.rank * total // self.num_ranks
        return range(head, head + 1)

    def experts(self, total: int) -> range:
        """The routed experts of which this rank holds anything."""
        return self.share(total) if self.expert_split == "experts" else range(total)


# The part of a tensor by its name in the checkpoint; None is all of it.
PartOf = Callable[[str], Part | None]


def of_dense(config: DenseConfig, shard: Shard) -> tuple[DenseConfig, PartOf]:
    """The rank's share of a dense decoder, and where its weights are. Raises Unsupported if it cannot be shared out."""
    _require_even_heads(config.num_heads, shard)
    if max(config.num_kv_heads, shard.num_ranks) % min(config.num_kv_heads, shard.num_ranks):
        raise Unsupported(f"{config.num_kv_heads} KV heads cannot be shared out evenly to {shard.num_ranks} ranks")
    kv_heads, inner = shard.kv_heads(config.num_kv_heads), shard.share(config.intermediate_size)
    queries = _wide(shard.share(config.num_heads), config.head_dim)
    keys = _wide(kv_heads, config.head_dim)
    parts = _vocabulary(config.vocab_size, shard) | _mlp(inner)
    parts |= {"q_proj": (0, queries), "k_proj": (0, keys), "v_proj": (0, keys), "o_proj": (1, queries)}
    share = replace(
        config,
        num_heads=config.num_heads // shard.num_ranks,
        num_kv_heads=len(kv_heads),
        intermediate_size=len(inner),
    )
    return share, lambda name: _part(name, parts)


def of_glm(config: GlmConfig, shard: Shard) -> tuple[GlmConfig, PartOf]:
    """The rank's share of a GLM-5 decoder, as `of_dense`. Experts and their router are configured as in the whole."""
    _require_even_heads(config.num_heads, shard)
    heads = shard.share(config.num_heads)
    up = config.qk_nope_head_dim + config.v_head_dim
    attention = {
        "q_b_proj": (0, _wide(heads, config.qk_head_dim)),
        "kv_b_proj": (0, _wide(heads, up)),
        "o_proj": (1, _wide(heads, config.v_head_dim)),
    }
    if not shard.experts(config.num_experts):
        raise Unsupported(f"{config.num_experts} experts cannot be shared out to {shard.num_ranks} ranks")
    inner = shard.share(config.intermediate_size)
    dense = _vocabulary(config.vocab_size, shard) | attention | _mlp(inner)
    shared = _mlp(shard.share(config.moe_intermediate_size * config.num_shared_experts))
    routed = _mlp(shard.share(config.moe_intermediate_size)) if shard.expert_split == "matrices" else {}

    def part_of(name: str) -> Part | None:
        kind = routed if EXPERT.search(name) else shared if ".shared_experts." in name else dense
        return _part(name, kind)

    share = replace(config, num_heads=len(heads), intermediate_size=len(inner))
    return share, part_of


Parts = dict[str, tuple[int, range]]


def _vocabulary(vocab_size: int, shard: Shard) -> Parts:
    rows = shard.share(vocab_size)
    return {"embed_tokens": (0, rows), "lm_head": (0, rows)}


def _mlp(inner: range) -> Parts:
    return {"gate_proj": (0, inner), "up_proj": (0, inner), "down_proj": (1, inner)}


def _wide(heads: range, dim: int) -> range:
    """The rows of some heads, `dim` each."""
    return range(heads.start * dim, heads.stop * dim)


def _part(name: str, parts: Parts) -> Part | None:
    *_, module, kind = name.split(".")
    if module not in parts:
        return None
    dim, indices = parts[module]
    if kind == "bias" and dim == 1:  # added once, behind the sum over ranks
        return None
    return Part(dim, indices.start, len(indices))


def _require_even_heads(num_heads: int, shard: Shard) -> None:
    if num_heads % shard.num_ranks:
        raise Unsupported(f"{num_heads} attention heads cannot be shared out evenly to {shard.num_ranks} ranks")
