"""What the law leaves to rejection sampling: the distribution. A tiny GLM, drafted by its own layer, against what the
same model gives every output. Seeds are fixed."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np

from shared.engine import stream
from shared.engine.api import EngineRequest, SamplingParams
from shared.engine.executor import TorchExecutor
from shared.engine.speculation.speculator import Speculation
from tests.law.conftest import TinyModels
from tests.law.test_drafted import FEW_TOKENS
from tests.law.worker import Worker
from tests.unit.drawing import chi_square_bound, plain_distribution

COUNT, PROMPT = 300, tuple(token * 37 % 200 for token in range(11, 45))
SAMPLING = SamplingParams(temperature=1.5, top_p=0.98, logit_bias=FEW_TOKENS, max_tokens=3, ignore_eos=True)
OUTPUTS = list(product([token_id for token_id, _ in FEW_TOKENS], repeat=3))


def expected(executor: TorchExecutor) -> dict[tuple[int, ...], float]:
    """The probability of each output, by the model's logits and the definitions."""

    def next_token(*output: int) -> np.ndarray:
        *_, logits = stream.logits(executor.model, [*PROMPT, *output])
        row = logits[-1].clone()
        for token_id, bias in FEW_TOKENS:
            row[token_id] += bias
        return np.asarray(plain_distribution(row, SAMPLING))

    known = {output[:place]: next_token(*output[:place]) for output in OUTPUTS for place in range(3)}
    return {output: float(np.prod([known[output[:place]][output[place]] for place in range(3)])) for output in OUTPUTS}


def test_outputs_that_an_mtp_layer_drafted_follow_the_models_distribution(tiny_models: TinyModels) -> None:
    executor = tiny_models.make_executor("glm-mtp", rejection=True)(200)
    assert isinstance(executor, TorchExecutor)
    assert not executor.runs_behind
    worker = Worker(executor, speculation=Speculation(2, adaptive=False))
    for seed in range(COUNT):
        worker.submit(EngineRequest(str(seed), PROMPT, replace(SAMPLING, seed=seed * 104_729)))
    worker.finish()
    drafts = worker.engine.draft_counts()
    assert 0.1 < drafts.accepted[0] / drafts.verified[0] < 0.95
    counts = Counter(map(tuple, worker.outputs.values()))
    assert sum(counts.values()) == COUNT
    found = np.array([counts[output] for output in OUTPUTS])
    often = np.array(list(expected(executor).values())) * COUNT
    common = often >= 5
    pairs = [(found[common], often[common]), (found[~common].sum(), max(often[~common].sum(), 1e-3))]
    assert sum(((have - want) ** 2 / want).sum() for have, want in pairs) < chi_square_bound(int(common.sum()))
