"""Which rows of a model's head are tokens: vocabularies are padded, and the padding must never be chosen."""

import json
from pathlib import Path

from shared.errors import Unsupported


def num_tokens(model_dir: Path, vocab_size: int) -> int:
    """Ids below this are tokens: one more than the last id in `tokenizer.json`, at most `vocab_size`, which it is where
    a directory has no such file. Raises Unsupported if the file cannot be read."""
    path = model_dir / "tokenizer.json"
    return min(num_in(path), vocab_size) or vocab_size if path.exists() else vocab_size


def num_in(path: Path) -> int:
    """One more than the last id in a `tokenizer.json`; 0 for one without tokens. Raises Unsupported."""
    try:
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models list their pieces; the others map them to ids.
        last = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
        last = max(map(int, [last, *(token["id"] for token in tokenizer.get("added_tokens") or ())]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return last + 1
