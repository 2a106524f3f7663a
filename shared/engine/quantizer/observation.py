"""What linear layers are given to compute with: the largest magnitude of each one's inputs, by its name.

The layers of the engine join and stack the matrices of a checkpoint. So names are noted where matrices are read, and
products are recognized by the memory of their matrix, while a model runs in float32, in which layers keep it as it is.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shared.engine.layers.decoder import TorchDecoder
from shared.engine.models import config as dense_config
from shared.engine.models import glm_config
from shared.engine.models.api import Model, Placement
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.config import DenseConfig
from shared.engine.models.glm import Glm
from shared.engine.models.glm_weights import AttentionWeights, GlmWeights, MlpWeights, MoeWeights
from shared.engine.models.llama import Llama
from shared.engine.models.registry import architecture
from shared.engine.models.weights import DenseWeights, LayerWeights
from shared.engine.parallel.partition import Shard


class Observer(TorchFunctionMode):
    """While it is entered, notes the inputs of every product with a matrix that it was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.amax: dict[str, float] = defaultdict(float)
        self._names: dict[int, list[str]] = {}

    def know(self, matrix: torch.Tensor, names: list[str]) -> None:
        """`matrix` computes these linear layers."""
        self._names[matrix.data_ptr()] = names

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """torch's own hook."""
        if function is F.linear and args[0].numel():
            found = float(args[0].abs().amax())
            for name in self._names.get(args[1].data_ptr(), ()):
                self.amax[name] = max(self.amax[name], found)
        return function(*args, **(kwargs or {}))


def load(model_dir: Path, num_threads: int, observer: Observer) -> Model:
    """A model in float32 on the CPU, its matrices known to `observer`. Raises Unsupported."""
    placement = Placement(torch.float32, num_threads, "torch")
    checkpoint = Checkpoint(model_dir, torch.float32)
    if architecture(model_dir) == glm_config.ARCHITECTURE:
        glm = glm_config.read(model_dir)
        return Glm(glm, placement, _GlmWeights(checkpoint, glm, observer))
    dense = dense_config.read(model_dir)
    weights = _DenseWeights(checkpoint, dense, observer)
    return Llama(dense, torch.float32, TorchDecoder(dense, weights, num_threads, placement.group), Shard())


class _DenseWeights(DenseWeights):
    def __init__(self, checkpoint: Checkpoint, config: DenseConfig, observer: Observer) -> None:
        super().__init__(checkpoint, config, Shard())
        self._observer = observer

    def layer(self, index: int) -> LayerWeights:
        """As in DenseWeights."""
        found, prefix = super().layer(index), f"model.layers.{index}."
        attention = prefix + "self_attn."
        self._observer.know(found.qkv, [f"{attention}{name}_proj.weight" for name in "qkv"])
        self._observer.know(found.output, [attention + "o_proj.weight"])
        _know_mlp(self._observer, prefix + "mlp.", found.gate_up, found.down)
        return found


class _GlmWeights(GlmWeights):
    def __init__(self, checkpoint: Checkpoint, config: glm_config.GlmConfig, observer: Observer) -> None:
        super().__init__(checkpoint, config, Shard(), mtp=False)
        self._observer = observer

    def attention(self, layer: int) -> AttentionWeights:
        """As in GlmWeights. kv_b is never multiplied with latents here, so its inputs are not seen."""
        found, prefix, know = super().attention(layer), f"model.layers.{layer}.self_attn.", self._observer.know
        know(found.down, [prefix + "q_a_proj.weight", prefix + "kv_a_proj_with_mqa.weight"])
        know(found.query, [prefix + "q_b_proj.weight"])
        know(found.output, [prefix + "o_proj.weight"])
        if found.indexer is not None:
            know(found.indexer.query, [prefix + "indexer.wq_b.weight"])
            know(found.indexer.key, [prefix + "indexer.wk.weight"])
            know(found.indexer.head_weights, [prefix + "indexer.weights_proj.weight"])
        return found

    def mlp(self, layer: int) -> MlpWeights | MoeWeights:
        """As in GlmWeights."""
        found, prefix = super().mlp(layer), f"model.layers.{layer}.mlp."
        if isinstance(found, MlpWeights):
            _know_mlp(self._observer, prefix, found.gate_up, found.down)
            return found
        _know_mlp(self._observer, prefix + "shared_experts.", found.shared.gate_up, found.shared.down)
        for expert, gate_up, down in zip(found.expert_ids, found.experts.gate_up, found.experts.down, strict=True):
            _know_mlp(self._observer, f"{prefix}experts.{expert}.", gate_up, down)
        return found


def _know_mlp(observer: Observer, prefix: str, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    observer.know(gate_up, [prefix + "gate_proj.weight", prefix + "up_proj.weight"])
    observer.know(down, [prefix + "down_proj.weight"])
