"""What an engine does about drafts: how many each sequence gets, where they come from, how they fared."""

from collections.abc import Callable
from dataclasses import dataclass

from shared.engine.api import Chosen, DraftCounts
from shared.engine.meter import Meter
from shared.engine.sequence import Sequence
from shared.engine.speculation.acceptance import OF_THE_TEXT, Acceptance, num_worthwhile
from shared.engine.speculation.proposer import Proposer


@dataclass(frozen=True, slots=True)
class Speculation:
    """At most `num_drafts` drafts a step and sequence; if `adaptive`, as many of them as are worth it.

    They come from a proposer that each sequence gets; without one, from the executor.
    """

    num_drafts: int = 0
    adaptive: bool = True
    make_proposer: Callable[[], Proposer] | None = None

    @property
    def num_ahead(self) -> int:
        """Drafts for which a step should have pages beyond its own: those that the executor proposes."""
        return self.num_drafts if self.make_proposer is None else 0


class Speculator:
    """For one engine, in its thread."""

    def __init__(self, speculation: Speculation, meter: Meter) -> None:
        self._speculation, self._meter = speculation, meter
        self._verified = [0] * speculation.num_drafts
        self._accepted = [0] * speculation.num_drafts

    def begin(self, sequence: Sequence) -> None:
        """Take what came with the request, if drafts are used at all."""
        num_drafts, make_proposer = self._speculation.num_drafts, self._speculation.make_proposer
        sequence.drafts = list(sequence.request.draft_token_ids[:num_drafts])
        if make_proposer is not None:
            sequence.proposer, sequence.acceptance = make_proposer(), Acceptance(OF_THE_TEXT)
            if not sequence.drafts:
                self._propose(sequence, num_drafts)

    def num_wanted(self, sequence: Sequence, num_generating: int) -> int:
        """Drafts to propose for the next step, of `num_generating` sequences: fewer, and then none, as they are rarely
        right or the step is busy with others."""
        most = self._speculation.num_drafts
        if not (most and self._speculation.adaptive):
            return most
        cost = self._meter.draft_ms * num_generating / (self._meter.decode_step_ms or 1.0)
        return num_worthwhile(sequence.acceptance.chance, cost, most)

    def absorb(self, sequence: Sequence, num_drafts: int, chosen: Chosen, num_wanted: int) -> None:
        """Note how a step's drafts fared, and keep those for the next one. The sequence has its new tokens already."""
        num_accepted = len(chosen.tokens) - 1
        sequence.acceptance.note(num_drafts, num_accepted)
        for position in range(num_drafts):
            self._verified[position] += 1
            self._accepted[position] += position < num_accepted
        sequence.drafts = list(chosen.drafts[:num_wanted])
        self._propose(sequence, num_wanted)

    def counts(self) -> DraftCounts:
        """How drafts have fared."""
        used = sum(count > 0 for count in self._verified)
        return DraftCounts(tuple(self._verified[:used]), tuple(self._accepted[:used]))

    def _propose(self, sequence: Sequence, num_wanted: int) -> None:
        if sequence.proposer is not None and num_wanted:
            sequence.drafts = sequence.proposer.propose(sequence.tokens, num_wanted)
