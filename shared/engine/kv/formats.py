"""In which form a token's state is cached, and how many bytes that takes.

Plain forms are floats, one row per token. The fp8 forms are those of vLLM, SGLang and FlashMLA:

    latent      kv_lora e4m3 | float32 scale per 128 of them | rotary key in bfloat16: 656 bytes at 512 + 64
    index key   D e4m3 and a float32 scale, in a page first the values of all tokens, then the scales: 132 bytes at 128

Scales are powers of two.
"""

from dataclasses import dataclass

from shared.errors import Unsupported

FLOAT_BYTES = {"bfloat16": 2, "float32": 4}
KV_DTYPES = (*FLOAT_BYTES, "fp8")
FP8_LATENT, FP8_INDEX_KEY = "fp8_ds_mla", "fp8_index_key"
GROUP = 128
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The form of one token's state in one layer. `name` is a float dtype, or what the bytes are called."""

    name: str
    row_bytes: int


def latent(kv_dtype: str, kv_lora_rank: int, rope_dim: int) -> RowFormat:
    """Of an MLA latent and the rotary key behind it. Raises Unsupported for a `kv_dtype` that is not of KV_DTYPES."""
    if kv_dtype == "fp8":
        scales = -(-kv_lora_rank // GROUP) * SCALE_BYTES
        return RowFormat(FP8_LATENT, kv_lora_rank + scales + rope_dim * FLOAT_BYTES["bfloat16"])
    return floats(kv_dtype, kv_lora_rank + rope_dim)


def index_key(kv_dtype: str, dim: int) -> RowFormat:
    """Of an indexer's key. Raises Unsupported for a `kv_dtype` that is not of KV_DTYPES."""
    return RowFormat(FP8_INDEX_KEY, dim + SCALE_BYTES) if kv_dtype == "fp8" else floats(kv_dtype, dim)


def floats(kv_dtype: str, dim: int) -> RowFormat:
    """Of `dim` floats. Raises Unsupported for a `kv_dtype` that is no float."""
    if kv_dtype not in FLOAT_BYTES:
        raise Unsupported(f"KV cannot be kept in {kv_dtype!r} here; it can in {', '.join(FLOAT_BYTES)}")
    return RowFormat(kv_dtype, dim * FLOAT_BYTES[kv_dtype])
