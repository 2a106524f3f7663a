"""How a linear layer is stored: decided by the tensors that are there, because the lists in checkpoints' configurations
are wrong often enough (they name modules that do not exist and miss others)."""

from collections.abc import Collection
from enum import Enum

from shared.errors import Unsupported


class Format(Enum):
    """Where the weights of a linear layer are, by the suffixes after its name."""

    PLAIN = ("weight",)
    FP8_BLOCK = ("weight", "weight_scale_inv")
    NVFP4 = ("weight", "weight_scale", "weight_scale_2")
    # llm-compressor's `nvfp4-pack-quantized`: the same codes and scales, but 1 / scale_2.
    NVFP4_RECIPROCAL = ("weight_packed", "weight_scale", "weight_global_scale")


PACKED = (Format.NVFP4, Format.NVFP4_RECIPROCAL)  # two codes a byte
KNOWN = frozenset(suffix for format_ in Format for suffix in format_.value)


def detect(linear: str, names: Collection[str]) -> Format:
    """The format of `linear` ("model.layers.0.mlp.up_proj") in a checkpoint with these tensor `names`.

    Raises Unsupported when the tensors that are there make up no format, for instance FP8 with one scale per matrix.
    """
    prefix = f"{linear}."
    found = {suffix for suffix in KNOWN if prefix + suffix in names}
    for format_ in Format:
        if found == set(format_.value):
            return format_
    raise Unsupported(f"the weights of {linear} are stored in a way that is not known: {sorted(found) or 'nothing'}")
