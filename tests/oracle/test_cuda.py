"""The GPU path beside its twins. Needs an NVIDIA GPU, Triton and FlashInfer."""

from dataclasses import fields, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kernels import build as compiling
from shared.engine.kernels import cuda_products, reference, w4a16
from shared.engine.kernels.dequantized_ahead import DequantizedAhead
from shared.engine.layers.decoder import TorchDecoder
from shared.engine.models.config import DenseConfig, parse
from shared.engine.models.llama import Decoder
from shared.engine.models.weights import DenseWeights, LayerOf, LayerWeights
from shared.engine.parallel.group import Alone
from shared.engine.quantization import nvfp4
from shared.models.store import default_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CACHE = default_cache() / "kernels"
PAGE_SIZE, NUM_PAGES, VOCABULARY = 16, 64, 512
PLAIN = SamplingParams()
FREED_SIZES = (8, 16, 32, 64, 128)
MATRICES = ("qkv", "output", "gate_up", "down")


@cache
def products() -> cuda_products.CudaProducts:
    capability, nvcc = torch.cuda.get_device_capability(), compiling.cuda_compiler()
    return cuda_products.CudaProducts(cuda_products.load(compiling.cuda_library(CACHE, nvcc, capability)))


def config(qk_norm: bool) -> DenseConfig:
    return parse(
        {
            "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 768,
            "intermediate_size": 1024,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
        }
    )


class Weights(DenseWeights):
    """Equal whenever they are asked for."""

    def __init__(self, made: DenseConfig, packed: bool) -> None:
        self.config, self._chance, self._is_packed = made, torch.Generator("cuda"), packed

    def embedding(self) -> torch.Tensor:
        self._chance.manual_seed(100)
        return self._random(VOCABULARY, 768)

    def head(self) -> torch.Tensor:
        self._chance.manual_seed(101)
        return self._random(VOCABULARY, 768)

    def final_norm(self) -> torch.Tensor:
        self._chance.manual_seed(102)
        return 1 + self._random(768)

    def packed_head(self) -> w4a16.Weight:
        return self.head()

    def layer(self, index: int) -> LayerWeights:
        layer = self._made(index)
        if not self._is_packed:
            return layer
        rounded = {name: nvfp4.dequantize(nvfp4.quantize(getattr(layer, name))) for name in MATRICES}
        return replace(layer, **rounded)

    def packed_layer(self, index: int) -> LayerOf[w4a16.Weight]:
        layer = self._made(index)
        found = {field.name: getattr(layer, field.name) for field in fields(layer)}
        if self._is_packed:
            for name in MATRICES:
                tensor = nvfp4.quantize(found[name])
                found[name] = w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2, gated=name == "gate_up")
        return LayerOf(**found)

    def _made(self, index: int) -> LayerWeights:
        self._chance.manual_seed(index)
        norm = 1 + self._random(128) if self.config.qk_norm else None
        return LayerOf(
            input_norm=1 + self._random(768),
            qkv=self._random(12 * 128, 768),
            qkv_bias=self._random(12 * 128),
            q_norm=norm,
            k_norm=norm,
            output=self._random(768, 1024),
            output_bias=None,
            post_norm=1 + self._random(768),
            gate_up=self._random(2048, 768),
            gate_up_bias=None,
            down=self._random(768, 1024),
            down_bias=None,
        )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._chance, dtype=torch.bfloat16, device="cuda") * 0.05


class Both:
    """The same weights in the GPU path and in its twin, each with pages of its own."""

    def __init__(self, qk_norm: bool, packed: bool) -> None:
        from shared.engine.layers.cuda_decoder import CudaDecoder

        made = config(qk_norm)
        shape = (NUM_PAGES, made.num_kv_heads, made.num_layers, 2, PAGE_SIZE, made.head_dim)
        heads = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        self.kv = [each.permute(0, 2, 3, 1, 4, 5) for each in heads]
        twin: Decoder = TorchDecoder(made, Weights(made, packed), 1, Alone())
        self.decoders: list[Decoder] = [CudaDecoder(made, Weights(made, packed), 1, products(), Alone()), twin]

    @torch.inference_mode()
    def logits(self, items: list[BatchItem]) -> list[torch.Tensor]:
        batch = build(items, PAGE_SIZE)
        return [decoder(batch, kv) for decoder, kv in zip(self.decoders, self.kv, strict=True)]


