"""A worker in virtual time: the real scheduler, pages and meter around steps that take what the sim engine says.

What `shared.engine.engine` and the servicers do around them is told again here in a few lines: an engine's step begins
and ends within one call, and a call takes no virtual time.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from collections.abc import Sequence as Series
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from bench.placement.virtual.loop import now_s
from shared import page_hash
from shared.blackboard.records import Load, ModelCard, Pages, Registration, Role, Room
from shared.engine.api import EngineRequest, SampledToken, SamplingParams
from shared.engine.kv.store import KvStore, PageTable
from shared.engine.meter import Meter, PromptCost, Rate
from shared.engine.scheduler import Part, Scheduler
from shared.engine.sequence import Limits, Sequence
from shared.engine.sim import SimModel
from shared.engine.splitmix import mix
from shared.worker.admission import Admission, Stay
from shared.worker.config import WorkerConfig
from shared.worker.measures import MAX_RATIO, PROMPT_MEMORY_MS, doubt

MODEL, EPOCH = "sim", 1
STEPS_QUEUED = 16
# Calls between two workers on one host, and what NIXL reads there.
PEER_S, READ_BYTES_PER_S = 0.005, 1e9


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, whose tenant names its pages, and how many tokens to generate behind it."""

    request_id: str
    tokens: tuple[int, ...]
    num_output: int
    hash_key: bytes

    def engine_request(self, *output: int, prefill_only: bool = False) -> EngineRequest:
        """For a scheduler; `output` is there already."""
        sampling = SamplingParams(max_tokens=self.num_output, ignore_eos=True)
        return EngineRequest(
            self.request_id, self.tokens, sampling, output, hash_key=self.hash_key, prefill_only=prefill_only
        )


@dataclass(slots=True)
class Rates:
    """As `shared.worker.measures` keeps them."""

    byte: Rate = field(default_factory=lambda: Rate(memory=1e9))
    output: Rate = field(default_factory=lambda: Rate(memory=64))
    prompt: Rate = field(default_factory=lambda: Rate(memory=PROMPT_MEMORY_MS))

    def computed(self, expected_ms: float, took_ms: float) -> None:
        """A prompt was computed, which the router expected to take so long; 0 if it did not say."""
        if expected_ms > 0:
            self.prompt.add(min(max(took_ms, expected_ms / MAX_RATIO), expected_ms * MAX_RATIO), expected_ms)


