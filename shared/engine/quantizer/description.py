"""What a quantized checkpoint says of itself, in the words of ModelOpt: `hf_quant_config.json`, and the
`quantization_config` of `config.json`.

With scales of activations it is NVFP4, which engines may compute in 4 bits throughout; without them it is W4A16_NVFP4,
weights alone. A missing `input_scale` under the name of NVFP4 would be read as whatever was in memory (vLLM allocates
it and lets the checkpoint fill it in).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.engine.quantization.nvfp4 import GROUP

PRODUCER = "forebay"


@dataclass(frozen=True, slots=True)
class Description:
    """`ignored` are patterns of the linear layers that are not quantized; `has_activations` says whether the others
    have an `input_scale`; `version` is that of the producer."""

    ignored: tuple[str, ...]
    has_activations: bool
    version: str

    def hf_quant_config(self) -> dict[str, Any]:
        """The content of `hf_quant_config.json`. It names no format of keys and values: that is the server's choice."""
        return {
            "producer": self._producer,
            "quantization": {
                "quant_algo": self._algorithm,
                "kv_cache_quant_algo": None,
                "group_size": GROUP,
                "exclude_modules": list(self.ignored),
            },
        }

    def config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `config.json`: the source's, with this in place of its own quantization."""
        numbers = {"num_bits": 4, "type": "float", "group_size": GROUP, "dynamic": False}
        group = {"weights": numbers} | ({"input_activations": numbers} if self.has_activations else {})
        about = {
            "quant_method": "modelopt",
            "quant_algo": self._algorithm,
            "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
            "ignore": list(self.ignored),
            "producer": self._producer,
        }
        return {**source, "quantization_config": about}

    @property
    def _producer(self) -> dict[str, str]:
        return {"name": PRODUCER, "version": self.version}

    @property
    def _algorithm(self) -> str:
        return "NVFP4" if self.has_activations else "W4A16_NVFP4"
