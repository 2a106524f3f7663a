"""A GGUF file becomes a Hugging Face directory, once.

Weights are stored in float32: a Q4_1 value is `scale * code + minimum` of two float16 numbers, which bfloat16 cannot
hold, and float32 is what other readers of GGUF compute with. A bfloat16 worker rounds when it loads.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tqdm import tqdm

from shared.models.gguf.config import generation_config, model_config
from shared.models.gguf.metadata import GgufFile
from shared.models.gguf.tensors import tensors
from shared.models.gguf.tokenizer import tokenizer, tokenizer_config


def convert(path: Path, model_dir: Path) -> None:
    """Write the model of the GGUF file `path` into the directory `model_dir`. Raises Unsupported."""
    file = GgufFile(path)
    parts = {
        "config.json": model_config(file),
        "generation_config.json": generation_config(file),
        "tokenizer.json": tokenizer(file),
        "tokenizer_config.json": tokenizer_config(file),
    }
    num_tensors = len(file.tensors)
    # `disable=None`: no bar where nobody sees it.
    bar = tqdm(tensors(file), desc=f"converting {path.name}", total=num_tensors, unit=" tensors", disable=None)
    weights = model_dir / "model.safetensors"
    save_file(dict(bar), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is made for its owner alone, but services may run as other users
    for name, content in parts.items():
        _write_json(model_dir / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
