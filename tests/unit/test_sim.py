from dataclasses import replace

import pytest

from shared.engine.api import BatchItem, Chosen, SampledToken, SamplingParams
from shared.engine.sim import SimExecutor, SimModel, WrongPages

PROMPT = list(range(3, 43))
MODEL = SimModel(prefill_ms_per_token=2, decode_ms=10, decode_ms_per_sequence=1)


class Sim:
    """An executor whose sleep is recorded, and one sequence in pages 3, 2, 1, 0."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.executor = SimExecutor(MODEL, num_pages=8, sleep=self.slept.append, clock=lambda: 0.0)

    def item(self, end: int = 40, start: int = 0, tokens: list[int] = PROMPT) -> BatchItem:
        return BatchItem("r", tokens[start:end], start, [3, 2, 1, 0], end == 40, SamplingParams(), 40, tokens)

    def choose(self, item: BatchItem) -> SampledToken:
        (chosen,) = self.executor.forward([item])
        assert chosen is not None
        (token,) = chosen.tokens
        return token


@pytest.fixture
def sim() -> Sim:
    return Sim()


def test_parts_of_a_prompt_write_the_bytes_of_the_whole(sim: Sim) -> None:
    whole = sim.choose(sim.item())
    pages = [bytes(sim.executor.memory.page(page_id)) for page_id in (3, 2, 1)]
    again = Sim()
    assert again.executor.forward([again.item(7)]) == [None]
    assert again.executor.forward([again.item(33, start=7)]) == [None]
    assert again.choose(again.item(start=33)) == whole
    assert [bytes(again.executor.memory.page(page_id)) for page_id in (3, 2, 1)] == pages


def test_the_next_token_depends_on_every_token(sim: Sim) -> None:
    chosen = {sim.choose(sim.item(tokens=[*PROMPT[:at], 99, *PROMPT[at + 1 :]])).token_id for at in range(40)}
    assert len(chosen) == 40


@pytest.mark.parametrize("byte", [0, 63, 64, 16 * 64 - 1])
@pytest.mark.parametrize("page_id", [3, 2])
def test_one_wrong_byte_of_the_context_is_an_error(page_id: int, byte: int, sim: Sim) -> None:
    sim.executor.forward([sim.item(32)])
    sim.executor.memory.page(page_id)[byte] ^= 1
    with pytest.raises(WrongPages, match=f"page {page_id} does not hold token"):
        sim.executor.forward([sim.item(start=32)])


def test_a_wrong_byte_in_the_last_page_is_found_while_generating(sim: Sim) -> None:
    sim.executor.forward([sim.item(39)])
    sim.executor.memory.page(1)[5] ^= 1
    with pytest.raises(WrongPages, match="token 32"):
        sim.executor.forward([sim.item(start=39)])


def test_pages_that_nobody_wrote_are_an_error(sim: Sim) -> None:
    with pytest.raises(WrongPages, match="token 0 "):
        sim.executor.forward([sim.item(start=1, tokens=[0] * 40)])


def test_items_of_one_step_do_not_touch_each_other(sim: Sim) -> None:
    alone = sim.choose(sim.item())
    other = replace(sim.item(tokens=PROMPT[::-1]), page_ids=[4, 5, 6])
    assert sim.executor.forward([other, sim.item(), other])[1] == Chosen((alone,))
    sim.executor.forward([sim.item(start=33), replace(other, start=39, token_ids=other.token_ids[39:])])


def test_pages_of_another_sequence_are_an_error(sim: Sim) -> None:
    sim.executor.forward([sim.item(32, tokens=[7, *PROMPT[1:]])])
    with pytest.raises(WrongPages, match="token 0 "):
        sim.executor.forward([sim.item(start=32)])


def test_seeds_differ_unless_the_choice_is_greedy(sim: Sim) -> None:
    def chosen(temperature: float) -> set[int]:
        items = (replace(sim.item(), sampling=SamplingParams(temperature, seed=seed)) for seed in range(20))
        return {sim.choose(item).token_id for item in items}

    assert len(chosen(temperature=0.0)) == 1
    assert len(chosen(temperature=0.5)) == 20


def test_a_stop_token_is_not_chosen_before_the_fewest_tokens_are_there(sim: Sim) -> None:
    stop = sim.choose(sim.item()).token_id
    params = SamplingParams(stop_token_ids=(stop,), min_tokens=1)
    assert sim.choose(replace(sim.item(), sampling=params)).token_id != stop
    assert sim.choose(replace(sim.item(), sampling=params, output_start=39)).token_id == stop


def test_log_probabilities_begin_with_the_chosen_token(sim: Sim) -> None:
    token = sim.choose(replace(sim.item(), sampling=SamplingParams(num_logprobs=3)))
    assert token.top[0] == (token.token_id, token.logprob)
    assert len(token.top) == 3


def test_a_step_takes_the_time_of_its_prompts_and_of_those_that_generate(sim: Sim) -> None:
    sim.executor.forward([sim.item(39)])
    sim.executor.forward([sim.item(start=39), sim.item(start=39)])
    assert sim.slept == pytest.approx([0.078, 0.012])
