"""The default model, converted by us, against transformers reading the same GGUF file by itself."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces, and a tab\tand\r\nlines\n\n\n  end  ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # ok\n\n\nclass A:\n\tpass\n",
    "it's we'll they'd I'M DON'T 'tis rock'n'roll",
    "日本語のテキスト、中文文本。 한국어 텍스트",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 🤷🏽‍♀️ ☃️ end",
    "naïve café Å Ångström ﬁ ǅ",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><repo_name><file_sep> <|im_end|>x<|im_start|",
    "price: 3.14159 or 1,000,000 or 0x7fff or v2",
    "\x00\x01 control \u200b zero width \ufeff bom \U0010ffff",
    "a" * 300 + " " * 50 + "!" * 50,
]
# Text where transformers' GGUF reader cuts otherwise than the model's own rule (each digit a word of its own).
DIGITS_AFTER_SPACES = ["a  1", "\n\n1. one\n\n2. two", "x   ¾ ٣ Ⅷ 12", "1 2  3   4", "\t\t42 "]
CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "Sure? 🙂"},
]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """transformers has the same file read anew for each thing that it wants of it, and its names listed anew for each
    module; and the file's reader takes a vocabulary apart by way of numpy's memmap, each cut of which is an object in
    Python. That was most of what this takes."""
    map_file, reader = np.memmap, gguf.GGUFReader

    def read(path: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "memmap", lambda *arguments, **more: map_file(*arguments, **more).view(np.ndarray))
            return reader(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", cache(read))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def tokenizers(smollm2: Path, smollm2_gguf: Path) -> tuple[Any, Any]:
    """Ours, and the oracle's."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    return transformers.AutoTokenizer.from_pretrained(smollm2), theirs


def test_every_weight_and_the_logits_equal_transformers(smollm2_oracle: Any, smollm2_gguf: Path) -> None:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    ours = smollm2_oracle
    dequantize = transformers.GgufConfig(dequantize=True)
    theirs = load(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, quantization_config=dequantize, dtype=torch.float32)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    ids = torch.arange(100, 140).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.generation_config.eos_token_id == [2]
    assert ours.config.max_position_embeddings == 8192


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_token_ids_equal_transformers(text: str, tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_equal_transformers(tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert len(ours) == len(theirs) == 49152


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["plain", "system"])
def test_the_chat_template_renders_as_in_transformers(
    generation_prompt: bool, system: list[dict[str, str]], tokenizers: tuple[Any, Any]
) -> None:
    ours, theirs = (
        tokenizer.apply_chat_template(system + CHAT, tokenize=False, add_generation_prompt=generation_prompt)
        for tokenizer in tokenizers
    )
    assert ours == theirs
    assert ("helpful AI assistant named SmolLM" in ours) == (not system)


@pytest.mark.parametrize("text", [*TEXTS[:9], *TEXTS[12:13], *DIGITS_AFTER_SPACES])
def test_token_ids_equal_a_plain_byte_pair_encoder(
    text: str, tokenizers: tuple[Any, Any], pairs: tuple[dict[str, int], dict[tuple[str, ...], int]]
) -> None:
    ours, _ = tokenizers
    assert ours.encode(text) == plain_encode(text, *pairs)


@pytest.fixture(scope="module")
def pairs(tokenizers: tuple[Any, Any]) -> tuple[dict[str, int], dict[tuple[str, ...], int]]:
    """Ids of tokens, and ranks of merges."""
    model = json.loads(tokenizers[0].backend_tokenizer.to_str())["model"]
    return model["vocab"], {tuple(merge): rank for rank, merge in enumerate(model["merges"])}


def plain_encode(text: str, vocab: dict[str, int], ranks: dict[tuple[str, ...], int]) -> list[int]:
    """Digits alone, then GPT-2's words, then the merge of the lowest rank until none applies.

    The cutting is as llama.cpp states it for "smollm": https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
    """
    letters = bytes_to_unicode()  # type: ignore[no-untyped-call]
    words = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for piece in regex.split(r"(\p{N})", text):
        for word in regex.findall(words, piece):
            parts = [letters[byte] for byte in word.encode()]
            while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
                at = next(i for i in range(len(parts)) if (parts[i], parts[i + 1]) == min(pairs, key=ranks.__getitem__))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            ids += [vocab[part] for part in parts]
    return ids
