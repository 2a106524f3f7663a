"""The suite's law: how a sequence is computed never changes its tokens."""

from dataclasses import replace

import pytest

from tests.law.conftest import NUM_TOKENS, Law


@pytest.mark.parametrize("chunk", [1, 7, 17, 33])
def test_chunked_at_odd_sizes(chunk: int, law: Law) -> None:
    prompt = law.prompt(100)
    assert law.worker(max_step_tokens=chunk).run(law.request(prompt)) == law.tokens(prompt)


@pytest.mark.parametrize("length", [31, 32, 33, 96])
def test_prefix_cached(length: int, law: Law) -> None:
    prompt, worker = law.prompt(length), law.worker()
    first, again = (worker.run(law.request(prompt, name)) for name in ("first", "again"))
    assert first == again == law.tokens(prompt)
    assert worker.num_cached["again"] == (length - 1) // 16 * 16


def test_the_next_turn_of_a_conversation_finds_prompt_and_output_cached(law: Law) -> None:
    prompt, worker = law.prompt(40), law.worker()
    turn = prompt + worker.run(law.request(prompt)) + law.prompt(10, seed=1)
    assert worker.run(law.request(turn, "next")) == law.tokens(turn)
    before_last = 40 + NUM_TOKENS - 1  # the last token is not computed, unless it was a draft that was right
    most = before_last + (law.speculation is not None)
    assert before_last // 16 * 16 <= worker.num_cached["next"] <= most // 16 * 16


def test_batched_with_others_that_come_and_go(law: Law) -> None:
    worker = law.worker(num_pages=256, max_step_tokens=48)
    prompts = {f"r{length}": law.prompt(length) for length in (1, 15, 16, 17, 100, 64, 5, 2)}
    for name, prompt in prompts.items():
        worker.submit(law.request(prompt, name))
        worker.step()
    worker.submit(law.request(law.prompt(50), "cancelled"))
    worker.step()
    worker.engine.cancel("cancelled")
    worker.finish()
    assert [worker.outputs[name] for name in prompts] == [law.tokens(prompt) for prompt in prompts.values()]


def test_preempted(law: Law) -> None:
    worker = law.worker(num_pages=10, max_step_tokens=64)
    prompts = {f"r{length}": law.prompt(length) for length in (30, 31, 47, 44)}
    for name, prompt in prompts.items():
        worker.submit(law.request(prompt, name))
    worker.finish()
    assert worker.engine.load().num_preemptions > 0
    assert [worker.outputs[name] for name in prompts] == [law.tokens(prompt) for prompt in prompts.values()]


@pytest.mark.parametrize("num_emitted", [1, 9, NUM_TOKENS - 1])
def test_continued_on_another_worker(num_emitted: int, law: Law) -> None:
    prompt = law.prompt(40)
    tokens = law.tokens(prompt)
    rest = law.worker().run(law.request(prompt, output=tokens[:num_emitted]))
    assert tokens[:num_emitted] + rest == tokens


def test_what_was_said_counts_once_where_it_is_computed_again(law: Law) -> None:
    """Few tokens may come, so that each comes often, and what it has been said is weighed again and again."""
    few = tuple((token_id, 100.0) for token_id in range(20, 32))
    counting = replace(law, sampling=replace(law.sampling, logit_bias=few, frequency_penalty=0.5))
    test_continued_on_another_worker(9, counting)
    test_preempted(counting)


@pytest.mark.parametrize("length", [1, 16, 47, 48, 49, 100])
def test_prefilled_elsewhere(length: int, law: Law) -> None:
    prompt, prefill, decode = law.prompt(length), law.worker(max_step_tokens=19), law.worker()
    first, pages = decode.pull(law.request(prompt), prefill)
    rest = decode.run(law.request(prompt, output=first), pages)
    assert first + rest == law.tokens(prompt)
    assert (prefill.num_held(), decode.num_held()) == (0, 0)


def test_prefilled_elsewhere_behind_a_prefix_that_is_cached_here(law: Law) -> None:
    prompt, prefill, decode = law.prompt(80), law.worker(), law.worker()
    decode.run(law.request(prompt[:50], "earlier"))
    first, pages = decode.pull(law.request(prompt), prefill)
    rest = decode.run(law.request(prompt, output=first), pages)
    assert first + rest == law.tokens(prompt)
    assert decode.num_cached["r"] == 80


def test_a_handoff_that_turned_out_stale_is_computed_again_from_what_was_cached(law: Law) -> None:
    prompt, decode = law.prompt(80), law.worker()
    decode.run(law.request(prompt[:50], "earlier"))
    pages = decode.reserve(law.request(prompt))
    decode.read(decode, pages.page_ids[:2], pages.page_ids[3:])
    assert decode.run(law.request(prompt), pages) == law.tokens(prompt)


def test_a_prefix_pulled_from_a_peer_and_computed_on(law: Law) -> None:
    prompt, peer, worker = law.prompt(80), law.worker(), law.worker()
    peer.run(law.request(prompt[:60], "earlier"))
    pages = worker.reserve(law.request(prompt))
    lease_id, remote = peer.acquire(law.request(prompt))
    worker.read(peer, remote, pages.page_ids)
    assert peer.kv.release(lease_id)
    pages.num_tokens = 16 * len(remote)
    assert worker.run(law.request(prompt), pages) == law.tokens(prompt)
    assert len(remote) == 3


def test_pages_of_everything_cached_are_never_written_again(law: Law) -> None:
    prompt, worker = law.prompt(64), law.worker()
    worker.run(law.request(prompt, "earlier"))
    pages = worker.reserve(law.request(prompt))
    shared = pages.page_ids[:4]
    assert pages.num_tokens == 64
    lease_id = worker.kv.grant(shared)
    before = [bytes(worker.page(page_id)) for page_id in shared]
    assert worker.run(law.request(prompt), pages) == law.tokens(prompt)
    assert [bytes(worker.page(page_id)) for page_id in shared] == before
    assert worker.kv.release(lease_id)


def test_prefilled_elsewhere_in_a_crowd_that_preempts(law: Law) -> None:
    prefill, decode = law.worker(), law.worker(num_pages=9, max_step_tokens=32)
    prompts = {f"r{length}": law.prompt(length) for length in (40, 30, 33)}
    firsts = {}
    for name, prompt in prompts.items():
        firsts[name], pages = decode.pull(law.request(prompt, name), prefill)
        decode.submit(law.request(prompt, name, output=firsts[name]), pages)
    decode.finish()
    assert decode.engine.load().num_preemptions > 0
    assert {name: firsts[name] + decode.outputs[name] for name in prompts} == {
        name: law.tokens(prompt) for name, prompt in prompts.items()
    }


def test_a_seed_makes_a_difference_to_sampling_alone(law: Law) -> None:
    """Or else the laws above would say nothing about sampling."""
    prompt, other = law.prompt(40), Law(law.make_executor, replace(law.sampling, seed=8))
    assert (other.tokens(prompt) != law.tokens(prompt)) == (law.sampling.temperature > 0)
