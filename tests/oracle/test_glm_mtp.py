"""Drafts of GLM's MTP layer against transformers' decoder layer, float32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from shared.engine.api import BatchItem, Chosen, SamplingParams
from shared.engine.executor import TorchExecutor, load_executor
from shared.errors import Unsupported
from tests.oracle import tiny_mtp
from tests.oracle.test_glm import GOLDEN, GOLDEN_PROMPT

NUM_DRAFTS = 5


def load(model_dir: Path, **changes: Any) -> TorchExecutor:
    settings: dict[str, Any] = {"dtype": "float32", "page_size": 16, "num_threads": 1, "num_pages": 16, "mtp": True}
    return load_executor(model_dir, model_name="tiny", **(settings | changes))


def step(executor: TorchExecutor, item: BatchItem) -> Chosen:
    (chosen,) = executor.forward([item])
    assert chosen is not None
    return chosen


def prompt_item(tokens: list[int], start: int = 0) -> BatchItem:
    pages = list(range(15, -1, -1))
    return BatchItem("r", tokens[start:], start, pages, True, SamplingParams(), len(tokens), tokens, 0, NUM_DRAFTS)


@pytest.fixture(scope="module", params=[True, False], ids=["as 5.2 shares a selection", "as 5 and 5.1 select anew"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, bool]:
    path = tmp_path_factory.mktemp("mtp")
    return path, *tiny_mtp.write(path, index_share_for_mtp_iteration=request.param), request.param


def test_drafts_behind_a_prompt_equal_transformers(oracle: tuple[Path, Any, Any, bool]) -> None:
    path, model, mtp, share = oracle
    chosen = step(load(path), prompt_item(GOLDEN_PROMPT))
    assert chosen.tokens[0].token_id == GOLDEN[0]
    known = [*GOLDEN_PROMPT, GOLDEN[0]]
    assert list(chosen.drafts) == tiny_mtp.drafts(model, mtp, known, NUM_DRAFTS, share=share)


def test_how_often_a_selection_is_made_is_felt(tmp_path: Path) -> None:
    model, mtp = tiny_mtp.write(tmp_path)
    shared, anew = (
        tiny_mtp.drafts(model, mtp, [*GOLDEN_PROMPT, GOLDEN[0]], NUM_DRAFTS, share=share) for share in (True, False)
    )
    assert shared[0] == anew[0]
    assert shared != anew


@pytest.mark.parametrize("num_right", range(NUM_DRAFTS + 1))
def test_drafts_behind_a_verification_equal_transformers(num_right: int, oracle: tuple[Path, Any, Any, bool]) -> None:
    path, model, mtp, share = oracle
    executor, known = load(path), [*GOLDEN_PROMPT, GOLDEN[0]]
    step(executor, prompt_item(GOLDEN_PROMPT))
    right = GOLDEN[1 : 1 + num_right]
    drafts = (right + [token + 1 for token in GOLDEN[1 + num_right :]])[:NUM_DRAFTS]
    item = replace(prompt_item(known, 48), token_ids=[known[-1], *drafts], num_drafts=NUM_DRAFTS)
    chosen = step(executor, item)
    assert [token.token_id for token in chosen.tokens] == GOLDEN[1 : 2 + num_right]
    known += GOLDEN[1 : 2 + num_right]
    assert list(chosen.drafts) == tiny_mtp.drafts(model, mtp, known, NUM_DRAFTS, share=share)


def test_drafts_do_not_depend_on_the_chunks_of_the_prompt(oracle: tuple[Path, Any, Any, bool]) -> None:
    executor = load(oracle[0])
    whole = step(executor, prompt_item(GOLDEN_PROMPT)).drafts
    again = load(oracle[0])
    for start, end in ((0, 7), (7, 30)):
        item = prompt_item(GOLDEN_PROMPT)
        part = replace(item, token_ids=GOLDEN_PROMPT[start:end], start=start, sample=False, num_wanted=0)
        part = replace(part, following=GOLDEN_PROMPT[end])
        assert again.forward([part]) == [None]
    assert step(again, prompt_item(GOLDEN_PROMPT, 30)).drafts == whole


def test_drafts_are_as_many_as_are_wanted_and_the_last_one_needs_no_page(oracle: tuple[Path, Any, Any, bool]) -> None:
    executor, item = load(oracle[0]), prompt_item(GOLDEN_PROMPT)
    drafts = step(executor, item).drafts
    assert step(executor, replace(item, num_wanted=2)).drafts == drafts[:2]
    assert step(executor, replace(item, page_ids=item.page_ids[:3], num_wanted=1)).drafts == drafts[:1]
    with pytest.raises(ValueError, match="in 3 pages"):
        step(executor, replace(item, page_ids=item.page_ids[:3], num_wanted=2))


WAYS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=0.8, seed=3, presence_penalty=0.5, repetition_penalty=1.2),
)


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "drawn", "penalties"])
def test_drafts_that_are_awaited_are_the_same(sampling: SamplingParams, oracle: tuple[Path, Any, Any, bool]) -> None:
    """As on a GPU, where the next draft is launched before the host hears of the last one."""
    at_once, other = load(oracle[0]), load(oracle[0])
    behind = TorchExecutor(other.model, other.spec, other.memory, behind=True)
    prompts = (GOLDEN_PROMPT, NUM_DRAFTS), (GOLDEN_PROMPT[:20], 2)
    items = [
        replace(prompt_item(prompt), sampling=sampling, page_ids=range(5 * n, 5 * n + 5), num_wanted=wanted)
        for n, (prompt, wanted) in enumerate(prompts)
    ]
    expected, found = at_once.forward(items), behind.forward(items)
    assert found == expected
    assert [len(each.drafts) for each in found if each is not None] == [NUM_DRAFTS, 2]


def test_pages_hold_the_state_of_the_mtp_layer_and_suit_only_those_who_have_it(tmp_path: Path) -> None:
    tiny_mtp.write(tmp_path)
    spec, without = load(tmp_path).spec, load(tmp_path, mtp=False).spec
    sizes = {state.name: (state.num_layers, state.size_bytes) for state in spec.layout.state_classes}
    assert sizes["mtp_latent"] == (1, 16 * 40 * 4)
    assert sizes["mtp_indexer_keys"] == (1, 16 * 16 * 4)
    assert len(without.layout.state_classes) == 2
    assert spec.compatibility_hash != without.compatibility_hash


def test_a_checkpoint_whose_mtp_layer_was_left_out_proposes_nothing(tmp_path: Path) -> None:
    tiny_mtp.write(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layers.7." not in name}, file)
    executor = load(tmp_path)
    assert not executor.proposes
    assert step(executor, prompt_item(GOLDEN_PROMPT)).drafts == ()


def test_an_mtp_layer_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny_mtp.write(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "eh_proj" not in name}, file)
    with pytest.raises(Unsupported, match=r"missing model\.layers\.7\.eh_proj\.weight"):
        load(tmp_path)
