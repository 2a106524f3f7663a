"""Who multiplies activations in NVFP4 here, if anybody can."""

import logging
from dataclasses import dataclass

import torch

from shared.engine.kernels import flashinfer_w4a4, w4a4
from shared.engine.models.api import CPU, Placement
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.quantization import w4a4_proof

log = logging.getLogger(__name__)

NAME = "w4a4"
NOT_STORED = (
    "no weights of this checkpoint are in NVFP4 with a scale for their activations (`forebay quantize --calibrate` "
    "measures them)"
)
NOT_COMPILED = (
    "FlashInfer's fused mixture is not compiled on this machine, which takes hours of a core (once): the package "
    "flashinfer-jit-cache brings it, `--kernels w4a4` compiles it"
)


@dataclass(frozen=True, slots=True)
class Found:
    """`products`, or what keeps them from serving. On the CPU neither: there layers take the twin."""

    obstacle: str | None
    products: w4a4.Products | None = None


def find(checkpoint: Checkpoint, placement: Placement, *, experts: bool) -> Found:
    """Look, and on a GPU run small products before they are trusted with a model's; with `experts` mixtures too.

    That compiles FlashInfer's kernels at first use, so it is done only for who may get them: products take minutes, and
    mixtures so long that they have to be asked for by name, unless they are there."""
    if placement.kernels not in ("auto", NAME):
        return Found("they were not asked for")
    if not checkpoint.has_input_scales():
        return Found(NOT_STORED)
    return Found(None) if placement.device == CPU else _on_gpu(placement, experts)


def _on_gpu(placement: Placement, experts: bool) -> Found:
    capability = torch.cuda.get_device_capability(placement.device)
    obstacle = flashinfer_w4a4.capability_obstacle(capability)
    if obstacle is None and placement.dtype != torch.bfloat16:
        obstacle = f"they compute in bfloat16, not in {placement.dtype_name}"
    if obstacle is not None:
        return Found(obstacle)
    try:
        products = flashinfer_w4a4.load()
        if experts and placement.kernels != NAME and not flashinfer_w4a4.mixtures_are_compiled(capability):
            return Found(NOT_COMPILED)
    except ImportError as error:
        return Found(f"{error.name} is not installed")
    log.info("trying FP4 products on this GPU; FlashInfer compiles them at first use, which takes minutes")
    return Found(w4a4_proof.obstacle(products, placement.device, experts=experts), products)
