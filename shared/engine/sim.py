"""An executor without a model, whose pages and tokens obey laws that show every mistake of the machinery around it.

    state[t] = sum over i <= t of mix(token[i], i)              64 bits, wrapping
    page words of token t = state[t], mix(state[t], 1), mix(state[t], 2) …
    token after t = mix(state[t], seed, t) mod vocabulary       seed 0 if the temperature is 0

So every byte of a page depends on all tokens up to it, and on their positions. A step goes on from the state that it
finds in the pages, and checks the bytes of its context: a page that was lost, mixed up, overwritten or half transferred
is an error, loud and at once. Sampling parameters that shape probabilities have no meaning here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from shared.engine.api import BatchItem, EngineSpec, SampledToken
from shared.engine.kv.layout import KvLayout, compatibility_hash, pack
from shared.engine.kv.memory import HostMemory

Words = NDArray[np.uint64]

WORD_BYTES = 8
GOLDEN = 0x9E3779B97F4A7C15


class WrongPages(Exception):
    """The bytes of a page are not those of the tokens it is said to hold."""


@dataclass(frozen=True, slots=True)
class SimModel:
    """What is simulated.

    A step takes `prefill_ms_per_token` for each token of a prompt; one in which sequences generate also takes
    `decode_ms`, and `decode_ms_per_sequence` for each of them.
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

    @property
    def layout(self) -> KvLayout:
        """One state class, `words`."""
        return pack(self.page_size, {"words": (1, "uint64", self.page_size * self.words_per_token * WORD_BYTES)})

    def step_ms(self, batch: Sequence[BatchItem]) -> float:
        """Time of a step."""
        num_prompt_tokens = sum(len(item.token_ids) for item in batch if len(item.token_ids) > 1)
        num_decodes = sum(len(item.token_ids) == 1 for item in batch)
        decode_ms = self.decode_ms + num_decodes * self.decode_ms_per_sequence
        return num_prompt_tokens * self.prefill_ms_per_token + (decode_ms if num_decodes else 0.0)


class SimExecutor:
    """Satisfies `shared.engine.api.Executor`. `sleep` takes seconds, and lets tests take none."""

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
            compatibility_hash=compatibility_hash(model.name, "sim", layout),
        )
        self.memory = HostMemory(num_pages, layout.page_bytes)
        self._model = model
        self._sleep = sleep
        self._clock = clock
        self._salts = np.arange(model.words_per_token, dtype=np.uint64)
        token_bytes = model.words_per_token * WORD_BYTES
        self._words: Words = np.ndarray(  # [pages, page_size, words_per_token]
            (num_pages, model.page_size, model.words_per_token),
            np.uint64,
            self.memory.buffer,
            strides=(layout.page_bytes, token_bytes, WORD_BYTES),
        )

    def forward(self, batch: Sequence[BatchItem]) -> list[SampledToken | None]:
        """Write the words of every item's tokens into its pages; return the chosen token of each item with `sample`.

        Raises WrongPages if a page does not hold what the item says was computed before.
        """
        started = self._clock()
        chosen = [self._compute(item) for item in batch]
        self._sleep(max(0.0, self._model.step_ms(batch) / 1000 - (self._clock() - started)))
        return chosen

    def _compute(self, item: BatchItem) -> SampledToken | None:
        before = self._check_context(item)
        states = before + _sums(item.token_ids, item.start)
        positions = np.arange(item.start, item.start + len(item.token_ids))
        pages = np.asarray(item.page_ids)[positions // self._model.page_size]
        self._words[pages, positions % self._model.page_size] = self._expand(states)
        return self._choose(item, int(states[-1])) if item.sample else None

    def _check_context(self, item: BatchItem) -> Words:
        """The state [1] after the context, whose bytes are right.

        All of it is checked at the beginning of each page and of each part of a prompt, the last page only in between:
        that finds every wrong byte within a page of tokens, and keeps long contexts cheap.
        """
        page_size = self._model.page_size
        whole = len(item.token_ids) > 1 or item.start % page_size == 0
        first_page = 0 if whole else item.start // page_size
        first = first_page * page_size
        state = self._words[item.page_ids[first_page - 1], -1, :1] if first_page else np.zeros(1, np.uint64)
        if first == item.start:
            return state
        pages = item.page_ids[first_page : -(-item.start // page_size)]
        found = self._words[np.asarray(pages)].reshape(-1, self._model.words_per_token)[: item.start - first]
        states = state + _sums(item.history[first : item.start], first)
        wrong = np.nonzero((found != self._expand(states)).any(axis=1))[0]
        if wrong.size:
            position = first + int(wrong[0])
            page = item.page_ids[position // page_size]
            raise WrongPages(f"{item.request_id}: page {page} does not hold token {position} of the sequence")
        return states[-1:]

    def _expand(self, states: Words) -> Words:
        """Page words [tokens, words_per_token] of states [tokens]."""
        words = _mix(states[:, None] + self._salts * np.uint64(GOLDEN))
        words[:, 0] = states
        return words

    def _choose(self, item: BatchItem, state: int) -> SampledToken:
        sampling, position = item.sampling, item.start + len(item.token_ids)
        seed = sampling.seed + 1 if sampling.temperature else 0
        salted = np.array([(state ^ (seed * GOLDEN + position)) % 2**64], np.uint64)
        token = int(_mix(salted)[0]) % self._model.vocab_size
        if position - item.output_start < sampling.min_tokens:
            stops = {*self._model.eos_token_ids, *sampling.stop_token_ids}
            token = next(other for other in self._from(token) if other not in stops)
        if sampling.num_logprobs is None:
            return SampledToken(token)
        top = zip(self._from(token), range(1, sampling.num_logprobs + 1), strict=False)
        return SampledToken(token, log(0.5), tuple((other, place * log(0.5)) for other, place in top))

    def _from(self, token: int) -> Iterator[int]:
        """The whole vocabulary, beginning with this token."""
        return (other % self._model.vocab_size for other in range(token, token + self._model.vocab_size))


def _sums(token_ids: Sequence[int], start: int) -> Words:
    """Running sums [tokens] of the mixed tokens and positions, from 0."""
    tokens = np.array(token_ids, np.uint64)
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    return np.cumsum(_mix(_mix(tokens + np.uint64(1)) + positions * np.uint64(GOLDEN)), dtype=np.uint64)


def _mix(words: Words) -> Words:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
