"""GLM-5, 5.1 and 5.2 on a GPU."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import build, cuda_experts, cuda_few, cuda_fp8, cuda_latent, w4a4
from shared.engine.kernels.cuda_experts import CudaExperts
from shared.engine.kernels.cuda_few import CudaFew
from shared.engine.kernels.cuda_fp8 import CudaFp8
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kv.layout import KvLayout
from shared.engine.layers import cuda_glm, cuda_glm_weights
from shared.engine.layers.cuda_glm import CudaGlm, Ends
from shared.engine.layers.cuda_glm_weights import Layer
from shared.engine.models.api import DraftLayer, Placement
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_layout import INDEX_KEYS, LATENTS, layout
from shared.engine.models.glm_mtp_cuda import GlmMtpOnCuda
from shared.engine.models.glm_weights import GlmWeights, MlpOf

log = logging.getLogger(__name__)


class GlmOnCuda:
    """Satisfies `models.api.Model`, as `glm.Glm` does on the CPU; `config` is that of the whole model."""

    num_torch_threads = 1

    def __init__(
        self, config: GlmConfig, placement: Placement, weights: GlmWeights, fp4: w4a4.Products | None = None
    ) -> None:
        self.vocab_size, self.max_position = config.vocab_size, config.max_position
        self.eos_token_ids = config.eos_token_ids
        self.recorded: Recorded | None = cuda_glm.recorded(config.max_position)
        self.arithmetic = placement.arithmetic(fp4=fp4 is not None)
        self._config, self._group = config, placement.group
        layers = tqdm(range(config.num_layers), "loading", unit=" layers", disable=None)
        top_k, (grouped, latent, fp8, few) = weights.config.num_experts_per_token, _compiled(placement)

        def ready(index: int, fp4: w4a4.Products | None = None) -> Layer:
            return cuda_glm_weights.grouping(read_layer(weights, index, fp4, fp8), top_k, grouped, few)

        read = [ready(index, fp4) for index in layers]
        ends = read_ends(weights, config.vocab_size, placement)
        self._decoder = CudaGlm(weights.config, ends, read, placement.group, latent)
        self.draft_layer: DraftLayer | None = None
        if weights.has_mtp:
            self.draft_layer = GlmMtpOnCuda(self._decoder, ready(config.num_layers), weights.mtp())

    def layout(self, page_size: int) -> KvLayout:
        """A page: latents of every layer, index keys of the full ones."""
        return layout(self._config, "bfloat16", page_size, mtp=self.draft_layer is not None)

    def rank_layout(self, page_size: int) -> KvLayout:
        """The same: heads share latents, so every rank needs them all."""
        return self.layout(page_size)

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """Logits float32 [R, vocab_size or more] of the sampled rows; see `models.api.Model`."""
        logits, _ = self._decoder(batch, pool, layout, (LATENTS, INDEX_KEYS))
        return self._group.join(logits) if len(logits) else logits


def kernels_of(library: Path, device: torch.device) -> tuple[CudaExperts, CudaLatent, CudaFp8, CudaFew]:
    """Those in the library that `build.cuda_library` makes of "glm"."""
    grouped, latent = CudaExperts(cuda_experts.load(library)), CudaLatent(cuda_latent.load(library))
    return grouped, latent, CudaFp8(cuda_fp8.load(library)), CudaFew(cuda_few.load(library), device)


def _compiled(placement: Placement) -> tuple[CudaExperts | None, CudaLatent | None, CudaFp8 | None, CudaFew | None]:
    """Kernels that a compiler has to be there for. Without them those in Triton serve, which compute each choice of an
    expert by itself, select tile by tile, merge attention for each few of its values anew, and take only matrices in
    bfloat16."""
    capability = torch.cuda.get_device_capability(placement.device)
    try:
        path = build.cuda_library(placement.cache_dir / "kernels", build.cuda_compiler(), capability, "glm")
        return kernels_of(path, placement.device)
    except (build.BuildError, OSError) as error:
        log.warning("computing without our CUDA kernels for GLM: %s", error)
        return None, None, None, None


def read_layer(weights: GlmWeights, index: int, fp4: w4a4.Products | None = None, fp8: CudaFp8 | None = None) -> Layer:
    """A layer of a checkpoint. With `fp4`, experts that are stored for products in FP4 have these; with `fp8`, matrices
    of attention and of dense MLPs that are stored in e4m3 stay so."""
    attention = weights.stored_attention(index) if fp8 else weights.attention(index)
    mlp = (weights.fp4_mlp(index) if fp4 else None) or (weights.stored_mlp if fp8 else weights.packed_mlp)(index)
    return Layer(
        *weights.norms(index),
        cuda_glm_weights.attention(attention, fp8),
        cuda_glm_weights.dense(mlp, fp8) if isinstance(mlp, MlpOf) else cuda_glm_weights.mixture(mlp, fp4),
    )


def read_ends(weights: GlmWeights, vocab_size: int, placement: Placement) -> Ends:
    """Both ends of a checkpoint. The last rank's part of the head is filled up, so that all parts are equally long."""
    size = -(-vocab_size // placement.shard.num_ranks)
    head = weights.head()
    head = F.pad(head, (0, 0, 0, size - len(head)))
    return Ends(weights.embedding(), placement.shard.rank * size, weights.final_norm(), head)
