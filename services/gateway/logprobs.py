"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from protos.forebay.v1 import generation_pb2
from services.gateway.tokenizer import Tokenizer

Logprobs = generation_pb2.TokenLogprobs

# JSON has no infinity; OpenAI writes this for tokens that are impossible.
LOWEST = -9999.0


class TokenNames:
    """How tokens are shown: as text, or by their ids where there is no text or the client wants ids."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer

    def __call__(self, token_id: int) -> tuple[str, list[int] | None]:
        """Text and bytes."""
        if self._tokenizer is None:
            return f"token_id:{token_id}", None
        text, raw = self._tokenizer.token(token_id)
        return text, list(raw)


def for_chat(names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
    """`logprobs` of a chat choice. A stop token at the end has no log-probability and is left out."""
    content = [
        _entry(names, token_id, logprob.logprob)
        | {"top_logprobs": [_entry(names, top_id, top) for top_id, top in _top(logprob)]}
        for token_id, logprob in zip(token_ids, logprobs, strict=False)
    ]
    return {"content": content, "refusal": None}


def for_completion(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[Logprobs | None], offset: int, num_top: int
) -> dict[str, list[Any]]:
    """`logprobs` of a completion choice whose tokens begin `offset` characters into its text; null of a token that has
    none, the first of a prompt."""
    tokens = [names(token_id)[0] for token_id, _ in zip(token_ids, logprobs, strict=False)]
    tops = [
        None if logprob is None else _by_name(names, token_id, logprob, num_top)
        for token_id, logprob in zip(token_ids, logprobs, strict=False)
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [None if logprob is None else _finite(logprob.logprob) for logprob in logprobs],
        "top_logprobs": tops,
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
    }


def echoed(
    names: TokenNames, prompt: Sequence[int], logprobs: Sequence[Logprobs], echo: str, num_top: int
) -> dict[str, list[Any]]:
    """`logprobs` of a prompt as a completion repeats it. The token that opens it may not be in its text, or not the
    space that it begins with: it begins before the text then, as far as the tokens are longer."""
    found = for_completion(names, prompt, [None, *logprobs], 0, num_top)
    opening, missing = found["tokens"][0], sum(map(len, found["tokens"])) - len(echo)
    before = 0 if echo.startswith(opening) else max(0, min(len(opening), missing))
    return found | {"text_offset": [max(0, offset - before) for offset in found["text_offset"]]}


def of_prompt(names: TokenNames, prompt: Sequence[int], logprobs: Sequence[Logprobs], num_top: int) -> list[Any]:
    """`prompt_logprobs` as vLLM has them: for each token of the prompt itself and the most likely ones, by token id."""
    told: list[Any] = [None]
    for token_id, logprob in zip(prompt[1:], logprobs, strict=True):
        places = enumerate(_top(logprob, num_top), start=1)
        top = {top_id: (value, rank) for rank, (top_id, value) in places}
        entries = {token_id: (logprob.logprob, logprob.rank)} | top
        told.append({str(each): _ranked(names, each, *entry) for each, entry in entries.items()})
    return told


def _ranked(names: TokenNames, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": names(token_id)[0]}


def _by_name(names: TokenNames, token_id: int, logprob: Logprobs, num_top: int) -> dict[str, float]:
    """The most likely tokens, and the token itself. Of several that are written alike the most likely one stays: else a
    token could look like the most likely without being it."""
    found: dict[str, float] = {}
    for top_id, value in (*_top(logprob, num_top), (token_id, logprob.logprob)):
        found.setdefault(names(top_id)[0], _finite(value))
    return found


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = names(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _top(logprobs: Logprobs, count: int | None = None) -> Iterator[tuple[int, float]]:
    """So many of the most likely ones, or all that were reported."""
    return zip(logprobs.top_token_ids[:count], logprobs.top_logprobs[:count], strict=True)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
