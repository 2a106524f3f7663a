"""Quantizing: what is chosen, what it is called, and that a run may be killed anywhere."""

import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli.main import app
from shared.engine.models import accounting, tensor_list, tiny
from shared.engine.models.tensor_list import ModelTensors
from shared.engine.quantizer import calibration, choice, crew, description, job
from shared.engine.quantizer.calibration import read_prompts
from shared.engine.quantizer.choice import Modules
from shared.errors import Fault, InvalidRequest, Unsupported
from tests.unit import quantizing
from tests.unit.quantizing import SHARD_BYTES, progress, run
from tests.unit.test_glm_shapes import GLM_52
from tests.unit.test_inspect import GLM, QWEN3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.write("glm-5.2-even", directory := tmp_path_factory.mktemp("tiny"))
    (directory / "chat_template.jinja").write_text("hello")
    return directory


@pytest.fixture
def source(written: Path, tmp_path: Path) -> Path:
    """For each test a copy of its own."""
    return shutil.copytree(written, tmp_path / "source")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def glm_52() -> ModelTensors:
    return tensor_list.of_config(GLM_52 | GLM)


@pytest.fixture(scope="module")
def glm_52_told(glm_52: ModelTensors) -> dict[Modules, ModelTensors]:
    return {modules: told(glm_52, GLM_52 | GLM, modules) for modules in Modules}


def told(model: ModelTensors, fields: dict[str, Any], modules: Modules) -> ModelTensors:
    """The model as a checkpoint's configuration describes it after quantizing."""
    ignored = choice.left_alone(model, set(choice.chosen(model, modules)))
    return tensor_list.of_config(description.Description(tuple(ignored), False, "0").config(fields))


@pytest.mark.parametrize("modules", Modules)
def test_the_list_of_what_is_left_alone_names_exactly_that(
    glm_52: ModelTensors, glm_52_told: dict[Modules, ModelTensors], modules: Modules
) -> None:
    names = {name for name, tensor in glm_52_told[modules].tensors.items() if tensor.form == "nvfp4"}
    assert names == set(choice.chosen(glm_52, modules))


def test_routed_experts_of_glm_52_make_nvidias_checkpoint(
    glm_52: ModelTensors, glm_52_told: dict[Modules, ModelTensors]
) -> None:
    assert choice.default(glm_52) is Modules.ROUTED_EXPERTS
    num_bytes = sum(tensor.num_bytes for tensor in glm_52_told[Modules.ROUTED_EXPERTS].tensors.values())
    assert round(num_bytes / 1e9, 2) == 464.80


def test_fp8_layers_that_are_kept_are_told_by_name(glm_52: ModelTensors) -> None:
    fields = GLM_52 | GLM
    fp8 = tensor_list.of_config(fields | {"quantization_config": {"quant_method": "fp8"}})
    names = choice.chosen(fp8, Modules.ROUTED_EXPERTS)
    kept = choice.kept(fp8, set(names))
    ignored = choice.left_alone(fp8, {*names, *kept})
    told = description.Description(tuple(ignored), False, "0", tuple(names), tuple(kept))
    after = tensor_list.of_config(told.config(fields))
    assert {name for name, tensor in after.tensors.items() if tensor.form == "fp8"} == set(kept)
    assert {name for name, tensor in after.tensors.items() if tensor.form == "nvfp4"} == set(names)
    with pytest.raises(InvalidRequest, match="no layers in FP8"):
        choice.kept(glm_52, set(names))


def test_all_linears_are_all_but_head_embedding_router_and_mtp(
    glm_52: ModelTensors, glm_52_told: dict[Modules, ModelTensors]
) -> None:
    after = glm_52_told[Modules.ALL_LINEARS]
    plain = {entry.name for entry in accounting.module_classes(after) if entry.form != "nvfp4"}
    assert plain == {"norms and router", "embedding and head", "mtp"}
    ignored = choice.left_alone(glm_52, set(choice.chosen(glm_52, Modules.ALL_LINEARS)))
    assert ignored == ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(3, 78)), "model.layers.78.*"]


def test_a_dense_model_is_quantized_whole() -> None:
    model = tensor_list.of_config(QWEN3)
    assert choice.default(model) is Modules.ALL_LINEARS
    assert len(choice.chosen(model, Modules.ALL_LINEARS)) == 2 * 7
    with pytest.raises(InvalidRequest, match="has no routed-experts"):
        choice.chosen(model, Modules.ROUTED_EXPERTS)


def test_what_is_computed_as_one_shares_a_scale() -> None:
    names = [f"a.{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")] + ["b.up_proj.weight"]
    groups = choice.joined(names)
    assert groups["a.k_proj.weight"] == ("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight")
    assert groups["a.up_proj.weight"] == ("a.gate_proj.weight", "a.up_proj.weight")
    assert (groups["a.o_proj.weight"], groups["b.up_proj.weight"]) == (("a.o_proj.weight",), ("b.up_proj.weight",))


def test_files_are_bounded_and_the_index_leads_to_every_tensor(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "made")
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    found = {path.name: load_file(path) for path in (tmp_path / "made").glob("*.safetensors")}
    assert len(found) == result.num_shards > 3
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in found.values()]
    assert max(sizes) <= SHARD_BYTES
    assert index["metadata"]["total_size"] == sum(sizes) == result.num_bytes
    assert index["weight_map"] == {name: file for file, tensors in found.items() for name in tensors}


