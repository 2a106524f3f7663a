"""Log-probabilities of prompts in the engine: how many rows a step has of them, and from logits to what is told."""

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from shared.engine.api import EngineRequest, FinishReason, PromptLogprobs, SamplingParams, TokenLogprobs
from shared.engine.sampling.prompt_logprobs import apart, joined
from shared.engine.scheduler import LOGPROB_ROWS
from shared.errors import ContextTooLong, Fault, InvalidRequest
from tests.unit.drawing import item
from tests.unit.engine_rig import MODEL, Rig, last, output, request

LONG = replace(MODEL, max_model_len=4_000)


@pytest.fixture
def rig() -> Rig:
    return Rig(num_pages=512, model=LONG, max_step_tokens=2_000)


def num_told(rig: Rig, name: str) -> list[int]:
    events = rig.finish()
    return [len(event.logprobs) for event in events if isinstance(event, PromptLogprobs) and event.request_id == name]


def test_a_step_has_so_many_rows_of_logits_and_what_is_left_is_for_others(rig: Rig) -> None:
    rig.submit("told", 1_300, num_prompt_logprobs=1, max_tokens=1)
    rig.submit("told too", 20, num_prompt_logprobs=1, max_tokens=1)
    rig.submit("plain", 1_000, max_tokens=1)
    assert num_told(rig, "told") == [LOGPROB_ROWS, LOGPROB_ROWS, 1_299 - 2 * LOGPROB_ROWS]
    assert rig.batches[0] == {"told": LOGPROB_ROWS, "plain": 1_000}
    assert rig.batches[-1] == {"told": 1_300 - 2 * LOGPROB_ROWS, "told too": 20}


def test_what_is_told_already_takes_none_of_them(rig: Rig) -> None:
    """A worker that has nothing cached computes it all in one step, and is told of what is wanted."""
    asked = request("r", 1_300, num_prompt_logprobs=0, max_tokens=1)
    rig.engine.submit(replace(asked, num_prompt_logprobs_held=1_000))
    assert num_told(rig, "r") == [300]
    assert rig.batches == [{"r": 1_300}]


def test_a_prompt_may_fill_the_context_if_nothing_is_to_follow(rig: Rig) -> None:
    rig.submit("r", 4_000, num_prompt_logprobs=0, max_tokens=0)
    events = rig.finish()
    assert sum(len(event.logprobs) for event in events if isinstance(event, PromptLogprobs)) == 3_999
    assert (output(events, "r"), last(events, "r").finish_reason) == ([], FinishReason.LENGTH)


def test_others_do_not_wait_for_what_it_computes_anew(rig: Rig) -> None:
    """Nor does it wait for their pages, which are of no use to it."""
    rig.submit("r", 400, max_tokens=1)
    rig.engine.submit(replace(request("r", 400, num_prompt_logprobs=0, max_tokens=1), request_id="told"))
    rig.finish()
    assert rig.batches[0] == {"r": 400, "told": 400}


@pytest.mark.parametrize(
    ("fields", "held", "fault", "words"),
    [
        ({"max_tokens": 0}, 0, InvalidRequest, "max_tokens"),
        ({"max_tokens": -1, "num_prompt_logprobs": 1}, 0, InvalidRequest, "max_tokens"),
        ({"num_prompt_logprobs": -1}, 0, InvalidRequest, "num_prompt_logprobs is -1"),
        ({"num_prompt_logprobs": 501}, 0, InvalidRequest, "num_prompt_logprobs is 501"),
        ({"num_prompt_logprobs": 1}, 21, InvalidRequest, "21 log-probabilities are held of a prompt of 20 tokens"),
        ({"num_prompt_logprobs": 1, "max_tokens": 0, "num_tokens": 4_001}, 0, ContextTooLong, "at most 4000"),
    ],
)
def test_what_could_never_run_is_refused(
    fields: dict[str, Any], held: int, fault: type[Fault], words: str, rig: Rig
) -> None:
    with pytest.raises(fault, match=words):
        rig.engine.submit(replace(request("r", **fields), num_prompt_logprobs_held=held))
    assert not rig.engine.has_work()


# From logits ----------------------------------------------------------------------------------------------------------


def told(logits: torch.Tensor, tokens: list[int], num_top: int, num_tokens: int) -> list[TokenLogprobs]:
    """Of a prompt of one token more than there are rows; the last of its own computes nothing that is told."""
    asked = replace(
        item([0, *tokens], 1, num_prompt_logprobs=num_top),
        token_ids=[0, *tokens[:-1]],
        start=0,
        sample=False,
        following=tokens[-1],
        logprob_rows=range(len(tokens)),
    )
    left, found = apart(logits, [asked], num_tokens)
    assert not len(left)
    [chosen] = joined([None], [asked], found)
    assert chosen is not None
    return list(chosen.prompt_logprobs)


def test_of_equals_the_lower_id_comes_first_and_their_rank_is_the_same() -> None:
    row = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0, -1.0]])
    [likeliest] = told(row, [4], 4, 6)
    assert (likeliest.rank, [token for token, _ in likeliest.top]) == (1, [1, 3, 4, 2])
    assert likeliest.logprob == likeliest.top[0][1] == float(torch.log_softmax(row, -1)[0, 4])
    assert [each.rank for each in told(row.expand(6, 6), list(range(6)), 0, 6)] == [5, 1, 4, 1, 1, 6]


def test_padding_is_no_token_and_a_prompt_that_has_it_is_impossible() -> None:
    row = torch.tensor([[0.0, 1.0, 9.0, 9.0]])
    [impossible] = told(row, [3], 5, 2)
    assert (impossible.logprob, impossible.rank) == (-torch.inf, 3)
    assert [token for token, _ in impossible.top] == [1, 0]


@pytest.mark.parametrize("num_top", [0, 1, 2, 7])
def test_many_rows_are_as_each_alone(num_top: int) -> None:
    noise = torch.Generator().manual_seed(3)
    rows, tokens = torch.randn(50, 90, generator=noise).round(decimals=1), list(range(20, 70))
    together = told(rows, tokens, num_top, 90)
    assert together == list(
        chain.from_iterable(told(rows[i : i + 1], [token], num_top, 90) for i, token in enumerate(tokens))
    )
    for each, row, token in zip(together, torch.log_softmax(rows, -1), tokens, strict=True):
        order = torch.sort(row, descending=True, stable=True)
        assert each.rank == 1 + int((row > row[token]).sum())
        pairs = zip(order.indices.tolist(), order.values.tolist(), strict=True)
        assert list(each.top) == list(pairs)[:num_top]


def test_a_step_that_tells_nothing_is_left_as_it_is() -> None:
    logits, asked = torch.zeros(1, 4), EngineRequest("r", (1,), SamplingParams())
    plain = item(list(asked.prompt_token_ids), 0)
    assert apart(logits, [plain], 4) == (logits, None)
