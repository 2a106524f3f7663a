"""The law across ranks: one model on one, two or four ranks says the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from shared.engine.api import BatchItem, Executor, SamplingParams
from shared.engine.parallel.executor import ParallelExecutor
from shared.engine.parallel.partition import ExpertSplit
from shared.engine.speculation.speculator import Speculation
from shared.errors import WorkerLost
from tests.law import test_prompt_logprobs as told
from tests.law import test_same_tokens as laws
from tests.law.conftest import GREEDY, NUM_TOKENS, SAMPLED, Law, TinyModels
from tests.law.ranks import AloneWorker, RankedExecutor, RankedWorker, Ranks
from tests.law.test_drafted import FEW_TOKENS, NUM_DRAFTS
from tests.law.worker import Worker

# Four ranks have each of Llama's two KV heads twice, and one of Qwen3's four each.
FAMILIES = ("llama-8-heads", "qwen3-8-heads", "glm")


@dataclass(frozen=True)
class Model:
    """A small model; what is right is what one rank alone says."""

    name: str
    tiny_models: TinyModels

    def alone(self, num_pages: int) -> Executor:
        return self.tiny_models.make_executor(self.name)(num_pages)

    def on(self, ranks: Ranks, num_pages: int, split: ExpertSplit = "experts", **how: bool) -> RankedExecutor:
        return ranks.executor(self.tiny_models.path(self.name), num_pages, split, **how)

    def law(self, ranks: Ranks, sampling: SamplingParams, split: ExpertSplit = "experts") -> Law:
        """Workers are groups of ranks."""
        law = self.tiny_models.law(self.name, "", sampling)
        return replace(law, make_executor=lambda num_pages: self.on(ranks, num_pages, split), is_exact=False)

    def drafted(self, ranks: Ranks, sampling: SamplingParams, split: ExpertSplit = "experts") -> Law:
        """With drafts of the model's own layer, some of them right."""
        law = self.law(ranks, replace(sampling, logit_bias=FEW_TOKENS), split)
        return replace(law, speculation=Speculation(NUM_DRAFTS, adaptive=False))


class Deaf:
    """A follower that takes batches and does nothing."""

    def follow(self, batch: Sequence[BatchItem]) -> None:
        pass

    def is_gone(self) -> bool:
        return False


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Model:
    return Model(request.param, tiny_models)


@pytest.fixture(scope="module")
def drafting_model(tiny_models: TinyModels) -> Model:
    return Model("glm-mtp", tiny_models)


# Of what does not depend on how many share the model out: that four do is in the other laws.
by_two = pytest.mark.parametrize("ranks", [2], ids=["two ranks"], indirect=True)


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    made = Ranks(request.param, in_turns=True)
    yield made
    made.close()


@by_two
def test_sampled_preempted_and_batched(model: Model, ranks: Ranks) -> None:
    laws.test_preempted(model.law(ranks, SAMPLED))


def test_chunked_with_whole_experts(model: Model, ranks: Ranks) -> None:
    laws.test_chunked_at_odd_sizes(17, model.law(ranks, GREEDY, "experts"))


def test_prompts_are_told_of_by_all_ranks_as_by_one(model: Model, ranks: Ranks) -> None:
    told.test_chunked_at_odd_sizes(33, model.law(ranks, GREEDY))


def test_prefix_cached_with_split_experts(model: Model, ranks: Ranks) -> None:
    laws.test_prefix_cached(33, model.law(ranks, GREEDY, "matrices"))


def test_continued_by_several_ranks_where_one_was_lost(model: Model, ranks: Ranks) -> None:
    laws.test_continued_on_another_worker(9, model.law(ranks, SAMPLED))


@pytest.mark.parametrize("split_side", ["prefill", "decode"])
def test_prefilled_by_another_number_of_ranks(split_side: str, model: Model, ranks: Ranks) -> None:
    law = model.law(ranks, GREEDY)
    split, alone = RankedWorker(model.on(ranks, 64)), AloneWorker(model.alone(64))
    prefill, decode = (split, alone) if split_side == "prefill" else (alone, split)
    prompt = law.prompt(49)
    first, pages = decode.pull(law.request(prompt), prefill)
    assert first + decode.run(law.request(prompt, output=first), pages) == law.tokens(prompt)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("split", ["experts", "matrices"])
