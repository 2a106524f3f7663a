"""How often drafts are accepted, by coupled verification and by rejection sampling.

    python -m bench.acceptance [--model SmolLM2-135M-Instruct] [--tokens 200]

By arithmetic, for distributions of a given distance: random logits, and the same with noise, or mixed with others. For
real ones: a model, and as a draft's the same model that sees nothing but the last tokens. By the engine: a tiny GLM of
random weights, whose MTP layer has nothing to do with it. And for drafts of the text so far, where both are one: what
the model gave them, and how many came.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bench import provenance
from bench.speculation import NUM_PAGES, PROSE, TEXTS, generate
from shared.engine import stream
from shared.engine.api import SamplingParams
from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.models import tiny
from shared.engine.models.api import Model
from shared.engine.sampling import distribution
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

TEXT = Path(__file__).parent / "quality" / "text.txt"
VOCAB, DEVIATION, NUM_PAIRS = 49_152, 6.0, 8
DISTANCES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
WAYS = {
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 0.7, top_p 0.9": SamplingParams(temperature=0.7, top_p=0.9),
}
NUM_DRAFTS, NUM_REQUESTS = 4, 16
SIGHTS = (32, 8, 3)
PARTS = ("distances", "layer", "text")

Distribution = NDArray[np.float64]
Pair = tuple[Distribution, Distribution]
Method = Callable[[Distribution, Distribution], float]


def by_rejection(p: Distribution, q: Distribution) -> float:
    """1 - TV."""
    return float(np.minimum(p, q).sum())


def coupled(p: Distribution, q: Distribution) -> float:
    """How often both choose the same with the same noise: the sum over i of 1 / sum over j of max(p[j] / p[i],
    q[j] / q[i]) (Daliri, Musco, Suresh 2024). In order of q / p the maximum is the one up to i, the other behind."""
    both = (p > 0) & (q > 0)
    order = np.argsort(q[both] / p[both], kind="stable")
    one, other = p[both][order], q[both][order]
    only_p, only_q = p[q == 0].sum(), q[p == 0].sum()
    up_to = np.cumsum(one) + only_p
    behind = other[::-1].cumsum()[::-1] - other + only_q
    return float((1 / (up_to / one + behind / other)).sum())


def apart(p: Distribution, q: Distribution) -> float:
    """How often both choose the same with noise of their own: a drawn draft that is taken to stand for itself."""
    return float((p * q).sum())


METHODS: dict[str, Method] = {
    "rejection": by_rejection,
    "coupled": coupled,
    "apart": apart,
}


def softmax(row: Distribution) -> Distribution:
    likely: Distribution = np.exp(row - row.max())
    return likely / float(likely.sum())


def noisy(chance: np.random.Generator) -> Callable[[float], Pair]:
    """Logits, and the same with as much noise as is asked for."""
    model, noise = chance.normal(scale=DEVIATION, size=VOCAB), chance.normal(size=VOCAB)
    return lambda much: (softmax(model), softmax(model + 6 * much * noise))


def mixed(chance: np.random.Generator) -> Callable[[float], Pair]:
    """A distribution, and its mixture with another."""
    p, other = (softmax(chance.normal(scale=DEVIATION, size=VOCAB)) for _ in range(2))
    return lambda much: (p, (1 - much) * p + much * other)


def at_distance(pair: Callable[[float], Pair], distance: float) -> Pair:
    """The pair of this total variation, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - by_rejection(*pair(middle)) < distance else (low, middle)
    return pair(low)


def cells(pairs: Sequence[Pair]) -> str:
    """For each method, the acceptance of a draft, and tokens of a step that verifies NUM_DRAFTS such drafts."""
    shares = [float(np.mean([method(p, q) for p, q in pairs])) for method in METHODS.values()]
    lengths = [sum(share**j for j in range(NUM_DRAFTS + 1)) for share in shares]
    return " | ".join(f"{share:.3f} ({length:.2f})" for share, length in zip(shares, lengths, strict=True))


def synthetic() -> None:
    for (name, make), distance in itertools.product({"noise": noisy, "mixture": mixed}.items(), DISTANCES):
        pairs = [at_distance(make(np.random.default_rng(seed)), distance) for seed in range(NUM_PAIRS)]
        print(f"| {name}, TV {distance} | {cells(pairs)} |", flush=True)


