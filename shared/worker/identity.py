"""Who a worker is."""

from dataclasses import dataclass

from shared.errors import ModelNotFound, StaleEpoch


@dataclass(frozen=True, slots=True)
class Identity:
    """One incarnation of a worker."""

    name: str
    epoch: int
    model: str

    def require(self, epoch: int, model: str | None = None) -> None:
        """Raises StaleEpoch or ModelNotFound unless the caller means this incarnation and its model."""
        if epoch != self.epoch:
            raise StaleEpoch(f"{self.name} is at epoch {self.epoch}; the call was for epoch {epoch}")
        if model is not None and model != self.model:
            raise ModelNotFound(f"{self.name} serves {self.model!r}, not {model!r}", param="model")
