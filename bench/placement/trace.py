"""The conversation trace published with Mooncake (FAST '25): lengths and which prompts share which blocks."""

import json
import random
from collections.abc import Iterable

from bench.placement.workloads import Conversation, Turn, token_ids

BLOCK_TOKENS = 512


def load(lines: Iterable[str], divide: int, speed: float, duration_s: float) -> list[Conversation]:
    """The requests that come within `duration_s`, if the trace runs `speed` times as fast, with lengths divided.

    Each line is JSON: `timestamp` in ms, `input_length` and `output_length` in tokens, `hash_ids`, one for each block
    of 512 tokens; prompts with equal ids begin with equal tokens. Raises ValueError if `divide` leaves no whole blocks.
    """
    block_tokens, rest = divmod(BLOCK_TOKENS, divide)
    if rest:
        raise ValueError(f"blocks of {BLOCK_TOKENS} tokens cannot be divided by {divide}")
    made = []
    for line in lines:
        asked = json.loads(line)
        starts_s = asked["timestamp"] / 1000 / speed
        if starts_s >= duration_s:
            break
        length = max(2, asked["input_length"] // divide)
        prompt = [token for block in asked["hash_ids"] for token in _block(block, block_tokens)][:length]
        made.append(Conversation(starts_s, (Turn(tuple(prompt), max(2, asked["output_length"] // divide)),)))
    return made


def _block(number: int, num_tokens: int) -> tuple[int, ...]:
    return token_ids(random.Random(f"block {number}"), num_tokens)
