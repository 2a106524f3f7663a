"""A matrix product whose weights were made ready once."""

import torch
import torch.nn.functional as F

ROWS_HINT = 16


class Linear:
    """x [T, K] -> x W' + b [T, N].

    In bfloat16 on the CPU the weights are reordered once for oneDNN: 1 to 8 rows then take about two thirds of the
    time (docs/LOG.md).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self.prepacked = weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT) if self.prepacked else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        if self.prepacked:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return product
        return F.linear(x, self.weight, self.bias)
