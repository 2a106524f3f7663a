"""What drafts of the text so far are worth, by arithmetic: for a belief to begin with, and a cost of verifying one.

    python -m bench.drafting [--model SmolLM2-135M-Instruct] [--tokens 150]

No model computes. Texts are taken for outputs, so many tokens of them at a time behind a prompt of 30: prose, code, and
code that repeats itself. A step takes 1 and what its drafts cost, and the rule is the engine's, told the cost with the
first drafts. Printed are tokens by the time of a step without drafts: below 1 they are a loss.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from bench import provenance
from shared.engine.speculation.acceptance import OF_A_LAYER, OF_THE_TEXT, Acceptance, num_worthwhile
from shared.engine.speculation.ngram import NgramProposer
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

HERE = Path(__file__).parent
TEXTS = {
    "prose": (HERE / "quality" / "text.txt").read_text(),
    "code": (HERE / "engine.py").read_text() + (HERE / "transfer.py").read_text(),
    "code that repeats itself": "".join(
        f"    if name == 'field{number}':\n        return self.fields['field{number}']\n" for number in range(40)
    ),
}
PROMPT_TOKENS, MOST_DRAFTS = 30, 5
BELIEFS, COSTS = (0.9, OF_A_LAYER, OF_THE_TEXT, 0.35), (0.05, 0.15, 0.3, 0.5)


def time_of(tokens: Sequence[int], belief: float, cost: float) -> float:
    """Steps' time that a sequence takes behind its prompt."""
    proposer, acceptance, end, elapsed, told = NgramProposer(), Acceptance(belief), PROMPT_TOKENS, 0.0, 0.0
    while end < len(tokens):
        num_wanted = num_worthwhile(acceptance.chance, told, MOST_DRAFTS)
        drafts = proposer.propose(tokens[:end], min(num_wanted, len(tokens) - end - 1)) if num_wanted else []
        pairs = enumerate(zip(drafts, tokens[end:], strict=False))
        num_right = next((place for place, (draft, token) in pairs if draft != token), len(drafts))
        acceptance.note(len(drafts), num_right)
        told = cost if drafts else told
        elapsed, end = elapsed + 1 + cost * len(drafts), end + num_right + 1
    return elapsed


def speed(tokens: Sequence[int], length: int, belief: float, cost: float) -> float:
    """Tokens in the time of a step, over all whole stretches of a text."""
    whole = PROMPT_TOKENS + length
    parts = [tokens[start : start + whole] for start in range(0, len(tokens) - whole + 1, length)]
    return sum(length for _ in parts) / sum(time_of(part, belief, cost) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer cuts the texts")
    parser.add_argument("--tokens", type=int, default=150)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(store.resolve(args.model) / "tokenizer.json"))
    print(provenance.banner("bench.drafting"))
    print("| text | a draft costs | " + " | ".join(f"belief {each}" for each in BELIEFS) + " |")
    print("|---|---|" + "---|" * len(BELIEFS))
    for name, text in TEXTS.items():
        tokens = tokenizer.encode(text).ids
        for cost in COSTS:
            speeds = [speed(tokens, args.tokens, belief, cost) for belief in BELIEFS]
            print(f"| {name} | {cost} | " + " | ".join(f"{each:.3f}" for each in speeds) + " |", flush=True)


if __name__ == "__main__":
    main()
