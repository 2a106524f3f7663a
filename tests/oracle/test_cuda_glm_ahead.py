"""Verifications of drafts launched one behind the other on a GPU, where it is not known how many were right. Needs an
NVIDIA GPU and Triton."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bench.launched import InOrder
from shared.engine.api import BatchItem, Chosen, EngineRequest, SamplingParams, awaited
from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.speculation.speculator import Speculation
from tests.law.worker import Worker
from tests.oracle import random_glm
from tests.oracle.test_cuda_glm import NUM_PAGES, PAGE_SIZE, VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_DRAFTS = 3
# A random layer is never right about a random model, unless few tokens are left to choose from.
FEW_TOKENS = SamplingParams(logit_bias=((5, 200.0), (6, 200.0), (7, 200.0)), ignore_eos=True)
DRAWN = replace(FEW_TOKENS, temperature=1.0)
WAYS = {
    "greedy": FEW_TOKENS,
    "drawn": DRAWN,
    "drawn of a nucleus": replace(DRAWN, top_p=0.9, top_k=40, min_p=0.01),
    "logprobs": replace(DRAWN, num_logprobs=3),
}


def made(path: Path, *, shares: bool, rejection: bool = False) -> TorchExecutor:
    random_glm.write(path, index_share_for_mtp_iteration=shares, **VARIANTS["nothing to choose"])
    return load_executor(
        path, model_name="random", dtype="bfloat16", page_size=PAGE_SIZE, device="cuda", num_threads=1,
        num_pages=NUM_PAGES, mtp=True, rejection=rejection,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["as 5.2 shares a selection", "as 5 and 5.1 select anew"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchExecutor:
    return made(tmp_path_factory.mktemp("model"), shares=request.param)


@pytest.fixture(scope="module")
def rejecting(tmp_path_factory: pytest.TempPathFactory) -> TorchExecutor:
    """Verifies by rejection sampling."""
    return made(tmp_path_factory.mktemp("model"), shares=True, rejection=True)


ENGINES = WAYS | {"penalties, which need the host": replace(DRAWN, presence_penalty=0.5)}


@pytest.mark.parametrize("way", ENGINES)
def test_tokens_are_those_of_steps_in_order(way: str, executor: TorchExecutor) -> None:
    require_tokens_of_steps_in_order(way, executor)


@pytest.mark.parametrize("way", ["drawn", "drawn of a nucleus", "penalties, which need the host"])
def test_rejected_drafts_leave_the_tokens_of_steps_in_order(way: str, rejecting: TorchExecutor) -> None:
    require_tokens_of_steps_in_order(way, rejecting)


def require_tokens_of_steps_in_order(way: str, executor: TorchExecutor) -> None:
    """As long as nobody is at the end, so that both engines make the same batches, bit for bit."""
    found = []
    for kind in (InOrder(executor), executor):
        worker = Worker(kind, max_step_tokens=48, speculation=Speculation(NUM_DRAFTS, adaptive=False))
        for number, length in enumerate((5, 16, 40, 90)):
            prompt = [(7 * number + 3 * place) % 1000 for place in range(length)]
            worker.submit(EngineRequest(str(number), tuple(prompt), replace(ENGINES[way], max_tokens=100, seed=number)))
        worker.finish()
        counts = worker.engine.draft_counts()
        assert 0 < sum(counts.accepted) < sum(counts.verified)
        assert worker.num_held() == 0
        found.append(worker.outputs)
    assert all(len(tokens) == 100 for tokens in found[1].values())
    assert [each[:30] for each in found[0].values()] == [each[:30] for each in found[1].values()]


@dataclass
class Told:
    """A sequence whose drafts are verified step by step."""

    name: str
    sampling: SamplingParams
    tokens: list[int]
    drafts: Sequence[int] = ()

    def item(self) -> BatchItem:
        """The next verification; of a prompt at first."""
        start = 0 if not self.drafts else len(self.tokens) - 1
        pages, token_ids = range(24 * int(self.name), 24 * int(self.name) + 24), [*self.tokens[start:], *self.drafts]
        return BatchItem(
            self.name, token_ids, start, pages, True, self.sampling, 4, list(self.tokens), len(self.drafts), NUM_DRAFTS
        )

    def take(self, chosen: Chosen | None) -> None:
        assert chosen is not None
        self.tokens += [token.token_id for token in chosen.tokens]
        self.drafts = chosen.drafts


def begun(way: str, executor: TorchExecutor) -> list[Told]:
    """Four sequences behind their prompts, about to have drafts verified."""
    told = [Told(str(place), replace(WAYS[way], seed=place), [9 + place, 4, 5, 30]) for place in range(4)]
    for each, chosen in zip(told, executor.forward([each.item() for each in told]), strict=True):
        each.take(chosen)
    return told


def behind(items: Sequence[BatchItem]) -> list[BatchItem]:
    """The next verification, launched behind one of these parts."""
    num = len(items)
    return [
        replace(
            item,
            token_ids=[awaited(place + number * num) for number in range(1 + NUM_DRAFTS)],
            start=item.position,
            num_drafts=NUM_DRAFTS,
            num_in_doubt=item.num_drafts,
        )
        for place, item in enumerate(items)
    ]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("way", WAYS)
def test_a_launch_waits_for_nothing(way: str, executor: TorchExecutor) -> None:
    require_no_waiting(way, executor)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("way", WAYS)
def test_a_launch_that_rejects_drafts_waits_for_nothing(way: str, rejecting: TorchExecutor) -> None:
    require_no_waiting(way, rejecting)


def require_no_waiting(way: str, executor: TorchExecutor) -> None:
    items = [each.item() for each in begun(way, executor)]
    for _ in range(2):  # compiles, captures, and fills the allocators
        executor.forward(items)
        executor.forward(behind(items))
    torch.cuda.set_sync_debug_mode("error")
    steps = [executor.launch(items), executor.launch(behind(items))]
    assert all(step.chosen() for step in steps)


@pytest.mark.parametrize("way", WAYS)
def test_steps_queued_behind_a_busy_device_find_where_the_ones_before_end(way: str, executor: TorchExecutor) -> None:
    """Nothing of them is copied before all of them are launched."""
    told, items, in_order = begun(way, executor), list[list[BatchItem]](), list[list[Chosen | None]]()
    for _ in range(6):
        items.append([each.item() for each in told])
        in_order.append(executor.forward(items[-1]))
        for each, chosen in zip(told, in_order[-1], strict=True):
            each.take(chosen)
    num_right = {len(chosen.tokens) - 1 for step in in_order for chosen in step if chosen is not None}
    assert way == "greedy" or len(num_right) > 1
    torch.cuda._sleep(500_000_000)
    steps = [executor.launch(items[0]), *(executor.launch(behind(each)) for each in items[:-1])]
    assert [step.chosen() for step in steps] == in_order
