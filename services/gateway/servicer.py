"""The gRPC face: the same requests and answers as the REST face, in protobuf."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypedDict

from google.protobuf import json_format
from google.protobuf.message import Message

from protos.forebay.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2
from services.gateway import structured
from services.gateway.api_keys import ApiKeys
from services.gateway.core import Core
from services.gateway.output import Delta
from services.gateway.request import Caller, Job
from services.gateway.usage import add_drafts
from shared import rpc, telemetry

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

_REASONS = {
    "stop": generation_pb2.FINISH_REASON_STOP,
    "length": generation_pb2.FINISH_REASON_LENGTH,
    "tool_calls": generation_pb2.FINISH_REASON_TOOL_CALLS,
}
# Fields of GenerationOptions whose name and meaning are those of the REST face.
_SAME = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("top_k", "max_tokens", "n"),
)

MakeJob = Callable[[Mapping[str, Any], Caller], Awaitable[Job]]


class Event(TypedDict, total=False):
    """The `oneof event` of a response, the same in both methods: exactly one of them."""

    delta: gateway_pb2.OutputDelta
    finished: gateway_pb2.StreamFinished


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Serves GatewayService. Faults are raised; `shared/rpc.py` puts them on the wire."""

    def __init__(self, core: Core, keys: ApiKeys, timeout_ms: int) -> None:
        self._core, self._keys, self._timeout_s = core, keys, timeout_ms / 1000

    async def Chat(self, request: gateway_pb2.ChatRequest, _context: Any) -> AsyncIterator[gateway_pb2.ChatResponse]:
        """See the protocol."""
        raw = _options(request.options) | {"messages": [_message(message) for message in request.messages]}
        if request.tools:
            raw["tools"] = [_plain(json_format.MessageToDict(tool)) for tool in request.tools]
        raw |= {"tool_choice": request.tool_choice or None, "reasoning_effort": request.reasoning_effort or None}
        if request.HasField("parallel_tool_calls"):
            raw["parallel_tool_calls"] = request.parallel_tool_calls
        if request.HasField("chat_template_kwargs"):
            raw["chat_template_kwargs"] = _plain(json_format.MessageToDict(request.chat_template_kwargs))
        if request.options.HasField("num_logprobs"):
            raw |= {"logprobs": True, "top_logprobs": request.options.num_logprobs}
        async with aclosing(self._run(self._core.chat, raw, request.options)) as events:
            async for event in events:
                yield gateway_pb2.ChatResponse(**event)

    async def Complete(
        self, request: gateway_pb2.CompleteRequest, _context: Any
    ) -> AsyncIterator[gateway_pb2.CompleteResponse]:
        """See the protocol."""
        raw = _options(request.options)
        match request.WhichOneof("prompt"):
            case "text":
                raw["prompt"] = request.text
            case "token_ids":
                raw["prompt"] = [list(request.token_ids.ids)]
        if request.options.HasField("num_logprobs"):
            raw["logprobs"] = request.options.num_logprobs
        async with aclosing(self._run(self._core.complete, raw, request.options)) as events:
            async for event in events:
                yield gateway_pb2.CompleteResponse(**event)

    async def ListModels(
        self, _request: gateway_pb2.ListModelsRequest, _context: Any
    ) -> gateway_pb2.ListModelsResponse:
        """See the protocol."""
        self._tenant("")
        models = self._core.directory.models
        return gateway_pb2.ListModelsResponse(
            models=[gateway_pb2.Model(id=model.name, max_model_len=model.card.max_model_len) for model in models]
        )

    async def _run(
        self, make_job: MakeJob, raw: Mapping[str, Any], options: gateway_pb2.GenerationOptions
    ) -> AsyncGenerator[Event, None]:
        if not telemetry.request_id.get():
            telemetry.request_id.set(uuid.uuid4().hex)
        tenant, remaining = self._tenant(options.tenant), rpc.time_remaining()
        timeout_s = self._timeout_s if remaining is None else min(remaining, self._timeout_s)
        usages: dict[int, Delta] = {}
        with self._core.admitted(), rpc.deadline(timeout_s):
            job = await make_job(raw, Caller(telemetry.request_id.get(), tenant, timeout_s))
            async with aclosing(self._core.run(job)) as deltas:
                async for delta in deltas:
                    yield Event(delta=_delta(job, delta))
                    usages[delta.index] = delta
        num_reasoning = sum(delta.num_reasoning_tokens for delta in usages.values())
        usage = _total(job, usages)
        yield Event(finished=gateway_pb2.StreamFinished(usage=usage, num_reasoning_tokens=num_reasoning))

    def _tenant(self, named: str) -> str:
        return self._keys.tenant(rpc.metadata("authorization"), named)


def _options(options: gateway_pb2.GenerationOptions) -> dict[str, Any]:
    given = {descriptor.name for descriptor, _ in options.ListFields()}
    raw: dict[str, Any] = {name: getattr(options, name) for name in _SAME if name in given}
    raw |= {
        "model": options.model,
        "min_tokens": options.min_tokens,
        "stop": list(options.stop),
        "stop_token_ids": list(options.stop_token_ids),
        "ignore_eos": options.ignore_eos,
        "logit_bias": {str(token_id): bias for token_id, bias in options.logit_bias.items()},
        "priority": -options.priority,
        "return_token_ids": options.return_token_ids,
    }
    if options.HasField("seed"):  # unsigned here, signed on the REST face: the same 64 bits
        raw["seed"] = options.seed - (1 << 64) if options.seed >= 1 << 63 else options.seed
    if options.HasField("num_prompt_logprobs"):
        raw["prompt_logprobs"] = options.num_prompt_logprobs
    if options.HasField("grammar"):
        raw["structured_outputs"] = structured.described(options.grammar)
    return raw


def _message(message: gateway_pb2.ChatMessage) -> dict[str, Any]:
    extra: Message = message.extra
    fields: dict[str, Any] = _plain(json_format.MessageToDict(extra))
    return fields | {"role": message.role, "content": message.content}


def _plain(value: Any) -> Any:
    """What a Struct means: its whole numbers are integers, and its keys, which have no order, always come in the same.

    2 and 2.0 are different prompts, and so are two orders of keys: no page would be found in the cache.
    """
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in sorted(value.items())}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _delta(job: Job, delta: Delta) -> gateway_pb2.OutputDelta:
    return gateway_pb2.OutputDelta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids if job.options.return_token_ids else (),
        logprobs=delta.logprobs,
        prompt_logprobs=delta.prompt_logprobs,
        finish_reason=_REASONS.get(delta.finish_reason or "", generation_pb2.FINISH_REASON_UNSPECIFIED),
        reasoning=delta.reasoning,
        tool_calls=[
            gateway_pb2.ToolCallDelta(
                index=part.index,
                id="" if part.name is None else job.call_id(delta.index, part.index),
                name=part.name or "",
                arguments=part.arguments,
            )
            for part in delta.calls
        ],
    )


def _total(job: Job, last: Mapping[int, Delta]) -> generation_pb2.Usage:
    """Counts of all outputs together; prompts count once."""
    total = generation_pb2.Usage(
        num_prompt_tokens=sum(len(prompt.token_ids) for prompt in job.prompts),
        num_output_tokens=sum(delta.num_output_tokens for delta in last.values()),
    )
    for index, delta in last.items():
        if delta.usage is None:
            continue
        add_drafts(total, delta.usage)
        if index % job.options.n == 0:
            total.num_cached_local += delta.usage.num_cached_local
            total.num_cached_remote += delta.usage.num_cached_remote
            total.num_cached_transferred += delta.usage.num_cached_transferred
    return total
