"""A long prompt in one engine: memory grows by pages and a step, and the last tokens are those of a direct computation.
`tests/e2e/test_long_context.py` takes a longer one through all services."""

import json
import subprocess
import sys
from pathlib import Path

from tests.memory import MIB, only_where_it_is_told
from tests.oracle import long_context

NUM_TOKENS = 32_768
TIMEOUT_S = 200
# A chunk's scores of all tokens would take 128 MiB.
SLACK_MIB = 64


@only_where_it_is_told
def test_a_long_prompt_takes_its_pages_and_little_more_and_gets_the_right_tokens(tmp_path: Path) -> None:
    long_context.write(tmp_path)
    command = [sys.executable, "-m", "tests.oracle.long_context", str(tmp_path), str(NUM_TOKENS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["grown"] <= found["pool"] + SLACK_MIB * MIB
    long_context.check_tokens(tmp_path, NUM_TOKENS, found["tokens"])
