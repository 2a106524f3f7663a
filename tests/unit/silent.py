"""A decode worker that says one thing and then nothing."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc

# Longer than anybody waits for it.
FOR_EVER_S = 200.0


class Silent(decode_pb2_grpc.DecodeServiceServicer):
    """Sends one message and then computes for ever; `ended` is set when a call was given up."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        try:
            yield decode_pb2.GenerateResponse()
            await asyncio.sleep(FOR_EVER_S)
        finally:
            self.ended.set()
