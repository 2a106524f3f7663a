"""`forebay explain` on a router and a worker of this process, whose model has no tokenizer."""

from collections.abc import AsyncIterator

import pytest

from cli import explain
from cli.explain import Asked
from shared.blackboard.records import Registration, Role
from shared.errors import InvalidRequest
from tests.unit.router_rig import TTL_MS, Router


@pytest.fixture
async def router(valkey_url: str) -> AsyncIterator[Router]:
    router = Router(valkey_url)
    port = await router.start()
    await router.fleet_of("p1", "d1")
    entry = Registration(role=Role.ROUTER, name="r1", epoch=1, pid=1, address=f"127.0.0.1:{port}")
    await router.board.register(entry, TTL_MS)
    yield router
    await router.stop()


def asked(prompt: str, ids: list[int] | None = None) -> Asked:
    return Asked(prompt, model="", tenant="", max_tokens=16, token_ids=ids)


async def test_token_ids_need_no_tokenizer(router: Router) -> None:
    answer = await explain.ask(router.url, asked("", list(range(1_000))))
    assert "of 1000 prompt tokens cached" in answer.summary
    assert answer.candidates[0].placement.decode.worker_id == "d1"


async def test_without_tokenizer_a_text_is_refused_with_what_to_do(router: Router) -> None:
    with pytest.raises(InvalidRequest, match="give token ids and --ids"):
        await explain.ask(router.url, asked("hello"))


def test_token_ids_are_read_with_spaces_or_commas() -> None:
    assert explain.token_ids("1, 2 3,4") == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "one", "1 -2", f"{1 << 31}"])
def test_what_is_no_token_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        explain.token_ids(text)


async def test_the_table_has_each_candidate_and_what_its_cost_is_made_of(router: Router) -> None:
    answer = await explain.ask(router.url, asked("", list(range(1_000))))
    table = explain._table(answer)
    made_of = list(table.columns[-1].cells)
    assert table.row_count == len(answer.candidates) == 2
    for candidate, cell in zip(answer.candidates, made_of, strict=True):
        named = [part.split()[0] for part in str(cell).split(", ")]
        assert set(named) == {term.name.split()[0] for term in candidate.terms if term.cost_ms >= 0.05}


async def test_what_is_reserved_on_each_worker_is_shown(router: Router) -> None:
    await router.route()
    table = explain._rooms(await explain.ask(router.url, asked("", list(range(1_000)))))
    shown = dict(zip(*(column.cells for column in table.columns[:2]), strict=True))
    assert shown == {"d1": "0 + 1 of 0", "p1": "0 + 1 of 0"}
