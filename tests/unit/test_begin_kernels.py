"""What steps of GLM begin with, in Triton's interpreter beside its twins. Needs Triton."""

import pytest

from tests.unit.interpreted import assert_says, needs_triton

pytestmark = needs_triton

BEGIN = """
import torch
import torch.nn.functional as F
from shared.engine.kernels import triton_begin
from shared.engine.layers import rope

torch.manual_seed(0)
first, table, frequencies = 30, torch.randn(20, {size}), rope.frequencies(64, 8e6)
token_ids = torch.tensor([3, 29, 30, 41, 49, 50, 700], dtype=torch.int32)
positions = torch.tensor([0, 1, 2, 511, 8191, 100_000, 1_000_000], dtype=torch.int32)
out, cos, sin = triton_begin.begin(token_ids, positions, table, first, frequencies)
ours = ((token_ids >= 30) & (token_ids < 50))[:, None]
assert torch.equal(out, F.embedding((token_ids - first).clamp(0, 19), table) * ours)
for own, twin in zip((cos, sin), rope.table(frequencies, positions)):
    torch.testing.assert_close(own, twin, rtol=0, atol=1e-6)
print("equal")
"""

NORMS = """
import torch
from shared.engine.kernels import reference, triton_begin

torch.manual_seed(0)
x, wide = torch.randn(3, {size}).bfloat16(), torch.randn(3, {size} + 8).bfloat16()
gains = torch.randn(2, {size}).bfloat16().unbind()
y = wide[:, :{size}]
found = triton_begin.norms(x, y, gains, 1e-5)
twin = torch.cat([reference.rms_norm(each, gain, 1e-5) for each, gain in zip((x, y), gains)], dim=1)
torch.testing.assert_close(found.float(), twin.float(), rtol=2e-2, atol=0)
print("equal")
"""


@pytest.mark.parametrize("size", [2048, 3000])  # whole blocks, and less than two
@pytest.mark.parametrize("script", [BEGIN, NORMS])
def test_what_a_step_begins_with_equals_its_twin(script: str, size: int) -> None:
    assert_says("equal\n", script.format(size=size))
