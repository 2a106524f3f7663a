"""Tokenizers of each kind that models have, small enough to read."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
WORDS = ["hello", " world", " the", "!", "STOP"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'broken' %}{{ raise_exception('no') }}{% endif %}"
    "<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Tokenizer:
    """GPT-2's kind: 256 byte tokens, some merged words, special tokens at the end."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        [(piece, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        merged = piece[0]
        for character in piece[1:]:
            if (merged, character) not in merges:
                merges.append((merged, character))
                vocabulary.setdefault(merged + character, len(vocabulary))
            merged += character
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: words with a mark for the space before them, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hi", "▁you", "é", "a", "b"]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: pieces within a word begin with ##, and words are joined by spaces."""
    pieces = ["[UNK]", "play", "##ing", "##ed", "well", ",", "you"]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer | None = None, template: str | None = TEMPLATE) -> Path:
    """A model directory with the text side of a model."""
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    if template is not None:
        config = {"chat_template": template, "eos_token": "<|end|>", "bos_token": None}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
