"""Products with matrices in e4m3 beside torch: on the CPU as C++ with a coroutine for each lane, and on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from shared.engine.kernels import build, cuda_fp8, reference, w8a16
from shared.engine.kernels.cuda_fp8 import CudaFp8, Cut
from shared.engine.kernels.inputs import KeyNorm, Norm, Rows, State
from shared.engine.kernels.w8a16 import Weight
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CUTS = tuple((cluster, depth) for cluster in (2, 4, 8) for depth in (3, 4, 6))
PAGE_SIZE, LATENT, HALF, INDEX = 4, 64, 8, 32


@pytest.fixture(scope="module")
def emulated() -> CudaFp8:
    return CudaFp8(cuda_fp8.load(compiled("fp8.cu")))


@pytest.fixture(scope="module")
def on_gpu() -> CudaFp8:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    path = build.cuda_library(
        default_cache() / "kernels", build.cuda_compiler(), torch.cuda.get_device_capability(), "glm"
    )
    return CudaFp8(cuda_fp8.load(path))


def random_weight(num_rows: int, num_others: int, num_columns: int, device: torch.device) -> Weight:
    """Blocks of different sizes, and rows in fp16 behind them."""
    matrix = torch.randn(num_rows + num_others, num_columns, device=device) * num_columns**-0.5
    matrix *= torch.exp2(torch.randint(-3, 4, (num_rows + num_others, 1), device=device))
    codes, scales = w8a16.quantize(matrix[:num_rows])
    return w8a16.join([w8a16.of_blocks(codes, scales)], matrix[num_rows:])


def near(found: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    assert float((found.float() - expected).norm() / expected.norm()) < most


def require_product(
    kernels: CudaFp8, num_tokens: int, shape: tuple[int, int, int], cut: Cut | None, device: torch.device
) -> None:
    """That a product equals torch's with the same matrix: behind a norm and a sum, and as it is."""
    torch.manual_seed(num_tokens)
    weight, num_columns = random_weight(*shape, device), shape[2]
    x, delta = (torch.randn(num_tokens, num_columns + 8, device=device).bfloat16()[:, :num_columns] for _ in range(2))
    gain, exact = (1 + torch.randn(num_columns, device=device) / 10).bfloat16(), w8a16.unpack(weight)
    out, total = kernels.linear_keeping(x, weight, Norm(gain, 1e-5, delta), cut=cut)
    assert torch.equal(total, x + delta)
    normed = total.float() * (total.float().square().mean(1, keepdim=True) + 1e-5).rsqrt() * gain.float()
    near(out, F.linear(normed, exact), 1e-3)
    near(kernels.linear(x, weight, cut=cut), F.linear(x.float(), exact), 1e-5)
    huge = x.float() * torch.tensor([3e4, 1e-2], device=device).repeat(num_tokens)[:num_tokens, None]
    huge = huge.bfloat16()
    near(kernels.linear(huge, weight, dtype=torch.bfloat16, cut=cut), F.linear(huge.float(), exact), 4e-3)


