"""131,072 tokens: memory grows by pages and a step, and the last tokens are those of a direct computation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import long_context
from tests.oracle.long_context import CHUNK, NUM_OUTPUT, Twin

NUM_TOKENS, MIB = 131_072, 1 << 20
TIMEOUT_S = 600
# A chunk's scores of all tokens would take 512 MiB, and a mask of them a quarter of it.
SLACK_MIB = 64


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_prompt_of_131072_tokens_takes_its_pages_and_little_more_and_gets_the_right_tokens(tmp_path: Path) -> None:
    long_context.write(tmp_path)
    command = [sys.executable, "-m", "tests.oracle.long_context", str(tmp_path), str(NUM_TOKENS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["grown"] <= found["pool"] + SLACK_MIB * MIB
    tokens = [*long_context.prompt(NUM_TOKENS), *found["tokens"]]
    twin = Twin(tmp_path, tokens)
    rows = range(NUM_TOKENS - 1, NUM_TOKENS - 1 + NUM_OUTPUT)
    assert [int(twin.logits(row).argmax()) for row in rows] == found["tokens"]
    oldest = [int(twin.selection(row)[0]) for row in rows]
    assert max(oldest) < NUM_TOKENS - CHUNK, "the newest tokens alone mattered: the prompt shows nothing"
