"""GLM on a GPU beside the CPU path in bfloat16 and float32, and its kernels beside their twins. Needs an NVIDIA GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import Batch, build
from shared.engine.kernels import reference
from shared.engine.models import glm
from shared.engine.models.api import Model, Placement
from shared.engine.quantization import nvfp4
from shared.engine.quantization.packed_experts import packed as lay_out
from shared.errors import Unsupported
from tests.oracle import quantized, random_glm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PAGE_SIZE, NUM_PAGES = 16, 96
PLAIN = SamplingParams()


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


class Models:
    """The same weights on the GPU, and in plain torch on the CPU in float32 and in bfloat16, each with its pages."""

    def __init__(self, model_dir: Path) -> None:
        places = (
            Placement(torch.bfloat16, 1, device=torch.device("cuda", 0)),
            Placement(torch.float32, 2),
            Placement(torch.bfloat16, 2),
        )
        self.models: list[Model] = [glm.load(model_dir, place) for place in places]
        self.layouts = [model.layout(PAGE_SIZE) for model in self.models]
        self.pools = [
            torch.zeros(NUM_PAGES, layout.page_bytes, dtype=torch.uint8, device=place.device)
            for layout, place in zip(self.layouts, places, strict=True)
        ]

    @torch.inference_mode()
    def logits(self, items: list[BatchItem]) -> list[torch.Tensor]:
        batch = build(items, PAGE_SIZE)
        parts = zip(self.models, self.pools, self.layouts, strict=True)
        return [model.forward(batch, pool, layout).cpu() for model, pool, layout in parts]


def item(first_page: int, start: int, num_tokens: int, sample: bool = True) -> BatchItem:
    """Few tokens are drafts to verify, so all are sampled."""
    tokens = [(7 * first_page + 3 * position) % 1000 for position in range(start, start + num_tokens)]
    pages = range(first_page, first_page + 16)
    drafts = num_tokens - 1 if num_tokens < 8 else 0
    return BatchItem(str(first_page), tokens, start, pages, sample, PLAIN, start + num_tokens, num_drafts=drafts)


# What the model is changed to. In bfloat16 experts and tokens are now and then chosen otherwise than in float32.
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing to choose": {"index_topk": 4096, "n_routed_experts": 4},
    "experts": {"index_topk": 4096},
    "experts and tokens": {},
    "experts and few tokens": {"index_topk": 16},  # a prompt's context is many times as long
}


def distance(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """One less the cosine similarity, row by row."""
    return 1 - F.cosine_similarity(ours[:, : exact.shape[1]], exact, dim=1)


FAR, MORE_OFTEN = 0.01, 0.15  # of rows: a distance only of those that were chosen otherwise; twice what chance makes


def require_as_near(variant: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Distances on the GPU are like those on the CPU in bfloat16. Where a choice is close, rounding makes it, and a row
    is far off; that is as often so here as there, but for chance. Where there is nothing to choose, no row is."""
    every = variant == "nothing to choose"
    for quantile in (1.0,) if every else (0.0, 0.5):
        own, most = float(ours.quantile(quantile)), float(theirs.quantile(quantile))
        assert own < 2 * most + (1e-4 if every else 1e-3), (quantile, own, most)
    own, most = (float((each > FAR).float().mean()) for each in (ours, theirs))
    assert own <= most + (0 if every else MORE_OFTEN), ("far", own, most)


