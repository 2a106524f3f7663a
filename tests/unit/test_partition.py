"""Which part of each tensor a rank holds."""

from dataclasses import replace
from typing import Any

import pytest

from shared.engine.models import config as dense_config
from shared.engine.models import dense_shapes, glm_config, glm_shapes, tiny
from shared.engine.parallel.partition import ExpertSplit, Part, Shard, of_dense, of_glm
from shared.errors import Unsupported

LLAMA = dense_config.parse(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 211,
        "hidden_size": 96,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "mlp_bias": True,
    }
)
GLM = glm_config.parse(tiny.GLM_52)


def covered(parts: list[Part | None], shape: tuple[int, ...]) -> bool:
    """Whether every index of a tensor is in exactly one rank's part, or all of it in every rank's."""
    found = [part for part in parts if part is not None]
    if not found:
        return True
    indices = [index for part in found for index in range(part.start, part.start + part.length)]
    return len(found) == len(parts) and indices == list(range(shape[found[0].dim]))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_hold_every_weight_of_a_glm_once_or_all_of_them(num_ranks: int) -> None:
    owners = [of_glm(GLM, Shard(rank, num_ranks, "matrices"))[1] for rank in range(num_ranks)]
    for name, shape in glm_shapes.shapes(GLM).items():
        assert covered([part_of(name) for part_of in owners], shape), name


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_hold_every_weight_of_a_dense_decoder_once_or_all_of_them(num_ranks: int) -> None:
    owners = [of_dense(LLAMA, Shard(rank, num_ranks))[1] for rank in range(num_ranks)]
    for name, shape in dense_shapes.shapes(LLAMA).items():
        assert covered([part_of(name) for part_of in owners], shape), name


@pytest.mark.parametrize("total", [8, 10, 3])
def test_shares_are_consecutive_and_leave_nothing_out(total: int) -> None:
    assert [index for rank in range(4) for index in Shard(rank, 4).share(total)] == list(range(total))


def test_each_expert_is_whole_on_one_rank_or_sliced_on_all() -> None:
    whole = [Shard(rank, 4, "experts").experts(8) for rank in range(4)]
    assert [list(experts) for experts in whole] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(Shard(3, 4, "matrices").experts(8)) == list(range(8))
    name = "model.layers.5.mlp.experts.3.down_proj.weight"
    splits: list[tuple[ExpertSplit, Part | None]] = [("experts", None), ("matrices", Part(1, 14, 14))]
    for split, part in splits:
        assert of_glm(GLM, Shard(1, 4, split))[1](name) == part


def test_fewer_kv_heads_than_ranks_are_on_several() -> None:
    assert [list(Shard(rank, 4).kv_heads(2)) for rank in range(4)] == [[0], [0], [1], [1]]
    share, part_of = of_dense(LLAMA, Shard(1, 4))
    assert (share.num_heads, share.num_kv_heads) == (2, 1)
    assert part_of("model.layers.0.self_attn.k_proj.weight") == Part(0, 0, 32)


def test_a_bias_behind_a_sum_over_ranks_is_whole_on_each() -> None:
    assert of_dense(LLAMA, Shard(1, 2))[1]("model.layers.0.self_attn.o_proj.bias") is None


def test_latents_and_selections_are_everywhere() -> None:
    _, part_of = of_glm(GLM, Shard(1, 4))
    for name in ("kv_a_proj_with_mqa", "q_a_proj", "indexer.wq_b", "indexer.wk", "indexer.weights_proj"):
        assert part_of(f"model.layers.0.self_attn.{name}.weight") is None


@pytest.mark.parametrize(
    ("config", "num_ranks", "message"),
    [
        (LLAMA, 3, "8 attention heads"),
        (replace(LLAMA, num_heads=12, num_kv_heads=3), 2, "3 KV heads"),
        (GLM, 8, "4 attention heads"),
        (replace(GLM, num_experts=2), 4, "2 experts"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(config: Any, num_ranks: int, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        (of_glm if config.__class__ is GLM.__class__ else of_dense)(config, Shard(num_ranks - 1, num_ranks))
