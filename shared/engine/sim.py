"""An executor without a model, whose pages and tokens obey laws that show every mistake of the machinery around it.

    state[t] = sum over i <= t of mix(token[i], i)              64 bits, wrapping
    page words of token t = state[t], state[t] xor salt[1], state[t] xor salt[2] …
    token after t = mix(state[t], seed, t) mod vocabulary       seed 0 if the temperature is 0
    draft of it   = the same, or where mix(state[t], …) says so, the token beside it
    rank of x     = 1 + how far x is behind that token, without a seed, around the vocabulary; probability 1 / 2 ** rank

So every byte of a page depends on all tokens up to it, and on their positions. A step goes on from the state that it
finds in the pages, and checks the bytes of its context: a page that was lost, mixed up, overwritten or half transferred
is an error, loud and at once. Sampling parameters that shape probabilities have no meaning here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np
from numpy.typing import NDArray

from shared.engine.api import BatchItem, Chosen, Computed, EngineSpec, Recorded, SampledToken, TokenLogprobs
from shared.engine.kv.layout import KvLayout, compatibility_hash, pack
from shared.engine.kv.memory import HostMemory
from shared.engine.speculation.verify import verified
from shared.engine.splitmix import GOLDEN, Words, mix, mix_words

Ints = NDArray[np.int64]

WORD_BYTES = 8
# Of a token and of its position in `mix`: odd, so that no two tokens, nor two positions, are the same there.
OF_TOKEN, OF_POSITION = 0xAF251AF3B0F025B5, GOLDEN
_OF_TOKEN, _OF_POSITION = np.uint64(OF_TOKEN), np.uint64(OF_POSITION)


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
    """The tokens of a step that are checked or written: the P pages that they are in, those of all items one behind the
    other, each with a row for each of its T tokens. Rows behind an item's last token mean nothing."""

    pages: Ints  # [P]
    tokens: Words  # [P, T]
    positions: Ints  # [P, T]
    is_new: NDArray[np.bool_]  # [P, T], to be written
    is_context: NDArray[np.bool_]  # [P, T], to be checked
    firsts: Ints  # [P], the first page of the same item
    before: Ints  # [P], the page before that one, -1 if there is none
    lasts: list[int]  # [S], the row behind each item's last, of all P * T


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
        self._salts = mix_words(np.arange(model.words_per_token, dtype=np.uint64))  # the first is 0
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
        chosen = [self._found(item, own) for item, own in zip(batch, states, strict=True)]
        self._late_s = 0.0
        if (pause_s := due - self._clock()) > 0:
            self._sleep(pause_s)
            self._late_s = max(0.0, self._clock() - due)
        return chosen

    def _compute(self, batch: Sequence[BatchItem]) -> list[list[int]]:
        """Check the context of every item, and write its new tokens; the states after its last ones, as many as it has
        a use for."""
        rows = _lay_out(batch, [self._first_row(item) for item in batch], self._model.page_size)
        states = rows.tokens * _OF_TOKEN
        states += rows.positions.view(np.uint64) * _OF_POSITION
        np.cumsum(mix_words(states), axis=1, out=states)
        states += self._states_before(rows, states[:, -1])[:, None]
        words = states[..., None] ^ self._salts

        wrong = self._words[rows.pages] != words
        wrong &= rows.is_context[..., None]
        if wrong.any():
            raise WrongPages(_difference(batch, rows, wrong.any(axis=2)))
        page, slot = rows.is_new.nonzero()
        self._words[rows.pages[page], slot] = words[page, slot]
        flat = states.reshape(-1)
        return [flat[last - _num_states(item) : last].tolist() for item, last in zip(batch, rows.lasts, strict=True)]

    def _first_row(self, item: BatchItem) -> int:
        """From where the context of an item is checked: all of it at the beginning of each page and of each part of a
        prompt, its last page only in between. So every wrong byte is found within a page of tokens, and long contexts
        stay cheap."""
        page_size = self._model.page_size
        whole = item.position > item.start + 1 or (_end(item) - 1) // page_size != (item.start - 1) // page_size
        return 0 if whole else item.start // page_size * page_size

    def _states_before(self, rows: Rows, sums: Words) -> Words:
        """The state [P] before the first row of each page: what the page before the item's first one has, and the sums
        [P] of its pages in between."""
        ends = np.cumsum(sums, dtype=np.uint64) - sums
        states: Words = self._words[rows.before, -1, 0]
        states[rows.before < 0] = 0
        states += ends
        states -= ends[rows.firsts]
        return states

    def _found(self, item: BatchItem, states: Sequence[int]) -> Chosen | None:
        """What is asked of an item; `states` after the last of its tokens."""
        chosen = self._chosen(item, states[-1 - item.num_drafts :]) if item.sample else None
        if not item.logprob_rows:
            return chosen
        pairs = zip(states, item.logprob_rows, item.told, strict=False)
        told = tuple(self._told(item.sampling.num_prompt_logprobs or 0, *pair) for pair in pairs)
        return replace(chosen or Chosen(()), prompt_logprobs=told)

    def _told(self, num_top: int, state: int, position: int, token: int) -> TokenLogprobs:
        """Of a token of a prompt behind this position."""
        likeliest = mix(state ^ position + 1) % self._model.vocab_size
        rank = 1 + (token - likeliest) % self._model.vocab_size
        return TokenLogprobs(rank * log(0.5), rank, self._top(likeliest, num_top))

    def _chosen(self, item: BatchItem, states: Sequence[int]) -> Chosen:
        """What the item's tokens are followed by; `states` after the last of them, and after each draft."""
        if not (item.num_drafts or self.proposes):
            return Chosen((self._choose(states[0], item),))
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
        stops = self._model.eos_token_ids + sampling.stop_token_ids
        if token in stops and item.position - item.output_start < sampling.min_tokens:
            token = next(other for other in self._from(token) if other not in stops)
        if sampling.num_logprobs is None:
            return SampledToken(token)
        return SampledToken(token, log(0.5), self._top(token, sampling.num_logprobs))

    def _top(self, likeliest: int, count: int) -> tuple[tuple[int, float], ...]:
        """The most likely tokens."""
        top = zip(self._from(likeliest), range(1, count + 1), strict=False)
        return tuple((other, place * log(0.5)) for other, place in top)

    def _from(self, token: int) -> Iterator[int]:
        """The whole vocabulary, beginning with this token."""
        return (other % self._model.vocab_size for other in range(token, token + self._model.vocab_size))


