"""Clusters whose workers are several ranks each, through four services, in float32, by token ids."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.engine.api import SamplingParams
from tests.e2e.cluster import HAND_OVER, RunningCluster, running
from tests.oracle import driver

PROMPT = [3 + token * 37 % 200 for token in range(150)]
NUM_TOKENS = 60
DEADLINE_S = 150.0
# The drafting layer of a random model is never right, unless few tokens are left to choose from.
FEW = dict.fromkeys((5, 6), 100.0)


async def stream(cluster: RunningCluster, amid: Callable[[], None] | None = None, **fields: Any) -> list[int]:
    """The tokens of the prompt; `amid` happens after the first ones."""
    tokens: list[int] = []
    body = {"model": cluster.model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True} | fields
    async with (
        httpx.AsyncClient(base_url=cluster.url, timeout=DEADLINE_S) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    tokens += choice.get("token_ids") or []
                if tokens and amid is not None:
                    amid()
                    amid = None
    return tokens


@pytest.fixture(scope="module")
def expected(glm: Path) -> list[int]:
    """What the bare model says, greedily."""
    return driver.generate(driver.load(glm), PROMPT, NUM_TOKENS)


@pytest.fixture(scope="module")
def cluster(glm: Path) -> Iterator[RunningCluster]:
    """A worker of each kind of two ranks; one that is lost is waited for, however slowly its ranks start."""
    patient = f"--gateway-flags=--recovery-wait-ms {int(DEADLINE_S * 1000)}"
    flags = ["--model", str(glm), "--dtype", "float32", "--tp", "2", "--deadline", str(DEADLINE_S)]
    drafting = "--worker-flags=--num-pages 64 --num-draft-tokens 2 --no-adaptive-drafts"
    with running(*flags, drafting, HAND_OVER, patient) as cluster:
        yield cluster


async def test_a_prompt_handed_over_in_a_cluster_of_ranks_gets_the_tokens_of_the_bare_model(
    cluster: RunningCluster, glm: Path, expected: list[int]
) -> None:
    assert await stream(cluster) == expected
    drawn = await stream(cluster, temperature=0.9, seed=7, logit_bias=FEW)
    await cluster.until(lambda rows: rows["prefill-0"]["pages"]["cached"] >= len(PROMPT) // 16)
    await cluster.until_measured("decode-0", "forebay_drafts_accepted_total", lambda num: num > 0)
    rows = await cluster.status()
    assert [len(rows[name]["rank_pids"]) for name in ("decode-0", "prefill-0")] == [1, 1]
    sampling = SamplingParams(temperature=0.9, seed=7, logit_bias=tuple(FEW.items()))
    assert drawn == driver.generate(driver.load(glm), PROMPT, NUM_TOKENS, sampling=sampling)


async def test_a_rank_killed_amid_an_output_costs_no_token(cluster: RunningCluster, expected: list[int]) -> None:
    (rank,) = (await cluster.status())["decode-0"]["rank_pids"]
    tokens = await stream(cluster, lambda: os.kill(rank, signal.SIGKILL))
    assert (await cluster.status())["decode-0"]["num_restarts"] == 1
    assert tokens == expected
