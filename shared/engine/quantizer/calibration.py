"""Scales of activations (`input_scale`), measured while the source model computes a user's prompts."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shared.engine import stream
from shared.engine.models.accounting import LAYER
from shared.engine.quantization import nvfp4
from shared.engine.quantizer import observation
from shared.errors import InvalidRequest, Unsupported

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of each prompt for a model; `identity` is equal for equal prompts."""

    model_dir: Path
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def identity(self) -> str:
        """A hash in hex."""
        return blake2b(repr(self.token_ids).encode(), digest_size=16).hexdigest()

    def measure(self, names: Sequence[str]) -> dict[str, float]:
        """amax / (6 * 448) of the inputs of each of these weights' products, by name.

        A layer that saw no token, as rarely chosen experts, gets the most that its like in the same decoder layer saw
        (and the log says how many did). Raises InvalidRequest for a prompt that does not fit the model.
        """
        observer = observation.Observer()
        model = observation.load(self.model_dir, os.cpu_count() or 1, observer)
        for token_ids in tqdm(self.token_ids, "calibrating", unit=" prompts", disable=None):
            if len(token_ids) > model.max_position or max(token_ids) >= model.vocab_size or min(token_ids) < 0:
                raise InvalidRequest("a prompt has more tokens than the model's context, or ids beyond its vocabulary")
            with observer:
                for _ in stream.logits(model, token_ids, last=True):
                    pass
        return {name: _scale(amax) for name, amax in fill_in(names, observer.amax).items()}


def fill_in(names: Sequence[str], seen: Mapping[str, float]) -> dict[str, float]:
    """What was seen, for all of `names`; for those that saw nothing the most of their kind, or of all, in the layer."""
    by_kind: dict[tuple[str, str], float] = {}
    for name, amax in seen.items():
        for key in ((_layer(name), _kind(name)), (_layer(name), "")):
            by_kind[key] = max(by_kind.get(key, 0.0), amax)
    unseen = [name for name in names if name not in seen]
    if unseen:
        log.warning(
            "%d of %d layers saw no token and got the scale of their like in the same layer, among them %s",
            *(len(unseen), len(names), unseen[0]),
        )
    return {
        name: seen[name] if name in seen else by_kind.get((_layer(name), _kind(name)), by_kind[_layer(name), ""])
        for name in names
    }


def read_prompts(path: Path, model_dir: Path) -> Prompts:
    """The prompts in a file: one a line (.txt), or JSON objects with a "prompt" or "text", a string or token ids.

    Raises InvalidRequest for a file that cannot be read or is empty, Unsupported if text cannot be tokenized.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [_prompt(line) for line in lines] if path.suffix == ".jsonl" else list[Any](lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} cannot be read as prompts: {error}") from None
    tokenized = tuple(_tokenized(found, model_dir))
    if not any(tokenized):
        raise InvalidRequest(f"{path} holds no prompt")
    return Prompts(model_dir, tuple(token_ids for token_ids in tokenized if token_ids))


def _prompt(line: str) -> str | list[int]:
    fields = json.loads(line)
    prompt = fields["prompt"] if "prompt" in fields else fields["text"]
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]


def _tokenized(prompts: Sequence[str | list[int]], model_dir: Path) -> Iterator[tuple[int, ...]]:
    tokenizer: Any = None
    for prompt in prompts:
        if isinstance(prompt, str):
            tokenizer = tokenizer or _tokenizer(model_dir)
            yield tuple(tokenizer.encode(prompt).ids)
        else:
            yield tuple(prompt)


def _tokenizer(model_dir: Path) -> Any:
    file = model_dir / "tokenizer.json"
    if not file.exists():
        raise Unsupported(f"{model_dir} has no tokenizer.json: give prompts as token ids, in a .jsonl file")
    try:
        import tokenizers
    except ImportError:
        raise Unsupported("prompts as text need the package tokenizers (forebay[gateway])") from None
    return tokenizers.Tokenizer.from_file(str(file))


def _layer(name: str) -> str:
    found = LAYER.search(name)
    return found[1] if found else ""


def _kind(name: str) -> str:
    return name.split(".")[-2]


def _scale(amax: float) -> float:
    return float(nvfp4.scale_of(torch.tensor(amax)))
