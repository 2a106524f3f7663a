"""What quantizing cost: a quantized model beside the one that it was made of, with confidence intervals."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.quality import calls, divergence
from bench.quality.divergence import AGREES, BASE, DIVERGENCE, QUANT
from bench.quality.intervals import Figure, Values, bootstrap, mean
from shared.engine.executor import DTYPES
from shared.engine.models import registry
from shared.engine.models.api import Model, Placement
from shared.errors import InvalidRequest, Unsupported

TEXT, PROMPTS = (Path(__file__).with_name(name) for name in ("text.txt", "prompts.txt"))
MIN_WINDOWS = 2
# A cluster that serves a model directory with some kernels: its gateway's URL, the model's name there, and the API key
# that the gateway asks for, if any.
Serve = Callable[[Path, str], AbstractContextManager[tuple[str, str, str]]]
BEST = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. Texts are cut into windows of `context` tokens; answers have `num_tokens`. The quantized model
    computes with `kernels`: "w4a4" quantizes activations too."""

    text: Path = TEXT
    prompts: Path = PROMPTS
    context: int = 128
    num_tokens: int = 64
    dtype: str = "bfloat16"
    seed: int = 0
    kernels: str = BEST


@dataclass(frozen=True, slots=True)
class Answers:
    """Whether each question was answered right, by each model; `native`: they were given tools as such."""

    base: tuple[bool, ...]
    quant: tuple[bool, ...]
    native: bool


def run(base: Path, quant: Path, settings: Settings, serve: Serve | None) -> dict[str, Any]:
    """All figures. Function calls are asked for only with `serve`.

    Raises InvalidRequest for texts that are too short and models that cannot be compared, Unsupported for models
    that cannot be computed or that have no tokenizer.
    """
    windows = divergence.windows(_encode(base, _read(settings.text)), settings.context)
    if len(windows) < MIN_WINDOWS:
        raise InvalidRequest(f"{settings.text} is too short for {MIN_WINDOWS} windows of {settings.context} tokens")
    prompts = [_encode(base, line) for line in _read(settings.prompts).splitlines() if line.strip()]
    if not prompts:
        raise InvalidRequest(f"{settings.prompts} holds no prompt")
    model = _load(base, settings.dtype, BEST)
    with divergence.Predictions(model, tqdm(windows, "predicting", unit=" windows", disable=None)) as predictions:
        said = divergence.greedy(model, prompts, settings.num_tokens)
        del model  # before the next is loaded
        model = _load(quant, settings.dtype, settings.kernels)
        tokens = divergence.compare(predictions, model, tqdm(windows, "comparing", unit=" windows", disable=None))
    pairs = zip(said, divergence.greedy(model, prompts, settings.num_tokens), strict=True)
    lengths = [divergence.agreed_length(*pair) for pair in pairs]
    del model
    answers = _ask_both((base, BEST), (quant, settings.kernels), serve) if serve else None
    return {
        "base": str(base),
        "quant": str(quant),
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "num_windows": len(windows),
        "num_tokens": sum(map(len, tokens)),
        "num_prompts": len(prompts),
        "figures": figures(tokens, lengths, answers, settings),
        "calls": asdict(answers) if answers else None,
    }


def figures(
    tokens: Sequence[Values], lengths: Sequence[int], answers: Answers | None, settings: Settings
) -> dict[str, dict[str, float]]:
    """Each figure by its name, with its interval; both models' tokens, and answers, are drawn together."""
    agreed = [np.array([[length, length == settings.num_tokens]], np.float64) for length in lengths]
    found = {
        "base perplexity": bootstrap(tokens, _perplexity(BASE), settings.seed),
        "quant perplexity": bootstrap(tokens, _perplexity(QUANT), settings.seed),
        "perplexity ratio": bootstrap(tokens, _perplexity_ratio, settings.seed),
        "mean KL, nats": bootstrap(tokens, mean(DIVERGENCE), settings.seed),
        "top-1 agreement": bootstrap(tokens, mean(AGREES), settings.seed),
        "greedy tokens until they differ": bootstrap(agreed, mean(0), settings.seed),
        "greedy answers that never differ": bootstrap(agreed, mean(1), settings.seed),
    }
    if answers is not None:
        pairs = zip(answers.base, answers.quant, strict=True)
        rows = [np.array([[one, other, other - one]], np.float64) for one, other in pairs]
        names = ("base function calls right", "quant function calls right", "difference of function calls right")
        found |= {name: bootstrap(rows, mean(column), settings.seed) for column, name in enumerate(names)}
    return {name: asdict(interval) for name, interval in found.items()}


def _perplexity(column: int) -> Figure:
    return lambda means: np.exp(means[..., column])


def _perplexity_ratio(means: Values) -> Values:
    return np.exp(means[..., QUANT] - means[..., BASE])


def _ask_both(base: tuple[Path, str], quant: tuple[Path, str], serve: Serve) -> Answers:
    cases = calls.cases()
    right, native = [], []
    for path, kernels in (base, quant):
        with serve(path, kernels) as (url, name, api_key), calls.Asker(url, name, api_key) as asker:
            right.append(asker.are_right(cases))
            native.append(asker.native)
    if native[0] != native[1]:
        raise InvalidRequest("one model takes tools and the other does not: their answers cannot be compared")
    return Answers(right[0], right[1], native[0])


def _load(path: Path, dtype: str, kernels: str) -> Model:
    if dtype not in DTYPES:
        raise Unsupported(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return registry.load(path, Placement(DTYPES[dtype], os.cpu_count() or 1, kernels))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as text: {error}") from None


def _encode(model_dir: Path, text: str) -> list[int]:
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        raise Unsupported(f"{model_dir} has no tokenizer.json")
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(file)).encode(text).ids)
