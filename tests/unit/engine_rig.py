"""An engine over a simulated executor, stepped by hand, and what to ask of its events."""

from collections.abc import Callable, Sequence
from typing import Any

from shared.engine.api import BatchItem, Chosen, EngineRequest, Event, Executor, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.kv.store import PageTable
from shared.engine.sim import SimExecutor, SimModel
from shared.engine.speculation.speculator import Speculation
from tests.unit.behind import Behind, WatchedStore

MODEL = SimModel(vocab_size=500, max_model_len=200, eos_token_ids=(2,))


class Spy(SimExecutor):
    """Records every batch; can be told to do something in the middle of a step."""

    def __init__(self, model: SimModel, num_pages: int) -> None:
        super().__init__(model, num_pages, sleep=lambda seconds: None)
        self.batches: list[dict[str, int]] = []
        self.during: Callable[[], None] = lambda: None

    def forward(self, batch: Sequence[BatchItem]) -> list[Chosen | None]:
        assert len({item.request_id for item in batch}) == len(batch)
        self.batches.append({item.request_id: len(item.token_ids) for item in batch})
        self.during()
        return super().forward(batch)


class Rig:
    def __init__(
        self,
        num_pages: int = 32,
        max_step_tokens: int = 64,
        max_num_sequences: int = 8,
        model: SimModel = MODEL,
        speculation: Speculation | None = None,
        *,
        behind: bool = False,
    ) -> None:
        self.now = 0.0
        self.executor = Spy(model, num_pages)
        self.behind = Behind(self.executor)
        executor: Executor = self.behind if behind else self.executor
        self.kv = WatchedStore(executor, num_pages, 16, clock=lambda: self.now)
        self.engine = Engine(
            executor,
            self.kv,
            max_step_tokens=max_step_tokens,
            max_num_sequences=max_num_sequences,
            speculation=speculation,
            clock=lambda: self.now,
        )

    def submit(self, name: str, num_tokens: int = 20, pages: PageTable | None = None, **fields: Any) -> None:
        self.now += 0.001
        self.engine.submit(request(name, num_tokens, **fields), pages)

    def finish(self, max_steps: int = 1000) -> list[Event]:
        events: list[Event] = []
        for _ in range(max_steps):
            if not self.engine.has_work():
                return events
            events += self.engine.step()
            assert self.kv.check() == []
        raise AssertionError("the engine does not come to an end")

    @property
    def batches(self) -> list[dict[str, int]]:
        return self.executor.batches


def request(name: str, num_tokens: int = 20, **fields: Any) -> EngineRequest:
    names = ("output_token_ids", "draft_token_ids", "prefill_only", "priority", "resumed")
    own = {field: fields.pop(field) for field in names if field in fields}
    prompt = tuple(3 + (sum(map(ord, name)) + index) % 400 for index in range(num_tokens))
    return EngineRequest(name, prompt, SamplingParams(**{"max_tokens": 4, "ignore_eos": True} | fields), **own)


def output(events: list[Event], name: str) -> list[int]:
    return [
        token.token_id
        for event in events
        if isinstance(event, TokensSampled) and event.request_id == name
        for token in event.tokens
    ]


def last(events: list[Event], name: str) -> TokensSampled:
    event = [event for event in events if event.request_id == name][-1]
    assert isinstance(event, TokensSampled)
    return event


def order_of_ends(events: list[Event]) -> list[str]:
    return [event.request_id for event in events if isinstance(event, TokensSampled) and event.finish_reason]
