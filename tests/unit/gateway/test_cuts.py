"""Long texts are cut into parts whose tokens are those of the whole."""

import asyncio
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from services.gateway import cuts, tokenizer
from tests.unit.gateway.tiny_tokenizers import byte_fallback, word_piece

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What tokenizers treat in ways of their own: contractions, digits, runs of spaces, marks that join the letter before.
SCRAPS = [
    "the",
    " of",
    " a",
    " it's",
    "'s",
    "'",
    "  ",
    " ",
    "\n",
    "\r\n ",
    "\t",
    "12",
    " 3456",
    "é",
    "e\u0301",
    " \u0301",
]
SCRAPS += ["一二", "🙂", ".", " (x", "END", " END", "<|end|>", " <|end|>", "Å", " \u212b", "_y", " z", "İ", " q"]


@cache
def text(seed: int, num_scraps: int = 12_000) -> str:
    return "".join(Random(seed).choices(SCRAPS, k=num_scraps))


def trained(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator([text(0)], trainer)
    found.add_special_tokens(["<|end|>"])
    return found


def gpt_2() -> Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def smollm_2() -> Tokenizer:
    return trained(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama_3() -> Tokenizer:
    found = trained(*split_by(LLAMA))
    found.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 600)])
    return found


def qwen_2() -> Tokenizer:
    found = trained(*split_by(LLAMA.replace("{1,3}", "")))
    found.normalizer = normalizers.NFC()
    return found


def split_by(pattern: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def with_added(*added: AddedToken) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        found = gpt_2()
        found.add_tokens(list(added))
        return found

    return make


CUT = {"gpt-2": gpt_2, "smollm-2": smollm_2, "llama-3": llama_3, "qwen-2": qwen_2}
WHOLE: dict[str, Callable[[], Tokenizer]] = {
    "llama 2": byte_fallback,
    "bert": word_piece,
    "a space before all": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another pattern": lambda: trained(*split_by(r"\p{L}+ \p{L}+|\s+|\S+")),
    "no step that cuts": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "a token of two words": with_added(AddedToken("of a")),
    "a token that takes the space": with_added(AddedToken("END", rstrip=True)),
}


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[Tokenizer], tokenizer.Tokenizer]:
    def load(made: Tokenizer) -> tokenizer.Tokenizer:
        made.save(str(tmp_path / "tokenizer.json"))
        return tokenizer.Tokenizer(tmp_path / "tokenizer.json")

    return load


@cache
def made_of(kind: str) -> Tokenizer:
    """Training takes longer than what is tried with it."""
    return (CUT | WHOLE)[kind]()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(
    kind: str, special: bool, loaded: Callable[[Tokenizer], tokenizer.Tokenizer]
) -> None:
    made = made_of(kind)
    ours = loaded(made)
    for seed in range(1, 6 if kind in CUT else 2):  # where nothing is cut, no place can be a wrong one to cut at
        found = asyncio.run(ours.encode(text(seed), special=special))
        assert found == made.encode(text(seed), add_special_tokens=special).ids


@pytest.mark.parametrize(("kind", "may"), [*((kind, True) for kind in CUT), *((kind, False) for kind in WHOLE)])
def test_only_texts_of_known_tokenizers_are_cut(kind: str, may: bool) -> None:
    assert cuts.may_cut(json.loads(made_of(kind).to_str())) is may


def test_parts_make_up_the_text_and_are_worth_a_thread_each() -> None:
    parts = cuts.cut(text(1, 30_000))
    assert "".join(parts) == text(1, 30_000)
    assert len(parts) > 5
    assert min(map(len, parts)) >= cuts.CHARS
    assert max(map(len, parts)) < 2 * cuts.CHARS


def test_a_text_without_words_is_one_part() -> None:
    assert cuts.cut("一二三四" * 10_000) == ["一二三四" * 10_000]
    assert cuts.cut("word " * 100) == ["word " * 100]
