"""The law for log-probabilities of a prompt's tokens: how it is computed never changes them, and each is told once."""

from dataclasses import replace

import pytest

from shared.engine.api import EngineRequest, TokenLogprobs
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from tests.law.conftest import Law
from tests.law.worker import Worker

NUM_TOP = 3


def asked(law: Law, prompt: list[int], name: str = "r", **fields: int) -> EngineRequest:
    """A request for log-probabilities, and for two tokens unless told otherwise."""
    held = fields.pop("held", 0)
    sampling = replace(law.sampling, num_prompt_logprobs=NUM_TOP, **{"max_tokens": 2, **fields})  # type: ignore[arg-type]
    return replace(law.request(prompt, name), sampling=sampling, num_prompt_logprobs_held=held)


def told(law: Law, prompt: list[int]) -> list[TokenLogprobs]:
    """What is right: computed whole, by an engine of its own."""
    key, known = (law.sampling, *prompt), law.known.told
    if key not in known:
        worker = Worker((law.in_order or law.make_executor)(64))
        worker.run(asked(law, prompt))
        assert len(worker.told["r"]) == len(prompt) - 1
        known[key] = worker.told["r"]
    return known[key]


def same(law: Law, found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    """Equal to the bit, or as nearly as KV is kept where sums depend on the batch."""
    assert len(found) == len(expected)
    if law.is_exact:
        assert found == expected
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert one.rank == pytest.approx(other.rank, abs=1)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_chunked_at_odd_sizes(chunk: int, law: Law) -> None:
    prompt, worker = law.prompt(100), law.worker(max_step_tokens=chunk)
    assert worker.run(asked(law, prompt)) == law.tokens(prompt)[:2]
    same(law, worker.told["r"], told(law, prompt))


@pytest.mark.parametrize("length", [1, 2, 16, 17, 48])
def test_a_prompt_alone_without_a_token_behind_it(length: int, law: Law) -> None:
    prompt, worker = law.prompt(length), law.worker(max_step_tokens=19)
    assert worker.run(asked(law, prompt, max_tokens=0)) == []
    same(law, worker.told["r"], told(law, prompt))
    assert (worker.num_held(), worker.num_cached["r"]) == (0, 0)


def test_what_is_cached_is_computed_again_and_kept_for_others(law: Law) -> None:
    prompt, worker = law.prompt(80), law.worker()
    worker.run(law.request(prompt[:50], "earlier"))
    assert worker.run(asked(law, prompt)) == law.tokens(prompt)[:2]
    same(law, worker.told["r"], told(law, prompt))
    worker.run(law.request(prompt, "later"))
    assert (worker.num_cached["r"], worker.num_cached["later"]) == (0, 64)


def test_pages_that_were_cached_are_not_written_for_it(law: Law) -> None:
    prompt, worker = law.prompt(64), law.worker()
    worker.run(law.request(prompt, "earlier"))
    pages = worker.reserve(law.request(prompt))
    shared = pages.page_ids[:4]
    lease_id = worker.kv.grant(shared)
    before = [bytes(worker.page(page_id)) for page_id in shared]
    worker.submit(asked(law, prompt), pages)
    worker.finish()
    same(law, worker.told["r"], told(law, prompt))
    assert [bytes(worker.page(page_id)) for page_id in shared] == before
    assert worker.kv.release(lease_id)


def test_batched_with_others_that_come_and_go(law: Law) -> None:
    worker = law.worker(num_pages=256, max_step_tokens=48)
    prompts = {f"r{length}": law.prompt(length) for length in (15, 16, 100, 64, 2)}
    for name, prompt in prompts.items():
        worker.submit(asked(law, prompt, name))
        worker.submit(law.request(prompt, f"other {name}"))
        worker.step()
    worker.finish()
    for name, prompt in prompts.items():
        same(law, worker.told[name], told(law, prompt))
        assert not worker.told[f"other {name}"]
        assert worker.outputs[f"other {name}"] == law.tokens(prompt)


def test_preempted_amid_a_prompt_and_behind_it(law: Law) -> None:
    worker = law.worker(num_pages=10, max_step_tokens=20)
    prompts = {f"r{length}": law.prompt(length) for length in (30, 31, 47, 44)}
    for name, prompt in prompts.items():
        worker.submit(asked(law, prompt, name, max_tokens=law.sampling.max_tokens))
    worker.finish()
    assert worker.engine.load().num_preemptions > 0
    for name, prompt in prompts.items():
        same(law, worker.told[name], told(law, prompt))
        assert worker.outputs[name] == law.tokens(prompt)


@pytest.mark.parametrize("held", [1, 2, 33, 34, 79, 80])
def test_continued_on_a_worker_that_has_it_cached(held: int, law: Law) -> None:
    """It computes what it has no logits of, and uses what it has cached before that."""
    prompt, worker = law.prompt(80), law.worker(max_step_tokens=37)
    worker.run(law.request(prompt, "earlier"))
    assert worker.run(asked(law, prompt, held=held)) == law.tokens(prompt)[:2]
    same(law, worker.told["r"], told(law, prompt)[held - 1 :])
    assert worker.num_cached["r"] == (held - 1) // 16 * 16


def test_prefilled_elsewhere(law: Law) -> None:
    prompt, prefill, decode = law.prompt(80), law.worker(max_step_tokens=19), law.worker()
    first, pages = decode.pull(asked(law, prompt), prefill)
    rest = decode.run(replace(asked(law, prompt, held=80), output_token_ids=tuple(first)), pages)
    assert first + rest == law.tokens(prompt)[:2]
    same(law, prefill.told["r"], told(law, prompt))
    assert not decode.told["r"]


def test_prefilled_elsewhere_in_part(law: Law) -> None:
    """A prefill worker was lost behind its second chunk: its pages are kept, and what it told is not told again."""
    prompt, prefill, decode = law.prompt(80), law.worker(max_step_tokens=24), law.worker()
    prefill.submit(replace(asked(law, prompt), prefill_only=True))
    while len(prefill.told["r"]) < 48:
        prefill.step()
    pages, kept = decode.reserve(asked(law, prompt)), prefill.pages["r"][:3]
    decode.read(prefill, kept, pages.page_ids)
    pages.num_tokens = 16 * len(kept)
    held = 1 + len(prefill.told["r"])
    assert decode.run(asked(law, prompt, held=held), pages) == law.tokens(prompt)[:2]
    same(law, prefill.told["r"] + decode.told["r"], told(law, prompt))


def test_beside_drafts(law: Law) -> None:
    drafting = replace(law, speculation=Speculation(num_drafts=3, make_proposer=NgramProposer))
    prompt, worker = law.prompt(10) * 5, drafting.worker(max_step_tokens=21)
    assert worker.run(asked(law, prompt, max_tokens=24)) == law.tokens(prompt)
    same(law, worker.told["r"], told(law, prompt))


def test_another_prompt_is_another_answer(law: Law) -> None:
    """Or else the laws above would say nothing."""
    one, other = told(law, law.prompt(40)), told(law, law.prompt(40, seed=1))
    assert sum(mine == theirs for mine, theirs in zip(one, other, strict=True)) < 10
