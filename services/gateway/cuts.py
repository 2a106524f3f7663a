"""Where a long text may be cut, so that several threads find its tokens and they are those of the whole.

Between a letter and a space that a letter follows ("of| the") the tokenizers of most models begin a new piece, whatever
stands before and behind: the regular expressions by which they take a text apart have no way to match a letter and a
space after it, and look no further back. What they do with a piece depends on that piece alone. Both hold for
tokenizers that are known; the texts of others are not cut.
"""

import re
from collections.abc import Mapping
from typing import Any

# So many characters are worth a thread.
CHARS = 6_000
# Of ASCII: no normal form puts one of these together with what stands beside it.
_BETWEEN_WORDS = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
_NORMAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
# As they are written in tokenizer.json: of Llama 3 and those like it, and of Qwen 2.
# GPT-2's is ByteLevel's own.
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_LLAMA, _LLAMA.replace("{1,3}", "")}


def cut(text: str) -> list[str]:
    """The text in parts of about `CHARS` characters; fewer and longer ones where it has no such places."""
    parts, begin = list[str](), 0
    while len(text) - begin >= 2 * CHARS and (place := _BETWEEN_WORDS.search(text, begin + CHARS)):
        parts.append(text[begin : place.start()])
        begin = place.start()
    return [*parts, text[begin:]]


def may_cut(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer, as its file describes it, finds the same tokens in the parts as in the whole. The special
    ones around a text are not looked at."""
    model, normalizer = tokenizer["model"], tokenizer["normalizer"]
    return (
        model["type"] == "BPE"
        and not model["dropout"]
        and all(each["type"] in _NORMAL_FORMS for each in _all(normalizer, "normalizers"))
        and _cuts_between_words(_all(tokenizer["pre_tokenizer"], "pretokenizers"))
        and not any(map(_reaches_over, tokenizer["added_tokens"]))
    )


def _all(component: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """What a component consists of: itself, or others in turn."""
    if component is None:
        return []
    return list(component[parts]) if component["type"] == "Sequence" else [component]


def _cuts_between_words(steps: list[Mapping[str, Any]]) -> bool:
    """Whether one of these steps cuts there, and none looks beyond, or adds anything to its pieces."""
    return any(map(_is_known, steps)) and all(
        _is_known(each) or (each["type"] in ("Digits", "ByteLevel") and not each.get("add_prefix_space"))
        for each in steps
    )


def _is_known(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    is_split = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return is_split and step["pattern"].get("Regex") in _PATTERNS


def _reaches_over(added: Mapping[str, Any]) -> bool:
    """Whether a token that is always one may hold a place between words, or take the space there."""
    return any(map(str.isspace, added["content"])) or (added["rstrip"] and added["content"][-1:].isalpha())
