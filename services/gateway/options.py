"""What chat and completion requests have in common, checked: ranges as OpenAI has them, additions as vLLM has them.

Fields that nobody knows are ignored, as OpenAI-compatible servers do. Fields that this server knows and cannot honour,
where ignoring them would change what the client gets, are refused as Unsupported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos.forebay.v1 import generation_pb2
from services.gateway import structured
from services.gateway.fields import Fields, Range, integer, wrong_type
from shared.errors import InvalidRequest, Unsupported

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
INT32 = Range(-(2**31), 2**31 - 1)
INT64 = Range(-(2**63), 2**63 - 1)
COUNT = Range(0, 2**31 - 1)
NUM_OUTPUTS = Range(1, 128)
# Made once: each of them takes as long as reading its field.
_TOP_K, _TEMPERATURE, _SHARE = Range(-1, 2**31 - 1), Range(0, 2), Range(0, 1)
_TOP_P, _PENALTY, _REPETITION = Range(0, 1, above=True), Range(-2, 2), Range(0, 100, above=True)

# Value: what is asked for when the field is absent; anything else but null cannot be honoured.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logprob_token_ids": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "thinking_token_budget": (),
    "spaces_between_special_tokens": (True,),
}


@dataclass(frozen=True, slots=True)
class Options:
    """`sampling` lacks seed and max_tokens, which depend on the choice and its prompt. `num_prompt_logprobs` are those
    that are reported besides what an echo shows."""

    sampling: generation_pb2.SamplingParams
    n: int
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    priority: int
    cache_salt: str
    return_token_ids: bool
    tokens_as_ids: bool
    num_prompt_logprobs: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool


def parse(fields: Fields, defaults: Mapping[str, float], num_logprobs: int | None, max_tokens: int | None) -> Options:
    """Options of a request. `defaults` are the model's own sampling parameters. Raises InvalidRequest, Unsupported."""
    refuse_unsupported(fields, _UNSUPPORTED)
    min_tokens = fields.integer("min_tokens", COUNT) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"'min_tokens' ({min_tokens}) exceeds 'max_tokens' ({max_tokens})", param="min_tokens")
    stream = fields.flag("stream") or False
    usage = _stream_options(fields, stream)
    num_prompt_logprobs = max_logprobs("prompt_logprobs", fields.integer("prompt_logprobs", COUNT))
    if num_prompt_logprobs is not None and stream:
        raise InvalidRequest("'prompt_logprobs' are not available when 'stream' is true", param="prompt_logprobs")
    salt = fields.text("cache_salt", 1024)
    if salt == "":
        raise InvalidRequest("'cache_salt' must not be empty", param="cache_salt")
    return Options(
        sampling=_sampling(fields, defaults, min_tokens, num_logprobs, num_prompt_logprobs),
        n=fields.integer("n", NUM_OUTPUTS) or 1,
        seed=fields.integer("seed", INT64),
        max_tokens=max_tokens,
        stop=_stop(fields),
        include_stop=fields.flag("include_stop_str_in_output") or False,
        skip_special_tokens=fields.flag("skip_special_tokens") is not False,
        priority=-(fields.integer("priority", INT32) or 0),  # vLLM: lower goes first; in the suite higher does
        cache_salt=salt or "",
        return_token_ids=fields.flag("return_token_ids") or False,
        tokens_as_ids=fields.flag("return_tokens_as_token_ids") or False,
        num_prompt_logprobs=num_prompt_logprobs,
        stream=stream,
        include_usage=usage.flag("include_usage") or False,
        continuous_usage=usage.flag("continuous_usage_stats") or False,
    )


def refuse_unsupported(fields: Fields, unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise Unsupported if a field asks for more than nothing."""
    for name in fields.present(unsupported):
        value = fields.raw(name)
        if value is not None and not any(value == other for other in unsupported[name]):
            raise Unsupported(f"'{name}' is not supported", param=name)


def max_logprobs(param: str, value: int | None) -> int | None:
    """A number of alternatives to report, within bounds. Raises InvalidRequest."""
    if value is not None:
        Range(0, MAX_LOGPROBS).check(param, value)
    return value


def _sampling(
    fields: Fields,
    defaults: Mapping[str, float],
    min_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
) -> generation_pb2.SamplingParams:
    def number(name: str, neutral: float, allowed: Range) -> float:
        value = fields.number(name, allowed)
        return defaults.get(name, neutral) if value is None else value

    top_k = fields.integer("top_k", _TOP_K)
    return generation_pb2.SamplingParams(
        temperature=number("temperature", 1.0, _TEMPERATURE),
        top_p=number("top_p", 1.0, _TOP_P),
        top_k=max(0, int(defaults.get("top_k", 0)) if top_k is None else top_k),
        min_p=number("min_p", 0.0, _SHARE),
        presence_penalty=number("presence_penalty", 0.0, _PENALTY),
        frequency_penalty=number("frequency_penalty", 0.0, _PENALTY),
        repetition_penalty=number("repetition_penalty", 1.0, _REPETITION),
        logit_bias=_logit_bias(fields),
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(fields),
        ignore_eos=fields.flag("ignore_eos") or False,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=structured.read(fields),
    )


def _stop(fields: Fields) -> tuple[str, ...]:
    raw = fields.raw("stop")
    stops = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("'stop' must be a string or an array of strings", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"'stop' must have at most {MAX_STOPS} entries, not {len(stops)}", param="stop")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidRequest(f"each entry of 'stop' must have 1 to {MAX_STOP_CHARS} characters", param="stop")
    return tuple(stops)


def _stop_token_ids(fields: Fields) -> list[int]:
    ids = fields.array("stop_token_ids") or []
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"'stop_token_ids' must have at most {MAX_STOP_TOKEN_IDS} entries", param="stop_token_ids")
    return [integer("stop_token_ids", token_id, COUNT) for token_id in ids]


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias: dict[int, float] = {}
    raw = fields.object("logit_bias") or {}
    if len(raw) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"'logit_bias' must have at most {MAX_LOGIT_BIAS} entries", param="logit_bias")
    for key, value in raw.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise InvalidRequest(f"a key of 'logit_bias' must be a token id, not {key[:50]!r}", param="logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float):
            wrong_type("logit_bias", "an object of numbers", value)
        Range(-100, 100).check("logit_bias", value)
        bias[integer("logit_bias", int(key), COUNT)] = float(value)
    return bias


def _stream_options(fields: Fields, stream: bool) -> Fields:
    options = fields.object("stream_options")
    if options is not None and not stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true", param="stream_options")
    return Fields(options or {})
