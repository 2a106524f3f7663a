"""Outputs of one prompt share its prefill: the first computes it, the others start at its first token.

By then its pages are cached. Started together, each output would be routed and prefilled as if it were alone. What is
told of a prompt comes with its first output alone, before any other begins.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from protos.forebay.v1 import decode_pb2, generation_pb2
from services.gateway.output import Generate
from services.gateway.request import Choice

Responses = AsyncGenerator[decode_pb2.GenerateResponse, None]


def starts(choices: Sequence[Choice], num_per_prompt: int, generate: Generate) -> list[Generate]:
    """How to generate each choice; there are `num_per_prompt` of each prompt, one prompt after the other.

    Prompts without a whole page leave nothing to share, and nobody waits for them unless they are told of. A wait ends
    when the first output does, at the latest, hence by the request's deadline.
    """
    found: list[Generate] = []
    for first in range(0, len(choices), num_per_prompt):
        leader = choices[first]
        if leader.is_empty:
            found += [_nothing] * num_per_prompt
        elif num_per_prompt == 1 or not (leader.route.page_hashes or leader.tells):
            found += [generate] * num_per_prompt
        else:
            begun, rest = asyncio.Event(), generate if leader.generate.sampling.max_tokens else _nothing
            found += [_leading(generate, begun), *[_following(rest, begun)] * (num_per_prompt - 1)]
    return found


async def _nothing(_choice: Choice) -> Responses:
    finished = decode_pb2.GenerateFinished(reason=generation_pb2.FINISH_REASON_LENGTH)
    yield decode_pb2.GenerateResponse(finished=finished)


def _leading(generate: Generate, begun: asyncio.Event) -> Generate:
    async def lead(choice: Choice) -> Responses:
        try:
            async with aclosing(generate(choice)) as responses:
                async for response in responses:
                    if not response.HasField("prompt_logprobs"):
                        begun.set()
                    yield response
        finally:
            begun.set()

    return lead


def _following(generate: Generate, begun: asyncio.Event) -> Generate:
    async def follow(choice: Choice) -> Responses:
        await begun.wait()
        async with aclosing(generate(choice)) as responses:
            async for response in responses:
                yield response

    return follow
