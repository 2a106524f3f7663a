"""What a quantized checkpoint says of itself, in the words of ModelOpt: `hf_quant_config.json`, and the
`quantization_config` of `config.json`.

With scales of activations it is NVFP4, which engines may compute in 4 bits throughout; without them it is W4A16_NVFP4,
weights alone. Where layers stay in block FP8 beside them it is MIXED_PRECISION, and each layer's algorithm is listed
(FP8_PB_WO, as in NVIDIA's own mixed checkpoints with `weight_scale_inv`). A missing `input_scale` under the name of
NVFP4 would be read as whatever was in memory (vLLM allocates it and lets the checkpoint fill it in).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.engine.quantization.fp8_block import BLOCK
from shared.engine.quantization.nvfp4 import GROUP

PRODUCER = "forebay"
MIXED = "MIXED_PRECISION"
BLOCKS = {
    "num_bits": 8, "type": "float", "dynamic": False, "strategy": "block", "block_structure": f"{BLOCK}x{BLOCK}",
}  # fmt: skip
EXPERT = re.compile(r"(\.experts)\.\d+\..*")


@dataclass(frozen=True, slots=True)
class Description:
    """`ignored` are patterns of the linear layers that are not quantized; `has_activations` says whether the others
    have an `input_scale`; `version` is that of the producer. `kept` are weights that stay in block FP8, and with them
    `quantized` those in NVFP4."""

    ignored: tuple[str, ...]
    has_activations: bool
    version: str
    quantized: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def hf_quant_config(self) -> dict[str, Any]:
        """The content of `hf_quant_config.json`. It names no format of keys and values: that is the server's choice."""
        return {
            "producer": self._producer,
            "quantization": {
                "quant_algo": MIXED if self.kept else self._algorithm,
                "kv_cache_quant_algo": None,
                "group_size": GROUP,
                "exclude_modules": list(self.ignored),
                **self._layers,
            },
        }

    def config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `config.json`: the source's, with this in place of its own quantization."""
        numbers = {"num_bits": 4, "type": "float", "group_size": GROUP, "dynamic": False}
        group = {"weights": numbers} | ({"input_activations": numbers} if self.has_activations else {})
        groups = {"group_0": {**group, "targets": _layers(self.quantized) if self.kept else ["Linear"]}}
        if self.kept:
            groups["group_1"] = {"weights": BLOCKS, "targets": _layers(self.kept)}
        about = {
            "quant_method": "modelopt",
            "quant_algo": MIXED if self.kept else self._algorithm,
            "config_groups": groups,
            "ignore": list(self.ignored),
            "producer": self._producer,
            **self._layers,
        }
        return {**source, "quantization_config": about}

    @property
    def _layers(self) -> dict[str, Any]:
        if not self.kept:
            return {}
        nvfp4 = {key: {"quant_algo": self._algorithm, "group_size": GROUP} for key in _layers(self.quantized)}
        fp8 = {key: {"quant_algo": "FP8_PB_WO", "group_size": BLOCK} for key in _layers(self.kept)}
        return {"quantized_layers": nvfp4 | fp8}

    @property
    def _producer(self) -> dict[str, str]:
        return {"name": PRODUCER, "version": self.version}

    @property
    def _algorithm(self) -> str:
        return "NVFP4" if self.has_activations else "W4A16_NVFP4"


def _layers(weights: Iterable[str]) -> list[str]:
    """Names of their layers; the routed experts of a decoder layer are one."""
    return list(dict.fromkeys(EXPERT.sub(r"\1", weight.removesuffix(".weight")) for weight in weights))
