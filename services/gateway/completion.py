"""Completion requests: prompts as text, as token ids, or as batches of either."""

from collections.abc import Mapping
from typing import Any

from services.gateway import options as common
from services.gateway import structured
from services.gateway.fields import Fields, Range, integer, name_of
from services.gateway.models import ServedModel
from services.gateway.request import Caller, Job, Prompt, make_job
from shared.errors import InvalidRequest, Unsupported

# What OpenAI and vLLM generate when a completion does not say how much.
DEFAULT_MAX_TOKENS = 16
MAX_TOKEN_ID = Range(0, 2**31 - 1)
_EXPECTED = "'prompt' must be a string, an array of strings, an array of token ids or an array of such arrays"
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"suffix": ("",)}


async def job(raw: Mapping[str, Any], caller: Caller, model: ServedModel, max_choices: int) -> Job:
    """Check a request and tokenize its prompts. Raises InvalidRequest, ContextTooLong, Unsupported."""
    fields = Fields(raw)
    common.refuse_unsupported(fields, _UNSUPPORTED)
    echo = fields.flag("echo") or False
    logprobs = common.max_logprobs("logprobs", fields.integer("logprobs", common.COUNT))
    # 0 is of use only to have the prompt echoed, or to hear how likely it is.
    about_prompt = echo or fields.raw("prompt_logprobs") is not None
    max_tokens = fields.integer("max_tokens", Range(0 if about_prompt else 1, 2**31 - 1))
    options = common.parse(fields, model.defaults, logprobs, max_tokens)
    if echo and logprobs is not None:
        options.sampling.num_prompt_logprobs = max(logprobs, options.num_prompt_logprobs or 0)
    _check_best_of(fields, options.n)
    special = fields.flag("add_special_tokens") is not False
    raw_prompts = _split(fields.raw("prompt"))
    if len(raw_prompts) > max_choices:
        raise InvalidRequest(f"'prompt' must have at most {max_choices} entries", param="prompt")
    prompts = [await _prompt(prompt, model, special) for prompt in raw_prompts]
    await structured.check(fields, options.sampling, model)
    default = max(DEFAULT_MAX_TOKENS, options.sampling.min_tokens)
    return make_job(caller, model, options, prompts, max_choices, echo=echo, default_max_tokens=default)


def _check_best_of(fields: Fields, n: int) -> None:
    best_of = fields.integer("best_of", common.NUM_OUTPUTS)
    if best_of is not None and best_of != n:
        raise Unsupported("'best_of' is not supported: ask for 'n' outputs and choose among them", param="best_of")


def _split(prompt: object) -> list[str | list[Any]]:
    """The prompts of a request, without a look into arrays of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt is None:
        raise InvalidRequest("'prompt' is missing", param="prompt")
    if not isinstance(prompt, list):
        raise InvalidRequest(f"{_EXPECTED}, not {name_of(prompt)}", param="prompt")
    if not prompt:
        raise InvalidRequest("'prompt' must not be an empty array", param="prompt")
    if all(isinstance(entry, str) for entry in prompt) or all(isinstance(entry, list) for entry in prompt):
        return prompt
    if any(isinstance(entry, str | list) for entry in prompt):
        raise InvalidRequest(f"{_EXPECTED}, not a mixture of them", param="prompt")
    return [prompt]


async def _prompt(prompt: str | list[Any], model: ServedModel, special: bool) -> Prompt:
    if isinstance(prompt, str):
        token_ids = await model.tokenizer("prompt").encode(prompt, special=special)
        return Prompt(tuple(token_ids), prompt)
    if set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) <= MAX_TOKEN_ID.high:
        return Prompt(tuple(prompt))
    return Prompt(tuple(integer(f"prompt[{i}]", token_id, MAX_TOKEN_ID) for i, token_id in enumerate(prompt)))
