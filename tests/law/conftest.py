import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shared.engine.api import EngineRequest, Executor, SamplingParams, TokenLogprobs
from shared.engine.sim import SimExecutor, SimModel
from shared.engine.speculation.speculator import Speculation
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL
from shared.page_hash import tenant_key
from tests.law.worker import Worker
from tests.unit.behind import Behind

if TYPE_CHECKING:
    from shared.engine.executor import TorchExecutor

MakeExecutor = Callable[[int], Executor]
NUM_TOKENS = 24
BEHIND, REJECTION = "behind", "rejection"


def sim(num_pages: int) -> Executor:
    model = SimModel(vocab_size=211, eos_token_ids=(), draft_acceptance=0.7)
    return SimExecutor(model, num_pages, sleep=lambda seconds: None)


def behind(executor: Executor) -> Executor:
    """The same, with steps launched one behind the other, and tokens chosen as on a GPU."""
    from shared.engine.executor import TorchExecutor

    if not isinstance(executor, TorchExecutor):
        return Behind(executor)
    return TorchExecutor(executor.model, executor.spec, executor.memory, behind=True)


def write_tiny(name: str, path: Path, **changes: Any) -> None:
    """A small random model."""
    from tests.oracle import tiny_glm, tiny_models, tiny_mtp

    few = {**tiny_glm.FEW_LAYERS, "vocab_size": 211, "eos_token_id": [2], "pad_token_id": 2}
    if name == "glm":  # attends to 8 of the visible tokens, so that every choice of theirs is felt
        tiny_glm.write(path, **few)
    elif name == "glm-mtp":
        tiny_mtp.write(path, **few)
    else:
        tiny_models.write(name, path, **changes)


def load_tiny(path: Path, kv_dtype: str = "auto", **ranks: Any) -> "TorchExecutor":
    """One of them, with a pool of no use: see `another`."""
    from shared.engine.executor import load_executor

    return load_executor(
        path,
        model_name="tiny",
        dtype="float32",
        kv_dtype=kv_dtype,
        page_size=16,
        num_threads=1,
        num_pages=1,
        mtp=True,
        **ranks,
    )


def tiny_model(name: str, path: Path, **changes: Any) -> MakeExecutor:
    """One that is written here."""
    write_tiny(name, path, **changes)
    loaded = load_tiny(path)
    return lambda num_pages: another(loaded, num_pages)


@dataclass(frozen=True)
class Answers:
    """What one model says, by how and what it was asked."""

    tokens: dict[tuple[object, ...], list[int]] = field(default_factory=dict)
    told: dict[tuple[object, ...], list[TokenLogprobs]] = field(default_factory=dict)


@dataclass
class TinyModels:
    """Small models, each of which is written once, loaded once, and asked once for what is right, by all laws."""

    root: Path
    loaded: dict[str, "TorchExecutor"] = field(default_factory=dict)
    answers: dict[str, "Answers"] = field(default_factory=lambda: defaultdict(Answers))

    def path(self, name: str) -> Path:
        """The directory of one."""
        if not (path := self.root / name).exists():
            write_tiny(name, path)
        return path

    def make_executor(self, variant: str, *, rejection: bool = False) -> MakeExecutor:
        """Executors of one, all with the same weights; behind its name `variant` may say how pages are kept."""
        if variant == "sim":
            return sim
        if variant not in self.loaded:
            name, _, kv_dtype = variant.partition(" ")
            self.loaded[variant] = load_tiny(self.path(name), kv_dtype or "auto")
        return lambda num_pages: another(self.loaded[variant], num_pages, rejection=rejection)

    def law(self, variant: str, how: str, sampling: SamplingParams) -> "Law":
        """`how` steps are computed and drafts verified: nothing, BEHIND or REJECTION."""
        in_order = self.make_executor(variant)
        ways: dict[str, MakeExecutor] = {
            "": in_order,
            BEHIND: lambda num_pages: behind(in_order(num_pages)),
            REJECTION: self.make_executor(variant, rejection=True),
        }
        is_exact = "fp8" not in variant  # those are computed in torch
        return Law(ways[how], sampling, in_order=in_order, known=self.answers[variant], is_exact=is_exact)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("models"))


def another(executor: "TorchExecutor", num_pages: int, *, rejection: bool = False) -> "TorchExecutor":
    """One with the same weights and a pool of its own."""
    from shared.engine.executor import TorchExecutor
    from shared.engine.kv.memory import HostMemory

    spec, memory = executor.spec, HostMemory(num_pages, executor.layout.page_bytes)
    return TorchExecutor(executor.model, replace(spec, num_pages=num_pages), memory, rejection=rejection)


def default_model() -> tuple[Path, MakeExecutor]:
    """Its directory, and executors that share the weights, in bfloat16 as it is served: native kernels add in an order
    that depends on positions alone, in either dtype."""
    from shared.engine.executor import load_executor

    path = store.resolve(DEFAULT_MODEL)
    loaded = load_executor(path, model_name="smollm2", dtype="bfloat16", page_size=16, num_threads=1, num_pages=1)
    return path, lambda num_pages: another(loaded, num_pages)


@dataclass(frozen=True)
class Law:
    """One model and one way to choose tokens. Tokens that end a sequence are ignored: all have something to compare.
    What is right is asked only once. Unless it `is_exact`, the last digits of logits depend on the batch."""

    make_executor: MakeExecutor
    sampling: SamplingParams
    speculation: Speculation | None = field(default=None, kw_only=True)
    in_order: MakeExecutor | None = field(default=None, kw_only=True)
    is_exact: bool = field(default=True, kw_only=True)
    known: Answers = field(default_factory=Answers, kw_only=True)

    def worker(self, num_pages: int = 64, max_step_tokens: int = 512) -> Worker:
        return Worker(self.make_executor(num_pages), max_step_tokens, self.speculation)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        return random.Random(seed * 1000 + length).choices(range(3, 211), k=length)

    def request(self, prompt: list[int], name: str = "r", output: list[int] | None = None) -> EngineRequest:
        return EngineRequest(name, tuple(prompt), self.sampling, tuple(output or ()), tenant_key("law"))

    def tokens(self, prompt: list[int]) -> list[int]:
        """The output of a prompt that has an engine to itself and is computed whole, without drafts, step by step."""
        asked, known = (self.sampling, *prompt), self.known.tokens
        if asked not in known:
            known[asked] = Worker((self.in_order or self.make_executor)(64)).run(self.request(prompt))
        return known[asked]


GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.95, seed=7)
SAMPLED = replace(DRAWN, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.1)
PENALIZED = replace(SAMPLED, top_k=50, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1)
CASES = [(model, "", sampling) for model in ("sim", "llama", "qwen3", "glm") for sampling in (GREEDY, SAMPLED)]
CASES += [(model, BEHIND, sampling) for model in ("sim", "llama") for sampling in (GREEDY, SAMPLED)]
CASES += [("glm", BEHIND, SAMPLED)]


def _name(case: tuple[str, str, SamplingParams]) -> str:
    model, how, sampling = case
    return f"{' '.join(filter(None, (model, how)))}-{'sampled' if sampling is SAMPLED else 'greedy'}"


@pytest.fixture(scope="session", params=CASES, ids=_name)
def law(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Law:
    return tiny_models.law(*request.param)
