"""Every tensor of a model with its form and its bytes, from a configuration and, where there are any, from the headers
of weight files. Nothing is loaded.

With no weight files the configuration's `quantization_config` is all there is to go by. Which linear layers its makers
leave alone: those of its `ignore` list (fnmatch patterns; "re:" begins a regular expression), and in FP8 the expert
router, the indexer's head weights and what joins the MTP layer to the model (the published GLM-5 checkpoints).
"""

import fnmatch
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from shared.engine.models import config as dense_config
from shared.engine.models import dense_shapes, glm_config, glm_shapes
from shared.engine.models.config import DenseConfig, require_known_quantization
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.inventory import Inventory
from shared.engine.quantization.formats import Format
from shared.errors import Unsupported

DENSE_ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
ARCHITECTURES = (*DENSE_ARCHITECTURES, glm_config.ARCHITECTURE)
FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FORMAT_NAMES = {Format.FP8_BLOCK: "fp8", Format.NVFP4: "nvfp4", Format.NVFP4_RECIPROCAL: "nvfp4"}
LINEAR = re.compile(r"\.layers\.\d+\..*proj(_with_mqa)?\.weight$|\.indexer\.w\w+\.weight$")
EXPERT = re.compile(r"\.experts\.\d+\..*")
WILD = re.compile(r"[*?[]|^re:")  # what makes a pattern more than a name
NEVER_FP8 = re.compile(r"weights_proj|eh_proj")
FP8_BLOCK, NVFP4_GROUP = 128, 16


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight of its true `shape`; `form` is a float dtype, "fp8" or "nvfp4"; `num_bytes` counts its scales."""

    shape: tuple[int, ...]
    form: str
    num_bytes: int

    @property
    def num_parameters(self) -> int:
        """Elements of the true shape."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """A model's tensors by name; `num_stored` counts those in files, scales apart."""

    architecture: str
    config: DenseConfig | GlmConfig
    has_mtp: bool
    from_headers: bool
    num_stored: int
    tensors: Mapping[str, Tensor]


def read(path: Path) -> ModelTensors:
    """Of a model directory, or of a lone `config.json`. A directory with no weight files is as its configuration says.

    Raises Unsupported for what is missing, broken, of another architecture, or does not fit together.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = dense_config.read_json(file)
    weights = path.is_dir() and any(path.glob("*.safetensors*"))
    return of_headers(fields, Inventory(path)) if weights else of_config(fields)


def of_config(fields: Mapping[str, Any]) -> ModelTensors:
    """What a checkpoint of this configuration holds. Raises Unsupported."""
    name, config, shapes, mtp = _expected(fields)
    quantize, plain = _quantization(fields), _plain_form(fields)
    tensors, num_stored = {}, 0
    for tensor, shape in (shapes | mtp).items():
        stored = quantize(tensor) if LINEAR.search(tensor) else Format.PLAIN
        tensors[tensor] = _sized(shape, stored, "float32" if tensor.endswith("e_score_correction_bias") else plain)
        num_stored += len(stored.value)
    return ModelTensors(name, config, bool(mtp), False, num_stored, tensors)


def of_headers(fields: Mapping[str, Any], inventory: Inventory) -> ModelTensors:
    """What is in the weight files, checked as when they are loaded. Raises Unsupported."""
    name, config, shapes, mtp = _expected(fields)
    has_mtp = any(tensor in inventory.names() for tensor in mtp)
    tied = isinstance(config, DenseConfig) and config.tied_embeddings
    expected = shapes | mtp if has_mtp else shapes
    inventory.check(expected, ignored=(dense_shapes.HEAD,) if tied else ())
    tensors = {tensor: _found(inventory, tensor) for tensor in expected}
    num_stored = sum(len(inventory.parts(tensor)) for tensor in expected)
    return ModelTensors(name, config, has_mtp, True, num_stored, tensors)


def _expected(fields: Mapping[str, Any]) -> tuple[str, DenseConfig | GlmConfig, glm_shapes.Shapes, glm_shapes.Shapes]:
    """Architecture, configuration, shapes of the model, shapes of its MTP layers."""
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise Unsupported(f"architecture {name!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}")
    if not isinstance(fields.get("quantization_config") or {}, Mapping):
        raise Unsupported("the quantization_config of config.json is no JSON object")
    if name in DENSE_ARCHITECTURES:
        dense = dense_config.parse(fields)
        return name, dense, dense_shapes.shapes(dense), {}
    require_known_quantization(fields)
    glm = glm_config.parse(fields)
    layers = range(glm.num_layers, glm.num_layers + glm.num_mtp_layers)
    mtp = {tensor: shape for layer in layers for tensor, shape in glm_shapes.mtp_shapes(glm, layer).items()}
    return name, glm, glm_shapes.shapes(glm), mtp


def _plain_form(fields: Mapping[str, Any]) -> str:
    form = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
    if form not in FLOAT_BYTES:
        raise Unsupported(f"config.json says dtype {form!r}; known are {', '.join(FLOAT_BYTES)}")
    return form


def _quantization(fields: Mapping[str, Any]) -> Callable[[str], Format]:
    """The form of each linear layer of the decoder's layers that a `quantization_config` means."""
    about = fields.get("quantization_config")
    if not about:
        return lambda _: Format.PLAIN
    method = about.get("quant_method", "fp8")
    if method == "fp8":
        return lambda name: Format.PLAIN if NEVER_FP8.search(name) else Format.FP8_BLOCK
    if "nvfp4" not in json.dumps(about).lower():
        raise Unsupported(f"quant_method {method!r} without NVFP4 is not supported")
    if layers := about.get("quantized_layers"):
        return lambda name: _listed(name, layers)
    stored = Format.NVFP4 if method == "modelopt" else Format.NVFP4_RECIPROCAL
    is_ignored = _matcher([str(pattern) for pattern in about.get("ignore") or ()])
    return lambda name: Format.PLAIN if is_ignored(name.removesuffix(".weight")) else stored


