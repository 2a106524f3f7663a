"""A request while the engine has it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.engine.api import NO_ROWS, BatchItem, EngineRequest, FinishReason, SampledToken, awaited
from shared.engine.grammars import Matcher
from shared.engine.kv.store import PageTable
from shared.engine.speculation.acceptance import Acceptance
from shared.engine.speculation.proposer import Proposer
from shared.page_hash import chain


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a sequence besides its own parameters.

    `max_len` counts prompt and output: what the model's context, and the whole pool, can hold.
    """

    page_size: int
    max_len: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sequence ended; `stop_token` is the one that did it, if one did."""

    reason: FinishReason
    stop_token: SampledToken | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and the pages that hold the KV of the first `num_computed` of them.

    `rank` orders sequences: lower runs first. `drafts` may follow `tokens`. There are never more than `most` tokens.
    Only the engine's thread changes a sequence, but for `cancelled`.

    Steps in flight choose `num_awaited` tokens more, one each, and `table` is as it will be when those steps are done.
    The last of them chooses in its `place`-th of `num_places` places, and leaves `num_proposed` drafts for the next.
    Up to `num_in_doubt` drafts may turn out right there, each of which is one more token, computed already.

    Nothing more is to be told of the first `num_told` tokens of the prompt: their log-probabilities are known to who
    wants them, if anybody does.
    """

    request: EngineRequest
    limits: Limits
    rank: tuple[float, int]
    table: PageTable
    tokens: list[int] = field(init=False)
    hashes: list[bytes] = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)
    most: int = field(init=False)
    num_cached_tokens: int = 0
    num_published: int = 0
    num_announced: int = 0
    num_told: int = field(init=False)
    num_awaited: int = 0
    place: int = 0
    num_places: int = 0
    num_proposed: int = 0
    num_in_doubt: int = 0
    started: bool = False
    cancelled: bool = False
    ended: bool = False
    drafts: list[int] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    proposer: Proposer | None = None
    matcher: Matcher | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)
        self.hashes = list(self.request.page_hashes)
        self._name_pages(len(self.tokens) // self.limits.page_size)
        eos = () if self.request.sampling.ignore_eos else self.limits.eos_token_ids
        self.stop_token_ids = frozenset((*self.request.sampling.stop_token_ids, *eos))
        num_prompt_tokens = len(self.request.prompt_token_ids)
        self.most = min(num_prompt_tokens + self.request.sampling.max_tokens, self.limits.max_len)
        wanted = self.request.sampling.num_prompt_logprobs is not None  # of the first token nobody knows anything
        self.num_told = max(1, self.request.num_prompt_logprobs_held) if wanted else num_prompt_tokens

    @property
    def length(self) -> int:
        """Tokens, those that are awaited included: at least so many."""
        return len(self.tokens) + self.num_awaited

    @property
    def longest(self) -> int:
        """Tokens, should all drafts be right that are in doubt."""
        num_tokens = len(self.tokens)
        return num_tokens + self.num_awaited + self.num_in_doubt if self.num_awaited else num_tokens

    @property
    def num_computed(self) -> int:
        """Leading tokens whose KV is in the pages."""
        return self.table.num_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to compute before the next one can be chosen; 1 while decoding."""
        return len(self.tokens) + self.num_awaited - self.table.num_tokens

    @property
    def num_output(self) -> int:
        """Output tokens, those of an earlier worker included."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def num_pages_missing(self) -> int:
        """Pages to hold before all tokens have room."""
        return max(0, -(-self.longest // self.limits.page_size) - len(self.table.page_ids))

    @property
    def num_draftable(self) -> int:
        """Drafts that may be verified: if all are right, the token behind them is the last one there is room for.
        Behind a step in flight those that it proposes."""
        if self.request.prefill_only:
            return 0
        num_drafts = self.num_proposed if self.num_awaited else len(self.drafts)
        return max(0, min(num_drafts, self.most - self.length - 1, self.limits.max_len - self.longest - 1))

    @property
    def num_reusable(self) -> int:
        """Tokens whose KV may come from a cache: whole pages, but never the last token, whose logits are needed. Its
        page is computed into a page of the sequence's own, so that a shared one is never written. No cache has the
        logits of a token either, behind which the log-probability of the next one is wanted."""
        num_tokens = min(len(self.tokens), self.num_told) if self.tells else len(self.tokens)
        return (num_tokens - 1) // self.limits.page_size * self.limits.page_size

    @property
    def tells(self) -> bool:
        """Whether log-probabilities of the prompt are still wanted."""
        return self.num_told < len(self.request.prompt_token_ids)

    def logprob_rows(self, start: int, end: int) -> range:
        """The positions of a part behind which the log-probability of the next token of the prompt is wanted."""
        if not self.tells:
            return NO_ROWS
        first = max(start, self.num_told - 1)
        return range(first, max(first, min(end, len(self.request.prompt_token_ids) - 1)))

    @property
    def reusable_hashes(self) -> list[bytes]:
        """Hashes of the pages that may come from a cache."""
        return self.hashes[: self.num_reusable // self.limits.page_size]

    def start(self) -> None:
        """The sequence runs from now on. What it is said to have found cached is what it found the first time."""
        if not self.started:
            self.num_cached_tokens = min(self.num_computed, len(self.request.prompt_token_ids))
        self.started = True

    def part(self, start: int, num_tokens: int, num_drafts: int = 0, num_wanted: int = 0) -> BatchItem:
        """The item of a step that computes `num_tokens` tokens from `start`, and drafts behind them. It wants no
        more drafts of the executor than the pages have room for. It shows the live lists, uncopied: they do not change
        before the step is launched."""
        end = start + num_tokens
        token_ids, num_in_doubt = self.tokens[start:end], 0
        if not token_ids:
            num_in_doubt = self.num_in_doubt
            token_ids = [awaited(self.place + number * self.num_places) for number in range(1 + num_drafts)]
        elif num_drafts:
            token_ids += self.drafts[:num_drafts]
        if num_wanted and self.proposer is None:  # the last draft is not computed in the step that proposes it
            num_free = len(self.table.page_ids) * self.limits.page_size - end - num_drafts - num_in_doubt
            num_wanted = max(0, min(num_wanted, num_free + 1))
        return BatchItem(
            request_id=self.request.request_id,
            token_ids=token_ids,
            start=start,
            page_ids=self.table.page_ids,
            sample=end == self.length,
            sampling=self.request.sampling,
            output_start=len(self.request.prompt_token_ids),
            history=self.tokens,
            num_drafts=num_drafts,
            num_wanted=num_wanted,
            hands_over=self.request.prefill_only,
            following=self.tokens[end] if end < len(self.tokens) else None,
            allowed=self.matcher.allowed(self.drafts[:num_drafts]) if self.matcher and end == self.length else (),
            num_in_doubt=num_in_doubt,
            logprob_rows=self.logprob_rows(start, end),
        )

    def launch(self, end: int, item: BatchItem, place: int, num_places: int, num_proposed: int) -> None:
        """A step was launched with this part, which computes the tokens up to `end`. If they are all, it chooses the
        next one in one of its places, and proposes drafts of what follows."""
        self.table.num_tokens = end
        if item.sample:
            self.num_awaited += 1
            self.place, self.num_places = place, num_places
            self.num_in_doubt, self.num_proposed = item.num_drafts, num_proposed

    def unpublished(self, num_computed: int) -> tuple[int, list[bytes]]:
        """Full pages of the first `num_computed` tokens, which are known, that were not made findable yet: index of the
        first one, and their hashes."""
        first, page_size = self.num_published, self.limits.page_size
        self.num_published = num_computed // page_size
        self._name_pages(self.num_published)
        return first, self.hashes[first : self.num_published]

    def _name_pages(self, num_pages: int) -> None:
        """Know the hashes of the first pages, which are full."""
        known, page_size = len(self.hashes), self.limits.page_size
        if known < num_pages:
            tail = self.tokens[known * page_size : num_pages * page_size]
            parent = self.hashes[-1] if self.hashes else b""
            self.hashes += chain(self.request.hash_key, tail, page_size, parent)

    def unannounced(self, num_computed: int) -> tuple[int, list[int]]:
        """Pages of the first `num_computed` tokens that no event has named yet: index of the first one, and their ids.
        The partly filled last page comes with the last token."""
        first, page_size = self.num_announced, self.limits.page_size
        is_all = num_computed == len(self.tokens)
        self.num_announced = -(-num_computed // page_size) if is_all else num_computed // page_size
        return first, self.table.page_ids[first : self.num_announced]

    def append(self, chosen: Iterable[SampledToken]) -> tuple[list[SampledToken], Ending | None]:
        """Take the tokens in that a step chose, until one ends the sequence: those that were emitted, and how it ended,
        if it did. No stop token is ever chosen before `min_tokens` are there: that is the executor's part."""
        self.num_awaited -= 1
        emitted: list[SampledToken] = []
        if self.is_full:  # only the prompt was to be computed
            return emitted, Ending(FinishReason.LENGTH)
        for token in chosen:
            if token.token_id in self.stop_token_ids:
                return emitted, Ending(FinishReason.STOP, token)
            self.tokens.append(token.token_id)
            emitted.append(token)
            if self.matcher is not None:
                self.matcher.advance([token.token_id])
            if self.is_full:
                return emitted, Ending(FinishReason.LENGTH)
        return emitted, None

    @property
    def is_full(self) -> bool:
        """Whether the output or the context has no room for another token."""
        return len(self.tokens) >= self.most

    @property
    def awaits_its_last(self) -> bool:
        """Whether the token that is awaited ends the sequence, whichever it is: nothing is to be computed behind it."""
        return self.num_awaited > 0 and (self.request.prefill_only or self.length >= self.most)
