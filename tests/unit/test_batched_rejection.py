"""Rejection sampling for all rows at once, beside its twin that verifies row by row."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bench.launched import InOrder
from shared.engine.api import BatchItem, Executor
from shared.engine.sampling.batched_rejection import BatchedRejectionSampler
from shared.engine.sampling.rejection import RejectionSampler
from shared.engine.sampling.sampler import Sampler
from tests.unit.drawing import VOCAB, item, rows
from tests.unit.markov import engine, executor, outputs
from tests.unit.test_rejection import BY_LAYER, SAMPLINGS, trial

SEEDS, LAST = range(60), 3  # the index of the token in front of all drafts


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_verified_together_and_launched_ahead_tokens_are_those_of_row_by_row(sampling: str) -> None:
    """Towards its end a sequence may get fewer drafts where it is not known how far it is."""
    asked = trial(**SAMPLINGS[sampling] | {"max_tokens": 20}).requests(50)
    alone = outputs(engine(executor(rejection=True), BY_LAYER), asked)
    for together, count in ((50, 50), (7, 21)):
        computes = [executor(rejection=True, behind=True) for _ in range(2)]
        kinds: list[Executor] = [InOrder(computes[0]), computes[1]]
        in_order, ahead = (outputs(engine(kind, BY_LAYER), asked[:count], together=together) for kind in kinds)
        expected = dict(list(alone.items())[:count])
        assert in_order == expected
        assert [each[:12] for each in ahead.values()] == [each[:12] for each in expected.values()]


def two_drafts(sampler: Sampler) -> list[tuple[int, int]]:
    """Of each sequence, drawn one after the other from logits of their own."""
    views = [replace(item((1, 2, 3), temperature=1.0, seed=seed), request_id=str(seed)) for seed in SEEDS]
    firsts, seconds = (
        sampler.propose(
            rows(len(SEEDS), seed=7 + number), [replace(each, start=LAST + number) for each in views], number
        )
        for number in range(2)
    )
    return [*zip(firsts, seconds, strict=True)]


def verifying(drafts: Sequence[tuple[int, int]], start: int = LAST) -> list[BatchItem]:
    views = [item((1, 2, 3), temperature=1.0, seed=seed) for seed in SEEDS]
    return [
        replace(each, request_id=str(seed), token_ids=(9, *own), start=start, num_drafts=2)
        for seed, each, own in zip(SEEDS, views, drafts, strict=True)
    ]


@pytest.mark.parametrize("kind", [RejectionSampler, BatchedRejectionSampler])
def test_drafts_that_were_not_drawn_here_in_the_step_before_stand_for_themselves(kind: type[Sampler]) -> None:
    """All of a sequence's, if one of them is another, or stands elsewhere, or a step was in between."""
    given = rows(3 * len(SEEDS))

    def chosen(case: str, sampler: Sampler, *, changed: int = 0, start: int = LAST) -> list[list[int]]:
        drafts = [(first, (second + changed) % VOCAB) for first, second in two_drafts(sampler)]
        if case == "a step later":
            sampler(rows(1), [replace(item((1, 2, 3), temperature=1.0), request_id="another")])
        return [[token.token_id for token in tokens] for tokens in sampler(given, verifying(drafts, start))]

    twin = RejectionSampler(VOCAB, ())
    ours, theirs = chosen("", kind(VOCAB, ())), chosen("", twin)
    assert ours == theirs
    assert ours != chosen("coupled", Sampler(VOCAB, ()))
    known = two_drafts(kind(VOCAB, ()))
    for case, changed, start in (("another", 1, LAST), ("elsewhere", 0, LAST + 1), ("a step later", 0, LAST)):
        found = chosen(case, kind(VOCAB, ()), changed=changed, start=start)
        drafts = [(first, (second + changed) % VOCAB) for first, second in known]
        plain = Sampler(VOCAB, ())(given, verifying(drafts, start))
        assert found == [[token.token_id for token in tokens] for tokens in plain], case
