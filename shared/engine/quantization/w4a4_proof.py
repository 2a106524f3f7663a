"""Kernels that nobody could run where they were written prove themselves where they are to serve: small products, held
against the twin's."""

import torch

from shared.engine.kernels.w4a4 import Products
from shared.engine.quantization import nvfp4, w4a4
from shared.engine.quantization.w4a4 import Calibrated

# Of the largest element. Both round products to bfloat16 (1 / 256); a mistaken layout is off by a third and more.
TOLERANCE = 0.02
ROWS = (1, 130)  # of x: less than a tile of scales, and more than one
MATRIX = (160, 224)  # no whole tiles of scales, either way
NUM_EXPERTS, HIDDEN, INNER, TOP_K = 4, 256, 128, 2


def obstacle(products: Products, device: torch.device, *, experts: bool) -> str | None:
    """Why `products` cannot serve on `device`, if they cannot; with `experts` mixtures too. Compiles what it runs,
    which may take many minutes the first time."""
    generator = torch.Generator().manual_seed(0)
    try:
        faults = [_linear(products, device, generator, num_rows) for num_rows in ROWS]
        if experts:
            faults += [_experts(products, device, generator, num_rows) for num_rows in ROWS]
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
        return f"they cannot be run on this GPU: {error}"
    return next((fault for fault in faults if fault is not None), None)


def _linear(products: Products, device: torch.device, generator: torch.Generator, num_rows: int) -> str | None:
    weight = w4a4.joined([_matrix(MATRIX, device, generator)])
    assert weight is not None, "MATRIX was chosen to fit"
    x = _random((num_rows, MATRIX[1]), generator).to(device, torch.bfloat16)
    return _difference("a product", products.linear(x, weight), w4a4.TorchProducts().linear(x, weight))


def _experts(products: Products, device: torch.device, generator: torch.Generator, num_rows: int) -> str | None:
    experts = w4a4.stacked(
        [_matrix((2 * INNER, HIDDEN), device, generator) for _ in range(NUM_EXPERTS)],
        [_matrix((HIDDEN, INNER), device, generator) for _ in range(NUM_EXPERTS)],
    )
    assert experts is not None, "their sizes were chosen to fit"
    x = _random((num_rows, HIDDEN), generator).to(device, torch.bfloat16)
    chosen = torch.rand((num_rows, NUM_EXPERTS), generator=generator).topk(TOP_K).indices.int().to(device)
    weights = torch.rand((num_rows, TOP_K), generator=generator).to(device)
    found, twins = (each.experts(x, experts, chosen, weights) for each in (products, w4a4.TorchProducts()))
    return _difference("a mixture", found, twins)


def _matrix(shape: tuple[int, int], device: torch.device, generator: torch.Generator) -> Calibrated:
    """One whose products are about as large as its inputs, which are taken to be at most 5. With that scale no bfloat16
    lies just between two codes, where approximate reciprocals could decide."""
    made = nvfp4.quantize(_random(shape, generator) * shape[1] ** -0.5)
    stored = nvfp4.Nvfp4Tensor(made.codes.to(device), made.scale.to(device), made.scale_2.to(device))
    return Calibrated(stored, nvfp4.scale_of(torch.tensor(5.0)).to(device))


def _random(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _difference(what: str, found: torch.Tensor, expected: torch.Tensor) -> str | None:
    error = float((found.float() - expected.float()).abs().amax() / expected.float().abs().amax())
    return None if error <= TOLERANCE else f"{what} on this GPU is off by {error:.2g} of its largest element"
