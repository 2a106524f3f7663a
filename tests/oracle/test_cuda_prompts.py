"""Many rows of one sequence on a GPU: what they select, and what they attend to, beside plain torch."""

import pytest
import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kernels import sparse_reference
from shared.engine.quantization.rows import FloatRows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PAGE_SIZE, HEADS, NOPE, ROPE, VALUE, LATENT = 64, 8, 192, 64, 256, 512


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


@pytest.mark.parametrize(("num_rows", "behind", "top_k"), [(300, 500, 128), (1000, 0, 2048), (700, 1900, 2048)])
def test_rows_attend_together_to_what_each_has_selected(num_rows: int, behind: int, top_k: int) -> None:
    from shared.engine.kernels import triton_prompt
    from shared.engine.kernels.inputs import Selected, Span

    context = behind + num_rows
    pages = torch.randperm(60, device="cuda")[: -(-context // PAGE_SIZE)].int()
    span = triton_prompt.spanned(Span(0, num_rows, context, pages), 60, HEADS, top_k)
    assert span.attended_together
    latents = random(60, 3, PAGE_SIZE, LATENT + ROPE)[:, 1]
    up_key, up_value = random(HEADS, NOPE, LATENT, scale=LATENT**-0.5), random(HEADS, VALUE, LATENT, scale=LATENT**-0.5)
    q, q_rope = random(num_rows, HEADS * (NOPE + ROPE) + 40), random(num_rows, HEADS, ROPE)
    positions = torch.arange(behind, context, device="cuda")
    seen = torch.zeros(num_rows, context, dtype=torch.bool, device="cuda")
    slots = torch.zeros(num_rows, top_k, dtype=torch.int32, device="cuda")
    counts = (positions + 1).clamp(max=top_k).int()
    for row, position in enumerate(positions.tolist()):
        chosen = torch.randperm(position + 1, device="cuda")[:top_k].sort().values
        seen[row, chosen] = True
        slots[row, : len(chosen)] = pages[chosen // PAGE_SIZE] * PAGE_SIZE + (chosen % PAGE_SIZE).int()
    triton_prompt.mark(span, Selected(slots, counts), PAGE_SIZE)
    context_of = triton_prompt.context(latents, span, up_key, up_value)
    found = triton_prompt.attend(q, q_rope, context_of, positions.int(), span.bits, 0.0625)
    own = latents[pages.long()].flatten(0, 1)[:context].float()
    keys = torch.einsum("cl,hnl->chn", own[:, :LATENT], up_key.float())
    values = torch.einsum("cl,hvl->chv", own[:, :LATENT], up_value.float())
    q_nope = q[:, : HEADS * (NOPE + ROPE)].view(num_rows, HEADS, -1)[..., :NOPE].float()
    scores = torch.einsum("thn,chn->htc", q_nope, keys) + torch.einsum("thr,cr->htc", q_rope.float(), own[:, LATENT:])
    weights = (scores * 0.0625).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("htc,chv->thv", weights, values).flatten(1)
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(("num_rows", "behind", "top_k"), [(150, 100, 64), (130, 5000, 2048), (200, 12_000, 2048)])
def test_rows_of_one_sequence_select_as_the_reference(num_rows: int, behind: int, top_k: int) -> None:
    from shared.engine.kernels import triton_index
    from shared.engine.kernels.inputs import Rows

    context = behind + num_rows
    num_pages = -(-context // PAGE_SIZE)
    order = torch.randperm(num_pages).tolist()
    batch = build([BatchItem("one", [0] * num_rows, behind, order, True, SamplingParams(), 0)], PAGE_SIZE)
    q, weights = torch.randn(num_rows, 32, 128).bfloat16(), torch.randn(num_rows, 40)[:, :32]
    keys = torch.randn(num_pages, PAGE_SIZE, 128).bfloat16()
    step = sparse_reference.Placed.of(batch, PAGE_SIZE)
    expected = sparse_reference.select(q, weights, FloatRows(keys), step, top_k)
    positions, starts, nothing = batch.positions.cuda(), torch.zeros_like(batch.positions).cuda(), torch.empty(0).cuda()
    rows = Rows(positions, positions, starts, batch.page_ids.cuda(), nothing, nothing)
    selected = triton_index.empty(num_rows, top_k, torch.device("cuda"))
    triton_index.select(q.cuda(), weights.cuda(), keys.cuda(), rows, selected, context, first=True, together=True)
    slots, counts = selected.slots.cpu(), selected.counts.tolist()
    for row, count in enumerate(counts):
        chosen = expected[row][expected[row] >= 0]
        wanted = batch.page_ids[chosen // PAGE_SIZE] * PAGE_SIZE + chosen % PAGE_SIZE
        assert count == len(wanted)
        # Sums of products of bfloat16 in another order: only scores that all but tie may change sides.
        assert len(set(slots[row, :count].tolist()) ^ set(wanted.tolist())) <= 4
