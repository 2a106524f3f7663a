"""Who is there: the routers and models on the blackboard, kept in memory, so that they outlive an outage of Redis."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from services.gateway import text_model
from services.gateway.models import ServedModel
from services.gateway.parsers.formats import AUTO, Formats
from services.gateway.text_model import TextModel
from shared.blackboard.board import Blackboard
from shared.blackboard.records import ModelCard, Registration, Role
from shared.errors import BlackboardLost, ModelNotFound, NoWorker

log = logging.getLogger(__name__)


class Directory:
    """Routers and models of the moment. `paths` says where the text side of a model is, by model name; other models'
    is read from where their workers found it. `formats` is how all of them write reasoning and tool calls."""

    def __init__(self, paths: Mapping[str, Path], formats: Formats = AUTO) -> None:
        self._paths, self._formats = dict(paths), formats
        self._routers: tuple[Registration, ...] = ()
        self._models: dict[str, ServedModel] = {}
        self._live: frozenset[str] = frozenset()
        self._changed = asyncio.Event()

    @property
    def routers(self) -> Sequence[Registration]:
        """Routers that take requests."""
        return self._routers

    @property
    def models(self) -> list[ServedModel]:
        """Models that a decode worker serves now, by name."""
        return [self._models[name] for name in sorted(self._live)]

    def model(self, name: str) -> ServedModel:
        """The model that a request names, also while its workers are away; it may name none if there is only one.

        Raises ModelNotFound, or NoWorker if nothing is served at all.
        """
        if name in self._models:
            return self._models[name]
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if not self._live:
            raise NoWorker("no worker is registered yet")
        if not name:
            raise ModelNotFound("several models are served: name one in 'model'", param="model")
        served = ", ".join(f"'{known}'" for known in sorted(self._live)[:10])
        raise ModelNotFound(f"The model '{name[:200]}' does not exist here; served are: {served}.", param="model")

    def problem(self) -> str | None:
        """Why no request can be served at the moment; None if some can."""
        if not self._live:
            return "no decode worker is registered"
        return None if self._routers else "no router is registered"

    async def changed(self, timeout_s: float) -> None:
        """Wait until something changes, or for the time given."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def update(self, processes: Sequence[Registration]) -> None:
        """Take over what the blackboard says; reads the directories of models that are new."""
        routers = tuple(p for p in processes if p.role is Role.ROUTER and not p.draining)
        cards = {p.card.model: p.card for p in processes if p.role is Role.DECODE and p.card and not p.draining}
        for name, card in cards.items():
            known = self._models.get(name)
            if known is None or known.card != card:
                text = known.text if known and known.card.model_path == card.model_path else await self._read(card)
                self._models[name] = ServedModel(card, text, int(time.time()))
        identities = {(r.name, r.epoch, r.address) for r in routers}
        changed = self._live != frozenset(cards) or identities != {(r.name, r.epoch, r.address) for r in self._routers}
        self._routers, self._live = routers, frozenset(cards)
        if changed:
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _read(self, card: ModelCard) -> TextModel:
        path = self._paths.get(card.model) or (Path(card.model_path) if card.model_path else None)
        try:
            text = await asyncio.to_thread(text_model.load, path, self._formats)
        except (ValueError, OSError) as error:
            log.error("model %s is served by token ids alone: %s", card.model, error)
            return TextModel(None, None, {})
        log.info("model %s: tokenizer %s, chat template %s", card.model, *_presence(text))
        log.info("model %s: reasoning %s, tool calls %s", card.model, text.formats.reasoning, text.formats.tools)
        return text


def _presence(text: TextModel) -> list[str]:
    return ["found" if part is not None else "absent" for part in (text.tokenizer, text.chat_template)]


async def follow(board: Blackboard, directory: Directory, interval_ms: int, ttl_ms: int) -> None:
    """Keep the directory up to date until cancelled: at every announcement, and every `interval_ms`.

    After an outage of the blackboard, those who are missing on it are kept for one `ttl_ms`: a Redis that lost its
    data, or was away for longer than registrations last, lists nobody until all have registered again.
    """
    known: dict[tuple[Role, str], Registration] = {}
    keep_until = 0.0
    while True:
        try:
            async with board.changes() as changes:
                while True:
                    found = {(p.role, p.name): p for p in await board.processes(Role.ROUTER, Role.DECODE)}
                    known = known | found if time.monotonic() < keep_until else found
                    await directory.update(list(known.values()))
                    await changes.wait(interval_ms / 1000)
        except BlackboardLost as fault:
            log.warning("the blackboard does not answer; going on with what is known: %s", fault.message)
            await asyncio.sleep(interval_ms / 1000)
            keep_until = time.monotonic() + ttl_ms / 1000
