"""compressed-tensors, the library of vLLM's and llm-compressor's checkpoints in NVFP4, as an oracle. To be imported by
whoever computes with it: it brings all of transformers, which takes seconds."""

from collections.abc import Sequence
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import NVFP4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file

TARGET = r"re:.*_proj$"
SCHEME = QuantizationScheme(**NVFP4, targets=[TARGET], format="nvfp4-pack-quantized")


def convert(made: Path, converted: Path, ignored: Sequence[str]) -> None:
    """A checkpoint of ModelOpt's kind into one of its own."""
    converter = ModelOptNvfp4Converter(ignore=ignored, targets=[TARGET])
    convert_checkpoint(made, converted, converter, max_workers=1, device="cpu")


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    """Those of every packed linear, float32, as the library unpacks and scales them."""
    stored, found = load_file(model_dir / "model.safetensors"), dict[str, torch.Tensor]()
    for name, packed in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
            scale, factor = (stored[f"{linear}.{part}"].float() for part in ("weight_scale", "weight_global_scale"))
            found[f"{linear}.weight"] = dequantize(codes, scale, args=SCHEME.weights, global_scale=factor)
    return found


def quantized(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the library stores of a linear's weight, float32 [out, in]."""
    groups = weight.unflatten(-1, (-1, 16))
    global_scale = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights, global_scale=global_scale)
    parts = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    stored: dict[str, torch.Tensor] = NVFP4PackedCompressor.compress(parts, SCHEME)
    return stored
