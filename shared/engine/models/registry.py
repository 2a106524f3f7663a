"""Which builder serves which architecture."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from shared.engine.models import config, glm, glm_config, llama
from shared.engine.models.api import Model, Placement
from shared.engine.parallel.partition import Shard, of_dense, of_glm
from shared.errors import Unsupported

BUILDERS: Mapping[str, Callable[[Path, Placement], Model]] = {
    "LlamaForCausalLM": llama.load,
    "Qwen3ForCausalLM": llama.load,
    "GlmMoeDsaForCausalLM": glm.load,
}
SHARES: Mapping[str, Callable[[Path, Shard], object]] = {
    "LlamaForCausalLM": lambda path, shard: of_dense(config.read(path), shard),
    "Qwen3ForCausalLM": lambda path, shard: of_dense(config.read(path), shard),
    "GlmMoeDsaForCausalLM": lambda path, shard: of_glm(glm_config.read(path), shard),
}


def load(model_dir: Path, placement: Placement) -> Model:
    """The model in a directory. Raises Unsupported, also for an architecture that nobody here can build."""
    return BUILDERS[_supported(model_dir)](model_dir, placement)


def require_shares(model_dir: Path, shard: Shard) -> None:
    """Raises Unsupported for a model that cannot be shared out to so many ranks, before any of them is started."""
    SHARES[_supported(model_dir)](model_dir, shard)


def _supported(model_dir: Path) -> str:
    name = architecture(model_dir)
    if name not in BUILDERS:
        raise Unsupported(f"architecture {name!r} is not supported; supported are {', '.join(sorted(BUILDERS))}")
    return name


def architecture(model_dir: Path) -> str:
    """What `config.json` names. Raises Unsupported if there is none."""
    try:
        fields = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        return str(fields["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise Unsupported(f"{model_dir} has no config.json that names an architecture") from None
