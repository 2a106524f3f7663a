"""Which rows of a model's head are tokens: vocabularies are padded, and the padding must never be chosen."""

import json
from pathlib import Path

from shared.errors import Unsupported


def num_tokens(model_dir: Path, vocab_size: int) -> int:
    """Ids below this are tokens: one more than the last id in `tokenizer.json`, at most `vocab_size`, which it is where
    a directory has no such file. Raises Unsupported if the file cannot be read."""
    path = model_dir / "tokenizer.json"
    if not path.exists():
        return vocab_size
    try:
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models list their pieces; the others map them to ids.
        last = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        last = max(map(int, [last, *(token["id"] for token in tokenizer.get("added_tokens") or ())]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return min(last + 1, vocab_size) or vocab_size
