"""From token ids to text, step by step, never splitting a character."""

from collections.abc import Callable, Sequence

# What an incomplete character decodes to.
REPLACEMENT = "\ufffd"
# Tokens of the prompt that the first token is decoded with: some decoders drop the space that begins a text.
NUM_CONTEXT = 6
# A character has at most four bytes, hence four tokens. More tokens than this without a whole character are not text,
# and are released as they are, so that a model that babbles bytes costs no more than any other.
MAX_HELD = 32


class Detokenizer:
    """Decodes one output.

    `decode` turns ids into text and may depend on neighbours, as byte tokens, joined words and dropped spaces do.
    Therefore each step decodes a window: the tokens of the piece before (context) and the tokens since. The new text is
    what the window has beyond its context. Concatenated, the pieces are what decoding all tokens at once gives.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int] = (),
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self._decode, self._skipped = decode, skipped
        self._window = [token_id for token_id in prompt_token_ids[-NUM_CONTEXT:] if token_id not in skipped]
        self._num_context = len(self._window)
        # A prompt of token ids may end within a character; all of it is then new.
        self._context_text = decode(self._window).rstrip(REPLACEMENT) if self._window else ""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = len(self._window) - self._num_context
        incomplete = text.endswith(REPLACEMENT) or len(text) <= len(self._context_text)
        if incomplete and num_held < MAX_HELD:
            return ""
        return self._slide(text)

    def flush(self) -> str:
        """The rest, incomplete as it is. Nothing follows."""
        if len(self._window) == self._num_context:
            return ""
        return self._slide(self._decode(self._window))

    def _slide(self, text: str) -> str:
        new = text[len(self._context_text) :]
        del self._window[: self._num_context]
        self._num_context = len(self._window)
        self._context_text = self._decode(self._window)
        return new
