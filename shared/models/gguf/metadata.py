"""Reading a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor

from shared.errors import Unsupported


class GgufFile:
    """The metadata and tensors of a file. Tensors are mapped, not read."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise Unsupported(f"{path} cannot be read as GGUF: {error}") from None
        self.path = path
        self.architecture = str(self.need("general.architecture"))

    @property
    def tensors(self) -> Sequence[ReaderTensor]:
        """In the order of the file."""
        return self._reader.tensors

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value: a number, string, bool or list of these."""
        found = self._reader.get_field(key)
        return default if found is None else found.contents()

    def need(self, key: str) -> Any:
        """A metadata value that must be there; Unsupported if it is not."""
        value = self.get(key)
        if value is None:
            raise Unsupported(f"{self._reader.data.filename} lacks the metadata {key}")
        return value

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """The value of `key` below the architecture's own prefix."""
        return self.get(f"{self.architecture}.{key}", default)

    def need_of_architecture(self, key: str) -> Any:
        """Likewise, but it must be there."""
        return self.need(f"{self.architecture}.{key}")
