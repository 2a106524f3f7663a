"""Drafts that are verified and proposed where they are computed: its twin is the drafter that hears of every token."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.engine.api import BatchItem, Chosen, SamplingParams, awaited
from shared.engine.batch import Batch, build
from shared.engine.kv.layout import pack
from shared.engine.models.api import DraftStep
from shared.engine.sampling.batched import BatchedSampler
from shared.engine.sampling.sampler import Sampler
from shared.engine.speculation.late import DraftedStep, LateDrafter, verify
from shared.engine.speculation.mtp import MtpDrafter
from tests.unit.interpreted import assert_says, needs_triton

VOCAB, PAGE_SIZE = 7, 4
LAYOUT = pack(PAGE_SIZE, {})
SAMPLER, LATE = Sampler(VOCAB, ()), BatchedSampler(VOCAB, ())
TABLE = torch.randn(200, 11, VOCAB, generator=torch.Generator().manual_seed(3))


class Layer:
    """Its logits depend on the token, its position, and the state that it is shown there."""

    def forward(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the executor runs the model")

    def extend(self, batch: Batch, states: torch.Tensor, *_: Any) -> DraftStep:
        assert len(states) == batch.num_tokens
        return self._step(batch, states, batch.sampled_rows)

    def advance(self, batch: Batch, last: DraftStep, going_on: Sequence[int], *_: Any) -> DraftStep:
        assert (batch.context_lens == batch.positions + 1).all()
        return self._step(batch, last.states[list(going_on)], torch.arange(batch.num_tokens))

    def _step(self, batch: Batch, states: torch.Tensor, rows: torch.Tensor) -> DraftStep:
        found = (states[:, 0] + 1 + batch.token_ids)[rows]
        return DraftStep(TABLE[batch.positions[rows].long(), (found % 11).long()], found[:, None], [])


def a_step(chance: random.Random) -> list[BatchItem]:
    """Parts of every kind: chunks of prompts, their ends, decodes and verifications of drafts."""
    items = []
    for number in range(chance.randrange(1, 6)):
        num_tokens, start = chance.choice([1, 1, 3]), chance.randrange(40)
        sample = num_tokens == 1 or chance.random() < 0.6
        num_drafts = chance.randrange(4) * sample
        sampling = SamplingParams(temperature=chance.choice([0.0, 1.0]), seed=chance.randrange(5))
        if chance.random() < 0.3:
            sampling = replace(sampling, num_logprobs=2)
        items.append(
            BatchItem(
                str(number), chance.choices(range(VOCAB), k=num_tokens + num_drafts), start, range(20), sample,
                sampling, 0, (), num_drafts, chance.randrange(4) * sample, following=None if sample else 5,
            )
        )  # fmt: skip
    return items


def logits_of(items: Sequence[BatchItem]) -> torch.Tensor:
    """Of few tokens, so that drafts are right now and then; a row depends on its position."""
    rows = [TABLE[each.position + row, 0] for each in items if each.sample for row in range(1 + each.num_drafts)]
    return torch.stack(rows) if rows else torch.empty(0, VOCAB)


def by_the_host(items: Sequence[BatchItem], states: torch.Tensor) -> list[Chosen | None]:
    each = iter(SAMPLER(logits_of(items), [item for item in items if item.sample]))
    tokens = [next(each) if item.sample else None for item in items]
    return MtpDrafter(Layer(), SAMPLER, LAYOUT)(items, tokens, states, torch.empty(0))


@pytest.mark.parametrize("seed", range(60))
def test_tokens_and_drafts_are_those_that_the_host_would_have_found(seed: int) -> None:
    items = a_step(random.Random(seed))
    step = build(items, PAGE_SIZE)
    states = torch.arange(step.num_tokens)[:, None]
    choice = LATE.launch(logits_of(items), [item for item in items if item.sample])
    found = LateDrafter(Layer(), LATE, LAYOUT)(items, step, choice.tokens, None, states, torch.empty(0))
    assert DraftedStep(items, choice.send(*found)).chosen() == by_the_host(items, states)


@pytest.mark.parametrize("seed", range(60))
def test_nor_do_they_depend_on_whether_the_host_knows_where_a_part_starts(seed: int) -> None:
    """As far as the host knows, parts start where they would if no draft before them had been right."""
    chance = random.Random(seed)
    items = [item for item in a_step(chance) if item.sample]
    by = [chance.randrange(min(3, item.start) + 1) for item in items]
    step = build(items, PAGE_SIZE)
    states = torch.arange(step.num_tokens)[:, None]
    least = [replace(each, start=each.start - more, num_in_doubt=3) for each, more in zip(items, by, strict=True)]
    moved = torch.tensor(by, dtype=torch.int64)
    late = build(least, PAGE_SIZE).moved_on(moved, [3] * len(items))
    assert (late.positions.tolist(), late.context_lens.tolist()) == (
        step.positions.tolist(), step.context_lens.tolist(),
    )  # fmt: skip
    choice = LATE.launch(logits_of(items), least, None, moved)
    found = LateDrafter(Layer(), LATE, LAYOUT)(least, late, choice.tokens, moved, states, torch.empty(0))
    assert DraftedStep(least, choice.send(*found)).chosen() == by_the_host(items, states)


def test_a_draft_behind_a_wrong_one_counts_for_nothing() -> None:
    item = BatchItem("r", [9, 1, 2, 3], 0, range(4), True, SamplingParams(), 0, (), 3)
    step = build([item, replace(item, token_ids=[9, 1], num_drafts=1), replace(item, token_ids=[9], num_drafts=0)], 4)
    found = verify(torch.tensor([1, 6, 3, 4, 5, 8, 7]), step, [3, 1, 0], torch.tensor([2, 0, 1]))
    assert (found.num_right.tolist(), found.last.tolist(), found.by.tolist()) == ([1, 0, 0], [6, 5, 7], [3, 0, 1])


def test_what_stands_for_drafts_is_found_behind_the_last_tokens() -> None:
    last, drafts = [5, 6], [[10, 11], [20, 21]]  # first drafts, second drafts
    chosen = torch.tensor([*last, *drafts[0], *drafts[1]])
    item = BatchItem("r", [awaited(1), awaited(3), awaited(5)], 0, range(4), True, SamplingParams(), 0, (), 2)
    other = BatchItem("s", [2, 3], 0, range(4), True, SamplingParams(), 0)
    assert build([item, other], 4).resolved(chosen).token_ids.tolist() == [6, 11, 21, 2, 3]


MOVE = """
import random, torch
from dataclasses import replace
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kernels.triton_moved import move, owners, taken
from shared.engine.layers.cuda_glm import NOBODY, on_device

