"""Text to tokens and back, for clients that count or cut before they ask."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.gateway import chat, tools
from services.gateway.fields import Fields, Range, integer
from services.gateway.models import ServedModel
from shared.errors import InvalidRequest

MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Tokens:
    """`texts` has the text of each token, if the client asked for it."""

    ids: list[int]
    texts: list[str] | None
    max_model_len: int


async def tokenize(raw: Mapping[str, Any], model: ServedModel) -> Tokens:
    """Exactly the tokens that a completion of this `prompt`, or a chat with these `messages`, would begin with.

    Raises InvalidRequest, Unsupported.
    """
    fields = Fields(raw)
    text = fields.text("prompt")
    if (text is None) == (fields.raw("messages") is None):
        raise InvalidRequest("give either 'prompt', a string, or 'messages'", param="prompt")
    if text is None:
        _, ids = await chat.prompt(fields, model, tools.read(fields))
    else:
        special = fields.flag("add_special_tokens") is not False
        ids = await model.tokenizer("prompt").encode(text, special=special)
    tokenizer = model.tokenizer("prompt")
    texts = [tokenizer.token(token_id)[0] for token_id in ids] if fields.flag("return_token_strs") else None
    return Tokens(ids, texts, model.card.max_model_len)


async def detokenize(raw: Mapping[str, Any], model: ServedModel) -> str:
    """The text of `tokens`. Raises InvalidRequest."""
    given = Fields(raw).array("tokens")
    if given is None:
        raise InvalidRequest("'tokens' is missing", param="tokens")
    if len(given) > MAX_TOKENS:
        raise InvalidRequest(f"'tokens' must have at most {MAX_TOKENS} entries", param="tokens")
    allowed, tokenizer = Range(0, model.card.vocab_size - 1), model.tokenizer("tokens")
    ids = [integer("tokens", token_id, allowed) for token_id in given]
    return await asyncio.to_thread(tokenizer.decode, ids)
