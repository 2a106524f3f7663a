"""Text comes out step by step, whole characters only, and is in sum what decoding everything at once gives."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer

from services.gateway.detokenizer import MAX_HELD, REPLACEMENT, Detokenizer
from tests.unit.gateway import tiny_tokenizers

TEXTS = [
    "hello world!",
    "caf\u00e9 na\u00efve",
    "\U0001f600\U0001f680",
    "a\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466b",
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587",
    "\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "e\u0301 combining",
    "tab\tand\nnewline\r\n\u00a0",
    "  leading and  double spaces ",
    "\U0001d54f \U00010348",
    "a\ufffdb",
]


def decoder_of(tokenizer: Tokenizer) -> Callable[..., str]:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(decoder_of(tokenizer), prompt or [])
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece] for piece in pieces]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback])
def test_pieces_are_whole_characters_and_make_up_the_text(kind: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = kind()
    ids = encode(tokenizer, text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decoder_of(tokenizer)(ids) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    assert pieces_of(tokenizer, encode(tokenizer, "\U0001f600")) == ["", "", "", "\U0001f600", ""]


def test_a_whole_character_is_not_held_back() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    assert pieces_of(tokenizer, encode(tokenizer, "hello world!"))[:-1] == ["hello", " world", "!"]


def test_the_space_before_a_first_word_is_kept_after_a_prompt() -> None:
    tokenizer = tiny_tokenizers.byte_fallback()
    hi, you = ids_of(tokenizer, "\u2581hi", "\u2581you")
    assert "".join(pieces_of(tokenizer, [you], prompt=[hi])) == " you"
    assert "".join(pieces_of(tokenizer, [you])) == "you"


def test_words_of_pieces_are_joined_as_the_decoder_joins_them() -> None:
    tokenizer = tiny_tokenizers.word_piece()
    ids = ids_of(tokenizer, "play", "##ing", "well", ",", "you", "play", "##ed")
    assert "".join(pieces_of(tokenizer, ids)) == decoder_of(tokenizer)(ids)


def test_bytes_that_never_become_a_character_are_given_at_the_end() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = encode(tokenizer, "hello\U0001f600")[:-1]
    assert "".join(pieces_of(tokenizer, ids)) == "hello" + REPLACEMENT


def test_a_broken_character_does_not_hold_back_what_follows() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = [*encode(tokenizer, "\u00e9")[:1], *encode(tokenizer, "hello")]
    assert pieces_of(tokenizer, ids)[:2] == ["", REPLACEMENT + "hello"]


def test_endless_broken_bytes_are_released_after_a_bounded_wait() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    [broken, _] = encode(tokenizer, "\u00e9")
    pieces = pieces_of(tokenizer, [broken] * MAX_HELD * 3)
    assert sum(bool(piece) for piece in pieces) >= 3
    assert "".join(pieces) == REPLACEMENT * MAX_HELD * 3


def test_a_prompt_that_ends_within_a_character_is_completed() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = encode(tokenizer, "a\U0001f600!")
    assert "".join(pieces_of(tokenizer, ids[3:], prompt=ids[:3])) == "\U0001f600!"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = tokenizer.encode("hello<|user|> world").ids
    special = frozenset(ids_of(tokenizer, "<|user|>"))
    skipping = Detokenizer(decoder_of(tokenizer), (), special)
    assert "".join(map(skipping.feed, ids)) + skipping.flush() == "hello world"
    assert "".join(pieces_of(tokenizer, ids)) == "hello<|user|> world"


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    ids = [*encode(tokenizer, "hello"), 99_999, *encode(tokenizer, "!")]
    assert "".join(pieces_of(tokenizer, ids)) == "hello!"
