"""GLM's MTP layer on a GPU beside the CPU path in float32 and bfloat16, and drafts of executors. Needs a GPU."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.api import BatchItem, Chosen, SamplingParams
from shared.engine.batch import build
from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.kernels import w8a16
from shared.engine.kernels.cuda_fp8 import Fp8Matrix
from shared.engine.models import glm
from shared.engine.models.api import DraftLayer, DraftStep, Placement
from tests.oracle import random_glm
from tests.oracle.test_cuda_glm import NUM_PAGES, PAGE_SIZE, VARIANTS, distance, in_e4m3, item, require_as_near

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PLACES = (
    Placement(torch.bfloat16, 1, device=torch.device("cuda", 0), mtp=True),
    Placement(torch.float32, 2, mtp=True),
    Placement(torch.bfloat16, 2, mtp=True),
)
NUM_DRAFTS = 3
HEAD_UNIT = 2.0**-11
# Of models. Of one, rounding alone makes 10 to 20 of the 48 rows choose otherwise (docs/LOG.md), as rows of a sequence
# follow one another.
SEEDS = (1, 2, 3, 4, 5)


class Drafting:
    """A model somewhere, told what its drafts are."""

    def __init__(self, model_dir: Path, place: Placement) -> None:
        model = glm.load(model_dir, place)
        assert model.draft_layer is not None
        self.layer: DraftLayer = model.draft_layer
        self.layout = model.layout(PAGE_SIZE)
        self.pool = torch.zeros(NUM_PAGES, self.layout.page_bytes, dtype=torch.uint8, device=place.device)

    @torch.inference_mode()
    def logits(self, items: Sequence[BatchItem], going_on: Sequence[int]) -> torch.Tensor:
        """Of the drafts behind a step: of all sequences at first, then of those `going_on`."""
        _, states = self.layer.forward(build(items, PAGE_SIZE), self.pool, self.layout)
        following = [replace(each, token_ids=moved(each, 1), num_drafts=0) for each in items]
        step = self.layer.extend(build(following, PAGE_SIZE), states, self.pool, self.layout)
        found = [step.logits.float().cpu()]
        for number in range(1, NUM_DRAFTS):
            places = going_on if number == 1 else range(len(going_on))
            step = self._advance([items[place] for place in going_on], step, places, number)
            found.append(step.logits.float().cpu())
        return torch.cat(found)

    def _advance(self, items: Sequence[BatchItem], last: DraftStep, places: Sequence[int], number: int) -> DraftStep:
        starts = [each.start + len(each.token_ids) - 1 + number for each in items]
        following = [
            replace(each, token_ids=moved(each, 1 + number)[-1:], start=start, num_drafts=0)
            for each, start in zip(items, starts, strict=True)
        ]
        return self.layer.advance(build(following, PAGE_SIZE), last, places, self.pool, self.layout)


def moved(each: BatchItem, by: int) -> list[int]:
    """The tokens so many positions on, as `item` makes them."""
    return list(item(each.page_ids[0], each.start + by, len(each.token_ids)).token_ids)


STEPS = (
    ([item(0, 0, 150), item(16, 0, 97)], [0, 1]),
    ([item(0, 150, 1), item(16, 97, 1)], [1]),
    *(([item(0, 151 + 4 * n, 4), item(16, 98 + 4 * n, 4), item(32, 4 * n, 4)], [0, 2]) for n in range(5)),
    ([item(0, 171, 1)], [0]),
)


@pytest.mark.parametrize("share", [True, False], ids=["as 5.2 shares a selection", "as 5 and 5.1 select anew"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_as_near_to_float32_as_bfloat16_is_on_the_cpu(variant: str, share: bool, tmp_path: Path) -> None:
    model_dirs = []
    for seed in SEEDS if variant != "nothing to choose" else SEEDS[:1]:
        model_dirs.append(tmp_path / str(seed))
        model_dirs[-1].mkdir()
        random_glm.write(model_dirs[-1], seed, index_share_for_mtp_iteration=share, **VARIANTS[variant])
    require_near_drafts(variant, model_dirs)


def test_drafts_of_a_checkpoint_in_e4m3_are_as_near(tmp_path: Path) -> None:
    """With a head that e4m3 has exactly, which is what they are chosen by."""
    model_dir = in_e4m3(tmp_path, "nothing to choose")
    put_head_in_e4m3(model_dir)
    head = getattr(Drafting(model_dir, PLACES[0]).layer, "head")  # noqa: B009 - what only a GPU has
    assert isinstance(head, Fp8Matrix)
    require_near_drafts("nothing to choose", [model_dir])


def put_head_in_e4m3(model_dir: Path) -> None:
    """Round it to multiples of a power of two by codes of e4m3, of which each block has the largest."""
    for path in model_dir.glob("*.safetensors"):
        tensors = load_file(path)
        if (head := tensors.get("lm_head.weight")) is not None:
            codes = (head.float() / HEAD_UNIT).clamp(-w8a16.CODE_MAX, w8a16.CODE_MAX)
            codes[:: w8a16.BLOCK, :: w8a16.BLOCK] = w8a16.CODE_MAX
            tensors["lm_head.weight"] = (codes.to(torch.float8_e4m3fn).float() * HEAD_UNIT).bfloat16()
            save_file(tensors, path)


def require_near_drafts(variant: str, model_dirs: Sequence[Path]) -> None:
    """That drafts on the GPU are as near to float32 as those on the CPU in bfloat16."""
    ours, theirs = list[torch.Tensor](), list[torch.Tensor]()
    for model_dir in model_dirs:
        found = []
        for place in PLACES:
            made = Drafting(model_dir, place)
            found.append(torch.cat([made.logits(*step) for step in STEPS]))
        on_gpu, exact, rounded = found
        ours.append(distance(on_gpu, exact))
        theirs.append(distance(rounded, exact))
    require_as_near(variant, torch.cat(ours), torch.cat(theirs))


def executor(model_dir: Path, *, mtp: bool) -> TorchExecutor:
    return load_executor(
        model_dir, model_name="random", dtype="bfloat16", page_size=PAGE_SIZE, device="cuda", num_threads=1,
        num_pages=NUM_PAGES, mtp=mtp,
    )  # fmt: skip


def chosen(made: TorchExecutor, each: BatchItem) -> Chosen:
    (found,) = made.forward([each])
    assert found is not None
    return found


PROMPT = list(item(0, 0, 60).token_ids)


def part(tokens: Sequence[int], start: int, sampling: SamplingParams, num_drafts: int = 0) -> BatchItem:
    own = list(tokens[start:])
    return BatchItem("r", own, start, range(16), True, sampling, 60, tokens[: len(tokens) - num_drafts], num_drafts, 3)


WAYS = (
    SamplingParams(),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, presence_penalty=0.5),
)


@pytest.mark.parametrize("sampling", WAYS, ids=["greedy", "drawn", "penalties"])
def test_tokens_and_drafts_do_not_depend_on_what_was_verified(sampling: SamplingParams, tmp_path: Path) -> None:
    random_glm.write(tmp_path, **VARIANTS["nothing to choose"])
    require_equal_tokens(tmp_path, sampling)


def test_nor_do_those_of_a_checkpoint_in_e4m3(tmp_path: Path) -> None:
    require_equal_tokens(in_e4m3(tmp_path, "nothing to choose"), SamplingParams())


def require_equal_tokens(model_dir: Path, sampling: SamplingParams) -> None:
    """That tokens and drafts equal those one by one, whatever was verified before."""
    without, one_by_one = executor(model_dir, mtp=False), executor(model_dir, mtp=True)
    tokens, drafts = list(PROMPT), list[tuple[int, ...]]()
    for _ in range(24):
        start = 0 if len(tokens) == len(PROMPT) else len(tokens) - 1
        plain, drafting = (chosen(made, part(tokens, start, sampling)) for made in (without, one_by_one))
        assert plain.tokens == drafting.tokens
        drafts.append(drafting.drafts)
        tokens.append(plain.tokens[0].token_id)
    verifying, at = executor(model_dir, mtp=True), len(PROMPT)
    assert chosen(verifying, part(tokens[:at], 0, sampling)).drafts == drafts[0]
    for num_right in (0, 3, 1, 2, 3, 0, 2, 3):
        right = tokens[at + 1 : at + 1 + num_right]
        wrong = [(token + 1) % 1000 for token in tokens[at + 1 + num_right : at + 4]]
        found = chosen(verifying, part([*tokens[: at + 1], *right, *wrong], at, sampling, 3))
        assert [token.token_id for token in found.tokens] == tokens[at + 1 : at + 2 + num_right]
        at += 1 + num_right
        assert found.drafts == drafts[at - len(PROMPT)]
