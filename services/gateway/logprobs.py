"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Iterator, Sequence
from typing import Any

from protos.forebay.v1 import generation_pb2
from services.gateway.tokenizer import Tokenizer

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


def for_chat(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprobs]
) -> dict[str, Any]:
    """`logprobs` of a chat choice. A stop token at the end has no log-probability and is left out."""
    content = [
        _entry(names, token_id, logprob.logprob)
        | {"top_logprobs": [_entry(names, top_id, top) for top_id, top in _top(logprob)]}
        for token_id, logprob in zip(token_ids, logprobs, strict=False)
    ]
    return {"content": content, "refusal": None}


def for_completion(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprobs], offset: int
) -> dict[str, Any]:
    """`logprobs` of a completion choice whose tokens begin `offset` characters into its text."""
    tokens, offsets = [names(token_id)[0] for token_id, _ in zip(token_ids, logprobs, strict=False)], []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = [
        {names(top_id)[0]: _finite(top) for top_id, top in [*_top(logprob), (token_id, logprob.logprob)]}
        for token_id, logprob in zip(token_ids, logprobs, strict=False)
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(logprob.logprob) for logprob in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = names(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _top(logprobs: generation_pb2.TokenLogprobs) -> Iterator[tuple[int, float]]:
    return zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
