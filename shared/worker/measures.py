"""What a worker measures, as OpenTelemetry instruments."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

from opentelemetry.metrics import CallbackOptions, Observation

from shared.blackboard.records import Load
from shared.engine.api import Engine
from shared.engine.meter import Rate, lasts_s
from shared.instruments import Meter

# How right the router's expectations were is told from prompts that should have taken so long together, and a single
# one counts as at most so wrong.
PROMPT_MEMORY_MS = 10_000.0
MAX_RATIO = 4.0
# Rates of prompts are known by so many tokens.
KNOWN_BY_TOKENS = 1024
# The rate of reading is forgotten when nothing was read for so long.
READ_KNOWN_FOR_S = 60.0
# What an engine says of how rates of prompts were measured, which routers are told as one doubt.
PROMPT_FACTS = ("num_prompt_tokens", "prompts_measured_at_s", "prompts_steady_s")


class Measures:
    """The instruments of one worker."""

    def __init__(self, meter: Meter, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self.requests = meter.create_counter("forebay_requests", description="Requests taken")
        self.output_tokens = meter.create_counter("forebay_output_tokens", description="Tokens emitted")
        self.cached_tokens = meter.create_counter("forebay_cached_tokens", description="Prompt tokens not computed")
        self.prefill_fallbacks = meter.create_counter(
            "forebay_prefill_fallbacks", description="Remote prefills that failed"
        )
        self.kept_tokens = meter.create_counter(
            "forebay_kept_tokens", description="Prompt tokens kept of remote prefills that failed midway"
        )
        self.failed_pulls = meter.create_counter(
            "forebay_failed_pulls", description="Prefixes computed here because they could not be pulled"
        )
        self.stale_releases = meter.create_counter(
            "forebay_stale_releases", description="Leases that had ended when their reader released them"
        )
        self.first_token = meter.create_histogram(
            "forebay_first_token_seconds", description="Time from a request's arrival here to its first token"
        )
        self._byte, self._output, self._read_at = Rate(memory=1e9), Rate(memory=64), clock()
        self._prompt = Rate(memory=PROMPT_MEMORY_MS)
        self._transfer_bytes = meter.create_counter("forebay_transfer_bytes", description="KV bytes read from peers")
        self._checked_pages = meter.create_counter(
            "forebay_checked_pages", description="Pages read from peers whose checksum was verified, by outcome"
        )
        self._transfer_seconds = meter.create_histogram(
            "forebay_transfer_seconds", description="Time of one read of KV pages"
        )
        meter.create_observable_gauge("forebay_pages", [self._pages], description="KV pages by state")
        meter.create_observable_counter("forebay_leases", [self._leases], description="Leases by what became of them")
        for name in ("verified", "accepted"):
            meter.create_observable_counter(
                f"forebay_drafts_{name}", [self._drafts(name)], description=f"Drafts {name}, by position in their step"
            )
        meter.create_observable_counter(
            "forebay_preemptions",
            [_observe(lambda: engine.load().num_preemptions)],
            description="Sequences that lost their pages to others, and were computed again",
        )
        for name, (description, read) in self._facts().items():
            meter.create_observable_gauge(f"forebay_{name}", [_observe(read)], description=description)

    def transferred(self, num_bytes: int, seconds: float) -> None:
        """One read of KV pages."""
        self._transfer_bytes.add(num_bytes)
        self._transfer_seconds.record(seconds)
        if num_bytes:
            self._byte.add(seconds * 1000, num_bytes)
            self._read_at = self._clock()

    def finished(self, num_output_tokens: int) -> None:
        """One output came to its end."""
        self._output.add(num_output_tokens, 1)

    def computed(self, expected_ms: float, took_ms: float) -> None:
        """A prompt was computed here, which the router expected to take so long; 0 if it did not say."""
        if expected_ms > 0:
            self._prompt.add(min(max(took_ms, expected_ms / MAX_RATIO), expected_ms * MAX_RATIO), expected_ms)

    def load(self, num_inside: int, num_requests: int) -> Load:
        """Facts for the router."""
        facts = asdict(self._engine.load())
        num_prompt_tokens, measured_at_s, steady_s = (facts.pop(name) for name in PROMPT_FACTS)
        return Load(
            **facts,
            prefill_doubt=doubt(num_prompt_tokens, self._clock() - measured_at_s, steady_s),
            transfer_bytes_per_ms=self._bytes_per_ms(),
            output_tokens=self._output.ms,
            prompt_ratio=self._prompt.ms,
            num_inside=num_inside,
            num_requests=num_requests,
        )

    def _bytes_per_ms(self) -> float:
        """At which pages are read here; 0 if that is not known. A worker that once read slowly would be given nothing
        to read again, if that were held against it for ever."""
        is_known = self._byte.ms and self._clock() - self._read_at < READ_KNOWN_FOR_S
        return 1 / self._byte.ms if is_known else 0.0

    def checked(self, num_pages: int, num_corrupt: int, owner: str) -> None:
        """Pages of a peer whose checksums were compared."""
        self._checked_pages.add(num_pages - num_corrupt, {"outcome": "right"})
        if num_corrupt:
            self._checked_pages.add(num_corrupt, {"outcome": "corrupt", "owner": owner})

    def _pages(self, _: CallbackOptions) -> Iterable[Observation]:
        counts = self._engine.kv.counts()
        for state in ("free", "cached", "leased", "held"):
            yield Observation(getattr(counts, state), {"state": state})

    def _leases(self, _: CallbackOptions) -> Iterable[Observation]:
        counts = self._engine.kv.lease_counts()
        yield Observation(counts.granted, {"outcome": "granted"})
        yield Observation(counts.lapsed, {"outcome": "lapsed"})

    def _drafts(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            counts: tuple[int, ...] = getattr(self._engine.draft_counts(), name)
            return [Observation(count, {"position": position}) for position, count in enumerate(counts)]

        return observe

    def _facts(self) -> dict[str, tuple[str, Callable[[], float]]]:
        engine = self._engine
        return {
            "running_sequences": ("Sequences that steps compute", lambda: engine.load().num_running),
            "waiting_sequences": ("Sequences that wait for pages or for a place", lambda: engine.load().num_waiting),
            "queued_tokens": ("Prompt tokens that are to be computed", lambda: engine.load().num_queued_tokens),
            "decode_step_seconds": (
                "Time of a step that decodes, as routers reckon with it",
                lambda: engine.load().decode_step_ms / 1000,
            ),
            "mean_accepted_length": (
                "Tokens of a step with drafts, for one sequence",
                lambda: engine.draft_counts().mean_accepted_length,
            ),
            "kv_bytes_per_token": ("Bytes that a token takes in pages", lambda: engine.spec.layout.bytes_per_token),
            "live_leases": ("Leases that peers have on pages", lambda: engine.kv.lease_counts().live),
            "page_faults": ("Pages in no state or in two: 0, unless there is a leak", lambda: _page_faults(engine)),
        }


def doubt(num_tokens: float, age_s: float, steady_s: float) -> float:
    """How little rates of prompts are to be relied on, from 0 to 1, if so many tokens measured them, so long ago, and
    they had been the same for `steady_s` then. A worker whose first prompts took long, or that had a bad moment, would
    never be given another if everybody believed that for ever; one that has been slow for long is believed for long."""
    return round(1 - min(1.0, num_tokens / KNOWN_BY_TOKENS) * math.exp(-age_s / lasts_s(steady_s)), 3)


def _page_faults(engine: Engine) -> int:
    """Pages that are in no state or in two: 0 unless there is a leak."""
    counts = engine.kv.counts()
    return counts.total - counts.free - counts.cached - counts.leased - counts.held


def _observe(read: Callable[[], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(read())]
