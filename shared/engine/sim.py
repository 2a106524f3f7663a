"""An executor without a model, whose pages and tokens obey laws that show every mistake of the machinery around it.

    state[t] = sum over i <= t of mix(token[i], i)              64 bits, wrapping
    page words of token t = state[t], mix(state[t], 1), mix(state[t], 2) …
    token after t = mix(state[t], seed, t) mod vocabulary       seed 0 if the temperature is 0
    draft of it   = the same, or where mix(state[t], …) says so, the token beside it

So every byte of a page depends on all tokens up to it, and on their positions. A step goes on from the state that it
finds in the pages, and checks the bytes of its context: a page that was lost, mixed up, overwritten or half transferred
is an error, loud and at once. Sampling parameters that shape probabilities have no meaning here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import log

import numpy as np
from numpy.typing import NDArray

from shared.engine.api import BatchItem, Chosen, Computed, EngineSpec, Recorded, SampledToken
from shared.engine.kv.layout import KvLayout, compatibility_hash, pack
from shared.engine.kv.memory import HostMemory
from shared.engine.speculation.verify import verified
from shared.engine.splitmix import GOLDEN, Words, mix, mix_words

Ints = NDArray[np.int64]

WORD_BYTES = 8


class WrongPages(Exception):
    """The bytes of a page are not those of the tokens it is said to hold."""


@dataclass(frozen=True, slots=True)
class SimModel:
    """What is simulated.

    A step takes `prefill_ms_per_token` for each token of a prompt and for each draft; one in which sequences generate
    also takes `decode_ms`, and `decode_ms_per_sequence` for each of them. With a `draft_acceptance` above 0 drafts are
    proposed, each right with this probability.
    """

    name: str = "sim"
    vocab_size: int = 32_000
    max_model_len: int = 131_072
    eos_token_ids: tuple[int, ...] = (2,)
    page_size: int = 16
    words_per_token: int = 8
    prefill_ms_per_token: float = 0.05
    decode_ms: float = 5.0
    decode_ms_per_sequence: float = 0.1
    draft_acceptance: float = 0.0

    @property
    def layout(self) -> KvLayout:
        """One state class, `words`."""
        return pack(self.page_size, {"words": (1, "uint64", self.page_size * self.words_per_token * WORD_BYTES)})

    def step_ms(self, batch: Sequence[BatchItem]) -> float:
        """Time of a step."""
        num_decodes = sum(item.position == item.start + 1 for item in batch)
        num_others = sum(len(item.token_ids) for item in batch) - num_decodes
        decode_ms = self.decode_ms + num_decodes * self.decode_ms_per_sequence
        return num_others * self.prefill_ms_per_token + (decode_ms if num_decodes else 0.0)


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a step that are checked or written, all S items laid end to end: N rows."""

    items: Ints  # [N], whose row it is
    positions: Ints  # [N]
    tokens: Words  # [N]
    pages: Ints  # [N]
    slots: Ints  # [N], places within the pages
    is_new: NDArray[np.bool_]  # [N], to be written; the others are context
    ends: Ints  # [S], where the rows of each item end
    pages_before: Ints  # [S], the page before the first row of each item, -1 if there is none


