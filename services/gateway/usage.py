"""Adding up what several workers, or several outputs, used."""

from collections.abc import MutableSequence, Sequence

from protos.forebay.v1 import generation_pb2


def add_drafts(total: generation_pb2.Usage, more: generation_pb2.Usage) -> None:
    """Add counts of drafts, those by position too; the other counts stay as they are."""
    total.num_draft_tokens += more.num_draft_tokens
    total.num_accepted_tokens += more.num_accepted_tokens
    _add(total.num_drafts_by_position, more.num_drafts_by_position)
    _add(total.num_accepted_by_position, more.num_accepted_by_position)


def num_cached(usage: generation_pb2.Usage | None) -> int:
    """How much of a prompt was cached, wherever it was."""
    if usage is None:
        return 0
    return usage.num_cached_local + usage.num_cached_remote + usage.num_cached_transferred


def _add(total: MutableSequence[int], counts: Sequence[int]) -> None:
    total.extend([0] * (len(counts) - len(total)))
    for position, count in enumerate(counts):
        total[position] += count
