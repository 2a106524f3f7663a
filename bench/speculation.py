"""What drafts of the text so far (n-grams) are worth on this machine.

    python -m bench.speculation [--model SmolLM2-135M-Instruct] [--threads 2] [--tokens 200]

Greedy output with drafts and without, in turns, for a text that repeats itself and for one that does not; the tokens
must be the same. Rates are medians of the repeats, decoding alone.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from bench import provenance
from shared.engine.api import EngineRequest, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.executor import DTYPES, TorchExecutor, load_executor
from shared.engine.kv.store import KvStore
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

NUM_REPEATS = 3
NUM_PAGES = 512
LINES = "".join(
    f"    if name == 'field{number}':\n        return self.fields['field{number}']\n" for number in range(6)
)
TEXTS = {
    "code that repeats itself": f"def get(self, name):\n{LINES}",
    "prose": "The old harbour lay quiet that morning. A boy walked along the stones and thought about",
}
MODES = {
    "off": Speculation(),
    "up to 5, adaptive": Speculation(5, make_proposer=NgramProposer),
    "up to 10, adaptive": Speculation(10, make_proposer=NgramProposer),
    "5, fixed": Speculation(5, adaptive=False, make_proposer=NgramProposer),
}


@dataclass(frozen=True)
class Outcome:
    token_ids: list[int]
    tokens_per_s: float
    mean_accepted_length: float


def generate(executor: TorchExecutor, speculation: Speculation, prompts: list[list[int]], num_tokens: int) -> Outcome:
    """Run a batch to its end; the clock starts behind the prompts."""
    kv = KvStore(NUM_PAGES, executor.spec.layout.page_size, 10_000)
    engine = Engine(executor, kv, max_step_tokens=512, max_num_sequences=16, speculation=speculation)
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.submit(EngineRequest(str(index), tuple(prompt), sampling))
    started, num_before = time.perf_counter(), 0
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokensSampled):
                outputs[event.request_id] += [token.token_id for token in event.tokens]
        if not num_before and all(outputs.values()):
            started, num_before = time.perf_counter(), sum(map(len, outputs.values()))
    elapsed_s, everything = time.perf_counter() - started, list(itertools.chain(*outputs.values()))
    rate = (len(everything) - num_before) / elapsed_s
    return Outcome(everything, rate, engine.draft_counts().mean_accepted_length)


def compare(run: Callable[[Speculation], Outcome], name: str) -> None:
    outcomes: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
    for _ in range(NUM_REPEATS):
        for mode, speculation in MODES.items():
            outcomes[mode].append(run(speculation))
    plain = statistics.median(outcome.tokens_per_s for outcome in outcomes["off"])
    for mode, several in outcomes.items():
        assert all(outcome.token_ids == outcomes["off"][0].token_ids for outcome in several), "drafts changed tokens"
        rate = statistics.median(outcome.tokens_per_s for outcome in several)
        length = several[-1].mean_accepted_length
        print(f"| {name} | {mode} | {rate:.0f} | {rate / plain:.2f} | {length:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a model directory, or a name `forebay models` lists")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    print(provenance.banner("bench.speculation"))
    model_dir = store.resolve(args.model)
    executor = load_executor(
        model_dir,
        model_name=args.model,
        dtype=args.dtype,
        page_size=16,
        num_threads=args.threads,
        num_pages=NUM_PAGES,
    )
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    print("| text, batch | drafts | tokens/s | times off | mean accepted length |\n|---|---|---|---|---|")
    for (name, text), size in itertools.product(TEXTS.items(), (1, 8)):
        prompts = [tokenizer.encode(f"{index}\n{text}").ids for index in range(size)]
        compare(lambda speculation, p=prompts: generate(executor, speculation, p, args.tokens), f"{name}, {size}")  # type: ignore[misc]


if __name__ == "__main__":
    main()
