"""Gated MLPs: one alone, and a mixture behind a sigmoid router with a correction bias (DeepSeek-V3's noaux_tc)."""

import torch
import torch.nn.functional as F

from shared.engine.kernels import reference, w4a4
from shared.engine.layers.linear import Linear, RowLinear
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_weights import MlpWeights, MoeWeights, PackedMoeWeights
from shared.engine.parallel.group import Alone, Group
from shared.engine.quantization.w4a4 import TorchProducts


class Mlp:
    """x [T, hidden] -> [T, hidden]."""

    def __init__(self, weights: MlpWeights, group: Group) -> None:
        self.gate_up, self.down = Linear(weights.gate_up), RowLinear(weights.down, None, group)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate) * up)."""
        return self.down(reference.silu_mul(self.gate_up(x)))


class Moe:
    """x [T, hidden] -> [T, hidden]: the shared expert, plus the weighted sum of the chosen ones.

    Every rank has all tokens, so experts that are shared out need no exchange of tokens: each rank adds up what its
    experts, or its slices of all experts, contribute, and one sum over ranks ends the layer.
    """

    def __init__(self, config: GlmConfig, weights: MoeWeights | PackedMoeWeights, group: Group) -> None:
        self.config, self.group = config, group
        self.router, self.correction_bias = weights.router.float(), weights.correction_bias
        self.routed: PlainExperts | TwinExperts
        if isinstance(weights.experts, w4a4.Experts):
            self.routed = TwinExperts(weights.experts)
        else:
            assert isinstance(weights, MoeWeights), "others are read for GPUs"
            self.routed = PlainExperts(weights)
        self.shared = Mlp(weights.shared, Alone())  # a part of the sum

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Experts are added in rising order, so that a token's sum does not depend on its batch."""
        weights, chosen = route(F.linear(x.float(), self.router), self.correction_bias, self.config)
        out = self.shared(x).float()
        self.routed.add(out, x, chosen, weights)
        return self.group.sum(out).to(x.dtype)


class PlainExperts:
    """A rank's experts in the dtype of the model."""

    def __init__(self, weights: MoeWeights) -> None:
        self._gate_up, self._down, self._ids = weights.experts.gate_up, weights.experts.down, weights.expert_ids

    def add(self, out: torch.Tensor, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        """To out float32 [T, hidden] what the experts `chosen` [T, k] make of x, weighted."""
        chosen, places = chosen.sort(dim=1)
        flat, weights = chosen.flatten(), weights.gather(1, places)
        counts = torch.bincount(flat, minlength=self._ids.stop).tolist()
        first, own = sum(counts[: self._ids.start]), counts[self._ids.start : self._ids.stop]
        order = flat.argsort(stable=True)[first : first + sum(own)]  # rows that go through one expert lie together
        if not len(order):
            return
        rows, experts = x[order // chosen.shape[1]].split(own), zip(self._gate_up, self._down, strict=True)
        made = [
            F.linear(reference.silu_mul(F.linear(each, gate_up)), down)
            for each, (gate_up, down) in zip(rows, experts, strict=True)
            if len(each)
        ]
        parts = out.new_zeros(len(flat), out.shape[1])
        parts[order] = torch.cat(made).float() * weights.flatten()[order, None]
        for part in parts.view(*chosen.shape, -1).unbind(1):
            out += part


class TwinExperts:
    """All experts, or a slice of each, with products in FP4 by their twin."""

    def __init__(self, experts: w4a4.Experts) -> None:
        self._experts, self._products = experts, TorchProducts()

    def add(self, out: torch.Tensor, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        """As PlainExperts."""
        out += self._products.experts(x, self._experts, chosen, weights)


def route(logits: torch.Tensor, bias: torch.Tensor, config: GlmConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 [T, k] and experts [T, k] from logits float32 [T, E].

    The bias takes part in the choice and not in the weights. With groups, only the best ones by the sum of their two
    best experts can be chosen from (DeepSeek-V3, section 2.1.2).
    """
    scores = logits.sigmoid()
    choice = scores + bias
    if config.num_groups > 1:
        grouped = choice.view(len(choice), config.num_groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.num_chosen_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    chosen = choice.topk(config.num_experts_per_token, dim=-1).indices
    weights = scores.gather(1, chosen)
    if config.normalize_top_k:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor, chosen
