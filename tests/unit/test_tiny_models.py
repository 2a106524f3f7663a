"""Models with random weights."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from shared.engine.models import tiny
from shared.errors import InvalidRequest


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny.write("glm-5.2", tmp_path / name, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"only glm-5\.2"):
        tiny.write("gpt-9", tmp_path)
    assert CliRunner().invoke(app, ["make-tiny", "gpt-9", str(tmp_path)]).exit_code == 2