class SimExecutor:
    """Satisfies `shared.engine.api.Executor`. `sleep` takes seconds, and lets tests take none."""

    runs_behind = False
    recorded: Recorded | None = None

    def __init__(
        self,
        model: SimModel,
        num_pages: int,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        layout = model.layout
        self.spec = EngineSpec(
            model=model.name,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.eos_token_ids,
            layout=layout,
            num_pages=num_pages,
            compatibility_hash=compatibility_hash(model.name, "sim", "", layout),
        )
        self.memory = HostMemory(num_pages, layout.page_bytes)
        self._model = model
        self._sleep = sleep
        self._clock = clock
        self._late_s = 0.0
        """What the last step slept too long: the next one sleeps as much less, so that on average they are right."""
        self._salts = np.arange(model.words_per_token, dtype=np.uint64)
        token_bytes = model.words_per_token * WORD_BYTES
        self._words: Words = np.ndarray(  # [pages, page_size, words_per_token]
            (num_pages, model.page_size, model.words_per_token),
            np.uint64,
            self.memory.buffer,
            strides=(layout.page_bytes, token_bytes, WORD_BYTES),
        )

    @property
    def proposes(self) -> bool:
        """Whether steps have drafts where they are wanted."""
        return self._model.draft_acceptance > 0

    def launch(self, batch: Sequence[BatchItem]) -> Computed:
        """Compute a step, at once."""
        return Computed(self.forward(batch))

    def forward(self, batch: Sequence[BatchItem]) -> list[Chosen | None]:
        """Write the words of every item's tokens into its pages; return what is chosen for each item with `sample`.

        Raises WrongPages if a page does not hold what the item says was computed before.
        """
        due = self._clock() + self._model.step_ms(batch) / 1000 - self._late_s
        states = self._compute(batch)
        chosen = [self._chosen(item, own) if item.sample else None for item, own in zip(batch, states, strict=True)]
        self._late_s = 0.0
        if (pause_s := due - self._clock()) > 0:
            self._sleep(pause_s)
            self._late_s = max(0.0, self._clock() - due)
        return chosen

    def _compute(self, batch: Sequence[BatchItem]) -> list[list[int]]:
        """Check the context of every item, and write its new tokens; the states after which it may choose a token."""
        rows = _lay_out(batch, [self._first_row(item) for item in batch], self._model.page_size)
        sums = np.cumsum(
            mix_words(mix_words(rows.tokens + np.uint64(1)) + rows.positions.astype(np.uint64) * np.uint64(GOLDEN)),
            dtype=np.uint64,
        )
        sums_before = np.concatenate([np.zeros(1, np.uint64), sums[rows.ends[:-1] - 1]])
        states = sums + (self._states_before(rows) - sums_before)[rows.items]
        words = self._expand(states)

        found = self._words[rows.pages, rows.slots]
        wrong = np.nonzero(~rows.is_new & (found != words).any(axis=1))[0]
        if wrong.size:
            name, position = batch[rows.items[wrong[0]]].request_id, rows.positions[wrong[0]]
            raise WrongPages(f"{name}: page {rows.pages[wrong[0]]} does not hold token {position} of the sequence")
        self._words[rows.pages[rows.is_new], rows.slots[rows.is_new]] = words[rows.is_new]
        return [states[end - 1 - item.num_drafts : end].tolist() for item, end in zip(batch, rows.ends, strict=True)]

    def _first_row(self, item: BatchItem) -> int:
        """From where the context of an item is checked: all of it at the beginning of each page and of each part of a
        prompt, its last page only in between. So every wrong byte is found within a page of tokens, and long contexts
        stay cheap."""
        page_size = self._model.page_size
        whole = item.position > item.start + 1 or (_end(item) - 1) // page_size != (item.start - 1) // page_size
        return 0 if whole else item.start // page_size * page_size

    def _states_before(self, rows: Rows) -> Words:
        """The state [S] before the first row of each item, as its pages have it."""
        return np.where(rows.pages_before < 0, np.uint64(0), self._words[rows.pages_before, -1, 0])

    def _expand(self, states: Words) -> Words:
        """Page words [tokens, words_per_token] of states [tokens]."""
        words = mix_words(states[:, None] + self._salts * np.uint64(GOLDEN))
        words[:, 0] = states
        return words

    def _chosen(self, item: BatchItem, states: Sequence[int]) -> Chosen:
        """What the item's tokens are followed by; `states` after the last of them, and after each draft."""
        tokens = verified(item, lambda row, view: self._choose(states[row], view))
        num_wanted = item.num_wanted if self.proposes else 0
        state, position = states[len(tokens) - 1], item.position + len(tokens) - 1
        return Chosen(tokens, tuple(self._drafts(item, state, position, tokens[-1].token_id, num_wanted)))

    def _drafts(self, item: BatchItem, state: int, position: int, token: int, count: int) -> Iterator[int]:
        """Drafts of what follows `token` at `position`, where the state was `state`."""
        for at in range(position, position + count):
            state = (state + _after(token, at)) % 2**64
            token = self._draw(item, state, at + 1)
            if mix(state ^ GOLDEN) >= self._model.draft_acceptance * 2**64:
                token = (token + 1) % self._model.vocab_size
            yield token

    def _draw(self, item: BatchItem, state: int, position: int) -> int:
        seed = item.sampling.seed + 1 if item.sampling.temperature else 0
        return mix(state ^ (seed * GOLDEN + position) % 2**64) % self._model.vocab_size

    def _choose(self, state: int, item: BatchItem) -> SampledToken:
        sampling, token = item.sampling, self._draw(item, state, item.position)
        if item.position - item.output_start < sampling.min_tokens:
            stops = {*self._model.eos_token_ids, *sampling.stop_token_ids}
            token = next(other for other in self._from(token) if other not in stops)
        if sampling.num_logprobs is None:
            return SampledToken(token)
        top = zip(self._from(token), range(1, sampling.num_logprobs + 1), strict=False)
        return SampledToken(token, log(0.5), tuple((other, place * log(0.5)) for other, place in top))

    def _from(self, token: int) -> Iterator[int]:
        """The whole vocabulary, beginning with this token."""
        return (other % self._model.vocab_size for other in range(token, token + self._model.vocab_size))


def _end(item: BatchItem) -> int:
    return item.start + len(item.token_ids)


def _lay_out(batch: Sequence[BatchItem], firsts: Sequence[int], page_size: int) -> Rows:
    """Rows of each item from its `first`, which is where a page begins."""
    lengths = np.array([_end(item) - first for item, first in zip(batch, firsts, strict=True)])
    ends = np.cumsum(lengths)
    items = np.repeat(np.arange(len(batch)), lengths)
    positions = np.arange(len(items)) - (ends - lengths - np.array(firsts))[items]
    tables = np.cumsum([0, *(len(item.page_ids) for item in batch[:-1])])
    history = [(*item.history[first : item.start], *item.token_ids) for item, first in zip(batch, firsts, strict=True)]
    return Rows(
        items=items,
        positions=positions,
        tokens=np.array(list(chain.from_iterable(history)), np.uint64),
        pages=np.array(list(chain.from_iterable(item.page_ids for item in batch)))[
            tables[items] + positions // page_size
        ],
        slots=positions % page_size,
        is_new=positions >= np.array([item.start for item in batch])[items],
        ends=ends,
        pages_before=np.array(
            [item.page_ids[first // page_size - 1] if first else -1 for item, first in zip(batch, firsts, strict=True)]
        ),
    )


def _after(token: int, position: int) -> int:
    """What a token adds to the state."""
    return mix((mix(token + 1) + position * GOLDEN) % 2**64)