chance, size = random.Random(1), 4
items, by = [], []
for number in range(70):
    pages = [number * 32 + place for place in chance.sample(range(32), 32)]
    start, num_tokens = chance.randrange(100), chance.choice([1, 4, 9])
    items.append(BatchItem(str(number), [number] * num_tokens, start, pages, True, SamplingParams(), 0))
    by.append(chance.randrange(4))
least, moved = build(items, size), torch.tensor(by)
known = build([replace(item, start=item.start + more) for item, more in zip(items, by)], size)
for num_rows in (least.num_tokens, least.num_tokens + 5):
    num_numbers = 4 * num_rows + len(least.page_ids)
    inputs, expected = (torch.full((num_numbers + num_rows,), NOBODY, dtype=torch.int32) for _ in range(2))
    for batch, target in ((least, inputs), (known, expected)):
        laid_out = on_device(batch, size, torch.device("cpu"))
        target[: 4 * num_rows].view(4, num_rows)[:, : batch.num_tokens] = laid_out[: 4 * batch.num_tokens].view(4, -1)
        target[4 * num_rows : num_numbers] = laid_out[4 * batch.num_tokens :]
        target[num_numbers :][: batch.num_tokens] = torch.from_numpy(owners(batch))
    move(inputs, num_rows, replace(least, moved=moved), size)
    assert torch.equal(inputs, expected)
    tokens = torch.arange(least.num_tokens) + 100_000
    move(inputs, num_rows, replace(least, moved=torch.zeros_like(moved)), size, tokens)
    expected[: least.num_tokens] = tokens
    assert torch.equal(inputs, expected)

sources = torch.randn(3, 1000).bfloat16(), torch.arange(5), torch.arange(2100, dtype=torch.int32)
for number in (1, 2, 3):
    for by in (None, torch.zeros_like(moved)):
        targets = [torch.zeros_like(source) for source in sources[:number]]
        move(inputs, num_rows, replace(least, moved=by), size, copied=[*zip(sources, targets)])
        assert all(torch.equal(*pair) for pair in zip(sources, targets))
        assert torch.equal(inputs, expected)

sources = torch.randn(5, 2788), torch.randn(5, 3000).bfloat16(), torch.arange(5, dtype=torch.int32)
for rows in (torch.tensor([3]), torch.tensor([4, 0])):
    assert all(torch.equal(own, of[rows]) for own, of in zip(taken(rows, sources), sources))
print("alike")
"""


VERIFY = """
import torch
from shared.engine.kernels.triton_verified import verify

chance = torch.Generator().manual_seed(1)
for num_drafts in (1, 3, 7):
    given = torch.randint(3, (40, 1 + num_drafts), generator=chance, dtype=torch.int32)
    tokens = torch.where(torch.rand(given.shape, generator=chance) < 0.7, given.roll(-1, 1), 5).long()
    moved = torch.randint(8, (40,), generator=chance)
    num_right = (tokens[:, :-1] == given[:, 1:]).long().cumprod(1).sum(1)
    last = tokens.gather(1, num_right[:, None])[:, 0]
    rows = torch.arange(40) * (1 + num_drafts) + num_right
    for by in (None, moved):
        found = verify(tokens.flatten(), given.flatten(), by, num_drafts)
        assert torch.equal(found, torch.stack((num_right, last, num_right + (0 if by is None else by), rows)))
print("alike")
"""


@needs_triton
def test_a_gpu_verifies_as_the_host_would() -> None:
    assert_says("alike\n", VERIFY)


@needs_triton
def test_a_gpu_moves_rows_and_tokens_to_where_the_host_would_have_put_them() -> None:
    assert_says("alike\n", MOVE)