class VirtualWorker:
    """One worker; `run` must run for anything to be computed."""

    def __init__(self, name: str, role: Role, config: WorkerConfig) -> None:
        self.name, self.role = name, role
        self.model = SimModel(
            prefill_ms_per_token=config.sim_prefill_ms_per_token,
            decode_ms=config.sim_decode_ms,
            decode_ms_per_sequence=config.sim_decode_ms_per_sequence,
            page_size=config.page_size,
        )
        self.kv = KvStore(config.num_pages, config.page_size, config.lease_ttl_ms, now_s)
        self.kv.on_capacity = self._freed
        self.admission, self.rates = Admission(), Rates()
        self.limits = Room(
            sequences=config.max_num_sequences + config.max_waiting,
            tokens=config.max_queued_tokens or STEPS_QUEUED * config.max_step_tokens,
            pages=config.num_pages,
        )
        self._scheduler = Scheduler(self.kv, config.max_step_tokens, config.max_num_sequences)
        self._meter, self._load = Meter(), Load()
        self._limits = Limits(config.page_size, config.num_pages * config.page_size, ())
        self._arrived: list[Sequence] = []
        self._streams: dict[Sequence, asyncio.Queue[int]] = {}
        self._waiting: deque[tuple[Series[bytes], int, asyncio.Future[PageTable]]] = deque()
        self._woken, self._numbers, self._num_beats = asyncio.Event(), count(), 0

    # What it says of itself -------------------------------------------------------------------------------------------

    def registration(self) -> Registration:
        """At this moment."""
        self._num_beats += 1
        layout, counts = self.model.layout, self.kv.counts()
        card = ModelCard(
            model=MODEL,
            max_model_len=self.model.max_model_len,
            page_size=layout.page_size,
            vocab_size=self.model.vocab_size,
            eos_token_ids=(),
            compatibility_hash="sim",
            kv_bytes_per_token=int(layout.bytes_per_token),
        )
        return Registration(
            role=self.role,
            name=self.name,
            epoch=EPOCH,
            pid=1,
            address=self.name,
            num_beats=self._num_beats,
            card=card,
            load=self.load(),
            pages=Pages(
                free=counts.free, cached=counts.cached, leased=counts.leased, held=counts.held, total=counts.total
            ),
        )

    @property
    def prompts(self) -> PromptCost:
        """What it has measured of prompts."""
        return self._meter.prompts

    def load(self) -> Load:
        """Facts as of the last step, and what has arrived since."""
        queued, prompts = sum(sequence.num_uncomputed for sequence in self._arrived), self.prompts
        return self._load.model_copy(
            update={
                "num_waiting": self._load.num_waiting + len(self._arrived),
                "num_queued_tokens": self._load.num_queued_tokens + queued,
                "prefill_doubt": doubt(prompts.num_tokens, now_s() - prompts.measured_at_s, prompts.steady_s),
                "transfer_bytes_per_ms": 1 / self.rates.byte.ms if self.rates.byte.ms else 0.0,
                "output_tokens": self.rates.output.ms,
                "prompt_ratio": self.rates.prompt.ms,
                "num_inside": self.admission.num_active,
                "num_requests": self.admission.num_requests,
            }
        )

    def used(self) -> Room:
        """As the worker would report it."""
        taken, counts = self.admission.taken(), self.kv.counts()
        return taken.model_copy(update={"pages": max(taken.pages, counts.held + counts.leased)})

    # Requests ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def stay(self, job: Job, num_tokens: int, num_output: int) -> Iterator[Stay]:
        """A request is inside, of which so many tokens of the prompt are to be computed here."""
        num_pages = self.model.layout.num_pages(len(job.tokens) + num_output)
        with self.admission.request(job.request_id, num_tokens, num_pages) as stay:
            yield stay

    async def reserve(self, job: Job, stay: Stay) -> PageTable:
        """Pages for a prompt, with what is cached in them; first come, first served."""
        hashes = page_hash.chain(job.hash_key, job.tokens[:-1], self.kv.page_size)
        future: asyncio.Future[PageTable] = asyncio.get_running_loop().create_future()
        self._waiting.append((hashes, self.model.layout.num_pages(len(job.tokens)), future))
        self._serve()
        table = await future
        stay.cached(table.num_tokens, table.num_tokens // self.kv.page_size)
        return table

    async def pull(self, peer: "VirtualWorker", job: Job, table: PageTable) -> None:
        """Read what a peer has more of a prompt's prefix."""
        hashes = page_hash.chain(job.hash_key, job.tokens[:-1], self.kv.page_size)
        await asyncio.sleep(PEER_S)
        if (acquired := peer.kv.acquire(hashes)) is None:
            return
        lease, pages = acquired
        if (gained := len(pages) * self.kv.page_size - table.num_tokens) > 0:
            await self.read(gained)
            table.num_tokens += gained
        peer.kv.release(lease)

    async def read(self, num_tokens: int) -> None:
        """Read so much of a peer."""
        num_bytes = num_tokens * self.model.layout.bytes_per_token
        await asyncio.sleep(num_bytes / READ_BYTES_PER_S)
        self.rates.byte.add(num_bytes / READ_BYTES_PER_S * 1000, num_bytes)

    async def generate(self, request: EngineRequest, table: PageTable) -> AsyncGenerator[tuple[int, Sequence], None]:
        """Tokens of a sequence as they are chosen. Pages of a prefill-only one are held until this is left."""
        sequence = Sequence(request, self._limits, (now_s(), next(self._numbers)), table.move())
        stream = self._streams[sequence] = asyncio.Queue()
        self._arrived.append(sequence)
        self._woken.set()
        try:
            while not sequence.ended or not stream.empty():
                yield await stream.get(), sequence
        finally:
            del self._streams[sequence]
            self._scheduler.remove(sequence)
            self.kv.drop(sequence.table)

    # Steps ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Step for ever."""
        while True:
            arrived, self._arrived = self._arrived, []
            for sequence in arrived:
                self._scheduler.add(sequence)
            parts = self._scheduler.schedule() if self._scheduler.has_work() else []
            if not parts:
                self._woken.clear()
                await self._woken.wait()
                continue
            took_ms, num_chosen = self._launch(parts)
            await asyncio.sleep(took_ms / 1000)
            self._meter.record(parts, num_chosen, took_ms, now_s())
            for part in parts:
                self._absorb(part)
            self._note_load()
            self._serve()

    def _launch(self, parts: Series[Part]) -> tuple[float, int]:
        """How long a step takes, and how many tokens it chooses."""
        items = [part.sequence.part(part.start, part.num_tokens) for part in parts]
        took_ms = self.model.step_ms(items)
        for place, (part, item) in enumerate(zip(parts, items, strict=True)):
            part.sequence.launch(part.end, item, place, len(items), num_proposed=0)
        return took_ms, sum(item.sample for item in items)

    def _absorb(self, part: Part) -> None:
        sequence = part.sequence
        if sequence.num_awaited:
            tokens, ending = sequence.append([SampledToken(_token(sequence.tokens, self.model.vocab_size))])
            sequence.ended = ending is not None or sequence.request.prefill_only
            self._streams[sequence].put_nowait(tokens[0].token_id)
        first_page, page_hashes = sequence.unpublished(part.end)
        if page_hashes:
            self.kv.publish(sequence.table, first_page, page_hashes)
        if sequence.ended:
            self._scheduler.remove(sequence)
            if not sequence.request.prefill_only:
                self.kv.drop(sequence.table)

    def _note_load(self) -> None:
        running, waiting, meter = self._scheduler.running, self._scheduler.waiting, self._meter
        self._load = Load(
            num_running=len(running),
            num_waiting=len(waiting),
            num_queued_tokens=sum(each.num_uncomputed for each in (*running, *waiting) if each.num_uncomputed > 1),
            prefill_ms_per_token=meter.prefill_ms_per_token,
            prefill_ms_per_pair=meter.prefill_ms_per_pair,
            decode_step_ms=meter.decode_step_ms,
            decode_ms_per_sequence=meter.draft_ms,
            num_steps=meter.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
        )

    def _freed(self) -> None:
        self._woken.set()
        self._serve()

    def _serve(self) -> None:
        """Give pages to those who wait, in order, as far as they go."""
        while self._waiting and not self._scheduler.is_short:
            hashes, num_pages, future = self._waiting[0]
            table = self.kv.reserve(hashes, num_pages, self._load.num_running)
            if table is None:
                return
            self._waiting.popleft()
            future.set_result(table)


def _token(tokens: Series[int], vocab_size: int) -> int:
    """What follows these: equal prompts get equal answers."""
    return mix(tokens[-1] << 32 ^ tokens[len(tokens) // 2] << 16 ^ len(tokens)) % vocab_size
