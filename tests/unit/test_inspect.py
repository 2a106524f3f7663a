"""What `forebay inspect` says is what publishers count, and what is in the files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli.inspect import facts
from cli.main import app
from shared.engine.models import accounting, registry, tensor_list, tiny
from shared.engine.models.tensor_list import ModelTensors
from shared.errors import Unsupported
from tests.architecture.tree import ROOT
from tests.oracle import quantized
from tests.unit.test_glm_shapes import GLM_51, GLM_52

GLM = {"architectures": ["GlmMoeDsaForCausalLM"]}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
# All but the routed experts of the model's own layers, in the patterns of ModelOpt.
NVFP4 = {
    "quantization_config": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": [
            *(f"model.layers.{layer}.*" for layer in (0, 1, 2, 78)),
            *("*self_attn*", "*.mlp.gate", "*shared_experts*", "lm_head"),
        ],
    }
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def glm_52() -> ModelTensors:
    return tensor_list.of_config(GLM_52 | GLM)


@pytest.fixture(scope="module")
def glm_52_fp8() -> ModelTensors:
    return tensor_list.of_config(GLM_52 | GLM | FP8)


def total_bytes(model: ModelTensors) -> int:
    return sum(tensor.num_bytes for tensor in model.tensors.values())


def test_a_bare_configuration_gives_the_published_totals(glm_52: ModelTensors, glm_52_fp8: ModelTensors) -> None:
    assert (glm_52.num_stored, total_bytes(glm_52)) == (59_585, 1_506_659_919_872)
    assert (glm_52_fp8.num_stored, total_bytes(glm_52_fp8)) == (118_629, 755_617_140_416)


def test_glm_51_has_its_published_total() -> None:
    glm_51 = tensor_list.of_config(GLM_51 | GLM)
    assert (glm_51.num_stored, total_bytes(glm_51)) == (59_870, 1_507_728_316_928)


def test_the_parameters_of_glm_52_are_the_published_ones(glm_52: ModelTensors) -> None:
    found = accounting.parameters(glm_52)
    assert (found.total, found.mtp) == (753_329_940_480, 9_952_920_576)
    assert found.total - found.mtp == 743_377_019_904
    assert round(found.active / 1e9, 1) == 40.3
    assert round(found.active_with_embedding / 1e9, 2) == 41.25


def test_an_nvfp4_configuration_quantizes_what_its_list_does_not_ignore() -> None:
    model = tensor_list.of_config(GLM_52 | GLM | NVFP4)
    entries = accounting.module_classes(model)
    assert {entry.name for entry in entries if entry.form == "nvfp4"} == {"routed experts"}
    assert round(total_bytes(model) / 1e9, 2) == 464.80


@pytest.mark.parametrize(
    ("ignored", "left"),
    [
        ([], set()),
        (["model.layers.0.mlp.up_proj"], {"0.mlp.up"}),
        (["model.layers.0.mlp.up", "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"], set()),
        (["*.1.mlp.up_proj", "model.layers.?.self_attn.k_proj"], {"1.mlp.up", "0.self_attn.k", "1.self_attn.k"}),
        ([r"re:.*1\.(mlp\.(gate|down)|self_attn\.o)"], {"1.mlp.gate", "1.mlp.down", "1.self_attn.o"}),
        (["re:model", "nothing.*"], None),
        (["lm_head", "model.layers.[!0].mlp.down_proj", r"re:.*0\.self_attn\.v"], {"1.mlp.down", "0.self_attn.v"}),
    ],
)
def test_a_list_of_what_is_ignored_has_names_patterns_and_expressions(
    ignored: list[str], left: set[str] | None
) -> None:
    """An expression says how a name begins."""
    about = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored}
    model = tensor_list.of_config(QWEN3 | {"quantization_config": about})
    linears = {name: tensor.form for name, tensor in model.tensors.items() if tensor_list.LINEAR.search(name)}
    plain = {
        name.removeprefix("model.layers.").removesuffix("_proj.weight")
        for name, form in linears.items()
        if form != "nvfp4"
    }
    assert plain == left if left is not None else len(plain) == len(linears)


def test_classes_of_modules_are_all_of_the_model(glm_52_fp8: ModelTensors) -> None:
    entries = accounting.module_classes(glm_52_fp8)
    assert sum(entry.num_bytes for entry in entries) == total_bytes(glm_52_fp8)
    assert {entry.num_tensors for entry in entries if entry.name == "routed experts"} == {75 * 256 * 3}
    assert sum(entry.num_tensors for entry in entries if entry.name == "mtp") == 791


def test_kv_of_glm_52_takes_the_published_bytes_per_token(glm_52: ModelTensors) -> None:
    plain, drafted = accounting.kv_bytes_per_token(glm_52), accounting.kv_bytes_per_token(glm_52, mtp=True)
    assert (plain["bfloat16"], plain["fp8"]) == (95_232, 53_940)
    assert (drafted["bfloat16"], drafted["fp8"]) == (96_640, 54_728)


def test_what_fits_is_what_a_rank_has_left(glm_52: ModelTensors, glm_52_fp8: ModelTensors) -> None:
    """Stored in FP8 it fits on 8 GPUs; with experts dequantized, as it is computed with, it does not and leaves no
    token. What attention has in FP8 stays so."""
    fits = {(fit.weights, fit.kv_dtype): fit for fit in accounting.fits(glm_52_fp8, 8, 141 * 10**9)}
    fit, eighth = fits["as stored", "fp8"], total_bytes(glm_52_fp8) / 8
    assert eighth < fit.weight_bytes < eighth * 1.02
    assert fit.room_bytes == 141 * 10**9 - fit.weight_bytes
    assert fit.num_tokens == fit.room_bytes // 54_728
    held = fits["fp8 and bfloat16", "fp8"]
    assert held.room_bytes < 0
    assert held.num_tokens == 0
    wide = accounting.fits(glm_52, 8, 141 * 10**9)[0]
    assert 2.8e9 < wide.weight_bytes - held.weight_bytes < 2.9e9


def test_experts_in_nvfp4_are_held_as_they_are_stored() -> None:
    """On 8 GPUs of 80 GB NVIDIA's checkpoint leaves room for a context of 131,072 tokens in fp8; in bfloat16 nothing
    would fit. What else is stored in NVFP4 is dequantized, but for dense models."""
    fits = accounting.fits(tensor_list.of_config(GLM_52 | GLM | NVFP4), 8, 80 * 10**9)
    held = {fit.kv_dtype: fit for fit in fits if fit.weights == "nvfp4 and bfloat16"}
    assert held["fp8"].num_tokens > 131_072
    packed = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}
    glm, dense = (tensor_list.of_config(fields | packed) for fields in (GLM_52 | GLM, QWEN3))
    of_glm, of_dense = ({fit.weights: fit.weight_bytes for fit in accounting.fits(m, 1, 1)} for m in (glm, dense))
    assert of_glm["nvfp4 and bfloat16"] > of_glm["as stored"] + 10 * 10**9
    assert of_dense["nvfp4 and bfloat16"] == of_dense["as stored"]


def test_heads_of_a_dense_model_are_shared_out_with_their_kv() -> None:
    model = tensor_list.of_config(QWEN3)
    alone, halves = (accounting.fits(model, num_gpus, 10**6)[0] for num_gpus in (1, 2))
    assert alone.kv_bytes_per_token == 2 * halves.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    assert alone.weight_bytes == 2 * accounting.parameters(model).total


def test_a_tied_embedding_is_active_as_the_head() -> None:
    found = accounting.parameters(tensor_list.of_config(QWEN3))
    assert found.active == found.active_with_embedding == found.total


@pytest.mark.parametrize("method", list(quantized.METHODS))
def test_headers_of_a_quantized_checkpoint_say_what_its_files_hold(method: str, tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path / "source")
    quantized.write(tmp_path / "source", method, tmp_path / "quantized", tmp_path / "meant")
    plain, packed = (tensor_list.read(tmp_path / name) for name in ("source", "quantized"))
    forms = {(entry.name, entry.form) for entry in accounting.module_classes(packed)}
    assert packed.from_headers
    assert packed.has_mtp
    assert ("attention", "fp8" if method == "fp8" else "nvfp4") in forms
    assert ("embedding and head", "float32") in forms
    assert accounting.parameters(packed) == accounting.parameters(plain)


def test_a_configuration_and_the_files_made_by_it_agree(tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    expected, found = tensor_list.of_config(fields | {"dtype": "float32"}), tensor_list.read(tmp_path)
    assert expected.tensors == found.tensors


def test_what_can_be_inspected_is_what_can_be_served() -> None:
    assert set(tensor_list.ARCHITECTURES) == set(registry.BUILDERS)


def test_the_command_tells_programs_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    told = CliRunner().invoke(app, ["inspect", str(tmp_path), "--gpus", "2", "--gpu-memory", "1", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.output) == facts(tensor_list.of_config(QWEN3), 2, 1.0)


def test_the_command_tells_people_what_does_not_fit(tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path)
    told = CliRunner().invoke(app, ["inspect", str(tmp_path), "--gpus", "2", "--gpu-memory", "0.0001"])
    assert told.exit_code == 0, told.output
    for words in ("GlmMoeDsaForCausalLM", "routed experts", "with MTP", "too few"):
        assert words in told.output


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (QWEN3 | {"architectures": ["Mystery"]}, "'Mystery' is not supported"),
        ({"architectures": ["LlamaForCausalLM"]}, "config.json lacks"),
        (QWEN3 | {"dtype": "int3"}, "int3"),
        (QWEN3 | {"quantization_config": "fp8"}, "no JSON object"),
        (QWEN3 | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "without NVFP4"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(Unsupported, match=fault):
        tensor_list.of_config(fields)


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    def fault(*arguments: str) -> str:
        told = CliRunner().invoke(app, ["inspect", *arguments])
        assert told.exit_code == 2
        return " ".join(told.output.split())

    assert "it has no config.json" in fault(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert "given together" in fault(str(tmp_path), "--gpus", "2")
    assert "cannot be shared out" in fault(str(tmp_path), "--gpus", "3", "--gpu-memory", "80")
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "model.norm.weight is [3], not [32]" in fault(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert "cannot be read as safetensors" in fault(str(tmp_path))


def test_a_checkpoint_is_inspected_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import cli.inspect"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
