"""The kernel of all layers beside its twin: on the CPU as C++ with a coroutine for each lane, and on a GPU."""

import ctypes
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import Batch
from shared.engine.batch import build as built
from shared.engine.kernels import build, cuda_layers, cuda_products, w4a16
from shared.engine.kernels.cuda_layers import CudaLayers, Table
from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.layers import rope
from shared.engine.layers.decoder import DecoderLayer
from shared.engine.models.config import DenseConfig, parse
from shared.engine.models.weights import LayerOf
from shared.engine.parallel.group import Alone
from shared.engine.quantization import nvfp4
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled

PAGE_SIZE, NUM_LAYERS = 16, 2
MATRICES = ("qkv", "output", "gate_up", "down")


@pytest.fixture(scope="module")
def products() -> CudaProducts:
    return CudaProducts(ctypes.CDLL(str(compiled("layers.cu"))))


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and a step of sequences that have so many tokens already."""

    heads: int
    kv_heads: int
    inner: int
    has_extras: bool  # norms of queries and keys, biases
    num_blocks: int | None
    contexts: tuple[int, ...]
    width: int
    hidden: int = 128


CASES = {
    "splits": Case(4, 2, 384, False, 4, (150,), 1),
    "sequences": Case(2, 1, 256, True, 2, (0, 40), 1),
    "drafts": Case(4, 1, 384, True, 3, (70,), 3),
}
# As many blocks as fit the GPU; sizes of several chunks, the last of them short.
GPU_CASES = {
    "one token": Case(18, 2, 4352, False, None, (1000,), 1, hidden=2304),
    "one of a long context": Case(8, 2, 256, True, None, (5000,), 1),
    "sequences": Case(18, 2, 4352, True, None, (0, 70, 1, 300), 1, hidden=2304),
    "drafts": Case(32, 8, 4352, True, None, (500,), 4, hidden=2304),
    "wide": Case(8, 2, 512, True, None, (100, 20), 1, hidden=4224),
    "drafts of two": Case(16, 2, 1152, False, None, (60, 300), 2, hidden=1152),
}


def config(case: Case) -> DenseConfig:
    return parse(
        {
            "architectures": ["Qwen3ForCausalLM" if case.has_extras else "LlamaForCausalLM"],
            "vocab_size": 64,
            "hidden_size": case.hidden,
            "intermediate_size": case.inner,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": case.heads,
            "num_key_value_heads": case.kv_heads,
            "head_dim": 128,
        }
    )


def layer(case: Case, chance: torch.Generator) -> LayerOf[w4a16.Weight]:
    hidden = case.hidden

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance, device=chance.device).mul(float(shape[-1]) ** -0.5).bfloat16()

    def matrix(rows: int, columns: int, gated: bool = False) -> w4a16.PackedWeight:
        tensor = nvfp4.quantize(random(rows, columns))
        return w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2, gated=gated)

    heads = (case.heads + 2 * case.kv_heads) * 128
    norm = 1 + random(128) if case.has_extras else None
    return LayerOf(
        input_norm=1 + random(hidden),
        qkv=matrix(heads, hidden),
        qkv_bias=random(heads) if case.has_extras else None,
        q_norm=norm,
        k_norm=norm,
        output=matrix(hidden, case.heads * 128),
        output_bias=None,
        post_norm=1 + random(hidden),
        gate_up=matrix(2 * case.inner, hidden, gated=True),
        gate_up_bias=None,
        down=matrix(hidden, case.inner),
        down_bias=random(hidden) if case.has_extras else None,
    )


def unpacked(packed: LayerOf[w4a16.Weight]) -> LayerOf[torch.Tensor]:
    found: dict[str, Any] = {}
    for field in fields(packed):
        part = getattr(packed, field.name)
        found[field.name] = w4a16.unpack(part)[0] if field.name in MATRICES else part if part is None else part.float()
    return LayerOf(**found)


def parts(
    packed: LayerOf[w4a16.Weight],
) -> tuple[list[w4a16.Weight], list[torch.Tensor | None], list[torch.Tensor | None]]:
    return (
        [getattr(packed, name) for name in MATRICES],
        [getattr(packed, f"{name}_bias") for name in MATRICES],
        [packed.input_norm, packed.post_norm, packed.q_norm, packed.k_norm],
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layers_equal_their_twin(products: CudaProducts, case: Case) -> None:
    assert_equal(products, case, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_layers_on_a_gpu_equal_their_twin(case: Case) -> None:
    capability, nvcc = torch.cuda.get_device_capability(), build.cuda_compiler()
    library = cuda_products.load(build.cuda_library(default_cache() / "kernels", nvcc, capability))
    assert_equal(CudaProducts(library), case, torch.device("cuda"))


def assert_equal(products: CudaProducts, case: Case, device: torch.device) -> None:
    """In two steps of the same, so that the second begins with what the first has left of the counters."""
    chance, made = torch.Generator(device).manual_seed(1), config(case)
    layers = [layer(case, chance) for _ in range(NUM_LAYERS)]
    given = [cuda_layers.Layer(*parts(packed)) for packed in layers]
    assert cuda_layers.obstacle(products, made, given, case.num_blocks) is None
    kernel = CudaLayers(products, made, given, case.num_blocks)
    assert kernel.takes(len(case.contexts), case.width)
    batch = step(case).to(device)
    num_pages = int(batch.page_ids.max()) + 1
    shape = (num_pages, NUM_LAYERS, 2, case.kv_heads, PAGE_SIZE, 128)
    kv = torch.randn(shape, generator=chance, device=device).bfloat16()
    x = torch.randn(batch.num_tokens, case.hidden, generator=chance, device=device).bfloat16()
    angles = rope.table(rope.inverse_frequencies(made).to(device), batch.positions)
    expected, theirs = x.float(), kv.float()
    for index, packed in enumerate(layers):
        expected = DecoderLayer(made, unpacked(packed), Alone())(expected, angles, batch, theirs[:, index])
    sequence = torch.repeat_interleave(batch.query_starts.diff())
    slots = batch.page_ids[batch.page_starts[sequence] + batch.positions // PAGE_SIZE] * PAGE_SIZE
    table = Table(slots + batch.positions % PAGE_SIZE, batch.page_ids, batch.page_starts, batch.context_lens)
    again, before = x.clone(), kv.clone()
    kernel(x, angles, table, kv)
    torch.testing.assert_close(x.float(), expected, rtol=0.02, atol=0.03)
    torch.testing.assert_close(kv.float(), theirs, rtol=0.02, atol=0.03)
    kernel(again, angles, table, before)
    assert torch.equal(x, again)


def step(case: Case) -> Batch:
    """Pages in no order."""
    lengths = [-(-(context + case.width) // PAGE_SIZE) for context in case.contexts]
    pages = iter(torch.randperm(sum(lengths) + 3, generator=torch.Generator().manual_seed(2)).tolist())
    items = [
        BatchItem(
            str(place), [3] * case.width, context, [next(pages) for _ in range(length)], True, SamplingParams(), 0
        )
        for place, (context, length) in enumerate(zip(case.contexts, lengths, strict=True))
    ]
    return built(items, PAGE_SIZE)