def item(first_page: int, start: int, num_tokens: int, sample: bool = True) -> BatchItem:
    tokens = [(7 * first_page + 3 * position) % VOCABULARY for position in range(start, start + num_tokens)]
    pages = range(first_page, first_page + 12)
    return BatchItem(str(first_page), tokens, start, pages, sample, SamplingParams(), start + num_tokens)


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=["llama", "qwen3", "qwen3 in nvfp4"])
def both(request: pytest.FixtureRequest) -> Both:
    return Both(*request.param)


def assert_close(ours: torch.Tensor, twin: torch.Tensor) -> None:
    torch.testing.assert_close(ours, twin, atol=0.06 * float(twin.abs().max()), rtol=0)


def test_steps_of_every_kind_equal_the_twin(both: Both) -> None:
    for step in (
        [item(0, 0, 40)],  # a prompt
        [item(12, 0, 17, sample=False), item(0, 40, 1)],  # a chunk that asks for no token, beside a decode
        [item(12, 17, 33), item(24, 0, 5)],
        [item(0, 41, 1), item(12, 50, 1), item(24, 5, 1)],  # decode: a graph of 4, one of them empty
        [item(0, 42, 1), item(12, 51, 1), item(24, 6, 1)],
        [item(0, 43, 3), item(12, 52, 3)],  # verification
        [item(0, 46, 1)],
        [item(0, 47, 4)],
        [item(36, 0, 170), item(48, 0, 90)],  # so many tokens that matrices are dequantized
    ):
        assert_close(*both.logits(step))
    assert_close(*(kv.float() for kv in both.kv))


def test_a_chunk_that_asks_for_no_token_leaves_what_the_next_one_reads(both: Both) -> None:
    assert [len(logits) for logits in both.logits([item(0, 0, 20, sample=False)])] == [0, 0]
    assert_close(*both.logits([item(0, 20, 7)]))
    assert_close(*(kv.float() for kv in both.kv))


