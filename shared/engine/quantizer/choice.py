"""Which linear layers of a model are quantized, which of them share a scale, and how the others are named.

The choice of routed experts alone is NVIDIA's own for GLM-5: everything else, the MTP layer with its experts included,
stays as it is. Engines that serve such checkpoints compute MTP layers unquantized, so no choice takes them in.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from enum import StrEnum

from shared.engine.models import accounting
from shared.engine.models.config import DenseConfig
from shared.engine.models.tensor_list import LINEAR, ModelTensors
from shared.engine.quantization.nvfp4 import GROUP
from shared.errors import InvalidRequest, Unsupported

# What engines compute as one product, and so with one scale. ModelOpt joins what has one input in the same way.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
ROUTER = re.compile(r"\.mlp\.gate\.weight$")
HEAD = "lm_head"


class Modules(StrEnum):
    """What to quantize."""

    ROUTED_EXPERTS = "routed-experts"
    ALL_LINEARS = "all-linears"


def default(model: ModelTensors) -> Modules:
    """Routed experts where there are any: nearly all of the bytes, and the layers that bear it best."""
    return Modules.ALL_LINEARS if isinstance(model.config, DenseConfig) else Modules.ROUTED_EXPERTS


def chosen(model: ModelTensors, modules: Modules) -> list[str]:
    """The weights to quantize. Raises InvalidRequest for a model that has none of that kind, Unsupported for weights
    that are in NVFP4 already or whose rows are no whole groups of 16."""
    found = [
        name for name in model.tensors if LINEAR.search(name) and _wanted(accounting.module_class(model, name), modules)
    ]
    if not found:
        raise InvalidRequest(f"{model.architecture} has no {modules}", param="modules")
    done = [name for name in found if model.tensors[name].form == "nvfp4"]
    if done:
        raise Unsupported(f"{len(done)} of {len(found)} {modules} are in NVFP4 already, the first is {done[0]}")
    uneven = [name for name in found if model.tensors[name].shape[-1] % GROUP]
    if uneven:
        columns = model.tensors[uneven[0]].shape[-1]
        raise Unsupported(
            f"NVFP4 needs rows of a multiple of {GROUP} elements; {uneven[0]} has {columns} columns"
            + (f", and {len(uneven) - 1} more are like it" if len(uneven) > 1 else "")
        )
    return found


def kept(model: ModelTensors, quantized: Collection[str]) -> list[str]:
    """The weights in block FP8 that are not quantized again. Raises InvalidRequest where there are none."""
    found = [name for name, tensor in model.tensors.items() if tensor.form == "fp8" and name not in quantized]
    if not found:
        raise InvalidRequest(f"{model.architecture} has no layers in FP8 to keep", param="keep_fp8")
    return found


def _wanted(module_class: str, modules: Modules) -> bool:
    if modules is Modules.ROUTED_EXPERTS:
        return module_class == "routed experts"
    return module_class != accounting.MTP


def joined(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of these weights, those that it shares a scale with, itself among them."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in names:
        prefix, _, module = name.removesuffix(".weight").rpartition(".")
        kind = next((kinds[0] for kinds in JOINED if module in kinds), module)
        members.setdefault((prefix, kind), []).append(name)
    return {name: tuple(group) for group in members.values() for name in group}


def left_alone(model: ModelTensors, quantized: Collection[str]) -> list[str]:
    """Patterns (fnmatch) that match the names of all linear layers but the quantized ones (in whatever form): what
    `ignore` lists."""
    linears = {name.removesuffix(".weight"): name in quantized for name in model.tensors if _is_linear(name)}
    mixed = {part for name, is_quantized in linears.items() if is_quantized for part in _parts(name)}
    highest = (next((part for part in _parts(name) if part not in mixed), "") for name in linears)
    return [HEAD, *(part if part in linears else f"{part}.*" for part in dict.fromkeys(highest) if part)]


def _is_linear(name: str) -> bool:
    return bool(LINEAR.search(name) or ROUTER.search(name))


def _parts(name: str) -> Iterator[str]:
    """The parts of the tree of names that a name is in, from the root down to itself."""
    end = -1
    while (end := name.find(".", end + 1)) >= 0:
        yield name[:end]
    yield name
