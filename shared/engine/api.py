"""What an engine is to the process around it. No torch here: a servicer needs only this file and `kv`.

Threads: `Engine.step` belongs to one thread (`shared/engine/loop.py` runs it). `submit`, `cancel`, `load` and
everything on `Engine.kv` may be called from any thread and never wait for a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from shared.engine.kv.layout import KvLayout
from shared.engine.kv.memory import PoolMemory
from shared.engine.kv.store import KvStore, PageTable
from shared.errors import Fault
from shared.grammar import Grammar


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the meaning of each field is in protos/forebay/v1/generation.proto."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    grammar: Grammar | None = None
    num_prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether a choice depends on the tokens before it other than through the model."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run.

    `output_token_ids` were emitted before (by another worker): they are computed like the prompt, are not emitted
    again, and count for max_tokens, min_tokens and penalties. `draft_token_ids` may follow them; nobody has verified
    that. With `prefill_only` the sequence ends after one more token. A `resumed` one goes on after a fault elsewhere:
    its client waits amid an answer. `page_hashes` name leading pages of its prompt and earlier output, where whoever
    asks knows them: what is not among them is worked out. If log-probabilities of the prompt are wanted, those of its
    first `num_prompt_logprobs_held` tokens are known already, and not told again.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    hash_key: bytes = b""
    prefill_only: bool = False
    priority: int = 0
    draft_token_ids: tuple[int, ...] = ()
    resumed: bool = False
    page_hashes: tuple[bytes, ...] = ()
    num_prompt_logprobs_held: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and earlier output."""
        return self.prompt_token_ids + self.output_token_ids


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token. `logprob` and `top` (id, logprob; most likely first) are set if logprobs were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of a token of a prompt; `rank` is one more than there are likelier ones, `top` as in SampledToken."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step chose for one sequence: the drafts that were right, one token more, and drafts of what may follow;
    no `tokens` if only the item's `logprob_rows` were asked for."""

    tokens: tuple[SampledToken, ...]
    drafts: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class PagesComputed:
    """The KV of the first `num_tokens` tokens is complete in `page_ids`, which start at page index `first_page`.

    Sent for prefill-only sequences, once per chunk, with the pages that became complete since the last one. The last
    one, in the same step as the token, also has the partly filled page.
    """

    request_id: str
    first_page: int
    page_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the prompt's tokens from index `first` on. Sent once per chunk, if wanted, before what else that step says."""

    request_id: str
    first: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class TokensSampled:
    """New tokens, and whether they are the last. A stop token ends a sequence as `stop_token` and is not in `tokens`
    unless `ignore_eos`. There are none where none was to be generated.

    The step verified `num_drafts` drafts, and the first `num_accepted` of them were right. A prefill-only sequence ends
    with drafts of what may follow.
    """

    request_id: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    stop_token: SampledToken | None = None
    num_cached_tokens: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    draft_token_ids: tuple[int, ...] = ()

    @property
    def stop_token_id(self) -> int | None:
        """The token that ended the sequence, if one did."""
        return None if self.stop_token is None else self.stop_token.token_id


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence cannot go on; nothing follows."""

    request_id: str
    fault: Fault


Event = PagesComputed | PromptLogprobs | TokensSampled | Failed


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine serves. `compatibility_hash` is equal exactly where pages can be exchanged.

    `ridge_tokens`: so many tokens take about as long to compute as reading the weights does, which each step takes
    besides (the ridge of the roofline; Williams, Waterman and Patterson, 2009)."""

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    layout: KvLayout
    num_pages: int
    compatibility_hash: str
    ridge_tokens: int = 1


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Facts for the router, all measured by the engine itself; rates of prompts by the last `num_prompt_tokens`, which
    came to their end at `prompts_measured_at_s`, when the rate had been the same for `prompts_steady_s`."""

    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    prefill_ms_per_token: float = 0.0
    prefill_ms_per_pair: float = 0.0
    num_prompt_tokens: float = 0.0
    prompts_measured_at_s: float = 0.0
    prompts_steady_s: float = 0.0
    decode_step_ms: float = 0.0
    decode_ms_per_sequence: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Drafts that were ever verified, by their position in a step, and those of them that were right. Every step that
    verifies drafts of a sequence counts once in `verified[0]`."""

    verified: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verification, the one that needs no draft included; 0 before the first."""
        return 1 + sum(self.accepted) / self.verified[0] if self.verified else 0.0


class Engine(Protocol):
    """Runs sequences. `shared.engine.engine.Engine` is the one implementation; what computes is an Executor."""

    spec: EngineSpec
    kv: KvStore
    memory: PoolMemory

    def prepare(self, request: EngineRequest) -> None:
        """What may take a second before `submit`, in a thread that has the time. Raises InvalidRequest, Unsupported."""

    def submit(self, request: EngineRequest, pages: PageTable | None = None) -> None:
        """Queue a sequence. `pages` (from `kv.reserve`) pass into its ownership, and the caller's table is empty then;
        their first `pages.num_tokens` tokens are already computed. Raises InvalidRequest or ContextTooLong, and then
        leaves `pages` with the caller."""

    def cancel(self, request_id: str) -> None:
        """End a sequence and free its pages; no event follows. Unknown ids are ignored. A prefill-only sequence keeps
        its pages, so that they can be leased, until this is called, even after its last event."""

    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    def step(self) -> list[Event]:
        """Schedule, launch, absorb, emit. Raises WorkerLost if nothing will ever be computed again."""

    def load(self) -> EngineLoad:
        """Current facts."""

    def draft_counts(self) -> DraftCounts:
        """How drafts have fared."""

    @property
    def num_running(self) -> int:
        """Sequences that steps compute, as of the last one."""

    def is_short(self) -> bool:
        """Whether a sequence of this engine waits for pages: newcomers should leave it what is freed next."""


NO_ROWS = range(0)


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One sequence's part of a step: compute tokens [start, start + len(token_ids)) and, if `sample`, choose the next.

    `page_ids` cover all tokens up to the end of this part. `output_start` is the index in the sequence where its output
    begins (the length of the prompt), and `history` the whole sequence so far, for penalties. The last `num_drafts` of
    `token_ids` are drafts: they are not in `history`, and to be verified. `num_wanted` drafts may be proposed for the
    next step, which another worker computes if it `hands_over`; pages have room for all of them but the last.
    `following` is the token behind a part that is not the last, which a drafting layer looks at. `allowed` are the
    tokens that may be chosen, and those behind each draft, as bits (see `grammars`); None, and no rows, where all may.
    `logprob_rows` are the positions, all of the prompt, behind which the log-probability of the token that follows is
    wanted.

    Launched behind another step, a token may be what that one will choose: the id -1 - k (see `awaited`) stands for the
    k-th of what it leaves, and `history` ends before it. It leaves N tokens, the last one of each item that chooses;
    then N drafts, the first of each; then the second ones, and so on. If it verifies drafts of the sequence, the part
    starts up to `num_in_doubt` tokens further on: by as many as are right.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    page_ids: Sequence[int]
    sample: bool
    sampling: SamplingParams
    output_start: int
    history: Sequence[int] = field(default=())
    num_drafts: int = 0
    num_wanted: int = 0
    hands_over: bool = False
    following: int | None = None
    allowed: tuple[bytes | None, ...] = ()
    num_in_doubt: int = 0
    logprob_rows: range = NO_ROWS

    @property
    def position(self) -> int:
        """The index in the sequence of the first token to choose, at least."""
        return self.start + len(self.token_ids) - self.num_drafts

    @property
    def drafts(self) -> Sequence[int]:
        """The tokens to verify."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def told(self) -> Sequence[int]:
        """The tokens behind `logprob_rows`."""
        first, last = self.logprob_rows.start + 1 - self.start, self.logprob_rows.stop + 1 - self.start
        known = self.token_ids[first:last]
        return known if self.following is None or last <= len(self.token_ids) else [*known, self.following]

    @property
    def needs_host(self) -> bool:
        """Whether only the host knows what may be chosen, and so has to hear of what was chosen before. Where drafts
        are, penalties depend on which of them were right, and stop tokens are forbidden before some position. A grammar
        says what may come behind each token."""
        sampling, has_drafts = self.sampling, self.num_drafts + self.num_wanted > 0
        too_short = self.position - self.output_start < sampling.min_tokens
        return len(self.allowed) > 0 or (has_drafts and (sampling.has_penalties or too_short))


