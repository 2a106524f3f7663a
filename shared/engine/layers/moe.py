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
        experts, self._ids = weights.experts, weights.expert_ids
        self._gate_up, self._down = experts.gate_up.unbind(), experts.down.unbind()

    def add(self, out: torch.Tensor, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        """To out float32 [T, hidden] what the experts `chosen` [T, k] make of x, weighted."""
        flat, first = chosen.flatten(), self._ids.start
        counts = torch.bincount(flat, minlength=self._ids.stop).tolist()
        before, own = sum(counts[:first]), counts[first : self._ids.stop]
        used = [expert for expert, num_rows in enumerate(own) if num_rows]
        if not used:
            return
        order = flat.argsort(stable=True)[before : before + sum(own)]  # rows of one expert lie together
        tokens, num_rows = order // chosen.shape[1], [own[expert] for expert in used]
        rows = zip(used, x[tokens].split(num_rows), strict=True)
        inner = reference.silu_mul(torch.cat([F.linear(each, self._gate_up[expert]) for expert, each in rows]))
        rows = zip(used, inner.split(num_rows), strict=True)
        made = torch.cat([F.linear(each, self._down[expert]) for expert, each in rows]).float()
        out.index_add_(0, tokens, made * weights.flatten()[order, None])  # in the order of rows


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
