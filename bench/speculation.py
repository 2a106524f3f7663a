"""What drafts of the text so far (n-grams) are worth on this machine.

    python -m bench.speculation [--model SmolLM2-135M-Instruct] [--threads 2] [--tokens 200] [--only prose]

With drafts and without, in turns, for a text that repeats itself and for one that does not; the tokens must be the
same. Prose is also sampled: a small model's greedy prose soon repeats itself. Rates are medians of the repeats,
decoding alone, by the clock and by processor time, which others on the machine disturb less (with one thread);
acceptance is that of the first draft of each step that had any.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tokenizers import Tokenizer

from bench import provenance
from shared.engine.api import DraftCounts, EngineRequest, SamplingParams, TokensSampled
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
PROSE = "The old harbour lay quiet that morning. A boy walked along the stones and thought about"
TEXTS = {
    "code that repeats itself, greedy": (f"def get(self, name):\n{LINES}", 0.0),
    "prose, greedy": (PROSE, 0.0),
    "prose, temperature 0.8": (PROSE, 0.8),
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
    tokens_per_cpu_s: float
    drafts: DraftCounts

    @property
    def acceptance(self) -> float:
        """Of the first draft of each step that had any."""
        return self.drafts.accepted[0] / self.drafts.verified[0] if self.drafts.verified else 0.0


def generate(
    executor: TorchExecutor, speculation: Speculation, prompts: list[list[int]], sampling: SamplingParams
) -> Outcome:
    """Run a batch to its end, each prompt with a seed of its own; the clock starts behind the prompts."""
    kv = KvStore(NUM_PAGES, executor.spec.layout.page_size, 10_000)
    engine = Engine(executor, kv, max_step_tokens=512, max_num_sequences=16, speculation=speculation)
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.submit(EngineRequest(str(index), tuple(prompt), replace(sampling, seed=index)))
    started, cpu_started, num_before = time.perf_counter(), time.process_time(), 0
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokensSampled):
                outputs[event.request_id] += [token.token_id for token in event.tokens]
        if not num_before and all(outputs.values()):
            started, cpu_started = time.perf_counter(), time.process_time()
            num_before = sum(map(len, outputs.values()))
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    everything = list(itertools.chain(*outputs.values()))
    num_tokens = len(everything) - num_before
    return Outcome(everything, num_tokens / elapsed_s, num_tokens / cpu_s, engine.draft_counts())


def compare(run: Callable[[Speculation], Outcome], name: str) -> None:
    outcomes: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
    for _ in range(NUM_REPEATS):
        for mode, speculation in MODES.items():
            outcomes[mode].append(run(speculation))
    plain, plain_cpu = medians(outcomes["off"])
    for mode, several in outcomes.items():
        assert all(outcome.token_ids == outcomes["off"][0].token_ids for outcome in several), "drafts changed tokens"
        rate, cpu_rate = medians(several)
        drafts, share = several[-1].drafts, several[-1].acceptance
        times = f"{rate:.0f} | {rate / plain:.2f} | {cpu_rate / plain_cpu:.2f}"
        fared = f"{drafts.mean_accepted_length:.2f} | {share:.2f} | {sum(drafts.verified[:1])}"
        print(f"| {name} | {mode} | {times} | {fared} |", flush=True)


def medians(outcomes: list[Outcome]) -> tuple[float, float]:
    """Tokens a second, and a second of processor time."""
    rates = [(outcome.tokens_per_s, outcome.tokens_per_cpu_s) for outcome in outcomes]
    return statistics.median(rate for rate, _ in rates), statistics.median(rate for _, rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a model directory, or a name `forebay models` lists")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--only", default="", help="texts whose name has this, such as prose")
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
    columns = ["text, batch", "drafts", "tokens/s", "times off", "by processor time"]
    columns += ["mean accepted length", "acceptance", "verifications"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    texts = {name: text for name, text in TEXTS.items() if args.only in name}
    for size, (name, (text, temperature)) in itertools.product((1, 8), texts.items()):
        prompts = [tokenizer.encode(f"{index}\n{text}").ids for index in range(size)]
        sampling = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True)
        compare(partial(generate, executor, prompts=prompts, sampling=sampling), f"{name}, {size}")


if __name__ == "__main__":
    main()
