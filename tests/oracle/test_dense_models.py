"""Greedy tokens of dense models against transformers, float32."""

import random
from pathlib import Path

import pytest

from tests.oracle import driver, tiny_models

NUM_TOKENS = 24


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(3, 211), k=length)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
@pytest.mark.parametrize("length", [1, 7, 150])
def test_greedy_tokens_equal_transformers(variant: str, length: int, tmp_path: Path) -> None:
    oracle = tiny_models.write(variant, tmp_path)
    tokens = driver.generate(driver.load(tmp_path), prompt(length), NUM_TOKENS)
    assert tokens == tiny_models.greedy_tokens(oracle, prompt(length), NUM_TOKENS)


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 63])
def test_greedy_tokens_do_not_depend_on_the_chunks_of_the_prompt(chunk: int, tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path)
    executor = driver.load(tmp_path)
    whole = driver.generate(executor, prompt(100), NUM_TOKENS)
    assert driver.generate(executor, prompt(100), NUM_TOKENS, chunk) == whole


def test_greedy_tokens_do_not_depend_on_the_other_sequences_of_a_batch(tmp_path: Path) -> None:
    tiny_models.write("qwen3", tmp_path)
    executor = driver.load(tmp_path, num_pages=256)
    prompts = [prompt(length, seed=1) for length in (1, 2, 15, 16, 17, 40, 64, 90, 33, 5, 12, 150, 7)]
    alone = [driver.generate(executor, each, NUM_TOKENS) for each in prompts]
    assert driver.generate_together(executor, prompts, NUM_TOKENS) == alone


def test_a_sharded_checkpoint_equals_a_single_file(tmp_path: Path) -> None:
    tiny_models.write("llama", tmp_path / "single")
    tiny_models.write("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    tokens = [driver.generate(driver.load(tmp_path / name), prompt(20), NUM_TOKENS) for name in ("single", "sharded")]
    assert tokens[0] == tokens[1]
