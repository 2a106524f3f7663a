"""What a rank reads from which rank of a peer, whatever the numbers of ranks on both sides."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared.engine.kv.layout import KvLayout, Span, pack
from shared.engine.parallel.partition import Shard
from shared.engine.transfer.layout_plan import COSTS, SHARED_MEMORY, Costs, Reader, Slices, Take, plan
from shared.errors import Incompatible

NUM_LAYERS, NUM_HEADS, HEAD_BYTES = 3, 4, 8
SLICED, STAGED = (replace(SHARED_MEMORY, descriptor_us=cost) for cost in (0.0, 1e6))
LATENTS = pack(16, {"mla_latent": (7, "float32", 4480), "indexer_keys": (4, "float32", 1024)})


def layout(heads: range) -> KvLayout:
    size = NUM_LAYERS * 2 * len(heads) * HEAD_BYTES
    return pack(16, {"latent": (2, "float32", 128), "kv": (NUM_LAYERS, "float32", size)}, heads={"kv": heads})


def layouts(num_ranks: int) -> list[KvLayout]:
    return [layout(Shard(rank, num_ranks).kv_heads(NUM_HEADS)) for rank in range(num_ranks)]


def page(own: KvLayout) -> bytearray:
    """A page in which each byte of keys and values says which head and row it is of."""
    latent, kv = own.state_classes
    made = bytearray(own.page_bytes)
    made[: latent.size_bytes] = bytes(index % 251 for index in range(latent.size_bytes))
    heads = range(kv.first_head, kv.first_head + kv.num_heads)
    rows = [(row * NUM_HEADS + head) % 256 for row in range(NUM_LAYERS * 2) for head in heads]
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


@pytest.mark.parametrize("costs", [SLICED, STAGED])
def test_pages_with_checksums_are_staged_whatever_that_costs(costs: Costs) -> None:
    for take in plan(layouts(2)[0], layouts(1), Reader(0, 2, must_stage=True), costs):
        assert take.slices is not None
        assert take.slices.staged
    assert plan(layouts(2)[0], layouts(2), Reader(0, 2, must_stage=True), costs) == (Take(0),)


def test_equal_numbers_of_ranks_read_whole_pages_one_to_one() -> None:
    for ranks in (layouts(2), [LATENTS] * 4):
        for rank, own in enumerate(ranks):
            assert plan(own, ranks, Reader(rank, len(ranks), salt=5)) == (Take(rank),)


def test_workers_of_fewer_ranks_spread_over_the_ranks_that_have_the_same() -> None:
    sources = {plan(LATENTS, [LATENTS] * 4, Reader(rank, 2, salt))[0].rank for rank in range(2) for salt in range(2)}
    assert sources == {0, 1, 2, 3}


def test_a_worker_of_one_rank_gathers_the_heads_of_all() -> None:
    takes = plan(layouts(1)[0], layouts(4), Reader(), SLICED)
    assert [take.rank for take in takes] == [0, 1, 2, 3]


def test_neighbouring_spans_are_one() -> None:
    (take,) = plan(layouts(2)[1], layouts(1), Reader(1, 2), SLICED)
    assert take.slices is not None
    kv = [span for span in take.slices.spans if span.num_bytes == 2 * HEAD_BYTES]
    assert len(kv) == NUM_LAYERS * 2


@pytest.mark.parametrize(("costs", "staged"), [(SLICED, False), (STAGED, True)])
def test_pages_are_staged_where_descriptors_are_dear(costs: Costs, staged: bool) -> None:
    (take,) = plan(layouts(2)[0], layouts(1), Reader(0, 2), costs)
    assert isinstance(take.slices, Slices)
    assert take.slices.staged is staged


def of_8b(heads: range) -> KvLayout:
    """A page of some heads of an 8B model: a whole one, of 8, takes 2 MiB."""
    return pack(16, {"kv": (32, "bfloat16", len(heads) << 18)}, heads={"kv": heads})


@pytest.mark.parametrize(("kind", "staged"), [("DRAM", False), ("VRAM", True)])
def test_half_the_heads_of_an_8b_model_are_sliced_in_shared_memory_and_staged_between_gpus(
    kind: str, staged: bool
) -> None:
    """64 spans of 16 KiB: a GPU copies each as slowly as it copies a whole page."""
    (take,) = plan(of_8b(range(4)), [of_8b(range(8))], Reader(0, 2), COSTS.get((kind, kind), SHARED_MEMORY))
    assert take.slices is not None
    assert (len(take.slices.spans), take.slices.staged) == (64, staged)


def test_ranks_that_lack_what_we_need_are_refused() -> None:
    own = layouts(1)[0]
    other = pack(16, {"latent": (2, "bfloat16", 128)})
    small = replace(own, state_classes=(replace(own.state_classes[0], size_bytes=64), own.state_classes[1]))
    for theirs in ([other], layouts(2)[:1], [small], [LATENTS], [replace(own, page_size=32)]):
        with pytest.raises(Incompatible):
            plan(own, theirs, Reader())
