"""KV in FP8: the exact bytes, and how far from what was written they can be."""

import pytest
import torch

from shared.engine.kv import formats, view
from shared.engine.kv.layout import KvLayout, compatibility_hash, pack
from shared.engine.models import glm_config, glm_layout
from shared.engine.quantization import kv_fp8, rows
from shared.errors import Unsupported
from tests.unit.test_glm_shapes import GLM_52

KV_LORA, ROPE, KEY = 512, 64, 128
PAGE_SIZE = 4
NUM_PAGES = 3


def spread(*shape: int) -> torch.Tensor:
    """Values over many powers of two, some of them zero."""
    noise = torch.Generator().manual_seed(3)
    values = torch.randn(shape, generator=noise) * 10.0 ** torch.randint(-4, 4, shape, generator=noise)
    return values * (torch.rand(shape, generator=noise) > 0.1)


@pytest.mark.parametrize(("kv_dtype", "num_bytes"), [("bfloat16", 95_232), ("fp8", 53_940)])
def test_a_token_of_glm_52_takes_the_published_bytes(kv_dtype: str, num_bytes: int) -> None:
    assert glm_layout.layout(glm_config.parse(GLM_52), kv_dtype, 64).bytes_per_token == num_bytes


def test_a_scale_is_the_least_power_of_two_that_brings_the_largest_value_into_range() -> None:
    amax = torch.tensor([448.0, 448.1, 447.9, 224.0, 1.0, 0.0, 1e-9, 3e38])
    assert kv_fp8.scale_of(amax).tolist() == [1.0, 2.0, 1.0, 0.5, 2.0**-8, 2.0**-22, 2.0**-22, 2.0**120]


@pytest.mark.parametrize("dim", [KEY, 16, 7])
def test_a_quantized_value_is_off_by_a_sixteenth_or_half_the_smallest_step(dim: int) -> None:
    x = spread(200, dim)
    values, scale = kv_fp8.quantize(x)
    error = (kv_fp8.dequantize(values, scale) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale[:, None] / 1024)).all()
    assert error.max() > 0


def test_values_that_e4m3_holds_come_back_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()] * 2.0**-5
    assert torch.equal(kv_fp8.dequantize(*kv_fp8.quantize(exact)), exact)


def test_a_latent_is_656_bytes_values_then_scales_then_the_rotary_key() -> None:
    latents = spread(5, KV_LORA + ROPE)
    packed = kv_fp8.pack_latents(latents, KV_LORA)
    assert packed.shape == (5, 656) == (5, formats.latent("fp8", KV_LORA, ROPE).row_bytes)
    groups = latents[:, :KV_LORA].view(5, 4, 128)
    scales = packed[:, 512:528].contiguous().view(torch.float32)
    assert torch.equal(scales, kv_fp8.scale_of(groups.abs().amax(-1)))
    values = packed[:, :512].view(torch.float8_e4m3fn).float().view(5, 4, 128)
    assert torch.equal(values, (groups / scales[..., None]).to(torch.float8_e4m3fn).float())
    assert torch.equal(packed[:, 528:].contiguous().view(torch.bfloat16), latents[:, KV_LORA:].bfloat16())


@pytest.mark.parametrize(("kv_lora", "rope"), [(KV_LORA, ROPE), (40, 8), (200, 6)])
def test_a_latent_comes_back_within_the_bounds_of_its_group(kv_lora: int, rope: int) -> None:
    latents = spread(50, kv_lora + rope)
    packed = kv_fp8.pack_latents(latents, kv_lora)
    assert packed.shape[1] == formats.latent("fp8", kv_lora, rope).row_bytes
    back = kv_fp8.unpack_latents(packed, kv_lora)
    for group in latents[:, :kv_lora].split(128, dim=1):
        scale = kv_fp8.scale_of(group.abs().amax(-1, keepdim=True))
        error, back = (back[:, : group.shape[1]] - group).abs(), back[:, group.shape[1] :]
        assert (error <= torch.maximum(group.abs() / 16, scale / 1024)).all()
    assert torch.equal(back, latents[:, kv_lora:].bfloat16().float())


def pool(kv_dtype: str) -> tuple[torch.Tensor, KvLayout]:
    latent, key = formats.latent(kv_dtype, 40, 8), formats.index_key(kv_dtype, 16)
    layout = pack(
        PAGE_SIZE,
        {
            "latents": (2, latent.name, 2 * PAGE_SIZE * latent.row_bytes),
            "keys": (2, key.name, 2 * PAGE_SIZE * key.row_bytes),
        },
    )
    return torch.zeros(NUM_PAGES, layout.page_bytes, dtype=torch.uint8), layout


@pytest.mark.parametrize("kv_dtype", formats.KV_DTYPES)
def test_rows_come_back_from_the_pages_they_were_written_to(kv_dtype: str) -> None:
    memory, layout = pool(kv_dtype)
    pages, offsets = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 0, 1, 2])
    for layers, dim in (
        (rows.latents(memory, layout, "latents", 40), 48),
        (rows.index_keys(memory, layout, "keys", 16), 16),
    ):
        written = [spread(4, dim), spread(4, dim) + 1]
        for layer, values in zip(layers, written, strict=True):
            layer.write(pages, offsets, values)
        for layer, values in zip(layers, written, strict=True):
            error = (layer.read(pages, offsets).float() - values).abs()
            assert (error <= values.abs().amax(-1, keepdim=True) / 16).all()
            assert layer.read(torch.tensor([[1, 2]]), torch.tensor([[0, 0]])).abs().max() == 0


def test_a_page_of_index_keys_is_all_values_and_then_all_scales() -> None:
    memory, layout = pool("fp8")
    keys = spread(PAGE_SIZE, 16)
    rows.index_keys(memory, layout, "keys", 16)[1].write(torch.ones(4, dtype=torch.long), torch.arange(4), keys)
    second = view.state_view(memory, layout.state_classes[1], (2, -1))[1, 1]
    values, scales = kv_fp8.quantize(keys)
    assert torch.equal(second[: PAGE_SIZE * 16], values.view(torch.uint8).flatten())
    assert torch.equal(second[PAGE_SIZE * 16 :], scales.view(torch.uint8))


def test_workers_whose_kv_differs_in_form_do_not_exchange_pages() -> None:
    config = glm_config.parse(GLM_52)
    hashes = {
        compatibility_hash("glm", "r", dtype, glm_layout.layout(config, kv_dtype, 16))
        for kv_dtype in formats.KV_DTYPES
        for dtype in ("bfloat16", "float32")
    }
    assert len(hashes) == 6


def test_a_form_that_does_not_exist_is_named() -> None:
    with pytest.raises(Unsupported, match="int4"):
        formats.latent("int4", 40, 8)
