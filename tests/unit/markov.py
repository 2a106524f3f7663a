"""A model small enough that the probability of every output is known: the next token depends on the last one and on its
position. It has a layer that proposes drafts, which is of a mind of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shared.engine.api import EngineRequest, EngineSpec, Executor, Recorded, SamplingParams, TokensSampled
from shared.engine.batch import Batch
from shared.engine.engine import Engine
from shared.engine.executor import TorchExecutor
from shared.engine.kv.layout import KvLayout, pack
from shared.engine.kv.memory import HostMemory
from shared.engine.kv.store import KvStore
from shared.engine.models.api import DraftLayer, DraftStep
from shared.engine.speculation.speculator import Speculation
from tests.unit.drawing import plain_distribution

VOCAB, PERIOD = 4, 3


class Markov:
    """Satisfies `Model`, and `DraftLayer` for itself. Its pages hold nothing that matters."""

    vocab_size, max_position, num_torch_threads = VOCAB, 1_000, 1
    eos_token_ids: tuple[int, ...] = ()
    recorded: Recorded | None = None
    arithmetic = "float32"
    draft_layer: DraftLayer | None

    def __init__(self, *, drafts: bool = True) -> None:
        noise = torch.Generator().manual_seed(4)
        self.logits = torch.randn(PERIOD, VOCAB, VOCAB, generator=noise)
        self.drafted = self.logits + torch.randn(PERIOD, VOCAB, VOCAB, generator=noise)
        self.draft_layer = self if drafts else None

    def layout(self, page_size: int) -> KvLayout:
        return pack(page_size, {"nothing": (1, "uint8", page_size)})

    rank_layout = layout

    def forward(self, batch: Batch, *_: Any) -> Any:
        """Of a model; with a layer that proposes drafts also the states, of which it needs none."""
        rows = self.logits[batch.positions % PERIOD, batch.token_ids][batch.sampled_rows]
        return rows if self.draft_layer is None else (rows, torch.zeros(batch.num_tokens, 1))

    def extend(self, batch: Batch, *_: Any) -> DraftStep:
        rows = self.drafted[(batch.positions + 1) % PERIOD, batch.token_ids][batch.sampled_rows]
        return DraftStep(rows, torch.zeros(len(rows), 1), ())

    def advance(self, batch: Batch, *_: Any) -> DraftStep:
        return self.extend(batch)


@dataclass(frozen=True)
class Trial:
    """Many seeds of one request, and what they should come to."""

    sampling: SamplingParams
    prompt: tuple[int, ...]

    def requests(self, count: int) -> list[EngineRequest]:
        return [
            EngineRequest(str(seed), self.prompt, replace(self.sampling, seed=seed * 7_919)) for seed in range(count)
        ]

    def expected(self, num_tokens: int = 0) -> dict[tuple[int, ...], float]:
        """The probability of each output, or of its first tokens, from the definitions in float64."""
        model, found = Markov(), dict[tuple[int, ...], float]({(): 1.0})
        for _ in range(num_tokens or self.sampling.max_tokens):
            rows = {output: self._next(model, output) for output in found}
            found = {(*output, n): found[output] * float(rows[output][n]) for output in found for n in range(VOCAB)}
        return found

    def _next(self, model: Markov, output: tuple[int, ...]) -> Any:
        history, params = [*self.prompt, *output], self.sampling
        row = model.logits[(len(history) - 1) % PERIOD, history[-1]].double().numpy().copy()
        for token in set(history):
            row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
        for token in set(output):
            row[token] -= params.presence_penalty + output.count(token) * params.frequency_penalty
        for token, bias in params.logit_bias:
            row[token] += bias
        if len(output) < params.min_tokens:
            row[list(params.stop_token_ids)] = -np.inf
        return plain_distribution(torch.from_numpy(row), params)


def executor(page_size: int = 8, *, rejection: bool, drafts: bool = True, behind: bool = False) -> TorchExecutor:
    model, num_pages = Markov(drafts=drafts), 12_000
    layout = model.layout(page_size)
    spec = EngineSpec("markov", VOCAB, 1_000, (), layout, num_pages, "markov")
    return TorchExecutor(model, spec, HostMemory(num_pages, layout.page_bytes), rejection=rejection, behind=behind)


class Clock:
    """Steps take as long as the last three of a list, in turn: what is worth it changes all the time, but for the same
    steps in the same way."""

    def __init__(self) -> None:
        self._now, self._calls = 0.0, 0

    def __call__(self) -> float:
        self._calls += 1
        self._now += (0.001, 0.02, 0.004, 0.0005, 0.03)[self._calls % 5]
        return self._now


def engine(computes: Executor, speculation: Speculation, num_pages: int = 0) -> Engine:
    kv = KvStore(num_pages or computes.spec.num_pages, computes.spec.layout.page_size, 10_000, clock=lambda: 0.0)
    return Engine(
        computes,
        kv,
        max_step_tokens=100_000,
        max_num_sequences=10_000,
        speculation=speculation,
        clock=Clock(),
    )


def outputs(
    serving: Engine, requests: Sequence[EngineRequest], *, together: int = 10_000, num_steps: int = 1_000
) -> dict[str, tuple[int, ...]]:
    """What each request got, earlier output included, at its end or after so many steps. So many run `together`: nobody
    ever waits, for then there would be no drafts."""
    found = {request.request_id: request.output_token_ids for request in requests}
    for wave in range(0, len(requests), together):
        for request in requests[wave : wave + together]:
            serving.submit(request)
        step = 0
        while serving.has_work() and step < num_steps:
            step += 1
            for event in serving.step():
                assert isinstance(event, TokensSampled)
                found[event.request_id] += tuple(token.token_id for token in event.tokens)
    return found
