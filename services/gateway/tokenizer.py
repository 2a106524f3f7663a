"""A model's tokenizer: text to ids, ids to text, and single tokens for log-probabilities."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from services.gateway import cuts
from services.gateway.detokenizer import Detokenizer
from shared.errors import InvalidRequest

# Shorter texts are encoded at once, in less time than a thread takes to start.
NUM_CHARS_INLINE = 4_000


def _bytes_of_characters() -> Mapping[str, int]:
    """GPT-2's alphabet for bytes: printable characters of Latin-1 stand for themselves, others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Wraps the `tokenizers` library. Raises ValueError if the file is not a tokenizer.

    `special` are ids without text for readers; `added_tokens` are the ids of texts that are always one token.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._hf = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        added = self._hf.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.added_tokens = {content: token_id for token_id, content in self._added.items()}
        self._alphabet = _bytes_of_characters() if "ByteLevel" in str(self._hf.decoder) else {}
        self._around = self._special_around() if cuts.may_cut(json.loads(self._hf.to_str())) else None

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` adds those that the tokenizer puts around a text. Raises InvalidRequest."""
        try:
            if len(text) <= NUM_CHARS_INLINE:
                return self._encode([text], special)
            return await asyncio.to_thread(self._encode_long, text, special)
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens; ids that the tokenizer does not know have none."""
        return str(self._hf.decode(token_ids, skip_special_tokens=False))

    def detokenizer(self, prompt_token_ids: Sequence[int], *, skip_special: bool) -> Detokenizer:
        """A decoder of one output of a prompt."""
        return Detokenizer(self.decode, prompt_token_ids, self.special if skip_special else frozenset())

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token as text and as exact bytes, which are not always whole characters."""
        text = self._added.get(token_id)
        if text is not None:
            return text, text.encode()
        piece = self._hf.id_to_token(token_id) or ""
        if self._alphabet and all(character in self._alphabet for character in piece):
            raw = bytes(self._alphabet[character] for character in piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            raw = bytes([int(piece[3:5], 16)])
        else:
            raw = piece.replace("\u2581", " ").encode()
        return raw.decode(errors="replace"), raw

    def _encode(self, texts: Sequence[str], special: bool) -> list[int]:
        # Unlike encode, this lets other threads run meanwhile, and takes several for several texts; "fast" keeps no
        # offsets, which nobody asks for.
        found = self._hf.encode_batch_fast(texts, add_special_tokens=special)
        return found[0].ids if len(found) == 1 else [token_id for each in found for token_id in each.ids]

    def _encode_long(self, text: str, special: bool) -> list[int]:
        parts = [text] if self._around is None else cuts.cut(text)
        if self._around is None or len(parts) == 1:
            return self._encode(parts, special)
        before, after = self._around if special else ([], [])
        return [*before, *self._encode(parts, special=False), *after]

    def _special_around(self) -> tuple[list[int], list[int]] | None:
        """The tokens that are put before and behind a text; None if that is not what is done to it."""
        text, whole = self._encode(["a"], special=False), self._encode(["a"], special=True)
        places = range(len(whole) - len(text) + 1) if text else ()
        at = next((i for i in places if whole[i : i + len(text)] == text), None)
        return None if at is None else (whole[:at], whole[at + len(text) :])
