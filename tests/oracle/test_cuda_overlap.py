"""Steps launched one behind the other on a GPU, and tokens chosen there. Needs an NVIDIA GPU, Triton and FlashInfer."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.launched import InOrder
from shared.engine.api import BatchItem, EngineRequest, SamplingParams, awaited
from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.kernels import cuda_choice
from shared.engine.models import dense_shapes
from shared.engine.models.config import parse
from shared.engine.sampling.batched import BatchedSampler
from shared.engine.sampling.sampler import Sampler
from shared.models.store import default_cache
from tests.law.worker import Worker
from tests.unit.drawing import CUTS, MIXED, item, rows
from tests.unit.test_batched_sampling import PENALTIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
}
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.9, "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"num_logprobs": 3, "logit_bias": ((7, 1.5),), "min_tokens": 90},
    {"num_prompt_logprobs": 3},
]


def write(model_dir: Path) -> None:
    """A random model whose heads the GPU path takes."""
    chance = torch.Generator().manual_seed(5)
    made = {
        name: torch.randn(shape, generator=chance) * 0.1 if len(shape) > 1 else torch.ones(shape)
        for name, shape in dense_shapes.shapes(parse(CONFIG)).items()
    }
    save_file(made, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> TorchExecutor:
    path = tmp_path_factory.mktemp("model")
    write(path)
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda", "kernels": "cuda", "num_threads": 1}
    return load_executor(path, model_name="tiny", page_size=16, num_pages=64, **settings)


@pytest.mark.parametrize("params", WAYS, ids=str)
def test_tokens_are_those_of_steps_in_order(params: dict[str, Any], executor: TorchExecutor) -> None:
    """All sequences come at once and none ends early, so that both engines make the same batches, bit for bit."""
    found = []
    for kind in (InOrder(executor), executor):
        worker = Worker(kind, max_step_tokens=48)
        for number, length in enumerate((5, 16, 40, 90)):
            prompt = random.Random(number).choices(range(3, 512), k=length)
            sampling = SamplingParams(**{"max_tokens": 100, "ignore_eos": True, "seed": number} | params)
            worker.submit(EngineRequest(str(number), tuple(prompt), sampling))
        worker.finish()
        assert worker.num_held() == 0
        found.append((worker.outputs, worker.told))
    assert found[0] == found[1]
    assert all(len(tokens) == 100 for tokens in found[1][0].values())
    assert sum(map(len, found[1][1].values())) == ("num_prompt_logprobs" in params) * (4 + 15 + 39 + 89)


def decoding(params: dict[str, Any]) -> list[BatchItem]:
    """Two sequences about to compute token 20."""
    sampling = SamplingParams(**{"seed": 3} | params)
    return [
        BatchItem(str(place), [9 + place], 20, range(4 * place, 4 * place + 4), True, sampling, 4, [9 + place] * 21)
        for place in range(2)
    ]


def following(items: list[BatchItem], number: int) -> list[BatchItem]:
    return [replace(each, token_ids=[awaited(place)], start=20 + number) for place, each in enumerate(items)]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("params", WAYS, ids=str)
def test_a_launch_waits_for_nothing(params: dict[str, Any], executor: TorchExecutor) -> None:
    items = decoding(params)
    for _ in range(2):  # compiles, captures, and fills the allocators
        executor.forward(items)
        executor.forward(following(items, 1))
    torch.cuda.set_sync_debug_mode("error")
    steps = [executor.launch(items), executor.launch(following(items, 1))]
    assert all(step.chosen() for step in steps)


@pytest.mark.usefixtures("no_waiting")
def test_a_launch_that_tells_of_a_prompt_waits_for_nothing(executor: TorchExecutor) -> None:
    prompt = list(range(3, 43))
    item = BatchItem("r", prompt, 0, range(4), True, SamplingParams(num_prompt_logprobs=3), 40, prompt)
    told = replace(item, logprob_rows=range(39))
    for _ in range(2):
        executor.forward([told])
    torch.cuda.set_sync_debug_mode("error")
    [chosen] = executor.launch([told]).chosen()
    assert chosen is not None
    assert len(chosen.prompt_logprobs) == 39


@pytest.mark.parametrize("params", WAYS, ids=str)
def test_steps_queued_behind_a_busy_device_do_not_overwrite_each_others_inputs(
    params: dict[str, Any], executor: TorchExecutor
) -> None:
    """Nothing of them is copied before all of them are launched."""
    items = decoding(params)
    executor.forward(items)
    in_order, known = [], [[*each.history[:-1], *each.token_ids] for each in items]
    for number in range(5):
        late = [
            replace(each, token_ids=history[-1:], start=20 + number, history=list(history))
            for each, history in zip(items, known, strict=True)
        ]
        in_order.append(executor.forward(late))
        for history, chosen in zip(known, in_order[-1], strict=True):
            assert chosen is not None
            history.append(chosen.tokens[0].token_id)
    torch.cuda._sleep(500_000_000)
    steps = [executor.launch(items)]
    for number in range(1, 5):
        late = [
            replace(each, history=history[: 20 + number])
            for each, history in zip(following(items, number), known, strict=True)
        ]
        steps.append(executor.launch(late))
    assert [step.chosen() for step in steps] == in_order


@pytest.mark.parametrize("in_one_launch", [False, True])
def test_choosing_there_is_choosing_here(in_one_launch: bool) -> None:
    """Of 48 rows that are drawn, exp() or a logarithm that differs in its last bit decides none."""
    chance = random.Random(4)
    kinds = [*MIXED, *PENALTIES, *({"temperature": 1.0} | cut for cut in CUTS)]
    items = [
        item(chance.choices(range(3, 900), k=chance.randrange(2, 60)), 1, **({"seed": place} | chance.choice(kinds)))
        for place in range(48)
    ]
    given = rows(48, 1000)
    kernel = cuda_choice.find(torch.device("cuda", 0), default_cache() / "kernels", 1000)
    twin = Sampler(1000, (5,))(given, items)
    ours = BatchedSampler(1000, (5,), kernel if in_one_launch else None)(given.cuda(), items)
    assert [token.token_id for (token,) in ours] == [token.token_id for (token,) in twin]
    assert [[token_id for token_id, _ in token.top] for (token,) in ours] == [
        [token_id for token_id, _ in token.top] for (token,) in twin
    ]
