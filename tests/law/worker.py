"""An engine stepped by hand, and pages copied between two of them as a transport would."""

from collections.abc import Sequence
from dataclasses import replace

from shared.engine.api import (
    EngineRequest,
    Executor,
    Failed,
    PagesComputed,
    PromptLogprobs,
    SampledToken,
    TokenLogprobs,
    TokensSampled,
)
from shared.engine.engine import Engine
from shared.engine.grammars import Grammars
from shared.engine.kv.memory import HostMemory
from shared.engine.kv.store import KvStore, PageTable
from shared.engine.speculation.speculator import Speculation
from shared.page_hash import chain


class Worker:
    """Collects the output of every request. After each step the books of the page store must be right."""

    def __init__(
        self,
        executor: Executor,
        max_step_tokens: int = 512,
        speculation: Speculation | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.spec = executor.spec
        self.memory = executor.memory
        self.page_size = executor.spec.layout.page_size
        self.kv = KvStore(executor.spec.num_pages, self.page_size, lease_ttl_ms=10_000, clock=lambda: 0.0)
        self.engine = Engine(
            executor,
            self.kv,
            max_step_tokens=max_step_tokens,
            max_num_sequences=min(max_step_tokens, 32),
            speculation=speculation,
            grammars=grammars,
        )
        self.outputs: dict[str, list[int]] = {}
        self.said: dict[str, list[SampledToken]] = {}
        self.pages: dict[str, list[int]] = {}
        self.num_cached: dict[str, int] = {}
        self.drafts: dict[str, tuple[int, ...]] = {}
        self.told: dict[str, list[TokenLogprobs]] = {}
        self._first_told: dict[str, int] = {}

    def submit(self, request: EngineRequest, pages: PageTable | None = None) -> None:
        self.outputs[request.request_id] = []
        self.said[request.request_id] = []
        self.pages[request.request_id] = []
        self.told[request.request_id] = []
        self._first_told[request.request_id] = max(1, request.num_prompt_logprobs_held)
        self.engine.submit(request, pages)

    def step(self) -> None:
        for event in self.engine.step():
            match event:
                case PagesComputed(name, first_page, page_ids, _):
                    assert first_page == len(self.pages[name])
                    self.pages[name] += page_ids
                case PromptLogprobs(name, first, logprobs):
                    assert first == self._first_told[name] + len(self.told[name])
                    self.told[name] += logprobs
                case TokensSampled(name, tokens):
                    self.outputs[name] += [token.token_id for token in tokens]
                    self.said[name] += tokens
                    self.num_cached[name] = event.num_cached_tokens
                    self.drafts[name] = event.draft_token_ids
                case Failed(_, fault):
                    raise fault
        assert self.kv.check() == []

    def finish(self) -> None:
        while self.engine.has_work():
            self.step()

    def run(self, request: EngineRequest, pages: PageTable | None = None) -> list[int]:
        self.submit(request, pages)
        self.finish()
        return self.outputs[request.request_id]

    def reserve(self, request: EngineRequest) -> PageTable:
        """Pages for the prompt and one token, with what is cached of it."""
        num_pages = self.spec.layout.num_pages(len(request.prompt_token_ids) + 1)
        pages = self.kv.reserve(self.hashes(request), num_pages)
        assert pages is not None
        return pages

    def acquire(self, request: EngineRequest) -> tuple[int, list[int]]:
        """A lease on what is cached of a prompt."""
        lease = self.kv.acquire(self.hashes(request))
        assert lease is not None
        return lease

    def hashes(self, request: EngineRequest) -> list[bytes]:
        return chain(request.hash_key, request.prompt_token_ids, self.page_size)

    def pull(self, request: EngineRequest, peer: "Worker") -> tuple[list[int], PageTable]:
        """Have a peer prefill, and read what is missing here: the first token, and pages to go on with."""
        pages = self.reserve(request)
        first = peer.run(replace(request, prefill_only=True))
        num_held = pages.num_tokens // self.page_size
        self.read(peer, peer.pages[request.request_id][num_held:], pages.page_ids[num_held:])
        pages.num_tokens = len(request.prompt_token_ids)
        peer.engine.cancel(request.request_id)
        peer.finish()
        return first, pages

    def read(self, peer: "Worker", remote: Sequence[int], local: Sequence[int]) -> None:
        """What a one-sided READ does."""
        for theirs, ours in zip(remote, local, strict=False):
            self.page(ours)[:] = peer.page(theirs)

    def page(self, page_id: int) -> memoryview:
        assert isinstance(self.memory, HostMemory)
        return self.memory.page(page_id)

    def num_held(self) -> int:
        return self.kv.counts().held
