"""What a mixture of many tokens does beside its grouped products, in Triton's interpreter."""

from tests.unit.interpreted import assert_says, needs_triton

# The interpreter cuts a bfloat16 off where a GPU rounds.
ALIKE = """
import torch
from shared.engine.kernels import experts, triton_mixture

chance = torch.Generator().manual_seed(0)
for num_experts, rows, width in ((3, 5, 64), (2, 3, 256), (4, 7, 96)):
    codes = torch.randint(0, 256, (num_experts, rows, width // 2), generator=chance, dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (num_experts, rows, width // experts.GROUP), generator=chance, dtype=torch.uint8)
    factors = torch.rand(num_experts, generator=chance) * 0.003 * experts.FACTOR
    found, twin = (kernels.dequantize(codes, scale, factors) for kernels in (triton_mixture, experts))
    torch.testing.assert_close(found, twin, atol=0, rtol=2**-7)
    assert torch.equal(found == 0, twin == 0)
parts, own = (torch.randn(rows, 1500, generator=chance) for rows in (40, 10))
places, weights = torch.randperm(40, generator=chance).view(10, 4), torch.rand(10, 4, generator=chance)
twin = own + (parts[places] * weights[..., None]).sum(1)
torch.testing.assert_close(triton_mixture.add_up(parts, places, weights, own), twin)
print("alike")
"""


@needs_triton
def test_experts_are_decoded_and_added_up_as_by_their_twins() -> None:
    assert_says("alike\n", ALIKE)
