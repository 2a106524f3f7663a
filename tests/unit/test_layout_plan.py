"""What a rank reads from which rank of a peer, whatever the numbers of ranks on both sides."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared.engine.kv.layout import KvLayout, Span, pack
from shared.engine.parallel.partition import Shard
from shared.engine.transfer.layout_plan import Reader, Take, plan
from shared.errors import Incompatible

NUM_LAYERS, NUM_HEADS, HEAD_BYTES = 3, 4, 8
LATENTS = pack(16, {"mla_latent": (7, "float32", 4480), "indexer_keys": (4, "float32", 1024)})


def layout(heads: range) -> KvLayout:
    size = NUM_LAYERS * 2 * len(heads) * HEAD_BYTES
    return pack(16, {"latent": (2, "float32", 128), "kv": (NUM_LAYERS, "float32", size)}, heads={"kv": heads})


def layouts(num_ranks: int) -> list[KvLayout]:
    return [layout(Shard(rank, num_ranks).kv_heads(NUM_HEADS)) for rank in range(num_ranks)]


def page(own: KvLayout) -> bytearray:
    """A page in which each byte of keys and values says which head and row it is of: a row for each layer and kind."""
    latent, kv = own.state_classes
    made = bytearray(own.page_bytes)
    made[: latent.size_bytes] = bytes(index % 251 for index in range(latent.size_bytes))
    heads = range(kv.first_head, kv.first_head + kv.num_heads)
    rows = [(row * NUM_HEADS + head) % 256 for head in heads for row in range(NUM_LAYERS * 2)]
    made[kv.offset_bytes : kv.offset_bytes + kv.size_bytes] = bytes(value for value in rows for _ in range(HEAD_BYTES))
    return made


def read(own: KvLayout, takes: Sequence[Take], theirs: Sequence[KvLayout]) -> bytearray:
    """Our page, after a transport did what the plan says."""
    got = bytearray(own.page_bytes)
    for take in takes:
        source = page(theirs[take.rank])
        spans = take.slices.spans if take.slices else (Span(0, 0, own.page_bytes),)
        for span in spans:
            got[span.local : span.local + span.num_bytes] = source[span.remote : span.remote + span.num_bytes]
    return got


@pytest.mark.parametrize("num_theirs", [1, 2, 4, 8])
@pytest.mark.parametrize("num_ours", [1, 2, 4, 8])
def test_every_rank_gets_every_byte_of_its_page(num_ours: int, num_theirs: int) -> None:
    theirs = layouts(num_theirs)
    for rank, own in enumerate(layouts(num_ours)):
        assert read(own, plan(own, theirs, Reader(rank, num_ours, salt=3)), theirs) == page(own)


@pytest.mark.parametrize("must_stage", [False, True])
def test_parts_of_pages_are_staged_where_there_are_checksums(must_stage: bool) -> None:
    for take in plan(layouts(2)[0], layouts(1), Reader(0, 2, must_stage=must_stage)):
        assert take.slices is not None
        assert take.slices.staged is must_stage
    assert plan(layouts(2)[0], layouts(2), Reader(0, 2, must_stage=must_stage)) == (Take(0),)


def test_equal_numbers_of_ranks_read_whole_pages_one_to_one() -> None:
    for ranks in (layouts(2), [LATENTS] * 4):
        for rank, own in enumerate(ranks):
            assert plan(own, ranks, Reader(rank, len(ranks), salt=5)) == (Take(rank),)


def test_workers_of_fewer_ranks_spread_over_the_ranks_that_have_the_same() -> None:
    sources = {plan(LATENTS, [LATENTS] * 4, Reader(rank, 2, salt))[0].rank for rank in range(2) for salt in range(2)}
    assert sources == {0, 1, 2, 3}


def test_a_worker_of_one_rank_gathers_the_heads_of_all() -> None:
    takes = plan(layouts(1)[0], layouts(4), Reader())
    assert [take.rank for take in takes] == [0, 1, 2, 3]


def of_8b(heads: range) -> KvLayout:
    """A page of some heads of an 8B model: a whole one, of 8, takes 2 MiB."""
    return pack(16, {"kv": (32, "bfloat16", len(heads) << 18)}, heads={"kv": heads})


@pytest.mark.parametrize("num_theirs", [1, 2, 4, 8])
@pytest.mark.parametrize("num_ours", [1, 2, 4, 8])
def test_all_that_a_rank_takes_of_a_page_is_one_span(num_ours: int, num_theirs: int) -> None:
    """Keys and values of all layers: were they layer by layer, half the heads would be 64 spans."""
    theirs = [of_8b(Shard(rank, num_theirs).kv_heads(8)) for rank in range(num_theirs)]
    for rank in range(num_ours):
        for take in plan(of_8b(Shard(rank, num_ours).kv_heads(8)), theirs, Reader(rank, num_ours)):
            assert take.slices is None or len(take.slices.spans) == 1


def test_ranks_that_lack_what_we_need_are_refused() -> None:
    own = layouts(1)[0]
    other = pack(16, {"latent": (2, "bfloat16", 128)})
    small = replace(own, state_classes=(replace(own.state_classes[0], size_bytes=64), own.state_classes[1]))
    for theirs in ([other], layouts(2)[:1], [small], [LATENTS], [replace(own, page_size=32)]):
        with pytest.raises(Incompatible):
            plan(own, theirs, Reader())