def share(logits: torch.Tensor, params: SamplingParams) -> Distribution:
    weight: Distribution = distribution.weights(logits, params).double().numpy()
    return weight / float(weight.sum())


def behind(model: Model, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocab_size] of what follows each token."""
    return torch.cat(list(stream.logits(model, tokens)))


def short_sighted(model: Model, tokens: Sequence[int]) -> None:
    known = behind(model, tokens)
    for sight in SIGHTS:
        guessed = [behind(model, tokens[at + 1 - sight : at + 1])[-1] for at in range(sight, len(tokens))]
        for name, params in WAYS.items():
            pairs = [(share(p, params), share(q, params)) for p, q in zip(known[sight:], guessed, strict=True)]
            distance = 1 - np.mean([by_rejection(p, q) for p, q in pairs])
            print(f"| sees {sight} tokens, {name}: TV {distance:.2f} | {cells(pairs)} |", flush=True)


def of_a_layer(num_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        tiny.write("glm-5.2", Path(directory))
        for temperature, top_p in ((1.0, 1.0), (3.0, 1.0), (10.0, 1.0), (10.0, 0.5)):
            found = []
            for rejection in (True, False):
                executor = load(Path(directory), "float32", rejection=rejection)
                sampling = SamplingParams(temperature, top_p, max_tokens=num_tokens, ignore_eos=True)
                prompts = [[seed + 3, 7, 11] for seed in range(NUM_REQUESTS)]
                outcome = generate(executor, Speculation(NUM_DRAFTS, adaptive=False), prompts, sampling)
                found.append(f"{outcome.acceptance:.3f} ({outcome.drafts.mean_accepted_length:.2f})")
            print(f"| temperature {temperature}, top_p {top_p} | {' | '.join(found)} |", flush=True)


def of_the_text(executor: TorchExecutor, tokenizer: Tokenizer, num_tokens: int) -> None:
    """What the model gives the first draft, wherever there is one in what it wrote, and how many came."""
    texts = {"code that repeats itself": TEXTS["code that repeats itself, greedy"][0], "prose": PROSE}
    for (name, text), (way, params) in itertools.product(texts.items(), WAYS.items()):
        prompt, sampling = tokenizer.encode(text).ids, replace(params, max_tokens=num_tokens, ignore_eos=True)
        tokens = prompt + generate(executor, Speculation(), [prompt], sampling).token_ids
        proposer, rows, found = NgramProposer(), behind(executor.model, tokens), list[tuple[float, bool]]()
        for at in range(len(prompt), len(tokens)):
            for draft in proposer.propose(tokens[:at], 1):
                found.append((float(share(rows[at - 1], params)[draft]), draft == tokens[at]))
        likely, came = np.mean(found, axis=0)
        print(f"| {name}, {way} | {likely:.3f} | {came:.3f} | {len(found)} of {num_tokens} |", flush=True)


def load(model_dir: Path, dtype: str, *, rejection: bool = False) -> TorchExecutor:
    return load_executor(
        model_dir,
        model_name="model",
        dtype=dtype,
        page_size=16,
        num_threads=2,
        num_pages=NUM_PAGES,
        mtp=True,
        rejection=rejection,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a model directory, or a name `forebay models` lists")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    args = parser.parse_args()
    model_dir = store.resolve(args.model)
    executor, tokenizer = load(model_dir, "bfloat16"), Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    print(provenance.banner("bench.acceptance"))
    if "distances" in args.parts:
        print(f"| p, q | {' | '.join(METHODS)} |\n|---|" + "---|" * len(METHODS))
        synthetic()
        short_sighted(executor.model, tokenizer.encode(TEXT.read_text()).ids[: args.tokens])
    if "layer" in args.parts:
        print("\n| tiny GLM, counted | rejection | coupled |\n|---|---|---|")
        of_a_layer(args.tokens // 4)
    if "text" in args.parts:
        print("\n| n-grams | p(draft) | draft came | places |\n|---|---|---|---|")
        of_the_text(executor, tokenizer, args.tokens)


if __name__ == "__main__":
    main()
