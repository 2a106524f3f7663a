"""Experts in NVFP4 from how checkpoints store them to how the GPU's kernels take them."""

from collections.abc import Sequence

import torch

from shared.engine.kernels import experts
from shared.engine.quantization.nvfp4 import Nvfp4Tensor
from shared.errors import Unsupported

MULTIPLE = 1024  # of a row of x: a warp's codes


def packed(gate_up: Sequence[Nvfp4Tensor], down: Sequence[Nvfp4Tensor]) -> experts.Experts:
    """Expert by expert: gate and up joined [2 I, hidden], which share a scale, and down [hidden, I]. Raises Unsupported
    for a size that the kernels do not divide."""
    hidden, inner = gate_up[0].codes.shape[1] * 2, down[0].codes.shape[1] * 2
    if hidden % MULTIPLE or inner % 256:
        raise Unsupported(f"experts of {inner} in {hidden} values are no multiples of 256 and {MULTIPLE}")
    factors = [torch.stack([one.scale_2 for one in part]) for part in (gate_up, down)]
    return experts.Experts(
        gate_up=torch.stack([experts.words(one.codes) for one in gate_up]),
        down=torch.stack([experts.words(one.codes) for one in down]),
        gate_up_scale=torch.stack([one.scale.view(torch.uint8) for one in gate_up]),
        down_scale=torch.stack([one.scale.view(torch.uint8) for one in down]),
        factors=torch.stack(factors, dim=1) * experts.FACTOR,
    )
