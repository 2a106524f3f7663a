"""How drafts of an MTP layer are chosen, with a layer that says what it is told to."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from shared.engine.api import BatchItem, SampledToken, SamplingParams
from shared.engine.batch import Batch
from shared.engine.kv.layout import pack
from shared.engine.models.api import DraftStep
from shared.engine.sampling.sampler import Sampler
from shared.engine.speculation.mtp import MtpDrafter

VOCAB, NUM_DRAFTS = 50, 3
LAYOUT = pack(4, {})
SAMPLER = Sampler(VOCAB, ())


class Layer:
    """Has the same logits for every draft, and remembers what it was shown."""

    def __init__(self) -> None:
        self.logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
        self.shown: list[tuple[list[int], list[int]]] = []
        self.states: list[list[float]] = []

    def forward(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("the executor runs the model")

    def extend(self, batch: Batch, states: torch.Tensor, *_: Any) -> DraftStep:
        self.shown.append((batch.token_ids.tolist(), batch.positions.tolist()))
        self.states.append(states.flatten().tolist())
        num = len(batch.sampled_rows)
        return DraftStep(self.logits.expand(num, -1), torch.zeros(num, 1), [])

    def advance(self, batch: Batch, last: DraftStep, going_on: Sequence[int], *_: Any) -> DraftStep:
        self.shown.append((batch.token_ids.tolist(), batch.positions.tolist()))
        return DraftStep(self.logits.expand(len(going_on), -1), last.states, [])


def tokens(*token_ids: int) -> tuple[SampledToken, ...]:
    return tuple(map(SampledToken, token_ids))


def item(**changes: Any) -> BatchItem:
    made = BatchItem("r", [7, 8, 9], 0, [0, 1, 2], True, SamplingParams(), 3, [7, 8, 9], 0, NUM_DRAFTS)
    return replace(made, **changes)


def propose(layer: Layer, asked: BatchItem, chosen: tuple[SampledToken, ...]) -> tuple[int, ...]:
    states = torch.arange(len(asked.token_ids), dtype=torch.float32)[:, None]
    (choice,) = MtpDrafter(layer, SAMPLER, LAYOUT)([asked], [chosen], states, torch.empty(0))
    assert choice is not None
    return choice.drafts


def test_the_layer_follows_one_token_ahead_and_then_goes_on_alone() -> None:
    layer = Layer()
    drafts = propose(layer, item(), tokens(10))
    assert layer.shown[0] == ([8, 9, 10], [0, 1, 2])
    assert layer.shown[1:] == [([drafts[0]], [3]), ([drafts[1]], [4])]
    assert layer.states == [[0, 1, 2]]


def test_a_part_that_is_not_the_last_is_followed_by_the_token_behind_it() -> None:
    layer, part = Layer(), item(sample=False, num_wanted=0, following=10, history=())
    states = torch.zeros(3, 1)
    assert MtpDrafter(layer, SAMPLER, LAYOUT)([part], [None], states, torch.empty(0)) == [None]
    assert layer.shown == [([8, 9, 10], [0, 1, 2])]


def test_the_layer_does_not_follow_drafts_that_were_wrong() -> None:
    layer = Layer()
    verified = item(token_ids=[9, 20, 21, 22], start=2, num_drafts=3)
    propose(layer, verified, tokens(20, 30))
    assert layer.shown[0] == ([20, 30], [2, 3])
    assert layer.states == [[0, 1]]
    assert layer.shown[1][1] == [4]


def test_a_draft_is_drawn_with_the_random_number_of_its_position() -> None:
    """So a layer that is of the model's mind is always right."""
    sampling = SamplingParams(temperature=1.0, seed=5)
    drafts = propose(layer := Layer(), item(sampling=sampling), tokens(10))
    model = [
        SAMPLER(layer.logits, [item(sampling=sampling, token_ids=[0], start=position - 1)])[0][0].token_id
        for position in (4, 5, 6)
    ]
    assert list(drafts) == model
    assert len(set(model)) > 1


def test_penalties_count_drafts_as_the_model_would() -> None:
    sampling = SamplingParams(presence_penalty=1000.0)
    drafts = propose(layer := Layer(), item(sampling=sampling), tokens(int(Layer().logits.argmax())))
    assert list(drafts) == layer.logits[0].argsort(descending=True)[1:4].tolist()


def test_a_sequence_that_wants_no_drafts_is_followed_all_the_same() -> None:
    layer = Layer()
    assert propose(layer, item(num_wanted=0), tokens(10)) == ()
    assert layer.shown == [([8, 9, 10], [0, 1, 2])]
