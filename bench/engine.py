"""How fast the bare engine computes on this machine, beside transformers and, if installed, llama.cpp in the same run.

    python -m bench.engine [--model SmolLM2-135M-Instruct] [--dtype bfloat16] [--threads 2] [--kernels auto]

Prints the time to the first token of a 512-token prompt and the rate of decoding at batch 1 and 8 with 512 tokens of
context: the median of the repeats, and the best, which says what the code can do when nothing else runs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from bench import provenance
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.executor import DTYPES, TorchExecutor, load_executor
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

PAGE_SIZE = 16
NUM_PROMPT = 512
NUM_STEPS = 48
NUM_PREFILLS = 7
BATCHES = (1, 8)
PAGES_EACH = (NUM_PROMPT + NUM_STEPS) // PAGE_SIZE + 1

Timings = dict[str, list[float]]


def timed(times: list[float], work: Callable[[], Any]) -> Any:
    """Run `work` and note how many seconds it took."""
    start = time.perf_counter()
    result = work()
    times.append(time.perf_counter() - start)
    return result


def item(token_ids: list[int], start: int, sequence: int) -> BatchItem:
    pages = range(sequence * PAGES_EACH, (sequence + 1) * PAGES_EACH)
    return BatchItem(str(sequence), token_ids, start, pages, True, SamplingParams(), NUM_PROMPT)


def measure_ours(executor: TorchExecutor, prompt: list[int]) -> Timings:
    timings: Timings = {"prefill": []}
    for sequence in range(max(BATCHES)):
        timed(timings["prefill"], partial(executor.forward, [item(prompt, 0, sequence)]))
    for size in BATCHES:
        times = timings[f"decode {size}"] = []
        for step in range(NUM_STEPS):
            items = [item([prompt[step]], NUM_PROMPT + step, sequence) for sequence in range(size)]
            timed(times, partial(executor.forward, items))
    return timings


@torch.inference_mode()
def measure_transformers(model: Any, prompt: list[int]) -> Timings:
    timings: Timings = {"prefill": []}
    ids = torch.tensor([prompt])
    for _ in range(NUM_PREFILLS):
        timed(timings["prefill"], partial(model, ids, use_cache=True, logits_to_keep=1))
    for size in BATCHES:
        times = timings[f"decode {size}"] = []
        cache = model(ids.repeat(size, 1), use_cache=True, logits_to_keep=1).past_key_values
        for step in range(NUM_STEPS):
            token = torch.full((size, 1), prompt[step])
            timed(times, partial(model, token, past_key_values=cache, use_cache=True))
    return timings


def measure_llama_cpp(model: str, num_threads: int, prompt: list[int]) -> Timings:
    """Raises ImportError where llama.cpp is not installed."""
    from bench.llama import Llama

    llama = Llama(model, num_threads, max(BATCHES), NUM_PROMPT + NUM_STEPS)
    timings: Timings = {"prefill": []}
    for sequence in range(max(BATCHES)):
        timed(timings["prefill"], partial(llama.forward, [sequence], [prompt], 0))
    for size in BATCHES:
        times = timings[f"decode {size}"] = []
        for step in range(NUM_STEPS):
            tokens = [[prompt[step]]] * size
            timed(times, partial(llama.forward, range(size), tokens, NUM_PROMPT + step))
        for sequence in range(max(BATCHES)):
            llama.forget(sequence)
            llama.forward([sequence], [prompt], 0)
    return timings


def report(ours: Timings, theirs: Timings, name: str) -> None:
    print(f"\n| | forebay, median (best) | {name}, median (best) | times as fast, median (best) |\n|---|---|---|---|")
    for figure in ours:
        cells, values = [], []
        for times in (ours[figure], theirs[figure]):
            median, best = statistics.median(times[1:]), min(times)  # the first touches new memory
            values.append((median, best))
            if figure == "prefill":
                cells.append(f"{median:.3f} s ({best:.3f})")
            else:
                size = int(figure.split()[1])
                cells.append(f"{size / median:.0f} tokens/s ({size / best:.0f})")
        ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(*values, strict=True)]
        label = f"first token of {NUM_PROMPT}" if figure == "prefill" else f"decode, batch {figure.split()[1]}"
        print(f"| {label} | {cells[0]} | {cells[1]} | {ratios[0]:.1f} ({ratios[1]:.1f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a model directory, or a name `forebay models` lists")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="for both")
    parser.add_argument("--kernels", default="auto", help="auto, native or torch")
    args = parser.parse_args()
    print(provenance.banner("bench.engine"))
    model_dir = store.resolve(args.model)
    executor = load_executor(
        model_dir,
        model_name=args.model,
        dtype=args.dtype,
        page_size=PAGE_SIZE,
        num_threads=args.threads,
        num_pages=max(BATCHES) * PAGES_EACH,
        kernels=args.kernels,
    )
    vocabulary = range(3, executor.spec.vocab_size)
    prompt = random.Random(0).choices(vocabulary, k=NUM_PROMPT)
    ours = measure_ours(executor, prompt)
    torch.set_num_threads(args.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPES[args.dtype])
    report(ours, measure_transformers(model, prompt), "transformers")
    try:
        report(ours, measure_llama_cpp(args.model, args.threads, prompt), "llama.cpp")
    except ImportError:
        print("\nllama.cpp is not compared: `pip install llama-cpp-python` compiles and installs it")


if __name__ == "__main__":
    main()