def test_what_lies_beside_the_weights_comes_along(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "made")
    names = {path.name for path in (tmp_path / "made").iterdir() if path.suffix != ".safetensors"}
    index = "model.safetensors.index.json"
    assert names == {"config.json", "hf_quant_config.json", "chat_template.jinja", index}


def test_inspect_reads_the_result_right(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "made")
    forms = {(entry.name, entry.form) for entry in accounting.module_classes(tensor_list.read(tmp_path / "made"))}
    assert {name for name, form in forms if form == "nvfp4"} == {"routed experts"}
    assert ("mtp", "float32") in forms
    assert (
        tensor_list.read(tmp_path / "made").tensors
        == told(
            tensor_list.read(source), json.loads((source / "config.json").read_text()), Modules.ROUTED_EXPERTS
        ).tensors
    )


def test_several_processes_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one")
    read: list[int] = []
    run(source, tmp_path / "two", num_processes=2, progress=progress(read.append))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert read[-1] == sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    for point in (0, 2_000_000, 4_000_000):
        process = crew.processes().Process(target=quantizing.killed, args=(source, tmp_path / "made", point))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "made" / "config.json").exists()
        for path in (tmp_path / "made").glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    result = run(source, tmp_path / "made")
    assert 0 < result.num_kept < result.num_shards
    assert files(tmp_path / "made") == files(tmp_path / "whole")


def interrupted(source: Path, directory: Path) -> None:
    def at(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, directory, progress=progress(at))


def test_an_unfinished_run_of_something_else_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "made")
    with pytest.raises(InvalidRequest, match="unfinished run of another shard size"):
        run(source, tmp_path / "made", job.Options(shard_bytes=1000))
    tiny.write("glm-5.2-even", tmp_path / "other", seed=1)
    with pytest.raises(InvalidRequest, match="unfinished run of another source"):
        run(tmp_path / "other", tmp_path / "made")


def test_scales_of_an_unfinished_run_are_not_measured_again(source: Path, tmp_path: Path) -> None:
    measured: list[int] = []

    def calibrate(names: list[str]) -> dict[str, float]:
        measured.append(len(names))
        return dict.fromkeys(names, 0.5)

    def at(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "made", calibrate=calibrate, progress=progress(at))
    run(source, tmp_path / "made", calibrate=calibrate)
    assert len(measured) == 1
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.3.mlp.experts.0.up_proj.input_scale"
    assert load_file(tmp_path / "made" / index[name])[name].item() == 0.5


def test_a_directory_with_something_else_in_it_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "thesis.tex").write_text("mine")
    with pytest.raises(InvalidRequest, match=r"not empty: it holds thesis\.tex"):
        run(source, tmp_path / "made")
    assert files(tmp_path / "made") == {"thesis.tex": b"mine"}


def test_a_full_disk_is_said_and_the_run_can_go_on(source: Path, tmp_path: Path) -> None:
    def at(done: int) -> None:
        if done > 1_000_000:
            raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(InvalidRequest, match="is full; with room, the same command goes on"):
        run(source, tmp_path / "made", progress=progress(at))
    assert run(source, tmp_path / "made").num_kept


@pytest.mark.parametrize(("value", "word", "num_processes"), [(float("nan"), "NaN", 1), (float("-inf"), "infinite", 2)])
def test_a_weight_that_is_no_number_is_named(
    source: Path, tmp_path: Path, value: float, word: str, num_processes: int
) -> None:
    tensors, name = load_file(source / "model.safetensors"), "model.layers.4.mlp.experts.2.down_proj.weight"
    tensors[name][3, 3] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(Unsupported, match=f"experts.2.down_proj.weight has an element that is {word}"):
        run(source, tmp_path / "made", num_processes=num_processes)


def test_rows_that_are_no_whole_groups_are_named(tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path / "source")
    with pytest.raises(Unsupported, match=r"experts\.0\.gate_proj\.weight has 120 columns, and 95 more"):
        run(tmp_path / "source", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_what_is_quantized_already_is_refused(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "made")
    with pytest.raises(Unsupported, match="in NVFP4 already"):
        run(tmp_path / "made", tmp_path / "again")


def test_unseen_layers_get_the_scale_of_their_kind_else_of_their_layer() -> None:
    names = [f"model.layers.{place}_proj.weight" for place in ("1.e.0.up", "1.e.1.up", "1.kv_b", "2.up")]
    filled = calibration.fill_in(names, {names[0]: 3.0, "model.layers.1.o_proj.weight": 5.0, names[3]: 9.0})
    assert list(filled.values()) == [3.0, 3.0, 5.0, 9.0]


def test_prompts_are_read_as_token_ids(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [1, 2]}\n\n{"text": [3]}\n')
    assert read_prompts(file, source).token_ids == ((1, 2), (3,))


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.jsonl", "{", "cannot be read as prompts"),
        ("a.jsonl", '{"question": "?"}', "cannot be read as prompts"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.txt", "hello", "token ids"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    name: str, text: str, fault: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Fault, match=fault):
        read_prompts(tmp_path / name, source)


def test_the_command_quantizes_and_names_what_is_wrong(source: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        return " ".join(CliRunner().invoke(app, ["quantize", str(source), *arguments]).output.split())

    assert "576 linear layers in NVFP4" not in told(str(tmp_path / "made"), "--modules", "some")
    assert "96 linear layers in NVFP4, 1 files" in told(str(tmp_path / "made"))
    assert "is not empty" in told(str(tmp_path / "made"))
    assert "routed-experts, all-linears" in told(str(tmp_path / "other"), "--modules", "some")
