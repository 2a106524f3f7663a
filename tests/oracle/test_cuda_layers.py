"""The kernel of all layers beside its twin, on the CPU: compiled as C++ with a thread for each lane."""

import ctypes
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build as built
from shared.engine.kernels import build, cuda_layers, w4a16
from shared.engine.kernels.cuda_layers import CudaLayers, Table
from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.layers import rope
from shared.engine.layers.decoder import DecoderLayer
from shared.engine.models.config import DenseConfig, parse
from shared.engine.models.weights import LayerOf
from shared.engine.parallel.group import Alone
from shared.engine.quantization import nvfp4

EMULATION = Path(__file__).parent / "cuda_on_cpu"
PAGE_SIZE, NUM_PAGES, NUM_LAYERS = 16, 16, 2
MATRICES = ("qkv", "output", "gate_up", "down")


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> CudaProducts:
    gxx, path = build.compiler(), tmp_path_factory.mktemp("cuda") / "layers.so"
    if gxx is None:
        pytest.skip("no g++ found")
    folders = ("-I", EMULATION, "-I", build.CUDA_SOURCES)
    flags = ("-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-x", "c++")
    subprocess.run([gxx, *flags, *folders, build.CUDA_SOURCES / "layers.cu", "-o", path], check=True, timeout=120)
    return CudaProducts(ctypes.CDLL(str(path)))


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and a step of sequences that have so many tokens already."""

    heads: int
    kv_heads: int
    inner: int
    has_extras: bool  # norms of queries and keys, biases
    num_blocks: int
    contexts: tuple[int, ...]
    width: int


CASES = {
    "many heads": Case(18, 2, 256, False, 11, (0, 70), 1),
    "drafts": Case(4, 1, 2176, True, 9, (150,), 3),
}


def config(case: Case) -> DenseConfig:
    return parse(
        {
            "architectures": ["Qwen3ForCausalLM" if case.has_extras else "LlamaForCausalLM"],
            "vocab_size": 64,
            "hidden_size": 128,
            "intermediate_size": case.inner,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": case.heads,
            "num_key_value_heads": case.kv_heads,
            "head_dim": 128,
        }
    )


def layer(case: Case, chance: torch.Generator) -> LayerOf[w4a16.Weight]:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=chance) * shape[-1] ** -0.5).bfloat16()

    def matrix(rows: int, columns: int, gated: bool = False) -> w4a16.PackedWeight:
        tensor = nvfp4.quantize(random(rows, columns))
        return w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2, gated=gated)

    heads = (case.heads + 2 * case.kv_heads) * 128
    norm = 1 + random(128) if case.has_extras else None
    return LayerOf(
        input_norm=1 + random(128),
        qkv=matrix(heads, 128),
        qkv_bias=random(heads) if case.has_extras else None,
        q_norm=norm,
        k_norm=norm,
        output=matrix(128, case.heads * 128),
        output_bias=None,
        post_norm=1 + random(128),
        gate_up=matrix(2 * case.inner, 128, gated=True),
        gate_up_bias=None,
        down=matrix(128, case.inner),
        down_bias=random(128) if case.has_extras else None,
    )


def unpacked(packed: LayerOf[w4a16.Weight]) -> LayerOf[torch.Tensor]:
    found = {field.name: getattr(packed, field.name) for field in fields(packed)}
    return LayerOf(**{name: w4a16.unpack(part)[0] if name in MATRICES else _wide(part) for name, part in found.items()})


def parts(
    packed: LayerOf[w4a16.Weight],
) -> tuple[list[w4a16.Weight], list[torch.Tensor | None], list[torch.Tensor | None]]:
    return (
        [getattr(packed, name) for name in MATRICES],
        [getattr(packed, f"{name}_bias") for name in MATRICES],
        [packed.input_norm, packed.post_norm, packed.q_norm, packed.k_norm],
    )


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layers_equal_their_twin(products: CudaProducts, case: Case) -> None:
    chance, made = torch.Generator().manual_seed(1), config(case)
    layers = [layer(case, chance) for _ in range(NUM_LAYERS)]
    given = [cuda_layers.Layer(*parts(packed)) for packed in layers]
    assert cuda_layers.obstacle(products, made, given, case.num_blocks) is None
    kernel = CudaLayers(products, made, given, case.num_blocks)
    assert kernel.takes(len(case.contexts), case.width)
    pages = iter(torch.randperm(NUM_PAGES, generator=chance).tolist())
    items = []
    for context in case.contexts:
        own = [next(pages) for _ in range(-(-(context + case.width) // PAGE_SIZE))]
        tokens = [3] * case.width
        items.append(BatchItem(str(context), tokens, context, own, True, SamplingParams(), context + case.width))
    batch = built(items, PAGE_SIZE)
    kv = torch.randn(NUM_PAGES, NUM_LAYERS, 2, case.kv_heads, PAGE_SIZE, 128, generator=chance).bfloat16()
    theirs = kv.float()
    x = torch.randn(batch.num_tokens, 128, generator=chance).bfloat16()
    angles = rope.table(rope.inverse_frequencies(made), batch.positions)
    expected = x.float()
    for index, packed in enumerate(layers):
        expected = DecoderLayer(made, unpacked(packed), Alone())(expected, angles, batch, theirs[:, index])
    sequence = torch.repeat_interleave(batch.query_starts.diff())
    slots = batch.page_ids[batch.page_starts[sequence] + batch.positions // PAGE_SIZE] * PAGE_SIZE
    table = Table(slots + batch.positions % PAGE_SIZE, batch.page_ids, batch.page_starts, batch.context_lens)
    again, before = x.clone(), kv.clone()
    kernel(x, angles, table, kv)
    close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(x.float(), expected, **close)
    torch.testing.assert_close(kv.float(), theirs, **close)
    kernel(again, angles, table, before)  # with the counters that the first step has left
    assert torch.equal(x, again)
