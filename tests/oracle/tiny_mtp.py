"""An MTP layer for `tiny_glm`, of transformers' own decoder layer: transformers has none, and computes it from scratch
for every draft here."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.oracle import tiny_glm


class Mtp(torch.nn.Module):
    """The layer behind a checkpoint's last one, under the names of its tensors there."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        modeling = _modeling()
        fields = {"num_hidden_layers": 2, "mlp_layer_types": ["sparse"] * 2, "layer_types": ["indexed_attention"] * 2}
        fields |= {"indexer_types": ["full", "shared"], "first_k_dense_replace": 0}
        own = transformers.GlmMoeDsaConfig(**(config.to_dict() | fields))
        own._attn_implementation = own._experts_implementation = "eager"
        norm, hidden = modeling.GlmMoeDsaRMSNorm, own.hidden_size
        self.config, self.number = own, config.num_hidden_layers
        self.layer = modeling.GlmMoeDsaDecoderLayer(own, 0)
        self.enorm, self.hnorm, self.head_norm = (norm(hidden, own.rms_norm_eps) for _ in range(3))
        self.eh_proj = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.float().eval()

    def shared(self) -> Any:
        """The layer without its indexer: it takes a selection."""
        layer = _modeling().GlmMoeDsaDecoderLayer(self.config, 1).float().eval()
        layer.load_state_dict(self.layer.state_dict(), strict=False)
        return layer


def make(model: Any, seed: int = 2) -> Mtp:
    """Random, as `tiny_glm` is."""
    mtp = Mtp(model.config)
    tiny_glm.randomize(mtp, seed)
    return mtp


def write(model_dir: Path, seed: int = 1, **changes: Any) -> tuple[Any, Mtp]:
    """A model directory with an MTP layer: transformers' model, and the layer."""
    model = tiny_glm.write(model_dir, seed, num_nextn_predict_layers=1, **changes)
    mtp = make(model)
    file = model_dir / "model.safetensors"
    save_file(load_file(file) | tensors(mtp), file)
    return model, mtp


def tensors(mtp: Mtp) -> dict[str, torch.Tensor]:
    """By their names in a checkpoint, experts apart."""
    prefix, found = f"model.layers.{mtp.number}.", {}
    for full_name, tensor in mtp.state_dict().items():
        name = full_name.removeprefix("layer.").replace("head_norm", "shared_head.norm")
        if name == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    found[f"{prefix}mlp.experts.{expert}.{part}.weight"] = half.contiguous()
        elif name == "mlp.experts.down_proj":
            for expert, down in enumerate(tensor):
                found[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = down.contiguous()
        else:
            found[prefix + name] = tensor.contiguous()
    return found


@torch.inference_mode()
def drafts(model: Any, mtp: Mtp, tokens: list[int], count: int, *, share: bool) -> list[int]:
    """Greedy drafts of what follows `tokens`, of which the last one was just chosen."""
    states = model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
    following, topk, drafted = tokens[1:], None, list[int]()
    for _ in range(count):
        joined = torch.cat((mtp.enorm(model.model.embed_tokens(torch.tensor(following))), mtp.hnorm(states)), dim=-1)
        frozen = topk if share else None
        z, topk = _run(model, mtp, mtp.eh_proj(joined)[None], frozen)
        m = mtp.head_norm(z[0])
        drafted.append(int(model.lm_head(m[-1]).argmax()))
        following = [*following, drafted[-1]]
        states = torch.cat((states, m[-1:]))
    return drafted


def _run(model: Any, mtp: Mtp, u: torch.Tensor, topk: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer over all positions; a selection of fewer positions is kept, its last row for all that follow."""
    positions = torch.arange(u.shape[1])[None]
    # By place: transformers 5.24 renamed the fourth, the cache.
    mask = transformers.masking_utils.create_causal_mask(
        mtp.config, u, None, None, positions, allow_is_causal_skip=False
    )
    if topk is not None:
        num_more = u.shape[1] - topk.shape[1]
        topk = torch.cat((topk, topk[:, -1:].expand(-1, num_more, *topk.shape[2:])), dim=1)
    layer = mtp.layer if topk is None else mtp.shared()
    z, chosen = layer(
        u,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(u, position_ids=positions),
        prev_topk_indices=topk,
    )
    return z, chosen


def _modeling() -> Any:
    """transformers' module, which is imported when it is used."""
    return transformers.models.glm_moe_dsa.modeling_glm_moe_dsa
