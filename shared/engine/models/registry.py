"""Which builder serves which architecture."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from shared.engine.models import glm, llama
from shared.engine.models.api import Model, Placement
from shared.errors import Unsupported

BUILDERS: Mapping[str, Callable[[Path, Placement], Model]] = {
    "LlamaForCausalLM": llama.load,
    "Qwen3ForCausalLM": llama.load,
    "GlmMoeDsaForCausalLM": glm.load,
}


def load(model_dir: Path, placement: Placement) -> Model:
    """The model in a directory. Raises Unsupported, also for an architecture that nobody here can build."""
    name = architecture(model_dir)
    if name not in BUILDERS:
        raise Unsupported(f"architecture {name!r} is not supported; supported are {', '.join(sorted(BUILDERS))}")
    return BUILDERS[name](model_dir, placement)


def architecture(model_dir: Path) -> str:
    """What `config.json` names. Raises Unsupported if there is none."""
    try:
        fields = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        return str(fields["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise Unsupported(f"{model_dir} has no config.json that names an architecture") from None
