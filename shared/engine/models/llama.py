"""Dense decoders of the Llama kind: LlamaForCausalLM, and Qwen3ForCausalLM (RMSNorm on queries and keys besides)."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import build, cuda_products, native
from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.kernels.registry import Candidate, choose
from shared.engine.kv import view
from shared.engine.kv.layout import KvLayout
from shared.engine.layers import native_decoder
from shared.engine.layers.decoder import TorchDecoder
from shared.engine.models import dense_layout, fp4
from shared.engine.models.api import CPU, DraftLayer, Placement
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.config import DenseConfig, read
from shared.engine.models.weights import DenseWeights
from shared.engine.parallel.partition import Shard
from shared.errors import Unsupported

log = logging.getLogger(__name__)


class Decoder(Protocol):
    """(batch, kv [pages, layers, 2, Hkv, page_size, D]) -> logits float32 [R, vocab_size or more]. `kv` is a view: the
    heads of a page lie one behind the other."""

    num_torch_threads: int
    recorded: Recorded | None

    def __call__(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Compute a step."""


Build = Callable[[DenseConfig, DenseWeights, int], Decoder]


class Llama:
    """Satisfies `models.api.Model`; no layer of it proposes drafts.

    One state class: `kv`, a page being [Hkv, layers, 2, page_size, D]. `arithmetic` is by default that of `dtype`."""

    def __init__(
        self, config: DenseConfig, dtype: torch.dtype, decoder: Decoder, shard: Shard, arithmetic: str = ""
    ) -> None:
        self.vocab_size = config.vocab_size
        self.max_position = config.max_position
        self.eos_token_ids = config.eos_token_ids
        self.num_torch_threads = decoder.num_torch_threads
        self.recorded = decoder.recorded
        self.arithmetic = arithmetic or str(dtype).removeprefix("torch.")
        self.draft_layer: DraftLayer | None = None
        self._config = config
        self._dtype = dtype
        self._decoder = decoder
        self._kv_heads = shard.kv_heads(config.num_kv_heads)

    def layout(self, page_size: int) -> KvLayout:
        """A page: keys and values of every layer."""
        return self._layout(page_size, range(self._config.num_kv_heads))

    def rank_layout(self, page_size: int) -> KvLayout:
        """A page: keys and values of this rank's heads in every layer."""
        return self._layout(page_size, self._kv_heads)

    def _layout(self, page_size: int, heads: range) -> KvLayout:
        return dense_layout.layout(self._config, str(self._dtype).removeprefix("torch."), page_size, heads)

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """Logits float32 [R, vocab_size or more] of the sampled rows; see `models.api.Model`."""
        config = self._config
        shape = (len(self._kv_heads), config.num_layers, 2, layout.page_size, config.head_dim)
        heads = view.state_view(pool, view.state_class(layout, dense_layout.KV), shape)
        return self._decoder(batch, heads.permute(0, 2, 3, 1, 4, 5))


def load(model_dir: Path, placement: Placement) -> Llama:
    """The model in a directory. Raises Unsupported, naming every tensor that is missing, extra or misshapen."""
    config = read(model_dir)
    if placement.kv_format != placement.dtype_name:
        raise Unsupported(f"{config.architecture} keeps KV in the dtype it computes in, not in {placement.kv_format}")
    checkpoint = Checkpoint(model_dir, placement.dtype, placement.device)
    weights = DenseWeights(checkpoint, config, placement.shard)
    composed: Build = partial(TorchDecoder, group=placement.group)
    in_fp4 = _fp4(config, placement, checkpoint)
    candidates = [
        _cuda(config, placement, composed),
        _native(config, placement, composed),
        Candidate("torch", None, composed),
    ]
    # On the CPU their twin serves, slowly: behind "torch", which always can, only who asks for it gets it.
    chosen = choose([*candidates, in_fp4] if placement.device == CPU else [in_fp4, *candidates], placement.kernels)
    decoder = chosen.built(weights.config, weights, placement.num_threads)
    arithmetic = placement.arithmetic(fp4=chosen.name == fp4.NAME)
    return Llama(config, placement.dtype, decoder, placement.shard, arithmetic)


def _cuda(config: DenseConfig, placement: Placement, otherwise: Build) -> Candidate[Build]:
    obstacle = _cuda_obstacle(config, placement)
    if obstacle is not None:
        return Candidate("cuda", obstacle, otherwise)
    from shared.engine.layers.cuda_decoder import CudaDecoder

    def built(config: DenseConfig, weights: DenseWeights, num_threads: int) -> Decoder:
        return CudaDecoder(
            config, weights, num_threads, _products(placement), placement.group,
            attention=placement.attention, dequantized_bytes=placement.dequantized_bytes,
        )  # fmt: skip

    return Candidate("cuda", None, built)


def _cuda_obstacle(config: DenseConfig, placement: Placement) -> str | None:
    if placement.device.type != "cuda":
        return "the model is not on a GPU"
    try:
        from shared.engine.layers import cuda_decoder
    except ImportError as error:
        return f"{error.name} is not installed"
    return cuda_decoder.obstacle(config, placement.dtype)


def _fp4(config: DenseConfig, placement: Placement, checkpoint: Checkpoint) -> Candidate[Build]:
    """Products of activations in NVFP4: by FlashInfer on a GPU, by their twin on the CPU."""
    obstacle = None if placement.device == CPU else _cuda_obstacle(config, placement)
    if placement.device != CPU and placement.shard.num_ranks > 1:
        obstacle = obstacle or "they know nothing of ranks"
    found = fp4.Found(obstacle) if obstacle else fp4.find(checkpoint, placement, experts=False)
    if found.obstacle is not None or found.products is None:
        return Candidate(fp4.NAME, found.obstacle, partial(TorchDecoder, group=placement.group, fp4=True))
    from shared.engine.layers.cuda_decoder import CudaDecoder

    group, attention = placement.group, placement.attention
    built: Build = partial(CudaDecoder, products=None, group=group, fp4=found.products, attention=attention)
    return Candidate(fp4.NAME, None, built)


def _products(placement: Placement) -> CudaProducts | None:
    """Kernels for few tokens and packed weights; without them those of torch serve, and nothing stays packed."""
    capability = torch.cuda.get_device_capability(placement.device)
    try:
        path = build.cuda_library(placement.cache_dir / "kernels", build.cuda_compiler(), capability)
        return CudaProducts(cuda_products.load(path))
    except (build.BuildError, OSError) as error:
        log.warning("computing without our CUDA products, NVFP4 weights dequantized: %s", error)
        return None


def _native(config: DenseConfig, placement: Placement, otherwise: Build) -> Candidate[Build]:
    obstacle = native_decoder.obstacle(config) if placement.device == CPU else "the model is not on the CPU"
    if placement.shard.num_ranks > 1:
        obstacle = "they compute a step in one call, in which ranks cannot meet"
    if obstacle is not None:
        return Candidate("native", obstacle, otherwise)
    try:
        library = native.load(build.library(placement.cache_dir / "kernels", build.compiler()))
    except (build.BuildError, OSError) as error:
        return Candidate("native", str(error), otherwise)
    return Candidate("native", None, partial(native_decoder.NativeDecoder, library))
