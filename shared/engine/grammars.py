"""Outputs that are held to a grammar: which tokens may come next, by llguidance.

A row of `allowed` tokens has a bit for each token of the vocabulary, the first in the lowest bit of the first byte.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from shared.errors import InvalidRequest, Unsupported
from shared.grammar import Grammar, source

# Grammars that are kept compiled; one takes some 10 KiB to some MiB.
MAX_KEPT = 64


class Matcher:
    """Where one output is in its grammar. Belongs to the engine's thread."""

    def __init__(self, matcher: LLMatcher, behind_token_id: int | None, token_ids: Iterable[int]) -> None:
        self._matcher, self._awaited = matcher, behind_token_id
        self.advance(token_ids)

    @property
    def error(self) -> str:
        """Why the output cannot be held to its grammar any more; empty as long as it can."""
        return self._matcher.get_error()

    def advance(self, token_ids: Iterable[int]) -> None:
        """The output goes on with these. What its grammar does not allow becomes its `error`."""
        for token_id in token_ids:
            if self._awaited is None:
                self._matcher.consume_token(token_id)
            elif token_id == self._awaited:
                self._awaited = None

    def allowed(self, drafts: Sequence[int]) -> tuple[bytes | None, ...]:
        """The tokens that may come next, and behind each of the drafts; None where all may, and where nobody looks:
        behind a draft that is not allowed, which is never chosen."""
        rows, awaited, num_consumed = list[bytes | None](), self._awaited, 0
        for draft in (*drafts, None):
            rows.append(None if awaited is not None else self._matcher.compute_bitmask())
            if draft is None:
                break
            if awaited is not None:
                awaited = None if draft == awaited else awaited
            elif self._matcher.try_consume_tokens([draft]):
                num_consumed += 1
            else:
                break
        if num_consumed:
            self._matcher.rollback(num_consumed)
        return (*rows, *[None] * (1 + len(drafts) - len(rows)))


class Grammars:
    """Grammars over the vocabulary of one model. May be called from any thread."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`tokenizer` is the model's tokenizer.json, read at the first grammar. An output that has come to the end of
        its grammar may only go on with one of `eos_token_ids`."""
        self._path, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> None:
        """Have a grammar ready; may take a second, in which other threads run. Raises InvalidRequest for one that
        cannot be used, Unsupported if the model has no tokenizer."""
        self._compiled(grammar)

    def begin(self, grammar: Grammar, output: Iterable[int]) -> Matcher:
        """For an output that has begun so. Raises what `compile` does, and InvalidRequest if the grammar does not allow
        the output."""
        compiled = self._compiled(grammar)
        with self._lock:
            copied = compiled.deep_copy()
        matcher = Matcher(copied, grammar.behind_token_id, output)
        if matcher.error:
            raise InvalidRequest(f"the output so far is not of its grammar: {matcher.error}", param="output_token_ids")
        return matcher

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            if (kept := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return kept
        compiled = LLMatcher(self._vocabulary(), source(grammar), log_level=0)
        if compiled.is_error():
            raise InvalidRequest(f"the {grammar.kind} cannot be used: {compiled.get_error()}")
        with self._lock:
            self._kept[grammar] = compiled
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if not self._path.is_file():
                    raise Unsupported("the model has no tokenizer: its outputs cannot be held to a grammar")
                self._tokenizer = LLTokenizer(str(self._path), self._vocab_size, self._eos_token_ids)
            return self._tokenizer
