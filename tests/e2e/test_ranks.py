"""Clusters whose workers are several ranks each, through four services, in float32, by token ids."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from shared.engine.api import SamplingParams
from shared.engine.models import tiny
from tests.e2e.cluster import HAND_OVER, RunningCluster, running
from tests.oracle import driver

PROMPT = [3 + token * 37 % 200 for token in range(150)]
NUM_TOKENS = 300
DEADLINE_S = 150.0


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


def flags_for(path: Path, *flags: str) -> list[str]:
    fixed = ["--model", str(path), "--dtype", "float32", "--tp", "2", "--deadline", str(DEADLINE_S)]
    return [*fixed, "--worker-flags=--num-pages 64 --num-draft-tokens 2 --no-adaptive-drafts", *flags]


async def test_a_prompt_handed_over_in_a_cluster_of_ranks_gets_the_tokens_of_the_bare_model(tmp_path: Path) -> None:
    """Greedy, and sampled from so few tokens that the drafting layer of a random model is right now and then."""
    tiny.write("glm-5.2", tmp_path / "glm")
    few = dict.fromkeys((5, 6, 7), 100.0)
    with running(*flags_for(tmp_path / "glm", HAND_OVER)) as cluster:
        tokens = await stream(cluster)
        drawn = await stream(cluster, temperature=0.9, seed=7, logit_bias=few)
        await cluster.until(lambda rows: rows["prefill-0"]["pages"]["cached"] >= len(PROMPT) // 16)
        rows = await cluster.status()
        assert await cluster.measured("decode-0", "forebay_drafts_accepted_total") > 0
    assert [len(rows[name]["rank_pids"]) for name in ("decode-0", "prefill-0")] == [1, 1]
    executor = driver.load(tmp_path / "glm")
    assert tokens == driver.generate(executor, PROMPT, NUM_TOKENS)
    sampling = SamplingParams(temperature=0.9, seed=7, logit_bias=tuple(few.items()))
    assert drawn == driver.generate(executor, PROMPT, NUM_TOKENS, sampling=sampling)


async def test_a_rank_killed_amid_an_output_costs_no_token(tmp_path: Path) -> None:
    """Of a GLM that selects 8 of the visible tokens, and drafts."""
    tiny.write("glm-5.2", tmp_path / "glm")
    # The one worker comes back in time, however slowly its ranks start.
    patient = f"--gateway-flags=--recovery-wait-ms {int(DEADLINE_S * 1000)}"
    with running(*flags_for(tmp_path / "glm", "--prefill", "0", patient)) as cluster:
        (rank,) = (await cluster.status())["decode-0"]["rank_pids"]
        tokens = await stream(cluster, lambda: os.kill(rank, signal.SIGKILL))
        assert (await cluster.status())["decode-0"]["num_restarts"] == 1
    assert tokens == driver.generate(driver.load(tmp_path / "glm"), PROMPT, NUM_TOKENS)
