"""A GLM of two layers over a prompt of any length: `python -m tests.oracle.long_context DIR NUM_TOKENS` runs the engine
in a process of its own and prints what it took and said. `Twin` computes single rows directly, in float64."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from shared.engine.api import EngineRequest, SamplingParams
from tests.memory import Memory

CHUNK, NUM_OUTPUT, PAGE_SIZE, TOP_K = 1024, 5, 16, 16
CHANGES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 2,
    "indexer_types": ["full", "shared"],
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": TOP_K,
    "max_position_embeddings": 1 << 20,
    "eos_token_id": [2],
    "pad_token_id": 2,
}


def write(model_dir: Path) -> None:
    """Save the model. The second layer shares the first one's selection, so a row depends on few others."""
    from tests.oracle import tiny_glm  # imports transformers, which the process of `main` does without

    tiny_glm.write(model_dir, seed=3, **CHANGES)


def prompt(num_tokens: int) -> list[int]:
    return random.Random(1).choices(range(3, 257), k=num_tokens)


def main(model_dir: Path, num_tokens: int) -> None:
    from shared.engine.executor import load_executor
    from tests.law.worker import Worker

    num_pages = -(-(num_tokens + NUM_OUTPUT) // PAGE_SIZE) + 2 * CHUNK // PAGE_SIZE
    executor = load_executor(
        model_dir, model_name="long", dtype="float32", page_size=PAGE_SIZE, num_threads=2, num_pages=num_pages
    )
    worker, sampling = Worker(executor, CHUNK), SamplingParams(max_tokens=NUM_OUTPUT, ignore_eos=True)
    worker.run(EngineRequest("warm", tuple(prompt(2 * CHUNK)), sampling, hash_key=b"other"))
    memory = Memory("self")
    tokens = worker.run(EngineRequest("long", tuple(prompt(num_tokens)), sampling))
    pool_bytes = num_pages * executor.layout.page_bytes
    sys.stdout.write(json.dumps({"tokens": tokens, "grown": memory.grown(), "pool": pool_bytes}))


def check_tokens(model_dir: Path, num_tokens: int, found: list[int]) -> None:
    """Whether these followed `prompt(num_tokens)`, by the twin, and whether old tokens mattered to them."""
    twin = Twin(model_dir, [*prompt(num_tokens), *found])
    rows = range(num_tokens - 1, num_tokens - 1 + NUM_OUTPUT)
    assert [int(twin.logits(row).argmax()) for row in rows] == found
    oldest = [int(twin.selection(row)[0]) for row in rows]
    assert max(oldest) < num_tokens - CHUNK, "the newest tokens alone mattered: the prompt shows nothing"


class Twin:
    """Rows of the model over `tokens`, straight from the definitions: keys and values of every head are made."""

    def __init__(self, model_dir: Path, tokens: list[int]) -> None:
        fields = json.loads((model_dir / "config.json").read_text())
        self._tensors = {name: tensor.double() for name, tensor in load_file(model_dir / "model.safetensors").items()}
        self._eps, self._latent_eps = fields["rms_norm_eps"], fields["latent_norm_eps"]
        self._theta = fields["rope_parameters"]["rope_theta"]
        self._tokens = torch.tensor(tokens)
        self._embedded = self._tensors["model.embed_tokens.weight"][self._tokens]
        everything = torch.arange(len(tokens))
        x = self._norm(self._embedded, "layers.0.input_layernorm", self._eps)
        self._latents = self._latents_of(0, x, everything)
        key = F.linear(x, self._get("layers.0.self_attn.indexer.wk"))
        norm = (self._get("layers.0.self_attn.indexer.k_norm"), self._get("layers.0.self_attn.indexer.k_norm", "bias"))
        self._keys = self._rotate_first(F.layer_norm(key, key.shape[-1:], *norm, 1e-6), everything)

    def logits(self, position: int) -> torch.Tensor:
        """What follows the token at `position`."""
        selection = self.selection(position)
        hidden = torch.stack([self._first_layer(row) for row in selection.tolist()])
        x = self._norm(hidden, "layers.1.input_layernorm", self._eps)
        own = int((selection == position).nonzero()) if position in selection else None
        row = hidden[own] if own is not None else self._first_layer(position)
        out = self._layer(1, row, position, self._latents_of(1, x, selection))
        return F.linear(self._norm(out, "norm", self._eps), self._tensors["lm_head.weight"])

    def selection(self, position: int) -> torch.Tensor:
        """Of a token: the visible ones with the highest scores."""
        x = self._norm(self._embedded[position], "layers.0.input_layernorm", self._eps)
        q = F.linear(self._low(0, x), self._get("layers.0.self_attn.indexer.wq_b")).view(-1, self._keys.shape[1])
        q = self._rotate_first(q, torch.tensor([position]))
        weights = F.linear(x, self._get("layers.0.self_attn.indexer.weights_proj"))
        scores = weights @ torch.relu(q @ self._keys[: position + 1].T)
        return scores.argsort(descending=True, stable=True)[:TOP_K].sort().values

    def _first_layer(self, position: int) -> torch.Tensor:
        selection = self.selection(position)
        return self._layer(0, self._embedded[position], position, tuple(each[selection] for each in self._latents))

    def _layer(self, layer: int, h: torch.Tensor, position: int, latents: Any) -> torch.Tensor:
        """A row h [hidden] through a layer, attending to `latents`: c [K, lora], rotary keys [K, rope]."""
        c, rotary = latents
        prefix, (num_heads, nope, value) = f"layers.{layer}.self_attn.", (2, 8, 8)
        x = self._norm(h, f"layers.{layer}.input_layernorm", self._eps)
        q = F.linear(self._low(layer, x), self._get(prefix + "q_b_proj"))
        q_nope, q_rope = q.view(num_heads, -1).split([nope, rotary.shape[1]], dim=1)
        q_rope = self._rotate(q_rope, torch.tensor([position]))
        keys, values = F.linear(c, self._get(prefix + "kv_b_proj")).view(len(c), num_heads, -1).split([nope, value], 2)
        scores = torch.einsum("hn,khn->hk", q_nope, keys) + q_rope @ rotary.T
        shares = (scores * (nope + rotary.shape[1]) ** -0.5).softmax(dim=1)
        attended = torch.einsum("hk,khv->hv", shares, values)
        h = h + F.linear(attended.flatten(), self._get(prefix + "o_proj"))
        x, mlp = self._norm(h, f"layers.{layer}.post_attention_layernorm", self._eps), f"layers.{layer}.mlp."
        gated = F.silu(F.linear(x, self._get(mlp + "gate_proj"))) * F.linear(x, self._get(mlp + "up_proj"))
        return h + F.linear(gated, self._get(mlp + "down_proj"))

    def _latents_of(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = f"layers.{layer}.self_attn."
        both = F.linear(x, self._get(prefix + "kv_a_proj_with_mqa"))
        size = len(self._get(prefix + "kv_a_layernorm"))
        latent = self._norm(both[:, :size], prefix + "kv_a_layernorm", self._latent_eps)
        return latent, self._rotate(both[:, size:], positions)

    def _low(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"layers.{layer}.self_attn."
        return self._norm(F.linear(x, self._get(prefix + "q_a_proj")), prefix + "q_a_layernorm", self._latent_eps)

    def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return self._get(name) * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def _rotate_first(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.cat((self._rotate(x[:, :4], positions), x[:, 4:]), dim=1)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Neighbours paired, as complex numbers. x [T, D]."""
        turns = positions[:, None] * self._theta ** (-torch.arange(0, x.shape[1], 2).double() / x.shape[1])
        pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)).flatten(1)

    def _get(self, name: str, kind: str = "weight") -> torch.Tensor:
        return self._tensors[f"model.{name}.{kind}"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