def awaited(place: int) -> int:
    """The token id that stands for the token which the step before chooses in this place, and the reverse."""
    return -1 - place


class Step(Protocol):
    """A step that was launched."""

    def is_done(self) -> bool:
        """Whether `chosen` returns, or raises, at once."""

    def chosen(self) -> list[Chosen | None]:
        """Wait until it is computed; what is chosen or told for each item, if it asks. Raises what went wrong."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A step that was computed at once; satisfies `Step`."""

    choices: list[Chosen | None]

    def is_done(self) -> bool:
        """It is."""
        return True

    def chosen(self) -> list[Chosen | None]:
        """What was chosen."""
        return self.choices


@dataclass(frozen=True, slots=True)
class Recorded:
    """Steps that an executor records at their first use (CUDA graphs): those of sequences that compute equally many
    tokens, at most `max_width`, and are as many as one of `sizes`, in ascending order; others are padded to the next of
    these. A graph fits contexts up to the next of `rooms`, tokens in ascending order, if there are any."""

    sizes: tuple[int, ...]
    max_width: int
    rooms: tuple[int, ...] = ()


class Executor(Protocol):
    """Computes steps: `shared.engine.executor.TorchExecutor`, or `shared.engine.sim.SimExecutor` without a model."""

    spec: EngineSpec

    @property
    def recorded(self) -> Recorded | None:
        """Which steps are recorded at their first use; None: nothing is made then, neither graphs nor kernels."""

    @property
    def memory(self) -> PoolMemory:
        """The pages."""

    @property
    def proposes(self) -> bool:
        """Whether steps have drafts where they are wanted."""

    @property
    def runs_behind(self) -> bool:
        """Whether `launch` returns before the step is computed. Then steps may be launched one behind the other, each
        going on from what the one before writes, chooses and, if the executor proposes, drafts; but for drafts of items
        that `needs_host`."""

    def launch(self, batch: Sequence[BatchItem]) -> Step:
        """Write the KV of every item's tokens into its pages, and choose a token for each item with `sample`; find what
        is wanted of its `logprob_rows`.

        What is written for a draft that turns out wrong is overwritten by a later step. Nothing of `batch` is looked at
        after this has returned. Raises WorkerLost if nothing can be computed any more; any other error is of this batch
        alone.
        """
