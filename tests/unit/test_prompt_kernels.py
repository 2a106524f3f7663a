"""What many rows of one sequence select, and attend to, in Triton's interpreter; and when they do so together."""

from tests.unit.interpreted import LOOPS, assert_says, needs_triton

TOGETHER = """
import torch
from shared.engine.kernels import triton_prompt
from shared.engine.kernels.inputs import Selected, Span

chance = torch.Generator().manual_seed(0)

def random(*shape):
    return torch.randn(*shape, generator=chance)

page_size, heads, nope, rope, value, latent, num_pages = 16, 2, 48, 16, 32, 64, 40
latents = random(num_pages, 3, page_size, latent + rope)[:, 1]
up_key, up_value = random(heads, nope, latent) * latent**-0.5, random(heads, value, latent) * latent**-0.5
for num_rows, context, top_k in ((70, 150, 64), (70, 150, 256), (33, 33, 16)):
    pages = torch.randperm(num_pages, generator=chance)[: -(-context // page_size)].int()
    span = triton_prompt.spanned(Span(0, num_rows, context, pages), num_pages, 1, top_k)
    assert span.attended_together and (span.bits is None) == (context <= top_k)
    q, q_rope = random(num_rows, heads * (nope + rope) + 7), random(num_rows, heads, rope)
    positions = torch.arange(context - num_rows, context)
    seen = torch.zeros(num_rows, context, dtype=torch.bool)
    slots = torch.zeros(num_rows, top_k, dtype=torch.int32)
    for row, position in enumerate(positions.tolist()):
        chosen = torch.randperm(position + 1, generator=chance)[:top_k].sort().values
        seen[row, chosen] = True
        slots[row, : len(chosen)] = pages[chosen // page_size] * page_size + (chosen % page_size).int()
    triton_prompt.mark(span, Selected(slots, (positions + 1).clamp(max=top_k).int()), page_size)
    made = triton_prompt.context(latents, span, up_key, up_value)
    found = triton_prompt.attend(q, q_rope, made, positions.int(), span.bits, 0.1, rows=32)
    own = latents[pages.long()].flatten(0, 1)[:context]
    keys, values = (torch.einsum("cl,hnl->chn", own[:, :latent], up) for up in (up_key, up_value))
    q_nope = q[:, : heads * (nope + rope)].view(num_rows, heads, -1)[..., :nope]
    scores = torch.einsum("thn,chn->htc", q_nope, keys) + torch.einsum("thr,cr->htc", q_rope, own[:, latent:])
    weights = (scores * 0.1).masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, torch.einsum("htc,chv->thv", weights, values).flatten(1))
print("alike")
"""

SCORES = """
import torch
from shared.engine.kernels import triton_scores
from shared.engine.kernels.inputs import Rows

chance = torch.Generator().manual_seed(0)

def random(*shape):
    return torch.randn(*shape, generator=chance)

heads, dim, page_size, num_rows, context = 4, 16, 16, 10, 150
keys, pages = random(20, 2, page_size, dim)[:, 1], torch.randperm(20, generator=chance)[:10].int()
positions, starts = torch.arange(context - num_rows, context).int(), torch.full((num_rows,), 3).int()
q, weights = random(num_rows, heads, dim), random(num_rows, heads + 3)[:, :heads]
out = torch.full((num_rows, context), 7.0)
ids = torch.cat((torch.zeros(3), pages)).int()
triton_scores.scores(q, weights, keys, Rows(positions, positions, starts, ids, out, out), out, together=4, at_once=32)
own = keys[pages.long()].flatten(0, 1)[:context]
twin = (torch.einsum("thd,cd->thc", q, own).relu() * weights[..., None]).sum(1) * (heads * dim) ** -0.5
seen = torch.arange(context) <= positions[:, None]
torch.testing.assert_close(out[seen], twin[seen])
assert (out[~seen] == 7).all()
print("alike")
"""

WORTH = """
from shared.engine.kernels.triton_prompt import pays, suits

assert pays(1024, 1024, 8, 2048) and pays(8192, 8192, 8, 2048) and pays(2048, 16_384, 8, 2048)
assert not pays(2048, 32_768, 8, 2048) and not pays(64, 16_384, 8, 2048) and not pays(8192, 108_192, 8, 2048)
assert suits(192) and suits(128) and suits(48) and not suits(136) and not suits(224)
print("right")
"""


@needs_triton
def test_rows_that_attend_together_attend_to_what_each_has_selected() -> None:
    assert_says("alike\n", LOOPS + TOGETHER)


@needs_triton
def test_rows_of_one_sequence_are_scored_as_by_their_twin() -> None:
    assert_says("alike\n", LOOPS + SCORES)


@needs_triton
def test_rows_attend_together_where_that_takes_less() -> None:
    assert_says("right\n", WORTH)
