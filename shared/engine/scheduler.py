"""Which sequences compute how many tokens in the next step, and who gets pages for it."""

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import attrgetter

from shared.engine.kv.store import KvStore
from shared.engine.sequence import Sequence

RANK = attrgetter("rank")
# To compute so many takes about as long as a step does anyway: whoever can have them from another one's pages waits for
# these, and whoever resumes with no more joins a step of others.
STEP_TOKENS = 128
# One more step costs a quarter, at most, of what part of a prompt takes that is worth one of its own: so many ridges.
WORTH_A_STEP = 4
# Rows of a step, at most, behind which log-probabilities of prompts are wanted: each has a float32 for each token of
# the vocabulary, 310 MB for 512 rows of 150,000. For so many tokens it is worth reading the weights (decisions/0066).
LOGPROB_ROWS = 512
# When so many wait for it, the step is not filled up: to look at all who wait would take longer than that saves.
MOST_PASSED = 16


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part of a step: its tokens from `start`, and drafts of what follows them."""

    sequence: Sequence
    start: int
    num_tokens: int
    num_drafts: int = 0

    @property
    def end(self) -> int:
        """Behind the tokens, before the drafts."""
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether a token is chosen behind it."""
        return self.end == self.sequence.length

    @property
    def is_decode(self) -> bool:
        """Whether it computes the token that was chosen last, and none of a prompt."""
        return self.num_tokens == 1


