"""The likeliest tokens of many rows in one launch, in Triton's interpreter beside `torch.argmax`. Needs Triton."""

from tests.unit.interpreted import assert_says, needs_triton

pytestmark = needs_triton

SCRIPT = """
import torch
from shared.engine.kernels.triton_likeliest import Likeliest

torch.manual_seed(0)
likeliest = Likeliest(torch.device("cpu"))
for size in (5000, 7, 4096):  # again and again: all is left as it was found
    logits = torch.randn(9, size + 3)[:, :size]  # rows are further apart than they are long
    logits[0] -= 100
    logits[1] = -1.0
    logits[2] = float("-inf")
    logits[3] = torch.where(torch.arange(size) % 2 == 0, -0.0, 0.0)
    logits[4, [5, 6]] = float("inf")
    logits[5] = float("nan")
    logits[6] = -logits[5].abs()
    logits[7, -1] = 50.0
    logits[8, 0] = 50.0
    found, twin = likeliest(logits), logits.argmax(dim=1)
    assert 0 <= int(found[6]) < size
    found[6] = twin[6]
    assert torch.equal(found, twin), (found, twin)
assert likeliest.takes(torch.zeros(4, 9))
assert not likeliest.takes(torch.zeros(4, 9).bfloat16())
assert not likeliest.takes(torch.zeros(9, 4).t())
assert not likeliest.takes(torch.zeros(0, 9))
print("equal")
"""


def test_the_likeliest_tokens_are_those_of_torch() -> None:
    """Of rows of which some are equal, or no numbers: below zero these are no more than some token."""
    assert_says("equal\n", SCRIPT)
