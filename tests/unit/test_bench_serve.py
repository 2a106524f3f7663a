import asyncio
import json
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import httpx
import pytest

from bench.serve import load, measures, report
from bench.serve.client import Answer, Client
from bench.serve.workload import Ask, Workload, asks, warmup

ASK = Ask(0.0, (5, 6, 7), 4)


def sse(*contents: object) -> list[bytes]:
    return [f"data: {json.dumps(content)}\n\n".encode() for content in contents] + [b"data: [DONE]\n\n"]


def tokens(*ids: int) -> dict[str, Any]:
    return {"choices": [{"text": "x", "token_ids": list(ids)}]}


class Stream(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


def client(handler: Callable[[httpx.Request], httpx.Response]) -> Client:
    """Against a server that answers at once; every look at the clock finds it a second later."""
    seconds = count()
    http = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(handler))
    return Client(http, "m", lambda: float(next(seconds)))


async def answer_to(*contents: object, status: int = 200) -> Answer:
    return await client(lambda request: httpx.Response(status, stream=Stream(sse(*contents)))).ask(ASK)


async def test_an_answer_notes_when_each_token_came() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}}
    answer = await answer_to(tokens(1), tokens(2, 3), tokens(4), usage)
    assert answer == Answer(3, 4, 0.0, [(1.0, 1), (2.0, 2), (3.0, 1)], num_cached=2, num_reported=4)
    assert (measures.ttft_ms(answer), measures.gaps_ms(answer)) == (1000.0, [1000.0, 1000.0])
    assert measures.tpot_ms(answer) == pytest.approx(2000 / 3)


async def test_a_request_asks_for_an_exact_length_by_token_ids() -> None:
    asked: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, stream=Stream(sse(tokens(1, 2, 3, 4))))

    await client(handler).ask(ASK)
    wanted = {"prompt": [5, 6, 7], "max_tokens": 4, "min_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    assert asked[0].items() >= wanted.items()


async def test_tokens_of_a_server_without_ids_are_counted_by_its_usage() -> None:
    text = {"choices": [{"text": "two tokens"}]}
    answer = await answer_to(text, text, {"choices": [], "usage": {"completion_tokens": 4}})
    assert (answer.fault, answer.num_tokens, answer.num_seen) == (None, 4, 2)


@pytest.mark.parametrize(
    ("contents", "status", "fault"),
    [
        ([tokens(1)], 200, "1 tokens came, not 4"),
        ([], 200, "no tokens came"),
        ([tokens(1), {"error": {"message": "worker lost"}}], 200, "worker lost"),
        ([], 503, "HTTP 503"),
    ],
)
async def test_a_failed_request_says_why(contents: list[object], status: int, fault: str) -> None:
    answer = await answer_to(*contents, status=status)
    assert answer.fault is not None
    assert answer.fault.startswith(fault)


async def test_a_lost_connection_and_a_garbled_event_are_faults() -> None:
    def lost(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone")

    assert (await client(lost).ask(ASK)).fault == "ReadError: gone"
    garbled = client(lambda request: httpx.Response(200, stream=Stream([b"data: {\n\n"])))
    assert "JSONDecodeError" in ((await garbled.ask(ASK)).fault or "")


def test_a_workload_is_repeatable_and_has_the_lengths_asked_for() -> None:
    workload = Workload(num_requests=50, input_tokens=40, output_tokens=20, shared_tokens=10, seed=3)
    planned = [*asks(workload), *warmup(workload)]
    assert planned == [*asks(workload), *warmup(workload)]
    assert {(len(ask.prompt_token_ids), ask.output_tokens, ask.prompt_token_ids[:10]) for ask in planned} == {
        (40, 20, planned[0].prompt_token_ids[:10])
    }
    assert len({ask.prompt_token_ids for ask in planned}) == 52


def test_lengths_vary_within_the_spread() -> None:
    planned = asks(Workload(num_requests=200, input_tokens=100, output_tokens=10, spread=0.5))
    lengths = [len(ask.prompt_token_ids) for ask in planned]
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150


def test_a_rate_spaces_requests_as_a_poisson_process() -> None:
    planned = asks(Workload(num_requests=2_000, input_tokens=1, rate=4.0))
    assert planned[-1].at_s / len(planned) == pytest.approx(0.25, rel=0.05)
    assert [ask.at_s for ask in planned] == sorted(ask.at_s for ask in planned)


@pytest.mark.parametrize(
    "change",
    [{"num_requests": 0}, {"shared_tokens": 513}, {"spread": 1.0}, {"rate": 0.0}, {"first_token_id": 10_000}],
    ids=str,
)
def test_a_senseless_workload_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"begin|longer|spread|token ids"):
        asks(Workload(**change))


@pytest.mark.parametrize(("change", "most"), [({"concurrency": 3}, 3), ({"rate": 1e6}, 12)], ids=str)
async def test_callers_are_as_many_as_planned(change: dict[str, Any], most: int) -> None:
    asking, peak = 0, 0

    class Server(Client):
        async def ask(self, ask: Ask) -> Answer:
            nonlocal asking, peak
            asking, peak = asking + 1, max(peak, asking + 1)
            for _ in range(100):  # every request that can start does so meanwhile
                await asyncio.sleep(0)
            asking -= 1
            return Answer(1, 1, 0.0, [(1.0, 1)])

    workload = Workload(num_requests=12, num_warmup=1, **change)
    found = await load.run(Server(httpx.AsyncClient(), "m"), workload, iter((10.0, 14.0)).__next__)
    assert (len(found.answers), found.wall_s, peak) == (12, 4.0, most)


def test_figures_are_of_the_requests_that_succeeded() -> None:
    good = [Answer(10, 3, 0.0, [(first / 1e3, 1), (first / 1e3 + 0.2, 2)]) for first in range(1, 102)]
    figures = measures.figures(load.Run((*good, Answer(10, 3, 0.0, fault="lost")), 2.0))
    assert figures["ttft_ms"] == {"mean": 51.0, "p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert figures["tpot_ms"]["p99"] == 100.0
    assert figures["output_tokens_per_s"] == 101 * 3 / 2
    assert (figures["num_failed"], figures["faults"]) == (1, {"lost": 1})


def test_the_report_ends_with_everything_as_json() -> None:
    figures = measures.figures(load.Run((Answer(1, 1, 0.0, [(0.5, 1)]), Answer(1, 1, 0.0, fault="lost")), 1.0))
    told = report.circumstances("forebay bench serve", "http://server", "m", Workload())
    printed = report.text(told, figures)
    assert "| first token | 500.0 | 500.0 | 500.0 | 500.0 |" in printed
    assert "1 of 2 requests answered" in printed
    assert "failed, 1 times: lost" in printed
    again = json.loads(printed.splitlines()[-1])
    assert (again["ttft_ms"]["p50"], again["workload"]["seed"], again["itl_ms"]) == (500.0, 0, None)
    assert again["hardware"]