STEPS = (
    [item(0, 0, 150)],  # a prompt
    [item(16, 0, 97, sample=False), item(0, 150, 1)],  # a chunk that asks for no token, beside a decode
    [item(16, 97, 33), item(32, 0, 9)],
    [item(0, 151, 1), item(16, 130, 1), item(32, 9, 1)],  # decode: a graph of 4, one of them empty
    [item(0, 152, 1), item(16, 131, 1), item(32, 10, 1)],
    [item(0, 153, 3), item(16, 132, 3)],  # verification
    [item(0, 156, 4), item(16, 135, 4), item(32, 11, 4)],  # of more rows than the small kernels take
    [item(0, 160, 1)],
    *([item(0, 161 + 4 * n, 4), item(16, 139 + 4 * n, 4), item(32, 15 + 4 * n, 4)] for n in range(6)),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_every_kind_are_as_near_to_float32_as_bfloat16_is_on_the_cpu(variant: str, tmp_path: Path) -> None:
    random_glm.write(tmp_path, **VARIANTS[variant])
    require_as_near(variant, *distances(Models(tmp_path)))


def distances(models: Models) -> tuple[torch.Tensor, torch.Tensor]:
    """From float32, of all steps: on the GPU, and on the CPU in bfloat16."""
    ours, theirs = list[torch.Tensor](), list[torch.Tensor]()
    for step in STEPS:
        found, exact, rounded = models.logits(step)
        ours.append(distance(found, exact))
        theirs.append(distance(rounded, exact))
    return torch.cat(ours), torch.cat(theirs)


@pytest.mark.parametrize("variant", ["nothing to choose", "experts and tokens"])
def test_a_checkpoint_in_e4m3_stays_so_and_is_as_near_to_float32(variant: str, tmp_path: Path) -> None:
    from shared.engine.kernels.cuda_fp8 import Fp8Matrix

    models = Models(in_e4m3(tmp_path, variant))
    layers = getattr(models.models[0], "_decoder")._layers  # noqa: B009 - what only a GPU has
    for layer in layers:
        attention = layer.attention
        assert all(isinstance(matrix, Fp8Matrix) for matrix in (attention.down, attention.query, attention.output))
    assert isinstance(layers[0].mlp.gate_up, Fp8Matrix)
    require_as_near(variant, *distances(models))


def in_e4m3(folder: Path, variant: str) -> Path:
    """The directory of such a model."""
    (folder / "plain").mkdir()
    random_glm.write(folder / "plain", **VARIANTS[variant])
    quantized.write(folder / "plain", "fp8", folder / "e4m3", folder / "meant")
    return folder / "e4m3"


def test_a_padded_graph_writes_no_page_but_those_of_its_sequences(tmp_path: Path) -> None:
    random_glm.write(tmp_path)
    models = Models(tmp_path)
    models.logits([item(48, 0, 1), item(64, 0, 1), item(80, 0, 1)])
    assert models.pools[0].any(dim=1).nonzero().flatten().tolist() == [48, 64, 80]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k"), [(2784, 6144), (77, 256), (512, 1536)])
def test_a_product_behind_a_norm_equals_the_reference(num_rows: int, n: int, k: int) -> None:
    from shared.engine.kernels.gluon_rows import linear, linear_keeping
    from shared.engine.kernels.inputs import Norm

    x, delta, weight = random(num_rows, k), random(num_rows, k), random(n, k, scale=k**-0.5)
    gain = 1 + random(k, scale=0.1)
    normed = reference.rms_norm(x + delta, gain, 1e-5)
    out, total, kept = linear_keeping(x, weight, Norm(gain, 1e-5, delta))
    torch.testing.assert_close(out, F.linear(normed.float(), weight.float()), atol=0.05, rtol=0.02)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(kept, normed, atol=0.02, rtol=0.02)
    torch.testing.assert_close(linear(x, weight), F.linear(x.float(), weight.float()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "nvfp4"])
@pytest.mark.parametrize("num_rows", [1, 5, 65, 100, 300, 600])
def test_a_mixture_equals_its_sum_expert_by_expert(num_rows: int, packed: bool) -> None:
    from shared.engine.kernels import experts as layout
    from shared.engine.kernels import gluon_experts as kernel

    hidden, inner, num, top_k = 1024, 256, 16, 4
    gate_up, down = random(num, 2 * inner, hidden, scale=0.03), random(num, hidden, inner, scale=0.06)
    experts = layout.Experts(gate_up, down)
    if packed:
        stored = [[nvfp4.quantize(matrix) for matrix in part] for part in (gate_up, down)]
        gate_up, down = (torch.stack([nvfp4.dequantize(one) for one in part]) for part in stored)
        experts = lay_out(stored[0], stored[1])
    x = random(num_rows, hidden)
    shared = layout.SharedExpert(random(2 * inner, hidden, scale=0.03), random(hidden, inner, scale=0.06))
    chosen = torch.stack([torch.randperm(num, device="cuda")[:top_k] for _ in range(num_rows)]).int()
    weights = torch.rand(num_rows, top_k, device="cuda")
    expected = F.linear(reference.silu_mul(F.linear(x.float(), shared.gate_up.float())), shared.down.float())
    for row in range(num_rows):
        for place, expert in enumerate(chosen[row].tolist()):
            part = reference.silu_mul(F.linear(x[row : row + 1].float(), gate_up[expert].float()))
            expected[row] += (F.linear(part, down[expert].float()) * weights[row, place])[0]
    mix = kernel.mixture if num_rows <= kernel.MAX_TOKENS else kernel.large_mixture
    few = num_rows <= kernel.MAX_TOKENS
    found = mix(x.to(kernel.activations(experts)) if few else x, chosen, weights, experts, shared)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.01


def test_a_gain_that_fp16_cannot_bear_is_refused() -> None:
    from shared.engine.kernels.gluon_experts import require_small

    require_small(torch.full((6144,), 100.0))
    with pytest.raises(Unsupported, match="gain of 1e\\+04"):
        require_small(torch.full((6144,), 10_000.0))


def rows_of(batch: Batch) -> Any:
    from shared.engine.kernels.inputs import Rows

    sequence = torch.repeat_interleave(batch.query_starts.diff())
    starts = batch.page_starts[sequence]
    own = batch.page_ids[starts + batch.positions // PAGE_SIZE] * PAGE_SIZE + batch.positions % PAGE_SIZE
    angles = torch.rand(batch.num_tokens, 32)
    parts = (batch.positions, own, starts, batch.page_ids, angles.cos(), angles.sin())
    return Rows(*(part.cuda() for part in parts))


@pytest.mark.parametrize(("top_k", "tile"), [(64, 256), (64, 4096), (2048, 8192), (2048, 0)])
def test_the_selection_equals_the_reference(top_k: int, tile: int) -> None:
    from shared.engine.kernels import sparse_reference, triton_index
    from shared.engine.quantization.rows import FloatRows

    num_pages = 2048
    order = torch.randperm(num_pages).tolist()
    lengths = (40, 3000, 20000)
    items, used = [], 0
    for length in lengths:
        count = -(-length // PAGE_SIZE)
        items.append(BatchItem(str(length), [0, 0], length - 2, order[used : used + count], True, PLAIN, 0))
        used += count
    batch = build(items, PAGE_SIZE)
    q, weights = torch.randn(6, 32, 128).bfloat16(), torch.randn(6, 32)
    keys = torch.randn(num_pages, PAGE_SIZE, 128).bfloat16()
    step = sparse_reference.Placed.of(batch, PAGE_SIZE)
    expected = sparse_reference.select(q, weights, FloatRows(keys), step, top_k)
    selected = triton_index.empty(6, top_k, torch.device("cuda"))
    rows = rows_of(batch)
    triton_index.select(q.cuda(), weights.cuda(), keys.cuda(), rows, selected, 20480, first=True, tile=tile)
    for row in range(6):
        positions = expected[row][expected[row] >= 0]
        start = int(rows.starts[row])
        slots = batch.page_ids[start + positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        found = selected.slots[row, : int(selected.counts[row])].cpu()
        assert len(found) == len(slots)
        # Sums of products of bfloat16 in another order: only scores that all but tie may change sides.
        assert len(set(found.tolist()) ^ set(slots.tolist())) <= 4


@pytest.mark.parametrize(("num_rows", "heads"), [(1, 8), (4, 8), (3, 64), (40, 8)])
def test_sparse_attention_equals_the_reference(num_rows: int, heads: int) -> None:
    from shared.engine.kernels.inputs import Queries, Selected
    from shared.engine.kernels.triton_latent import attend

    top_k, counts = 2048, torch.randint(1, 2049, (num_rows,), dtype=torch.int32, device="cuda")
    latents = random(256, 3, PAGE_SIZE, 576)[:, 1]
    slots = torch.stack([torch.randperm(256 * PAGE_SIZE, device="cuda")[:top_k] for _ in range(num_rows)]).int()
    queries = Queries(random(num_rows, heads, 512), random(num_rows, heads, 64), None)
    up_value = random(heads, 256, 512, scale=0.05)
    found = attend(queries, latents, Selected(slots, counts), up_value, 0.0625)
    for row, count in enumerate(counts.tolist()):
        own = slots[row, :count].long()
        keys = latents[own // PAGE_SIZE, own % PAGE_SIZE].float()
        q = torch.cat((queries.latent[row], queries.rope[row]), dim=-1).float()
        attended = (q @ keys.T * 0.0625).softmax(-1) @ keys[:, :512]
        expected = torch.einsum("hc,hvc->hv", attended, up_value.float()).flatten()
        torch.testing.assert_close(found[row].float(), expected, atol=0.03, rtol=0.03)
