"""The dense decoder composed of torch operations: the twin of the native one, and its stand-in without a compiler."""

import torch
from tqdm import tqdm

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import reference
from shared.engine.layers import rope
from shared.engine.layers.attention import Attention
from shared.engine.layers.linear import Linear, RowLinear
from shared.engine.layers.vocabulary import Embedding, Head
from shared.engine.models.config import DenseConfig
from shared.engine.models.weights import DenseWeights, Fp4Weights
from shared.engine.parallel.group import Group


class DecoderLayer:
    """x [T, hidden] -> [T, hidden]: attention and gated MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DenseConfig, weights: Fp4Weights, group: Group) -> None:
        self.eps = config.rms_norm_eps
        self.input_norm, self.post_norm = weights.input_norm, weights.post_norm
        self.attention = Attention(config, weights, group)
        self.gate_up = Linear(weights.gate_up, weights.gate_up_bias)
        self.down = RowLinear(weights.down, weights.down_bias, group)

    def __call__(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], batch: Batch, kv: torch.Tensor
    ) -> torch.Tensor:
        """`kv` [pages, 2, Hkv, page_size, D] is this layer's."""
        x = x + self.attention(reference.rms_norm(x, self.input_norm, self.eps), angles, batch, kv)
        return x + self.down(reference.silu_mul(self.gate_up(reference.rms_norm(x, self.post_norm, self.eps))))


class TorchDecoder:
    """Token ids to logits, in the dtype of the weights; a rank's share of both, if the group has several. With `fp4`
    products are in FP4 where the weights allow it (`DenseWeights.fp4_layer`)."""

    recorded: Recorded | None = None

    def __init__(
        self, config: DenseConfig, weights: DenseWeights, num_threads: int, group: Group, *, fp4: bool = False
    ) -> None:
        self.num_torch_threads = num_threads
        self.eps = config.rms_norm_eps
        self.embedding = Embedding(weights.embedding(), config.vocab_size, group)
        self.norm = weights.final_norm()
        self.frequencies = rope.inverse_frequencies(config).to(self.norm.device)
        layers = tqdm(range(config.num_layers), "loading", unit=" layers", disable=None)
        read = weights.fp4_layer if fp4 else weights.layer
        self.layers = [DecoderLayer(config, read(index), group) for index in layers]
        self.head = Head(weights.head(), config.vocab_size, group)

    def __call__(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Logits float32 [R, vocab_size or more]. `kv` [pages, layers, 2, Hkv, page_size, D]."""
        batch = batch.to(self.norm.device)
        x = self.embedding(batch.token_ids)
        angles = rope.table(self.frequencies, batch.positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, batch, kv[:, index])
        return self.head(reference.rms_norm(x[batch.sampled_rows], self.norm, self.eps))
