"""Which requests an engine takes: what is wrong with one is said before it costs anything."""

from math import isfinite

from shared.engine.api import EngineRequest, EngineSpec, SamplingParams
from shared.engine.sequence import Limits
from shared.errors import ContextTooLong, InvalidRequest


def limits(spec: EngineSpec) -> Limits:
    """No sequence grows beyond the context, nor beyond the pool: there every one must be able to finish alone."""
    pool_tokens = spec.num_pages * spec.layout.page_size
    return Limits(spec.layout.page_size, min(spec.max_model_len, pool_tokens), spec.eos_token_ids)


def require_runnable(request: EngineRequest, spec: EngineSpec) -> None:
    """Raises InvalidRequest or ContextTooLong for a request that could never run to an end here."""
    num_tokens, max_len = len(request.prompt_token_ids) + len(request.output_token_ids), limits(spec).max_len
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if num_tokens + (request.sampling.max_tokens > 0) > max_len:
        raise ContextTooLong(
            f"{num_tokens} tokens leave no room for another one: this worker holds sequences of at most {max_len} "
            f"tokens (context of {spec.max_model_len}, {spec.num_pages} pages of {spec.layout.page_size})",
            param="prompt",
        )
    _require_vocabulary(request.prompt_token_ids, spec, "prompt")
    _require_vocabulary(request.output_token_ids, spec, "output_token_ids")
    _require_vocabulary(request.draft_token_ids, spec, "draft_token_ids")
    _require_sampling(request.sampling, spec)
    _require_end(request.sampling)
    if request.num_prompt_logprobs_held > len(request.prompt_token_ids):
        raise InvalidRequest(
            f"{request.num_prompt_logprobs_held} log-probabilities are held of a prompt of "
            f"{len(request.prompt_token_ids)} tokens",
            param="num_prompt_logprobs_held",
        )
    if len(request.output_token_ids) >= max(1, request.sampling.max_tokens):
        raise InvalidRequest(
            f"max_tokens is {request.sampling.max_tokens}, and {len(request.output_token_ids)} tokens were emitted "
            "before: there is nothing to generate",
            param="max_tokens",
        )


def _require_vocabulary(token_ids: tuple[int, ...], spec: EngineSpec, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < spec.vocab_size):
        raise InvalidRequest(f"a token id is outside the vocabulary, 0 to {spec.vocab_size - 1}", param=param)


def _require_end(sampling: SamplingParams) -> None:
    """A grammar says where an output may end, and a token that the model stops with ends it there."""
    if sampling.grammar is not None:
        for param, value in (("min_tokens", sampling.min_tokens), ("ignore_eos", sampling.ignore_eos)):
            if value:
                raise InvalidRequest(
                    f"{param} cannot be had with a grammar, which says where an output ends", param=param
                )


def _require_sampling(sampling: SamplingParams, spec: EngineSpec) -> None:
    wrong = {
        "temperature": not (isfinite(sampling.temperature) and sampling.temperature >= 0),
        "top_p": not 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k < 0,
        "min_p": not 0 <= sampling.min_p <= 1,
        "presence_penalty": not isfinite(sampling.presence_penalty),
        "frequency_penalty": not isfinite(sampling.frequency_penalty),
        "repetition_penalty": not (isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0),
        "logit_bias": not all(isfinite(bias) and 0 <= token < spec.vocab_size for token, bias in sampling.logit_bias),
        "max_tokens": sampling.max_tokens < (sampling.num_prompt_logprobs is None),
        "min_tokens": not 0 <= sampling.min_tokens <= sampling.max_tokens,
        "num_logprobs": not 0 <= (sampling.num_logprobs or 0) <= spec.vocab_size,
        "num_prompt_logprobs": not 0 <= (sampling.num_prompt_logprobs or 0) <= spec.vocab_size,
    }
    for param, is_wrong in wrong.items():
        if is_wrong:
            raise InvalidRequest(f"{param} is {getattr(sampling, param)}, which is out of range", param=param)
