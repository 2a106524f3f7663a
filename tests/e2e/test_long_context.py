"""131,072 tokens through four services: computed by the prefill worker, handed over, continued by the decode worker.
Neither takes more than its pages and a chunk; the tokens are those of a direct computation in float64, which one engine
alone is held to as well (`tests/oracle/test_long_context.py`)."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import RunningCluster, running
from tests.e2e.integrity import measures_at
from tests.memory import MIB, Memory, only_where_it_is_told
from tests.oracle import long_context
from tests.oracle.long_context import CHUNK, NUM_OUTPUT, PAGE_SIZE

NUM_TOKENS, TIMEOUT_S = 131_072, 600
NUM_PAGES = NUM_TOKENS // PAGE_SIZE + 3 * CHUNK // PAGE_SIZE
# Beside its pages. A chunk's scores of all tokens would take 512 MiB, a second copy of the pages 24.
SLACK_MIB = {"prefill-0": 64, "decode-0": 20}


async def complete(cluster: RunningCluster, prompt: list[int]) -> dict[str, Any]:
    body = {"model": cluster.model, "prompt": prompt, "max_tokens": NUM_OUTPUT, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    async with httpx.AsyncClient(base_url=cluster.url, timeout=TIMEOUT_S) as http:
        answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@only_where_it_is_told
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
async def test_131072_tokens_are_handed_over_within_the_memory_of_their_pages_and_a_chunk(tmp_path: Path) -> None:
    long_context.write(tmp_path)
    flags = f"--worker-flags=--num-pages {NUM_PAGES} --max-step-tokens {CHUNK}"
    handed_over = f"--router-flags=--remote-prefill-min-tokens {CHUNK}"
    with running("--model", str(tmp_path), "--dtype", "float32", flags, handed_over) as cluster:
        await complete(cluster, long_context.prompt(2 * CHUNK)[::-1])  # what first steps take, both have taken
        rows = await cluster.status()
        memory = {name: Memory(rows[name]["pid"]) for name in SLACK_MIB}
        before = measures_at(rows["decode-0"]["metrics_address"])
        answer = await complete(cluster, long_context.prompt(NUM_TOKENS))
        grown = {name: watched.grown() for name, watched in memory.items()}
        after = measures_at(rows["decode-0"]["metrics_address"])
    long_context.check_tokens(tmp_path, NUM_TOKENS, answer["choices"][0]["token_ids"])
    pages_bytes = NUM_TOKENS * after["forebay_kv_bytes_per_token"]
    assert after["forebay_transfer_bytes_total"] - before["forebay_transfer_bytes_total"] == pages_bytes
    for name, slack in SLACK_MIB.items():
        assert grown[name] <= pages_bytes + slack * MIB, grown
