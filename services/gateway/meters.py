"""What a gateway measures."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.gateway.output import Delta
from services.gateway.request import Job
from shared.errors import Cancelled, Fault
from shared.instruments import Meter


class Meters:
    """Instruments of one process."""

    def __init__(self, meter: Meter) -> None:
        self._requests = meter.create_counter("forebay_gateway_requests", description="Requests by model and outcome.")
        self._running = meter.create_up_down_counter("forebay_gateway_running", description="Requests being answered.")
        self._prompt = meter.create_counter("forebay_gateway_prompt_tokens", description="Tokens of prompts.")
        self._output = meter.create_counter("forebay_gateway_output_tokens", description="Tokens of outputs.")
        self._first = meter.create_histogram(
            "forebay_gateway_first_token",
            description="Time from request to first token.",
        )
        self._token = meter.create_histogram(
            "forebay_gateway_time_per_output_token",
            description="Time per token after the first, of each request with several.",
        )
        self._whole = meter.create_histogram(
            "forebay_gateway_request",
            description="Time from request to last token.",
        )
        self._responses = meter.create_counter(
            "forebay_gateway_responses", description="Answers over HTTP by path and status, refusals included."
        )
        self._recovery = meter.create_histogram(
            "forebay_gateway_recovery",
            description="Time from a decode worker's fault to the first message of the one that goes on.",
        )

    def responded(self, path: str, status: int) -> None:
        """An answer over HTTP begins."""
        self._responses.add(1, {"path": path, "status": str(status)})

    def recovered(self, reason: str, since: float) -> None:
        """An output goes on after a fault that was noticed at a time of the monotonic clock."""
        self._recovery.record(time.monotonic() - since, {"fault": reason})

    async def measure(self, job: Job, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
        """Pass deltas on, and count the request when they end, however they end."""
        labels, begin, first_at = {"model": job.model.name}, time.perf_counter(), 0.0
        num_tokens, outcome = [0] * len(job.choices), Cancelled.reason
        self._running.add(1, labels)
        self._prompt.add(sum(len(prompt.token_ids) for prompt in job.prompts), labels)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if not (first_at or delta.prompt_logprobs):
                        first_at = time.perf_counter()
                        self._first.record(first_at - begin, labels)
                    num_tokens[delta.index] = delta.num_output_tokens
                    yield delta
            outcome = "OK"
        except Fault as fault:
            outcome = fault.reason
            raise
        finally:
            self._running.add(-1, labels)
            self._output.add(sum(num_tokens), labels)
            self._requests.add(1, labels | {"outcome": outcome})
            end = time.perf_counter()
            self._whole.record(end - begin, labels)
            if first_at and (longest := max(num_tokens)) > 1:
                self._token.record((end - first_at) / (longest - 1), labels)
