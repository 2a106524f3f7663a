"""Models with random weights."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from services.gateway.text_model import load
from shared.engine.models import tiny
from shared.errors import InvalidRequest
from tests.oracle import driver
from tests.unit.gateway.tiny_tokenizers import byte_level, write_model


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny.write("glm-5.2", tmp_path / name, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"only glm-5\.2"):
        tiny.write("gpt-9", tmp_path)
    assert CliRunner().invoke(app, ["make-tiny", "gpt-9", str(tmp_path)]).exit_code == 2


def text_model(path: Path, **config: Any) -> Path:
    """A model directory of which nothing but the tokenizer, the template and the stop tokens is of interest."""
    write_model(path, byte_level())
    (path / "config.json").write_text(json.dumps({"eos_token_id": 3} | config))
    return path


def test_with_the_tokenizer_of_another_model_text_and_conversations_work(tmp_path: Path) -> None:
    source = text_model(tmp_path / "source")
    result = CliRunner().invoke(app, ["make-tiny", "glm-5.2", str(tmp_path / "glm"), "--tokenizer", str(source)])
    assert result.exit_code == 0
    num_tokens, (stop,) = byte_level().get_vocab_size(), driver.load(tmp_path / "glm").spec.eos_token_ids
    assert (driver.load(tmp_path / "glm").spec.vocab_size, stop) == (num_tokens, 3)
    text = load(tmp_path / "glm")
    assert text.tokenizer is not None
    assert text.chat_template is not None
    prompt = text.chat_template.render([{"role": "user", "content": "hello"}])
    ids = asyncio.run(text.tokenizer.encode(prompt, special=False))
    assert len(driver.generate(driver.load(tmp_path / "glm"), ids, 3)) == 3


def test_stop_tokens_are_those_of_the_generation_config_where_there_is_one(tmp_path: Path) -> None:
    source = text_model(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    tiny.write("glm-5.2-even", tmp_path / "glm", tokenizer_dir=source)
    assert driver.load(tmp_path / "glm").spec.eos_token_ids == (5, 7)


@pytest.mark.parametrize("content", [None, "{}", '{"model": {"vocab": {}}}'])
def test_a_tokenizer_that_is_none_is_refused_with_its_place(content: str | None, tmp_path: Path) -> None:
    source = text_model(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    if content is not None:
        (source / "tokenizer.json").write_text(content)
    result = CliRunner().invoke(app, ["make-tiny", "glm-5.2", str(tmp_path / "glm"), "--tokenizer", str(source)])
    assert result.exit_code == 2
    assert str(source) in result.output
    assert not (tmp_path / "glm").exists()