def _num_states(item: BatchItem) -> int:
    """That of its last token and its drafts, or those from the first row on that is told of."""
    return _end(item) - item.logprob_rows.start if item.logprob_rows else 1 + item.num_drafts


def _end(item: BatchItem) -> int:
    return item.start + len(item.token_ids)


def _lay_out(batch: Sequence[BatchItem], firsts: Sequence[int], page_size: int) -> Rows:
    """Rows of each item from its `first`, which is where a page begins.

    By lists, which are made into arrays at the end: most steps have few rows, and each call of numpy costs as much as
    dozens of them."""
    pages, tokens, begins, facts, lasts = list[int](), list[int](), list[int](), list[int](), list[int]()
    for item, first in zip(batch, firsts, strict=True):
        page, end = len(pages), _end(item)
        pages += item.page_ids[first // page_size : -(-end // page_size)]
        tokens += item.history[first : item.start]
        tokens += item.token_ids
        lasts.append(len(tokens))
        tokens += [0] * (-end % page_size)
        begins += range(first, end, page_size)
        before = item.page_ids[first // page_size - 1] if first else -1
        facts += (item.start, end, page, before) * (len(pages) - page)
    starts, ends, first_pages, before_pages = np.array(facts).reshape(-1, 4).T
    positions = np.array(begins)[:, None] + np.arange(page_size)
    is_context = positions < starts[:, None]
    return Rows(
        pages=np.array(pages),
        tokens=np.array(tokens, np.uint64).reshape(-1, page_size),
        positions=positions,
        is_new=(positions < ends[:, None]) ^ is_context,
        is_context=is_context,
        firsts=first_pages,
        before=before_pages,
        lasts=lasts,
    )


def _difference(batch: Sequence[BatchItem], rows: Rows, wrong: NDArray[np.bool_]) -> str:
    """Where a page is not what its sequence says."""
    page, slot = np.argwhere(wrong)[0].tolist()
    row = page * wrong.shape[1] + slot
    name = next(item.request_id for item, last in zip(batch, rows.lasts, strict=True) if row < last)
    return f"{name}: page {rows.pages[page]} does not hold token {rows.positions[page, slot]} of the sequence"


def _after(token: int, position: int) -> int:
    """What a token adds to the state."""
    return mix((token * OF_TOKEN + position * OF_POSITION) % 2**64)
