"""The CUDA kernels' products beside their twins, on the CPU: compiled as C++ with a coroutine for each lane."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from shared.engine.kernels import cuda_products, reference, w4a16
from shared.engine.kernels.cuda_products import Activations, Arranged, CudaProducts, Residual
from shared.engine.kernels.product_plan import Plan
from shared.engine.quantization import nvfp4
from tests.oracle.emulated_cuda import compiled

EPS = 1e-5


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return cuda_products.load(compiled("products.cu"))


def using(library: ctypes.CDLL, row_tiles: int, warps_rows: int, cluster: int) -> CudaProducts:
    def plan(_packed: bool, num_tokens: int, _rows: int, _columns: int) -> Plan:
        eights = next(eights for eights in (1, 2, 4, 8) if num_tokens <= 8 * eights)
        return Plan(eights, 2 if eights == 8 else row_tiles, warps_rows, cluster)

    return CudaProducts(library, plan)


def packed(rows: int, columns: int, seed: int, gated: bool = False) -> w4a16.PackedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    tensor = nvfp4.quantize(weight * torch.logspace(-3, 0, rows)[:, None])
    return w4a16.pack(tensor.codes, tensor.scale, torch.rand(rows) + 0.5, gated=gated)


def activations(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


def dense(weight: w4a16.Weight) -> torch.Tensor:
    return weight.float() if isinstance(weight, torch.Tensor) else w4a16.unpack(weight)[0]


def assert_close(found: Activations, expected: torch.Tensor) -> None:
    found = found.plain() if isinstance(found, Arranged) else found
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.01, atol=0.004 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def wide_library() -> ctypes.CDLL:
    return cuda_products.load(compiled("wide.cu"))


def wide(library: ctypes.CDLL, cluster: int) -> CudaProducts:
    def plan(_packed: bool, num_tokens: int, _rows: int, _columns: int) -> Plan:
        return Plan(next(eights for eights in (2, 4, 8) if num_tokens <= 8 * eights), 1, 8, cluster, is_wide=True)

    return CudaProducts(library, plan)


CUTS = [(1, 1, 1, 1), (5, 1, 4, 2), (12, 2, 2, 1), (30, 1, 8, 1), (30, 2, 4, 4), (64, 2, 2, 1)]


@pytest.mark.parametrize(("tokens", "row_tiles", "warps_rows", "cluster"), CUTS)
@pytest.mark.parametrize("kind", ["packed", "bf16"])
def test_products_equal_those_of_torch(
    library: ctypes.CDLL, kind: str, tokens: int, row_tiles: int, warps_rows: int, cluster: int
) -> None:
    products = using(library, row_tiles, warps_rows, cluster)
    weight = packed(80, 336, 1) if kind == "packed" else activations(80, 320)
    x, bias = activations(tokens, 336 if kind == "packed" else 320), activations(1, 80)[0]
    assert_close(products.linear(x, weight, bias), F.linear(x.float(), dense(weight), bias.float()))


@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_of_a_gated_matrix_come_in_their_old_order(library: ctypes.CDLL, tokens: int) -> None:
    weight, x = packed(96, 208, 6, gated=True), activations(tokens, 208)
    expected = F.linear(x.float(), dense(weight))
    for cluster in (1, 2):
        assert_close(using(library, 2, 2, cluster).linear(x, weight), expected)


@pytest.mark.parametrize("kind", ["packed", "bf16"])
@pytest.mark.parametrize("cluster", [1, 2])
def test_a_norm_between_two_products_is_that_of_torch(library: ctypes.CDLL, kind: str, cluster: int) -> None:
    products, tokens, size = using(library, 1, 4, cluster), 3, 128
    inner, norm = activations(tokens, 64), activations(1, size)[0] + 1
    make = packed if kind == "packed" else lambda rows, columns, *_: activations(rows, columns)
    first, second = make(size, 64, 1), make(64, size, 2, True)
    stream = activations(tokens, size)
    expected = (stream.float() + inner.float() @ dense(first).T).bfloat16()
    normed = products.added(inner, first, Residual(stream, norm), EPS)
    assert_close(stream, expected)
    gated = products.gated(normed, second)
    plain = F.linear(reference.rms_norm(expected.float(), norm.float(), EPS), dense(second))
    assert_close(gated, reference.silu_mul(plain))


def test_a_stream_is_normed_before_its_first_product(library: ctypes.CDLL) -> None:
    products, x, norm = using(library, 1, 1, 1), activations(2, 256), activations(1, 256)[0] + 1
    weight = packed(48, 256, 3)
    expected = F.linear(reference.rms_norm(x.float(), norm.float(), EPS), dense(weight))
    assert_close(products.normed_linear(products.begun(x, norm, EPS, weight), weight), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_dequantized_weights_are_those_that_were_packed(library: ctypes.CDLL, gated: bool) -> None:
    weight = packed(48, 208, 4, gated)
    assert torch.equal(CudaProducts(library).dequantized(weight), w4a16.unpack(weight, torch.bfloat16)[0])


@pytest.mark.parametrize(("tokens", "cluster", "columns"), [(9, 1, 1200), (30, 2, 336), (64, 4, 2000), (33, 8, 336)])
def test_wide_products_equal_those_of_torch(wide_library: ctypes.CDLL, tokens: int, cluster: int, columns: int) -> None:
    weight = packed(200, columns, 1)
    x, bias = activations(tokens, columns), activations(1, 200)[0]
    expected = F.linear(x.float(), dense(weight), bias.float())
    assert_close(wide(wide_library, cluster).linear(x, weight, bias), expected)


def test_rows_of_a_wide_gated_matrix_come_in_their_old_order(wide_library: ctypes.CDLL) -> None:
    weight, x = packed(288, 208, 6, gated=True), activations(17, 208)
    assert_close(wide(wide_library, 2).linear(x, weight), F.linear(x.float(), dense(weight)))


@pytest.mark.parametrize("cluster", [1, 4])
def test_a_norm_between_two_wide_products_is_that_of_torch(
    library: ctypes.CDLL, wide_library: ctypes.CDLL, cluster: int
) -> None:
    products, tokens, size = wide(wide_library, cluster), 11, 256
    first, second = packed(size, 512, 1), packed(160, size, 2, True)
    inner, norm, stream = activations(tokens, 512), activations(1, size)[0] + 1, activations(tokens, size)
    expected = (stream.float() + inner.float() @ dense(first).T).bfloat16()
    normed = products.added(inner, first, Residual(stream, norm), EPS)
    assert_close(stream, expected)
    plain = F.linear(reference.rms_norm(expected.float(), norm.float(), EPS), dense(second))
    assert_close(products.gated(normed, second), reference.silu_mul(plain))
    assert_close(products.normed_linear(normed, second), plain)
    narrow = using(library, 1, 4, 1)  # which takes the same squares, and columns in their old order
    assert_close(narrow.normed_linear(normed, second), plain)


@pytest.mark.parametrize(("tokens", "columns"), [(9, 128), (33, 336)])
def test_arranged_activations_are_the_same_in_their_old_order(
    wide_library: ctypes.CDLL, tokens: int, columns: int
) -> None:
    x = activations(tokens, columns)
    found = wide(wide_library, 1).arranged(x, packed(16, columns, 1))
    assert isinstance(found, Arranged)
    assert torch.equal(found.plain(), x)
    whole = Arranged(found.values, found.values.shape[1], found.values.shape[0] * 64).plain()
    assert not whole[:tokens, columns:].any()


def test_a_stream_is_normed_before_a_first_wide_product(library: ctypes.CDLL, wide_library: ctypes.CDLL) -> None:
    x, norm, weight = activations(12, 256), activations(1, 256)[0] + 1, packed(48, 256, 3)
    found = wide(library, 2).begun(x, norm, EPS, weight)
    expected = F.linear(reference.rms_norm(x.float(), norm.float(), EPS), dense(weight))
    assert_close(wide(wide_library, 2).normed_linear(found, weight), expected)
