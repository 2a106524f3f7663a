"""`tokenizer.json` and `tokenizer_config.json` from GGUF metadata: byte-level BPE only.

GGUF keeps the vocabulary, the merges and the *name* of the rule that cuts text into words before merging. The rule
itself is known by that name only, so it is written out here as the models' own `tokenizer.json` have it.
"""

from typing import Any

from shared.errors import Unsupported
from shared.models.gguf.metadata import GgufFile

CONTROL, USER_DEFINED = 3, 4
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Name of the rule: (normalizer, steps of the rule).
RULES: dict[str, tuple[dict[str, Any] | None, list[dict[str, Any]]]] = {
    # Every digit is a word of its own.
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]),
    "qwen2": (
        {"type": "NFC"},
        [
            {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL | {"use_regex": False},
        ],
    ),
}


def tokenizer(file: GgufFile) -> dict[str, Any]:
    """The content of `tokenizer.json`. Raises Unsupported for another kind of tokenizer."""
    kind, rule = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or rule not in RULES:
        known = ", ".join(f"gpt2/{name}" for name in RULES)
        raise Unsupported(f"GGUF tokenizer {kind}/{rule} is not supported; supported are {known}")
    if file.get("tokenizer.ggml.add_bos_token") or file.get("tokenizer.ggml.add_eos_token"):
        raise Unsupported("a GGUF tokenizer that adds begin or end tokens by itself is not supported")
    tokens = file.need("tokenizer.ggml.tokens")
    normalizer, steps = RULES[rule]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, file.need("tokenizer.ggml.token_type")),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in file.need("tokenizer.ggml.merges")],
        },
    }


def _added(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Tokens that are matched whole in the text, before any cutting."""
    return [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, with the chat template if there is one."""
    tokens = file.need("tokenizer.ggml.tokens")
    ids = {
        "bos_token": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token": file.get("tokenizer.ggml.eos_token_id"),
        "unk_token": file.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": file.get("tokenizer.ggml.padding_token_id"),
    }
    template = file.get("tokenizer.chat_template")
    return {
        # This class takes tokenizer.json as it is; GPT2Tokenizer would put its own rule in place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.need_of_architecture("context_length"),
        "clean_up_tokenization_spaces": False,
        **{name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
        **({"chat_template": template} if template is not None else {}),
    }
