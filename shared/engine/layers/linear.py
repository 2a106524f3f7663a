"""Matrix products whose weights were made ready once."""

import torch
import torch.nn.functional as F

from shared.engine.kernels import w4a4
from shared.engine.parallel.group import Group
from shared.engine.quantization.w4a4 import Linear as Fp4Linear

ROWS_HINT = 16


class Linear:
    """x [T, K] -> x W' + b [T, N].

    In bfloat16 on the CPU the weights are reordered once for oneDNN: 1 to 8 rows then take about two thirds of the
    time (docs/LOG.md). Matrices for products in FP4 have x quantized too, by their twin.
    """

    def __init__(self, weight: torch.Tensor | w4a4.Weight, bias: torch.Tensor | None = None) -> None:
        self.bias, self.prepacked, self._fp4 = bias, False, None
        if isinstance(weight, w4a4.Weight):
            self._fp4 = Fp4Linear(weight, bias)
            return
        suits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        self.prepacked = suits and torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT) if self.prepacked else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        if self._fp4 is not None:
            return self._fp4(x)
        if self.prepacked:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return product
        return F.linear(x, self.weight, self.bias)


class RowLinear:
    """As Linear, for a matrix of which each rank has some columns [N, K / ranks]: x [T, K / ranks] -> [T, N], the sum
    over all ranks on each of them."""

    def __init__(self, weight: torch.Tensor | w4a4.Weight, bias: torch.Tensor | None, group: Group) -> None:
        self._group = group
        shared = group.num_ranks > 1
        self._product = Linear(weight, None if shared else bias)
        self._bias = bias if shared else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        total = self._group.sum(self._product(x))
        return total if self._bias is None else total + self._bias
