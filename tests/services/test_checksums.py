"""Pages with checksums: what did not arrive as it left is found before it is used."""

from contextlib import aclosing

import pytest

from protos.forebay.v1 import prefill_pb2
from shared.engine.kv.checksum import page_checksums
from shared.engine.kv.layout import pack
from shared.engine.kv.memory import HostMemory
from tests.services.workers import Fleet, Running, generate, prompt, request, stream

LONG = 201
CORRUPT = {"reason": "CORRUPT_PAGES"}


@pytest.fixture
async def prefill(world: Fleet) -> Running:
    return await world.start("prefill", checksums=True)


async def test_whole_pages_pass_and_every_one_is_compared(world: Fleet, prefill: Running, decode: Running) -> None:
    asked = request(prompt(LONG), decode, prefill)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert world.measured("forebay_checked_pages_total", outcome="right") == 51
    assert world.measured("forebay_prefill_fallbacks_total", **CORRUPT) == 0


async def test_a_handoff_with_one_wrong_bit_is_discarded_and_named(
    world: Fleet, prefill: Running, decode: Running, caplog: pytest.LogCaptureFixture
) -> None:
    asked = request(prompt(LONG), decode, prefill)
    decode.transport.arrived = lambda page_ids: decode.spoil(page_ids[:1])
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert world.measured("forebay_checked_pages_total", outcome="corrupt", owner="prefill") >= 1
    assert world.measured("forebay_prefill_fallbacks_total", **CORRUPT) == 1
    assert "of prefill, epoch 1, arrived corrupt" in caplog.text
    for node in (prefill, decode):
        await node.idle()


async def test_pages_that_changed_at_their_owner_before_they_were_read_are_found(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill)
    prefill.transport.answer(False)
    async with aclosing(stream(world, asked)) as responses:
        tokens = list((await anext(responses)).tokens.token_ids)
        prefill.overwrite()
        prefill.transport.answer(True)
        async for response in responses:
            tokens += response.tokens.token_ids
    assert tokens == await world.expected(asked)
    assert world.measured("forebay_prefill_fallbacks_total", **CORRUPT) == 1


async def test_a_corrupt_prefix_is_computed_and_not_pulled(world: Fleet, prefill: Running, decode: Running) -> None:
    await generate(world, request(prompt(80), prefill))
    asked = request(prompt(120), decode, source=prefill)
    decode.transport.arrived = lambda page_ids: decode.spoil(page_ids[-1:])
    output = await generate(world, asked)
    assert output.tokens == await world.expected(asked)
    assert output.usage.num_cached_transferred == 0
    assert world.measured("forebay_checked_pages_total", outcome="corrupt", owner="prefill") == 1
    for node in (prefill, decode):
        await node.idle()


async def test_a_prefix_with_right_checksums_is_pulled(world: Fleet, prefill: Running, decode: Running) -> None:
    await generate(world, request(prompt(80), prefill))
    asked = request(prompt(120), decode, source=prefill)
    output = await generate(world, asked)
    assert (output.tokens, output.usage.num_cached_transferred) == (await world.expected(asked), 80)
    assert world.measured("forebay_checked_pages_total", outcome="right") == 20


async def test_a_manifest_with_too_few_checksums_is_refused(world: Fleet, prefill: Running, decode: Running) -> None:
    def tamper(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
        if response.HasField("pages_ready"):
            response.pages_ready.manifest.page_checksums.pop()
        return response

    prefill.prefill.tamper = tamper
    asked = request(prompt(LONG), decode, prefill)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert world.measured("forebay_prefill_fallbacks_total", reason="BAD_MANIFEST") == 1


async def test_a_worker_that_is_not_told_to_gives_no_checksums(world: Fleet, decode: Running) -> None:
    silent = await world.start("silent")
    await generate(world, request(prompt(LONG), decode, silent))
    assert world.measured("forebay_checked_pages_total", outcome="right") == 0


SIZES = {"kv": 256, "latent": 100, "indexer": 36, "scales": 4}


@pytest.mark.parametrize("name", SIZES)
def test_every_state_class_is_under_the_checksum(name: str) -> None:
    layout = pack(4, {each: (2, "uint8", size) for each, size in SIZES.items()})
    memory = HostMemory(2, layout.page_bytes)
    (state,) = (each for each in layout.state_classes if each.name == name)
    for place in (state.offset_bytes, state.offset_bytes + state.size_bytes - 1):
        before = page_checksums(memory, [0, 1])
        memory.page(1)[place] ^= 1
        assert page_checksums(memory, [0, 1])[0] == before[0]
        assert page_checksums(memory, [0, 1])[1] != before[1]
