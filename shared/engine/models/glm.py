"""GLM-5, 5.1 and 5.2: latent attention over a shared sparse selection, and a mixture of experts."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import build, native, reference
from shared.engine.kernels.registry import Candidate, choose
from shared.engine.kernels.sparse_reference import Placed
from shared.engine.kv.layout import KvLayout
from shared.engine.layers import native_glm, native_indexer, rope
from shared.engine.layers.glm_layer import Parts, TorchParts
from shared.engine.layers.vocabulary import Embedding, Head
from shared.engine.models import fp4
from shared.engine.models.api import CPU, DraftLayer, Model, Placement
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.glm_config import GlmConfig, read
from shared.engine.models.glm_layout import INDEX_KEYS, LATENTS, layout
from shared.engine.models.glm_mtp import GlmMtp
from shared.engine.models.glm_weights import GlmWeights
from shared.engine.parallel.partition import of_glm
from shared.engine.quantization import rows

log = logging.getLogger(__name__)


class Glm:
    """Satisfies `models.api.Model`.

    State classes: `glm_layout`, in the form that the placement asks for. It is made of `parts`, by default of torch's;
    with `fp4_experts` its layers, but for the one that drafts, multiply routed experts in FP4.
    """

    def __init__(
        self,
        config: GlmConfig,
        placement: Placement,
        weights: GlmWeights,
        *,
        parts: Parts | None = None,
        fp4_experts: bool = False,
    ) -> None:
        self.vocab_size = config.vocab_size
        self.max_position = config.max_position
        self.eos_token_ids = config.eos_token_ids
        self.num_torch_threads = placement.num_threads
        self.recorded: Recorded | None = None
        self.arithmetic = placement.arithmetic(fp4=fp4_experts)
        self._config, self._kv_dtype = config, placement.kv_format
        self.frequencies = rope.frequencies(config.qk_rope_head_dim, config.rope_theta)
        self.embedding = Embedding(weights.embedding(), config.vocab_size, placement.group)
        self._norm = weights.final_norm()
        layers = tqdm(range(config.num_layers), "loading", unit=" layers", disable=None)
        parts = parts or TorchParts()
        own: Parts = TorchParts(fp4=True) if fp4_experts else parts
        self._layers = [own.layer(weights, layer, placement.group) for layer in layers]
        self.head = Head(weights.head(), config.vocab_size, placement.group, parts.linear)
        self.draft_layer: DraftLayer | None = None
        if weights.has_mtp:
            self.draft_layer = GlmMtp(weights, placement.group, self, parts)

    def layout(self, page_size: int) -> KvLayout:
        """A page: latents of every layer, index keys of the full ones."""
        return layout(self._config, self._kv_dtype, page_size, mtp=self.draft_layer is not None)

    def rank_layout(self, page_size: int) -> KvLayout:
        """The same: heads share latents, so every rank needs them all."""
        return self.layout(page_size)

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """Logits float32 [R, vocab_size or more] of the sampled rows; see `models.api.Model`."""
        return self.head(self.norm(self.hidden(batch, pool, layout)[batch.sampled_rows]))

    def hidden(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """What the last layer leaves of every token of the step, [T, hidden], before the norm."""
        latents = rows.latents(pool, layout, LATENTS, self._config.kv_lora_rank)
        keys = iter(rows.index_keys(pool, layout, INDEX_KEYS, self._config.index_head_dim))
        x = self.embedding(batch.token_ids)
        turns, step = rope.turns(self.frequencies, batch.positions), Placed.of(batch, layout.page_size)
        selection = step.positions[:, None]  # the first layer makes its own
        for index, (layer, full) in enumerate(zip(self._layers, self._config.full_layers, strict=True)):
            own_keys = next(keys) if full else None
            x, selection = layer(x, turns, step, latents[index], own_keys, selection)
        return x

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden] as the head, and the MTP layer, take it."""
        return reference.rms_norm(hidden, self._norm, self._config.rms_norm_eps)


Build = Callable[[GlmConfig, Placement, GlmWeights], Model]


def load(model_dir: Path, placement: Placement) -> Model:
    """The model in a directory. Raises Unsupported, naming every tensor that is missing, extra or misshapen."""
    config = read(model_dir)
    checkpoint = Checkpoint(model_dir, placement.dtype, placement.device)
    cuda, composed, in_fp4 = _cuda(config, placement), _torch(placement), _fp4(config, placement, checkpoint)
    # On the CPU their twin serves, slowly: behind "torch", which always can, only who asks for it gets it.
    candidates = [_native(config, placement), composed, in_fp4] if placement.device == CPU else [in_fp4, cuda, composed]
    chosen = choose(candidates, placement.kernels)
    return chosen.built(config, placement, GlmWeights(checkpoint, config, placement.shard, mtp=placement.mtp))


def _torch(placement: Placement) -> Candidate[Build]:
    obstacle = None if placement.device == CPU else "in plain torch this architecture computes on the CPU alone"
    return Candidate("torch", obstacle, Glm)


def _native(config: GlmConfig, placement: Placement) -> Candidate[Build]:
    """Layers by our own C++; or layers of torch whose tokens it chooses, where it cannot do the rest."""
    if placement.kernels not in ("auto", "native"):
        return Candidate("native", "others were asked for", Glm)
    try:
        library = native.load(build.library(placement.cache_dir / "kernels", build.compiler()))
    except (build.BuildError, OSError) as error:
        return Candidate("native", str(error), Glm)
    parts: Parts = native_glm.NativeParts(library, placement.dtype, placement.num_threads)
    if obstacle := native_glm.obstacle(config, placement.dtype, placement.kv_format):
        log.info("layers are computed in torch: our own kernels do not take %s", obstacle)
        parts = TorchParts(native_indexer.Chooser(library, placement.num_threads))
    return Candidate("native", None, partial(Glm, parts=parts))


def _cuda(config: GlmConfig, placement: Placement) -> Candidate[Build]:
    if placement.device.type != "cuda":
        return Candidate("cuda", "the model is not on a GPU", Glm)
    try:
        from shared.engine.layers import cuda_glm_limits
        from shared.engine.models.glm_cuda import GlmOnCuda
    except ImportError as error:
        return Candidate("cuda", f"{error.name} is not installed", Glm)
    if placement.shard.num_ranks > 1 and placement.shard.expert_split == "experts":
        return Candidate("cuda", "their ranks share out the experts' matrices, not whole experts", GlmOnCuda)
    share, _ = of_glm(config, placement.shard)
    capability = torch.cuda.get_device_capability(placement.device)
    obstacle = cuda_glm_limits.obstacle(share, placement.dtype, placement.kv_format, capability)
    return Candidate("cuda", obstacle, GlmOnCuda)


def _fp4(config: GlmConfig, placement: Placement, checkpoint: Checkpoint) -> Candidate[Build]:
    """Routed experts with activations in NVFP4: by FlashInfer on a GPU, by their twin on the CPU."""
    obstacle = None if placement.device == CPU else _cuda(config, placement).obstacle
    if placement.shard.num_ranks > 1 and placement.shard.expert_split == "experts":
        obstacle = "their ranks share out the experts' matrices, not whole experts"
    found = fp4.Found(obstacle) if obstacle else fp4.find(checkpoint, placement, experts=True)
    if found.obstacle is not None or found.products is None:
        return Candidate(fp4.NAME, found.obstacle, partial(Glm, fp4_experts=True))
    from shared.engine.models.glm_cuda import GlmOnCuda

    return Candidate(fp4.NAME, None, partial(GlmOnCuda, fp4=found.products))