def test_decoding_and_verifying_equal_the_twin_whatever_ran_before(both: Both) -> None:
    state = torch.randn(both.kv[0].shape, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    for kv in both.kv:
        kv.copy_(state)
    steps = (
        [item(0, 41, 1), item(12, 50, 1), item(24, 150, 1)],
        [item(0, 42, 1)],
        [item(12, 51, 3), item(0, 43, 3)],
        [item(page, 44, 1) for page in range(0, 48, 12)] * 2,
        [item(24, 151, 2)],
    )
    for step in steps * 3:
        assert_close(*both.logits(step))
        torch.empty(1 << 20, dtype=torch.int32, device="cuda").fill_(7)  # whatever is free is written to
        _ = [
            torch.full((size,), 7, dtype=torch.int32, device="cuda") for size in (8, 16, 32, 64, 128) for _ in range(20)
        ]


def test_a_padded_graph_writes_no_page_but_those_of_its_sequences(both: Both) -> None:
    both.logits([item(12, 0, 1), item(24, 0, 1), item(36, 0, 1)])
    written = {page for page in range(NUM_PAGES) if bool(both.kv[0][page].any())}
    assert written == {12, 24, 36}


@pytest.mark.parametrize("in_place", [False, True])
def test_rotated_keys_and_values_equal_the_reference(in_place: bool) -> None:
    from shared.engine.kernels import triton_dense

    made, rows = config(qk_norm=False), 5
    qkv = torch.randn(rows, 12 * 128, dtype=torch.bfloat16, device="cuda")
    kv = torch.zeros(4, 2, 2, PAGE_SIZE, 128, dtype=torch.bfloat16, device="cuda")
    angles = torch.rand(rows, 64, device="cuda")
    slots = torch.tensor([17, 3, -1, 63, 32], dtype=torch.int32, device="cuda")
    heads = qkv.view(rows, 12, 128).clone()
    want_q, want_k, want_v = heads[:, :8], heads[:, 8:10], heads[:, 10:]
    turned, norms = (angles.cos(), angles.sin()), (None, None)
    q = triton_dense.rotate_and_append(qkv, turned, norms, made.rms_norm_eps, slots, kv, in_place=in_place)
    keys = reference.rotate(want_k, angles.cos(), angles.sin())
    torch.testing.assert_close(q[:, :8], reference.rotate(want_q, angles.cos(), angles.sin()))
    if in_place:
        torch.testing.assert_close(qkv.view(rows, 12, 128)[:, 8:], torch.cat((keys, want_v), dim=1))
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            torch.testing.assert_close(kv[slot // PAGE_SIZE, 0, :, slot % PAGE_SIZE], keys[row])
            torch.testing.assert_close(kv[slot // PAGE_SIZE, 1, :, slot % PAGE_SIZE], want_v[row])
    assert int((kv.abs().sum(dim=(1, 2, 4)) > 0).sum()) == 4


@pytest.mark.parametrize(("width", "group"), [(1, 4), (3, 2), (8, 4)])
def test_attention_of_few_queries_equals_the_reference(width: int, group: int) -> None:
    from shared.engine.kernels import triton_paged

    lengths, pages = (8, 200, 1000), iter(torch.randperm(80).tolist())
    items = [
        BatchItem(
            str(length), [0] * width, length - width, [next(pages) for _ in range(-(-length // 16))], True, PLAIN, 0
        )
        for length in lengths
    ]
    batch = build(items, PAGE_SIZE).to(torch.device("cuda"))
    kv = torch.randn(80, 3, 2, 2, PAGE_SIZE, 128, dtype=torch.bfloat16, device="cuda")[:, 1]
    q = torch.randn(3 * width, 2 * group, 128, dtype=torch.bfloat16, device="cuda")
    num_done = triton_paged.counters(3, 2, q.device)
    found = triton_paged.attend(q, kv, batch.page_ids, batch.page_starts, batch.context_lens, num_done)
    assert not num_done.any()
    torch.testing.assert_close(found, reference.paged_attention(q, kv, batch), atol=0.02, rtol=0.02)


def test_attention_of_prompts_equals_the_reference() -> None:
    from shared.engine.kernels.flashinfer_paged import PagedAttention, PagedShape

    pages = torch.randperm(80).tolist()
    items = [
        BatchItem("new", [0] * 300, 0, pages[:20], True, PLAIN, 0),
        BatchItem("chunk", [0] * 100, 150, pages[20:40], True, PLAIN, 0),
        BatchItem("decode", [0], 33, pages[40:50], True, PLAIN, 0),
    ]
    batch, cuda = build(items, PAGE_SIZE), torch.device("cuda")
    kv = torch.randn(80, 3, 2, 2, PAGE_SIZE, 128, dtype=torch.bfloat16, device="cuda")[:, 1]
    q = torch.randn(401, 8, 128, dtype=torch.bfloat16, device="cuda")
    attention = PagedAttention(PagedShape(8, 2, 128, PAGE_SIZE, torch.bfloat16), cuda)
    attention.plan(batch)
    expected = reference.paged_attention(q, kv, batch.to(cuda))
    torch.testing.assert_close(attention(q, kv), expected, atol=0.02, rtol=0.02)


def test_attention_over_a_steps_own_rows_equals_the_reference() -> None:
    from shared.engine.kernels.flashinfer_paged import PagedAttention, PagedShape

    items = [
        BatchItem(str(n), [0] * n, 0, range(20 * place, 20 * place + 20), True, PLAIN, 0)
        for place, n in enumerate((300, 5, 128))
    ]
    batch, cuda = build(items, PAGE_SIZE), torch.device("cuda")
    attention = PagedAttention(PagedShape(8, 2, 128, PAGE_SIZE, torch.bfloat16), cuda)
    if not attention.plan(batch):
        pytest.skip("FlashInfer's FA3 is not what attends here")
    kv = torch.zeros(80, 2, 2, PAGE_SIZE, 128, dtype=torch.bfloat16, device="cuda")
    heads = torch.randn(433, 12, 128, dtype=torch.bfloat16, device="cuda")
    q, k, v = heads.split((8, 2, 2), dim=1)
    reference.append_kv(kv, k, v, batch.to(cuda))
    expected = reference.paged_attention(q, kv, batch.to(cuda))
    torch.testing.assert_close(attention(heads, kv), expected, atol=0.02, rtol=0.02)
    continued = [replace(items[0], start=300, token_ids=[0] * 4), items[1]]
    assert not attention.plan(build(continued, PAGE_SIZE)), "some of what it attends to is in pages alone"


def test_small_kernels_equal_the_reference() -> None:
    from shared.engine.kernels import triton_dense

    x, delta = (torch.randn(3, 1000, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = torch.randn(1000, dtype=torch.bfloat16, device="cuda")
    total = x + delta
    torch.testing.assert_close(triton_dense.silu_mul(x), reference.silu_mul(x))
    torch.testing.assert_close(
        triton_dense.add_rms_norm(x, delta, weight, 1e-5), reference.rms_norm(total, weight, 1e-5)
    )
    assert torch.equal(x, total)


@pytest.mark.parametrize("tokens", [1, 4, 7, 9, 16, 30, 64, 100, 150, 200])
@pytest.mark.parametrize("is_packed", [False, True])
def test_products_equal_those_of_torch(tokens: int, is_packed: bool) -> None:
    dense = torch.randn(640, 1280, dtype=torch.bfloat16, device="cuda") * 0.03
    weight: w4a16.Weight = dense
    if is_packed:
        tensor = nvfp4.quantize(dense)
        packed = weight = w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2)
        dense = w4a16.unpack(packed, torch.bfloat16)[0]
    x = torch.randn(tokens, 1280, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(products().dequantized(weight), dense)
    expected = x.float() @ dense.float().T
    torch.testing.assert_close(products().linear(x, weight).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_kept", [0, 6, 16], ids=["none kept", "some kept", "all kept"])
def test_matrices_dequantized_ahead_give_the_same_products(num_kept: int) -> None:
    """Asked for in their order, from the beginning again before the end, and in any order; right up to the last bit."""
    shapes = ((768, 512), (512, 512), (1024, 512), (512, 512))
    made = [[torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes] for _ in range(4)]
    tensors = [[nvfp4.quantize(each) for each in layer] for layer in made]
    layers = [[w4a16.pack(each.codes, each.scale, each.scale_2) for each in layer] for layer in tensors]
    matrices = [each for layer in layers for each in layer]
    kept_bytes = 2 * sum(each.num_rows * each.num_columns for each in matrices[:num_kept]) + 512
    ahead = DequantizedAhead(products(), layers, kept_bytes)
    assert ahead.num_kept == num_kept
    x = torch.randn(300, 512, dtype=torch.bfloat16, device="cuda")
    expected = [products().linear(x, each) for each in matrices]
    assert not products().stays_packed(matrices[0], len(x))
    for place in [*range(7), *range(16), 5, 5, 15, 0, 9, 8, *range(16)]:
        torch.empty(1 << 20, dtype=torch.int32, device="cuda").fill_(7)  # whatever is free is written to
        with ahead.dequantized(matrices[place], x.device) as matrix:
            assert torch.equal(F.linear(x, matrix), expected[place])