def _listed(name: str, layers: Mapping[str, Any]) -> Format:
    """That of the layer, or of the experts it belongs to, in ModelOpt's list of layers with forms of their own."""
    of_experts = EXPERT.sub(".experts", name).removesuffix(".weight")
    about = layers.get(name.removesuffix(".weight")) or layers.get(of_experts) or {}
    algorithm = str(about.get("quant_algo", ""))
    if algorithm == "FP8_PB_WO":
        return Format.FP8_BLOCK
    return Format.NVFP4 if "NVFP4" in algorithm else Format.PLAIN


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether one of the patterns matches a name. There are hundreds of them for tens of thousands of names, so all
    that are fnmatch's make one expression, and those that are names themselves one set."""
    names = {pattern for pattern in patterns if not WILD.search(pattern)}
    globs = [fnmatch.translate(pattern) for pattern in patterns if pattern not in names and pattern[:3] != "re:"]
    expressions = [pattern[3:] for pattern in patterns if pattern.startswith("re:")]
    matches = [re.compile(each).match for each in (["|".join(globs)] if globs else []) + expressions]
    return lambda name: name in names or any(match(name) for match in matches)


@cache
def _sized(shape: tuple[int, ...], stored: Format, plain: str) -> Tensor:
    """FP8: a float32 scale per block of 128 x 128. NVFP4: half a byte, an e4m3 scale per 16, a float32 scale."""
    if stored is Format.PLAIN:
        return Tensor(shape, plain, prod(shape) * FLOAT_BYTES[plain])
    if stored is Format.FP8_BLOCK:
        return Tensor(shape, "fp8", prod(shape) + 4 * prod(-(-size // FP8_BLOCK) for size in shape))
    return Tensor(shape, "nvfp4", prod(shape) // 2 + prod(shape) // NVFP4_GROUP + 4)


def _found(inventory: Inventory, name: str) -> Tensor:
    stored = inventory.format(name)
    dtype = inventory.stored[inventory.parts(name)[0]].dtype
    form = FORMAT_NAMES.get(stored) or FLOAT_NAMES.get(dtype, dtype.lower())
    return Tensor(inventory.shape(name), form, inventory.num_bytes(name))