class Scheduler:
    """Sequences that run, sequences that wait, both in order of rank; for one thread.

    There are no modes: a step is "sequence → number of tokens" under one budget. A sequence has pages for all its
    tokens when it starts, and grows page by page as it generates. When pages run out, the youngest ones lose theirs and
    wait to be computed again, mostly from the cache. Prefill-only sequences never grow, and never lose pages while they
    run.

    Prompts of resumed sequences, whose clients wait amid an answer, go before all others, also before those that have
    begun, and their steps are not filled up with others, which would only make them longer. Of those that come together
    when a worker is lost the shortest go first, and one that would more than double a step is left out of it, once:
    many that have little to compute do not wait for one that has much.

    Where nobody generates a prompt that ends in a step is not held up by part of one that does not: the step is not
    filled up with that, if the part is worth a step of its own (decisions/0055).

    Prompts whose log-probabilities are wanted have LOGPROB_ROWS of a step, all together; what they leave of the budget
    is for others.

    A prompt that begins as another one of the same step waits for that step, and finds it cached: computed together,
    the beginning would be computed twice, and both of them, and all others in the step, would wait for it.

    Nobody starves: ranks are fixed at arrival, the head of the queue is never overtaken by those who need pages, and of
    those who run, the first by rank always makes progress.

    Ahead of a step that is still computed, the next one is planned as if its tokens were there. Nobody loses pages
    then: they may still be written to.

    Drafts are verified with what is left: of the budget behind all tokens, of the pages behind all who grow, and not at
    all while somebody waits. An executor that proposes drafts may want room for `num_ahead` of them in turn.
    """

    def __init__(
        self, kv: KvStore, max_step_tokens: int, max_num_sequences: int, num_ahead: int = 0, ridge_tokens: int = 1
    ) -> None:
        """For `ridge_tokens` see `EngineSpec`. Raises ValueError for more sequences than a step has tokens."""
        if not 1 <= max_num_sequences <= max_step_tokens:
            raise ValueError(f"{max_num_sequences} sequences cannot share a budget of {max_step_tokens} tokens a step")
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._kv = kv
        self._max_step_tokens = max_step_tokens
        self._max_num_sequences = max_num_sequences
        self._num_ahead = num_ahead
        self._worth_a_step = WORTH_A_STEP * ridge_tokens
        self._short = False
        self._stalled_at: int | None = None
        self._left_out: set[tuple[float, int]] = set()  # ranks of resumed ones that had no part in the last step
        self._computing: set[bytes] = set()  # hashes of the pages that steps in flight compute, and this one

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        if sequence.num_uncomputed < 1 or (sequence.tells and sequence.num_computed > sequence.num_reusable):
            self._kv.shrink(sequence.table, sequence.num_reusable)
        insort(self.waiting, sequence, key=RANK)
        self._stalled_at = None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its pages stay with it."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._stalled_at = None

    @property
    def is_short(self) -> bool:
        """Whether a sequence went without pages when the last step was planned. Newcomers should leave it what is
        freed next."""
        return self._short and bool(self.running or self.waiting)

    @property
    def is_pressed(self) -> bool:
        """Whether somebody waits or lacks pages: then time and pages are not for drafts."""
        return self._short or bool(self.waiting)

    def has_work(self) -> bool:
        """Whether `schedule` might plan anything: not if it could not, and no page was freed since."""
        if not (self.running or self.waiting):
            return False
        return self._stalled_at is None or self._stalled_at != self._kv.num_freed()

    def schedule(self, *, ahead: bool = False) -> list[Part]:
        """Plan a step: those that generate first, then prompts in order of rank, as far as the budget goes. `ahead` of
        one in flight nothing is planned if somebody would have to give pages for it, or has drafts from the text: they
        can be verified once it is known what they are to follow. The executor's own are awaited like tokens."""
        num_freed, self._short = self._kv.num_freed(), False
        self._computing = self._computing if ahead else set()
        self._start_computed()
        generating = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        decoding = [sequence for sequence in generating if not sequence.awaits_its_last] if ahead else generating
        if ahead and not self._can_go_on(decoding):
            return []
        parts = [_part(sequence, 1) for sequence in decoding if self._grow(sequence)]
        budget, num_rows, ends = self._max_step_tokens - len(parts), LOGPROB_ROWS, False
        for sequence in self._prompts():
            if ends and not decoding and self._worth_a_step <= budget < sequence.num_uncomputed:
                break
            part = _part(sequence, budget, num_rows)
            if not part.num_tokens:
                continue
            parts.append(part)
            num_rows -= len(sequence.logprob_rows(part.start, part.end))
            self._computing.update(sequence.hashes[part.start // self._kv.page_size : part.end // self._kv.page_size])
            budget -= part.num_tokens
            ends |= part.is_last
            if not budget:
                break
        self._left_out = {sequence.rank for sequence in self.waiting if sequence.request.resumed}
        self._stalled_at = None if parts or ahead else num_freed
        return parts if self.is_pressed else self._with_drafts(parts, budget)

    def _can_go_on(self, decoding: list[Sequence]) -> bool:
        """Whether sequences whose next token is awaited need nothing but pages that are free."""
        if not self._num_ahead and any(sequence.drafts for sequence in decoding):
            return False
        growing = [sequence for sequence in decoding if sequence.num_pages_missing]
        self._short = not all(self._kv.extend(sequence.table, sequence.num_pages_missing) for sequence in growing)
        return not self._short

    def _with_drafts(self, parts: list[Part], budget: int) -> list[Part]:
        drafted = []
        for part in parts:
            num_drafts = self._num_verifiable(part.sequence, budget) if part.is_last else 0
            drafted.append(replace(part, num_drafts=num_drafts) if num_drafts else part)
            budget -= num_drafts
        return drafted

    def _num_verifiable(self, sequence: Sequence, budget: int) -> int:
        """As many of a sequence's drafts as budget and pages have room for, once everybody else could grow."""
        num_drafts, table = min(sequence.num_draftable, budget), sequence.table
        if not num_drafts + self._num_ahead:
            return 0
        end = sequence.longest + num_drafts
        for num_tokens in (min(end + self._num_ahead, sequence.limits.max_len), end):
            num_pages = max(0, -(-num_tokens // self._kv.page_size) - len(table.page_ids))
            if self._kv.extend(table, num_pages, num_spare=len(self.running)):
                break
        return min(num_drafts, len(table.page_ids) * self._kv.page_size - sequence.longest)

    def _prompts(self) -> Iterator[Sequence]:
        """Prompts that may have a part in the step, in order; the resumed ones alone if there are any."""
        begun = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        resumed = [sequence for sequence in begun if sequence.request.resumed]
        yield from resumed
        num_tokens = sum(sequence.num_uncomputed for sequence in resumed)
        while sequence := self._start_next(self._resumed(max(STEP_TOKENS, num_tokens) if num_tokens else math.inf)):
            num_tokens += sequence.num_uncomputed
            yield sequence
        if num_tokens:
            return
        yield from begun
        while sequence := self._start_next(self.waiting):
            yield sequence

    def _start_computed(self) -> None:
        """Those whose prompt is computed, by another worker that is, generate from now on: their clients have the first
        token, and behind the prompts that run here they would wait for all of these. They take neither pages nor
        places from who waits longer."""
        if len(self.running) + len(self.waiting) <= self._max_num_sequences:
            for sequence in [each for each in self.waiting if each.num_uncomputed == 1]:
                if not sequence.num_pages_missing:
                    self._start(sequence)

    def _resumed(self, most_tokens: float) -> list[Sequence]:
        """Resumed ones that are ahead of all others and may join a step, the shortest first. Those that lack pages stay
        in order, behind."""
        ahead = list(takewhile(lambda each: each.request.resumed, self.waiting))
        ready = sorted((each for each in ahead if not each.num_pages_missing), key=self._turn)
        lacking = (each for each in ahead if each.num_pages_missing)
        return [
            each
            for in_turn in (ready, lacking)
            for each in takewhile(lambda one: self._turn(one)[1] <= most_tokens, in_turn)
        ]

    def _turn(self, resumed: Sequence) -> tuple[bool, int]:
        """Behind those that were left out before, which count for nothing."""
        was_left_out = resumed.rank in self._left_out
        return not was_left_out, 0 if was_left_out else resumed.num_uncomputed

    def _start_next(self, candidates: list[Sequence]) -> Sequence | None:
        """Start the first sequence that can. Past one that lacks pages, or would if it did not wait for another one's,
        only those go that have all of theirs already: they take nothing from it, and give theirs back the sooner."""
        if len(self.running) >= self._max_num_sequences:
            return None
        lacks, num_passed = False, 0
        for sequence in candidates:
            if self._is_computed_meanwhile(sequence):
                lacks |= bool(sequence.num_pages_missing)
                num_passed += 1
                if num_passed == MOST_PASSED:
                    break
            elif not sequence.num_pages_missing or (not (lacks or self._short) and self._acquire(sequence)):
                self._start(sequence)
                return sequence
            else:
                self._short = True
        return None

    def _is_computed_meanwhile(self, sequence: Sequence) -> bool:
        """Whether enough of what a sequence lacks of its prompt is computed for others in this step."""
        if sequence.started or not self._computing:
            return False
        hashes, page_size = sequence.reusable_hashes, self._kv.page_size
        first = max(sequence.num_computed // page_size, self._kv.match(hashes))
        return page_size * sum(1 for _ in takewhile(self._computing.__contains__, hashes[first:])) >= STEP_TOKENS

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=RANK)
        if not sequence.started:
            self._kv.adopt(sequence.table, sequence.reusable_hashes)
        sequence.start()

    def _grow(self, sequence: Sequence) -> bool:
        """Get a running sequence its next page, if it is at the end of its last one."""
        if not sequence.table.page_ids:
            return False  # preempted a moment ago, by an older one of this step
        while (num_missing := sequence.num_pages_missing) and not self._kv.extend(sequence.table, num_missing):
            growing = [each for each in self.running if not each.request.prefill_only]
            if not self._preempt_younger(sequence, growing + self.waiting):
                self._short = True
                return False
        return True

    def _acquire(self, sequence: Sequence) -> bool:
        """Get a waiting sequence all its pages. If nobody runs who would free some, those behind it give theirs."""
        while not self._hold(sequence):
            if self.running or not self._preempt_younger(sequence, self.waiting):
                return False
        return True

    def _hold(self, sequence: Sequence) -> bool:
        if sequence.table.page_ids:
            return self._kv.extend(sequence.table, sequence.num_pages_missing)
        # Who runs may soon need a page more: without room for that, the newcomer would be the first to be preempted.
        hashes, num_missing = sequence.reusable_hashes, sequence.num_pages_missing
        table = self._kv.reserve(hashes, num_missing, len(self.running))
        if table is None:  # only then does it matter who of them will: all are looked at, for each newcomer
            num_spare = sum(not each.request.prefill_only for each in self.running)
            table = self._kv.reserve(hashes, num_missing, num_spare)
        if table is not None:
            sequence.table = table
        return table is not None

    def _preempt_younger(self, sequence: Sequence, candidates: list[Sequence]) -> bool:
        """Take the pages of the youngest candidate behind this sequence; False if none has any."""
        younger = [each for each in candidates if each.table.page_ids and each.rank > sequence.rank]
        if not younger:
            return False
        victim = max(younger, key=RANK)
        self._kv.drop(victim.table)
        victim.num_published = 0
        self.num_preemptions += 1
        if victim in self.running:
            self.running.remove(victim)
            insort(self.waiting, victim, key=RANK)
        return True


def _part(sequence: Sequence, budget: int, num_rows: int = LOGPROB_ROWS) -> Part:
    """As much of a sequence as budget and rows of logits allow."""
    start, num_tokens = sequence.num_computed, min(sequence.num_uncomputed, budget)
    if sequence.tells:
        rows = sequence.logprob_rows(start, start + num_tokens)
        if len(rows) > num_rows:
            num_tokens = rows.start + num_rows - start
    return Part(sequence, start, num_tokens)
