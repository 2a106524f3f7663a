"""Spans copied out of staged pages: in host memory by numpy, on a device by torch (here on the CPU), the same."""

import random

import pytest
import torch

from shared.engine.kv.layout import Span
from shared.engine.kv.memory import HostMemory, PoolMemory
from shared.engine.kv.view import DeviceMemory, pool_bytes

NUM_PAGES, PAGE_BYTES, STAGED_BYTES, PAGES = 6, 960, 1440, [4, 0, 5]


def staged() -> HostMemory:
    made = HostMemory(NUM_PAGES, STAGED_BYTES)
    for page_id in range(NUM_PAGES):
        made.page(page_id)[:] = random.Random(page_id).randbytes(STAGED_BYTES)
    return made


def scattered(memory: PoolMemory, spans: list[Span]) -> list[bytes]:
    source, buffer = staged(), memory.another(NUM_PAGES, STAGED_BYTES)
    pool_bytes(buffer).copy_(pool_bytes(source))
    memory.scatter(buffer, spans)(PAGES)
    return [bytes(memory.page(page_id)) for page_id in range(NUM_PAGES)]


@pytest.mark.parametrize("word", [8, 4, 2, 1, 24])
def test_spans_of_any_alignment_come_to_their_places_in_both_kinds_of_memory(word: int) -> None:
    spans = [Span(0, 3 * word, 5 * word), Span(6 * word, 20 * word, 4 * word), Span(10 * word, 0, word)]
    expected = [bytearray(PAGE_BYTES) for _ in range(NUM_PAGES)]
    for place, page_id in enumerate(PAGES):
        for span in spans:
            came = bytes(staged().page(place)[span.remote : span.remote + span.num_bytes])
            expected[page_id][span.local : span.local + span.num_bytes] = came
    device = DeviceMemory(NUM_PAGES, PAGE_BYTES, torch.device("cpu"))
    for memory in (HostMemory(NUM_PAGES, PAGE_BYTES), device):
        assert scattered(memory, spans) == expected
