"""What a mixture of many tokens is made of, in Triton's interpreter."""

from tests.unit.interpreted import assert_says, needs_triton

MEMBERS = """
import torch
from shared.engine.kernels import triton_members

chance = torch.Generator().manual_seed(0)
for num_tokens, num_experts, top_k, sizes in ((300, 5, 3, (16, 64)), (7, 16, 4, (16, 16)), (1, 3, 1, (32, 16))):
    chosen = torch.rand(num_tokens, num_experts, generator=chance).topk(top_k).indices.int()
    chosen[chosen == 1] = 2  # an expert that nobody chooses, and one that is chosen twice
    who, flat = triton_members.members(chosen, num_experts, sizes), chosen.flatten()
    assert who.order[who.places.flatten().long()].tolist() == list(range(len(flat)))
    assert flat[who.order.long()].tolist() == flat.sort().values.tolist()
    assert who.ends.tolist() == flat.bincount(minlength=num_experts).cumsum(0).tolist()
    for size, tiles in zip(sizes, who.tiles, strict=True):
        expected, start = [], 0
        for expert, end in enumerate(who.ends.tolist()):
            expected += [[expert, first, end] for first in range(start, end, size)]
            start = end
        assert tiles[: len(expected)].tolist() == expected
        assert (tiles[len(expected) :, 0] == -1).all()
print("right")
"""

# Products of codes, scales and fp16 are exact in float32, as sums are but for their order.
EXPERTS = """
import torch
from shared.engine.kernels import experts, reference, triton_grouped, triton_members
from shared.engine.kernels.triton_grouped import Plan

chance = torch.Generator().manual_seed(0)
num_experts, hidden, inner, top_k = 4, 256, 128, 2

def codes(*shape):
    return torch.randint(0, 256, shape, generator=chance, dtype=torch.uint8)

def scales(*shape):
    return torch.randint(0x08, 0x48, shape, generator=chance, dtype=torch.uint8)

layer = experts.Experts(
    codes(num_experts, 2 * inner, hidden // 2), codes(num_experts, hidden, inner // 2),
    scales(num_experts, 2 * inner, hidden // 16), scales(num_experts, hidden, inner // 16),
    torch.rand(num_experts, 2, generator=chance) * 0.01 * experts.FACTOR,
)
gate_up, down = experts.plain_gate_up(layer).float(), experts.plain_down(layer).float()
SECOND = Plan(32, 128, 4, 1), Plan(16, 64, 4, 1)
for num_tokens, *plans in ((15, Plan(16, 64, 4, 1), Plan(16, 128, 4, 1, 2)), (30, *SECOND)):
    x = torch.randn(num_tokens, hidden, generator=chance).half()
    chosen = torch.rand(num_tokens, num_experts, generator=chance).topk(top_k).indices.int()
    who = triton_members.members(chosen, num_experts, tuple(plan.size for plan in plans))
    inner_values = triton_grouped.gate_up(x, who, who.tiles[0], layer, plans[0])
    found = triton_grouped.down(inner_values, who.tiles[1], layer, plans[1])
    for token, own in enumerate(chosen.tolist()):
        for place, expert in enumerate(own):
            twin = reference.silu_mul(x[token].float() @ gate_up[expert].T) @ down[expert].T
            part = found[who.places[token, place]].float()
            assert (part - twin).norm() < 0.01 * twin.norm(), (token, expert)
print("alike")
"""

SUMS = """
import torch
from shared.engine.kernels import triton_mixture, triton_ordered
from shared.engine.parallel.group import ordered_sum

chance = torch.Generator().manual_seed(0)
parts, own = (torch.randn(rows, 1500, generator=chance) for rows in (40, 10))
places, weights = torch.randperm(40, generator=chance).view(10, 4).int(), torch.rand(10, 4, generator=chance)
twin = own + (parts[places.long()] * weights[..., None]).sum(1)
torch.testing.assert_close(triton_mixture.add_up(parts, places, weights, own), twin)
shares = torch.randn(8, 5000, generator=chance)
assert torch.equal(triton_ordered.ordered_sum(shares), ordered_sum(shares.unbind()))
print("alike")
"""


@needs_triton
def test_members_stand_in_the_order_of_their_experts() -> None:
    assert_says("right\n", MEMBERS)


@needs_triton
def test_experts_of_codes_compute_as_their_twin() -> None:
    assert_says("alike\n", EXPERTS)


@needs_triton
def test_what_was_chosen_and_what_ranks_have_is_added_up_as_by_their_twins() -> None:
    assert_says("alike\n", SUMS)
