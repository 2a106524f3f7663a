"""The engine's objects as protobuf messages and back. The wire stops here: the engine never sees protobuf."""

from collections.abc import Iterable, Sequence

from protos.forebay.v1 import decode_pb2, generation_pb2, prefill_pb2
from shared.engine.api import EngineRequest, FinishReason, PromptLogprobs, SampledToken, SamplingParams
from shared.errors import InvalidRequest
from shared.grammar import Grammar, Kind

Request = decode_pb2.GenerateRequest | prefill_pb2.PrefillRequest

_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


def sampling_params(message: generation_pb2.SamplingParams) -> SamplingParams:
    """SamplingParams of a message. Values are checked by the engine."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
        grammar=_grammar(message.grammar) if message.HasField("grammar") else None,
        num_prompt_logprobs=message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else None,
    )


def _grammar(message: generation_pb2.Grammar) -> Grammar:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("a grammar has no text", param="grammar")
    behind = message.behind_token_id if message.HasField("behind_token_id") else None
    return Grammar(Kind(kind), getattr(message, kind), behind)


def engine_request(
    message: Request,
    *,
    page_hashes: Iterable[bytes],
    prefill_only: bool = False,
    more_output: Iterable[int] = (),
    drafts: Iterable[int] = (),
    more_told: int = 0,
) -> EngineRequest:
    """The sequence that a message asks for, whose leading pages have these hashes, with `more_output` behind the output
    that it has already, and drafts of what follows. The log-probabilities of `more_told` tokens of the prompt are known
    besides those that it has."""
    return EngineRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_params(message.sampling),
        output_token_ids=(*message.output_token_ids, *more_output),
        hash_key=message.hash_key,
        prefill_only=prefill_only,
        priority=message.priority,
        draft_token_ids=tuple(drafts),
        resumed=bool(message.output_token_ids),
        page_hashes=tuple(page_hashes),
        num_prompt_logprobs_held=num_held(message) + more_told,
    )


def reusable(message: Request, page_hashes: Sequence[bytes], page_size: int) -> Sequence[bytes]:
    """Those of a request's pages that may come out of a cache. No cache has logits: from the last token on of which
    everything is told that is wanted, they are computed."""
    tells = message.sampling.HasField("num_prompt_logprobs") and num_held(message) < len(message.prompt_token_ids)
    return page_hashes[: (num_held(message) - 1) // page_size] if tells else page_hashes


def num_held(message: Request) -> int:
    """Leading tokens of the prompt of which nothing is to be told any more. Of the first nobody knows anything."""
    return max(1, message.num_prompt_logprobs_held)


def token_chunk(tokens: Sequence[SampledToken]) -> generation_pb2.TokenChunk:
    """A chunk of tokens, with log-probabilities if the tokens have them."""
    logprobs = (token_logprobs(token) for token in tokens)
    return generation_pb2.TokenChunk(
        token_ids=[token.token_id for token in tokens], logprobs=[each for each in logprobs if each is not None]
    )


def token_logprobs(token: SampledToken | None) -> generation_pb2.TokenLogprobs | None:
    """Log-probabilities of a token that has them."""
    if token is None or token.logprob is None:
        return None
    return _logprobs(token.logprob, token.top)


def prompt_logprobs(event: PromptLogprobs) -> generation_pb2.PromptLogprobs:
    """What an event tells of a prompt."""
    found = (_logprobs(each.logprob, each.top, each.rank) for each in event.logprobs)
    return generation_pb2.PromptLogprobs(logprobs=found)


def _logprobs(logprob: float, top: Sequence[tuple[int, float]], rank: int = 0) -> generation_pb2.TokenLogprobs:
    return generation_pb2.TokenLogprobs(
        logprob=logprob,
        top_token_ids=[token_id for token_id, _ in top],
        top_logprobs=[value for _, value in top],
        rank=rank,
    )


def finish_reason(reason: FinishReason | None) -> generation_pb2.FinishReason.ValueType:
    """The reason's number on the wire; 0 for a sequence that goes on."""
    return generation_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _REASONS[reason]


def count_drafts(usage: generation_pb2.Usage, num_drafts: int, num_accepted: int) -> None:
    """Note one verification of a sequence's drafts."""
    usage.num_draft_tokens += num_drafts
    usage.num_accepted_tokens += num_accepted
    usage.num_drafts_by_position.extend([0] * (num_drafts - len(usage.num_drafts_by_position)))
    usage.num_accepted_by_position.extend([0] * (num_drafts - len(usage.num_accepted_by_position)))
    for position in range(num_drafts):
        usage.num_drafts_by_position[position] += 1
        usage.num_accepted_by_position[position] += position < num_accepted
