"""Rows of a head that are no tokens are never chosen."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.engine.api import SamplingParams
from shared.engine.models.tokens import num_tokens
from shared.errors import Unsupported
from tests.oracle import driver, tiny_glm
from tests.unit.gateway import glm
from tests.unit.gateway.tiny_tokenizers import byte_fallback, byte_level, word_piece, write_model


@pytest.mark.parametrize("made", [byte_level, byte_fallback, word_piece, glm.small_tokenizer])
def test_as_many_tokens_as_the_tokenizer_has(made: Any, tmp_path: Path) -> None:
    tokenizer = made()
    write_model(tmp_path, tokenizer)
    assert num_tokens(tmp_path, 10**6) == tokenizer.get_vocab_size(with_added_tokens=True)
    assert num_tokens(tmp_path, 7) == 7


def test_of_glm_5_2_the_last_24_rows_are_none(tmp_path: Path) -> None:
    """The fixture ends five ids before the real vocabulary does (154,855), at the last one that it has a name for."""
    write_model(tmp_path, glm.tokenizer())
    assert num_tokens(tmp_path, 154_880) == 154_851


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}', 2),
        ('{"model": {"vocab": {"a": 5}}, "added_tokens": [{"id": 9}]}', 10),
        ('{"model": {"vocab": {}}}', 50),
    ],
)
def test_lists_of_pieces_gaps_and_nothing_are_understood(text: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert num_tokens(tmp_path, 50) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_file_that_is_no_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(Unsupported, match=r"tokenizer\.json cannot be read"):
        num_tokens(tmp_path, 50)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=5.0, seed=3)], ids=["greedy", "hot"])
def test_a_model_never_says_what_its_tokenizer_cannot_read(sampling: SamplingParams, tmp_path: Path) -> None:
    tiny_glm.write(tmp_path)
    free = driver.generate(driver.load(tmp_path), [5, 6, 7], 40, sampling=sampling)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"last": 99}}}))
    bound = driver.generate(driver.load(tmp_path), [5, 6, 7], 40, sampling=sampling)
    assert max(free) > 99 >= max(bound)
