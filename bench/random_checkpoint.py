"""A model directory of a large dense shape with random weights in bfloat16, made on a GPU where there is one.

    python -m bench.random_checkpoint DIR [--shape llama-3.1-8b]

It has no tokenizer: such a model is served by token ids. A directory in memory (/dev/shm) is fast to write and to load.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.shapes import SHAPES
from shared.engine.models import dense_shapes
from shared.engine.models.config import parse

NUM_FILES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    args = parser.parse_args()
    started = time.perf_counter()
    write(args.directory, SHAPES[args.shape])
    print(f"{args.directory}: {args.shape} after {time.perf_counter() - started:.1f} s")


def write(directory: Path, fields: dict[str, object]) -> None:
    """Matrices with a standard deviation of columns ** -0.5, norms of one; layers in turn to several files."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = dense_shapes.shapes(parse(fields))
    files = [f"model-{number:05d}.safetensors" for number in range(NUM_FILES)]
    places = {name: files[_layer(name) % NUM_FILES] for name in shapes}
    with ThreadPoolExecutor(NUM_FILES) as threads:
        for _ in threads.map(lambda file: _write(directory / file, file, places, shapes), files):
            pass
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (directory / "config.json").write_text(json.dumps(fields | {"torch_dtype": "bfloat16", "eos_token_id": 2}))


def _write(path: Path, file: str, places: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chance, made = torch.Generator(device).manual_seed(int(file[6:11])), {}
    for name in (name for name, place in places.items() if place == file):
        values = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
        if values.ndim > 1:
            values.normal_(generator=chance).mul_(float(values.shape[1]) ** -0.5)
        made[name] = values.cpu()
    save_file(made, path)


def _layer(name: str) -> int:
    """Of a tensor; the ends count as the first and the last."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else "lm_head" in name


if __name__ == "__main__":
    main()
