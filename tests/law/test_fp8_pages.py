"""GLM with pages in FP8: what is read of a page depends on what was written to it alone, so the laws hold of it, and
are asked of each way that pages come about. Not of more: a last digit that depends on the step, as of any GLM in
float32, may fall on the other side between two values of FP8, and then a token changes."""

import pytest

from tests.law import test_same_tokens as laws
from tests.law.conftest import GREEDY, Law, TinyModels


@pytest.fixture(scope="module")
def law(tiny_models: TinyModels) -> Law:
    return tiny_models.law("glm fp8", "", GREEDY)


def test_chunked_at_an_odd_size(law: Law) -> None:
    laws.test_chunked_at_odd_sizes(7, law)


def test_prefix_cached(law: Law) -> None:
    laws.test_prefix_cached(33, law)


def test_prefilled_elsewhere(law: Law) -> None:
    laws.test_prefilled_elsewhere(48, law)


def test_preempted(law: Law) -> None:
    laws.test_preempted(law)
