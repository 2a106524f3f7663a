"""Checkpoints quantized by hand: the tensors that each format's makers write, around every matrix of the layers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.engine.quantization import fp8_block, nvfp4

Tensors = dict[str, torch.Tensor]
# Stored tensors by suffix, and the weights that they mean.
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def block_fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Blocks of 128 by 128, the last ones ragged, each scaled so that its largest element is 448."""
    num_rows, num_columns = weight.shape
    scale = torch.empty(-(-num_rows // 128), -(-num_columns // 128))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            at = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            scale[row, column] = weight[at].abs().max() / 448
            stored[at] = (weight[at] / scale[row, column]).to(torch.float8_e4m3fn)
    meant = fp8_block.dequantize(stored, scale, torch.float32)
    return {"weight": stored, "weight_scale_inv": scale}, meant


def modelopt(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """NVFP4 as NVIDIA ModelOpt writes it, with the scale of its activations."""
    made = nvfp4.quantize(weight)
    stored = {"weight": made.codes, "weight_scale": made.scale, "weight_scale_2": made.scale_2}
    return stored | {"input_scale": torch.tensor(0.01)}, nvfp4.dequantize(made, torch.float32)


def compressed_tensors(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """NVFP4 as llm-compressor writes it: the reciprocal of the matrix's scale."""
    made = nvfp4.quantize(weight)
    reciprocal = 1.0 / made.scale_2
    stored = {"weight_packed": made.codes, "weight_scale": made.scale, "weight_global_scale": reciprocal}
    meant = nvfp4.dequantize(nvfp4.Nvfp4Tensor(made.codes, made.scale, 1.0 / reciprocal), torch.float32)
    return stored | {"input_global_scale": torch.tensor(100.0)}, meant


METHODS: dict[str, Quantize] = {"fp8": block_fp8, "modelopt": modelopt, "compressed-tensors": compressed_tensors}


def write(source: Path, method: str, quantized_dir: Path, meant_dir: Path) -> None:
    """Quantize a directory's layer matrices; write the result, and a plain directory with the weights it means."""
    quantized, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        quantized[name] = meant[name] = tensor
        if ".layers." in name and tensor.ndim == 2 and tensor.shape[1] % 16 == 0:
            parts, meant[name] = METHODS[method](tensor)
            del quantized[name]
            quantized |= {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()}
    fields = json.loads((source / "config.json").read_text())
    for path, tensors, extra in (
        (quantized_dir, quantized, {"quantization_config": {"quant_method": method}}),
        (meant_dir, meant, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(fields | extra))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