def test_drafted_by_the_layer_that_all_ranks_share(
    split: ExpertSplit, sampling: SamplingParams, drafting_model: Model, ranks: Ranks
) -> None:
    law = drafting_model.drafted(ranks, sampling, split)
    prompt, worker = law.prompt(40), law.worker()
    assert worker.run(law.request(prompt)) == law.tokens(prompt)
    counts = worker.engine.draft_counts()
    assert 0 < sum(counts.accepted) < sum(counts.verified)
    assert worker.engine.load().num_steps < NUM_TOKENS


def test_all_ranks_verify_by_rejection_as_one_would(
    drafting_model: Model, ranks: Ranks, tiny_models: TinyModels
) -> None:
    """Each remembers what its drafts were drawn from: no rank is told."""
    law = drafting_model.drafted(ranks, SAMPLED)
    alone = Worker(tiny_models.make_executor("glm-mtp", rejection=True)(64), speculation=law.speculation)
    several = RankedWorker(drafting_model.on(ranks, 64, rejection=True), law.speculation)
    prompt = law.prompt(40)
    assert several.run(law.request(prompt)) == alone.run(law.request(prompt)) != law.tokens(prompt)
    assert sum(several.engine.draft_counts().accepted) > 0


@by_two
def test_drafted_and_chunked(drafting_model: Model, ranks: Ranks) -> None:
    laws.test_chunked_at_odd_sizes(7, drafting_model.drafted(ranks, GREEDY))


@by_two
def test_drafted_and_continued_by_several_ranks_where_one_was_lost(drafting_model: Model, ranks: Ranks) -> None:
    laws.test_continued_on_another_worker(9, drafting_model.drafted(ranks, SAMPLED))


@by_two
def test_drafted_preempted_and_batched(drafting_model: Model, ranks: Ranks) -> None:
    laws.test_preempted(drafting_model.drafted(ranks, SAMPLED))


@pytest.mark.parametrize("split_side", ["prefill", "decode"])
def test_drafted_behind_a_prompt_of_another_number_of_ranks(
    split_side: str, drafting_model: Model, ranks: Ranks
) -> None:
    """What is handed over has the drafting layer's state, and the drafts that one rank would have proposed."""
    law = drafting_model.drafted(ranks, SAMPLED)
    several = RankedWorker(drafting_model.on(ranks, 64), law.speculation)
    one, other = (AloneWorker(drafting_model.alone(64), law.speculation) for _ in range(2))
    prefill, decode = (several, one) if split_side == "prefill" else (one, several)
    prompt = law.prompt(49)
    first, pages = decode.pull(law.request(prompt), prefill)
    other.run(replace(law.request(prompt), prefill_only=True))
    drafts = prefill.drafts["r"]
    assert drafts == other.drafts["r"]
    assert len(drafts) == NUM_DRAFTS
    decode.submit(replace(law.request(prompt, output=first), draft_token_ids=drafts), pages)
    decode.finish()
    assert first + decode.outputs["r"] == law.tokens(prompt)
    assert sum(decode.engine.draft_counts().accepted) > 0


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_over_the_process_group_that_processes_use(num_ranks: int, drafting_model: Model) -> None:
    ranks = Ranks(num_ranks)
    laws.test_chunked_at_odd_sizes(33, drafting_model.drafted(ranks, SAMPLED))
    ranks.close()


def test_a_rank_that_is_late_ends_the_engine_with_a_fault(model: Model) -> None:
    ranks = Ranks(2, timeout_s=0.5)
    worker = Worker(ParallelExecutor(model.on(ranks, 64).executors[0], [Deaf()], patience_s=30.0))
    worker.submit(model.law(ranks, GREEDY).request([5, 6, 7]))
    with pytest.raises(WorkerLost, match="gone or late"):
        worker.step()
    ranks.close()
