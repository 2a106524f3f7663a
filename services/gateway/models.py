"""The models that can be asked for, with what the gateway needs to know of each."""

from collections.abc import Mapping
from dataclasses import dataclass

from services.gateway.chat_template import ChatTemplate
from services.gateway.text_model import TextModel
from services.gateway.tokenizer import Tokenizer
from shared.blackboard.records import ModelCard
from shared.errors import InvalidRequest, Unsupported


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as its workers describe it, and its text side. `created` is in unix seconds."""

    card: ModelCard
    text: TextModel
    created: int

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.card.model

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change the answers: the workers' weights, dtype and layout."""
        return f"fp_{self.card.compatibility_hash[:16]}"

    @property
    def defaults(self) -> Mapping[str, float]:
        """Sampling parameters for requests that name none."""
        return self.text.defaults

    def tokenizer(self, param: str) -> Tokenizer:
        """Raises InvalidRequest, for the field of the request that needs it."""
        if self.text.tokenizer is None:
            raise InvalidRequest(
                f"the model '{self.name}' has no tokenizer: send 'prompt' as token ids to /v1/completions, and no "
                f"'{param}' as text",
                param=param,
            )
        return self.text.tokenizer

    def chat_template(self) -> ChatTemplate:
        """Raises Unsupported."""
        if self.text.chat_template is None:
            raise Unsupported(f"the model '{self.name}' has no chat template: use /v1/completions", param="messages")
        return self.text.chat_template