def require_state(kernels: CudaFp8, num_tokens: int, full: bool, device: torch.device) -> None:
    """That queries and what is left in pages equal the reference; a row without a slot leaves nothing."""
    torch.manual_seed(num_tokens)
    weight = random_weight(48, 0, 256, device)
    low = torch.randn(num_tokens, 256 + LATENT + 2 * HALF + INDEX, device=device)
    gain, latent_gain = (1 + torch.randn(size, device=device).bfloat16() / 10 for size in (256, LATENT))
    key_norm = KeyNorm(1 + torch.randn(INDEX, device=device) / 10, torch.randn(INDEX, device=device) / 10, 1e-6)
    angle = torch.rand(num_tokens, HALF, device=device)
    slots = torch.randperm(4 * PAGE_SIZE, device=device)[:num_tokens].int()
    slots[-1] = -1 if num_tokens > 1 else slots[-1]
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    rows = Rows(ids, slots, ids, ids, angle.cos(), angle.sin())
    pool = torch.zeros(4, 2, PAGE_SIZE, LATENT + 2 * HALF, dtype=torch.bfloat16, device=device)
    keys = torch.zeros(4, 3, PAGE_SIZE, INDEX, dtype=torch.bfloat16, device=device)
    state = State(pool[:, 1], latent_gain, 1e-5, keys[:, 2] if full else None, key_norm if full else None)
    q = kernels.queries_and_state(low, weight, Norm(gain, 1e-5), rows, state)
    normed = reference.rms_norm(low[:, :256].bfloat16().float(), gain.float(), 1e-5)
    near(q, F.linear(normed, w8a16.unpack(weight)), 1e-3)

    def turned(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[:, : 2 * HALF : 2], x[:, 1 : 2 * HALF : 2]
        pairs = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
        return torch.cat((torch.stack(pairs, -1).flatten(1), x[:, 2 * HALF :]), 1)

    _, latent, rope, key = low.split([256, LATENT, 2 * HALF, INDEX], dim=1)
    expected = torch.cat((reference.rms_norm(latent, latent_gain.float(), 1e-5), turned(rope)), 1)
    index = turned(F.layer_norm(key, (INDEX,), key_norm.gain, key_norm.bias, 1e-6))
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            near(pool[slot // PAGE_SIZE, 1, slot % PAGE_SIZE], expected[row], 0.01)
            if full:
                near(keys[slot // PAGE_SIZE, 2, slot % PAGE_SIZE], index[row], 0.01)
    written = int((slots >= 0).sum())
    assert int(pool.any(-1).sum()) == written
    assert int(keys.any(-1).sum()) == written * full


@pytest.mark.parametrize(
    ("num_tokens", "cut"),
    [(1, (4, 3)), (2, (1, 4)), (3, (2, 4)), (4, (4, 3)), (5, (2, 6)), (8, (4, 6)), (12, (4, 3)), (33, (2, 4))],
)
def test_products_equal_torchs(num_tokens: int, cut: tuple[int, int], emulated: CudaFp8) -> None:
    require_product(emulated, num_tokens, (48, 32, 1536), Cut(*cut), CPU)


@pytest.mark.parametrize(("num_tokens", "full"), [(1, True), (3, True), (2, False), (10, True)])
def test_queries_and_what_is_kept_equal_the_reference(num_tokens: int, full: bool, emulated: CudaFp8) -> None:
    require_state(emulated, num_tokens, full, CPU)


def test_a_matrix_is_made_bfloat16_again(emulated: CudaFp8) -> None:
    weight = random_weight(80, 16, 256, CPU)
    assert torch.equal(emulated.plain(weight), w8a16.unpack(weight, torch.bfloat16))


def test_rows_keep_their_blocks_scales_wherever_they_are_cut() -> None:
    matrix = torch.randn(576, 256) * torch.exp2(torch.arange(576) // 64 % 5)[:, None]
    codes, scales = w8a16.quantize(matrix)
    whole = w8a16.unpack(w8a16.of_blocks(codes, scales))
    near(whole, matrix, 0.03)
    for first in (0, 144, 448):
        part = w8a16.of_blocks(codes[first:], scales[first // 128 :], first)
        assert torch.equal(w8a16.unpack(part), whole[first:])
        assert torch.equal(w8a16.unpack(part.first(48)), whole[first : first + 48])


SHAPES = ((2624, 0, 6144), (2752, 32, 6144), (2048, 0, 2048), (6144, 0, 2048), (6144, 0, 1536))


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [None, *CUTS])
def test_on_a_gpu_products_equal_torchs(cut: tuple[int, int] | None, on_gpu: CudaFp8) -> None:
    for shape in SHAPES:
        for num_tokens in (1, 2, 3, 4, 7, 8, 16, 20, 64):
            if cut is None or shape[2] // 128 % cut[0] == 0:
                require_product(on_gpu, num_tokens, shape, Cut(*cut) if cut else None, GPU)


@pytest.mark.gpu
def test_on_a_gpu_queries_and_what_is_kept_equal_the_reference(on_gpu: CudaFp8) -> None:
    for num_tokens in (1, 4, 10):
        for full in (True, False):
            require_state(on_gpu, num_tokens, full, GPU)
    weight = random_weight(2752, 32, 6144, GPU)
    assert torch.equal(on_gpu.plain(weight), w8a16.unpack(weight, torch.bfloat16))
