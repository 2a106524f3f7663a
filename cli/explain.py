"""`forebay explain`: where the router would send a conversation, what every other placement would cost, and why."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli import state
from cli.target import RedisUrl, fail
from protos.forebay.v1 import router_pb2, router_pb2_grpc
from services.gateway import text_model
from shared import page_hash, rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import ModelCard, Role
from shared.errors import Fault, InvalidRequest, ModelNotFound, NoWorker
from shared.models.store import default_cache

TIMEOUT_S = 10.0


def explain(
    prompt: Annotated[str, typer.Argument(help="What a user would say, or token ids.")],
    model: Annotated[str, typer.Option(help="Model; default: the first that is served.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose cache to look in.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    ids: Annotated[bool, typer.Option("--ids", help="The prompt is token ids, with spaces or commas between.")] = False,
    redis: RedisUrl = "",
) -> None:
    """Show every placement of a prompt with its cost in milliseconds, and what that is made of; nothing is computed or
    reserved. docs/placement.md explains the terms."""
    run = state.find(default_cache())
    if not redis and run is None:
        fail("no cluster runs on this machine; start one with `forebay up`")
    try:
        asked = Asked(prompt, model, tenant, max_tokens, token_ids(prompt) if ids else None)
        answer = asyncio.run(ask(redis or (run.redis_url if run else ""), asked))
    except Fault as fault:
        fail(fault.message)
    console = Console()
    console.print(_table(answer))
    console.print(_rooms(answer))
    typer.echo(answer.summary)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says; `token_ids` take the place of the prompt if they are given."""

    prompt: str
    model: str
    tenant: str
    max_tokens: int
    token_ids: list[int] | None


def token_ids(text: str) -> list[int]:
    """Numbers with spaces or commas between. Raises InvalidRequest."""
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InvalidRequest(f"not a token id: {error}", param="prompt") from None
    if not ids or not all(0 <= token < 1 << 31 for token in ids):
        raise InvalidRequest("token ids are numbers from 0 on, at least one", param="prompt")
    return ids


async def ask(redis_url: str, asked: Asked) -> router_pb2.ExplainResponse:
    """What a router says. Raises a Fault."""
    board, channels = Blackboard(redis_url), rpc.Channels()
    try:
        entries = await board.processes(Role.DECODE, Role.ROUTER)
        routers = [entry.address for entry in entries if entry.role is Role.ROUTER]
        cards = [entry.card for entry in entries if entry.card and asked.model in ("", entry.card.model)]
        if not routers:
            raise NoWorker("no router is there")
        if not cards:
            raise ModelNotFound(f"no worker serves {asked.model!r}" if asked.model else "no worker is there")
        request = _request(cards[0], asked, asked.token_ids or await _tokenized(cards[0], asked.prompt))
        stub: Any = router_pb2_grpc.RouterServiceStub(channels.to(routers[0]))
        explanation: router_pb2.ExplainResponse
        explanation = await rpc.call(stub.Explain, router_pb2.ExplainRequest(request=request), TIMEOUT_S)
        return explanation
    finally:
        await channels.close()
        await board.close()


async def _tokenized(card: ModelCard, prompt: str) -> list[int]:
    """As the gateway tokenizes a conversation that a user begins."""
    text = text_model.load(Path(card.model_path) if card.model_path else None)
    if text.tokenizer is None:
        raise InvalidRequest(f"{card.model} has no tokenizer on this machine; give token ids and --ids")
    if text.chat_template is not None:
        prompt = text.chat_template.render([{"role": "user", "content": prompt}])
    return list(await text.tokenizer.encode(prompt, special=text.chat_template is None))


def _request(card: ModelCard, asked: Asked, ids: list[int]) -> router_pb2.RouteRequest:
    hashes = page_hash.chain(page_hash.tenant_key(asked.tenant), ids, card.page_size)
    return router_pb2.RouteRequest(
        request_id="explain",
        model=card.model,
        page_hashes=page_hash.join(hashes),
        num_prompt_tokens=len(ids),
        max_tokens=asked.max_tokens,
        tenant=asked.tenant,
    )


def _rooms(answer: router_pb2.ExplainResponse) -> Table:
    """What workers have, are promised, and can have: the cheapest placement whose workers have room is taken."""
    table = Table("room on", "sequences", "prompt tokens", "pages", "", box=None, pad_edge=False)
    for room in answer.rooms:
        amounts = [
            f"{getattr(room.used, name)} + {getattr(room.promised, name)} of {getattr(room.limits, name)}"
            for name in ("sequences", "tokens", "pages")
        ]
        table.add_row(room.worker_id, *amounts, "" if room.limits.sequences else "has not reported yet")
    return table


def _table(answer: router_pb2.ExplainResponse) -> Table:
    """A row for each candidate; terms that are nothing are left out."""
    table = Table("cost ms", "cached", "prefill", "decode", "made of, in ms", box=None, pad_edge=False)
    for candidate in answer.candidates:
        placement = candidate.placement
        prefill = placement.prefill.worker_id if placement.HasField("prefill") else "there too"
        terms = sorted(candidate.terms, key=lambda term: -term.cost_ms)
        made_of = ", ".join(f"{term.name} {term.cost_ms:.1f}" for term in terms if round(term.cost_ms, 1))
        facts = [f"{candidate.cost_ms:.1f}", str(candidate.num_cached_tokens), prefill, placement.decode.worker_id]
        table.add_row(*facts, candidate.rejection or made_of)
    return table
