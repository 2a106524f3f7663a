"""What the commands say before there is a cluster, and to wrong flags."""

from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.state import RunDirectory, RunState
from cli.target import url_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOREBAY_CACHE", str(tmp_path))
    return tmp_path


COMMANDS = ["up", "status", "chat", "models", "explain", "inspect", "make-tiny", "quantize", "bench", "eval"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"forebay {metadata.version('forebay')}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status"], "no cluster runs on this machine; start one with `forebay up`"),
        (["explain", "hello"], "no cluster runs on this machine; start one with `forebay up`"),
        (["chat", "hello", "--url", "127.0.0.1:1"], "no answer from http://127.0.0.1:1"),
        (["status", "--redis", "foo"], "must be like redis://HOST:PORT/0"),
        (["up", "--redis", "foo"], "must be like redis://HOST:PORT/0"),
        (["up", "--dtype", "float8"], "'float8' is not one of 'bfloat16'"),
        (["up", "--model", "no/such"], "no model 'no/such'"),
        (["up", "--engine", "sim", "--port", "0", "--host", "198.51.100.1"], "cannot listen on 198.51.100.1"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(cache: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, words, terminal_width=200)
    assert done.exit_code in {1, 2}
    assert said in " ".join(done.output.replace("│", " ").split())
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("given", ["127.0.0.1:81", "http://127.0.0.1:81/", "http://127.0.0.1:81/v1"])
def test_a_url_is_taken_as_people_write_it(given: str) -> None:
    assert url_of(given) == "http://127.0.0.1:81"


def test_a_cluster_that_is_still_starting_is_not_asked(cache: Path) -> None:
    directory = RunDirectory.create(cache)
    directory.write(RunState(supervisor_pid=int(directory.path.name), started_unix_ms=1, redis_url="redis://x"))
    done = CliRunner().invoke(app, ["chat", "hello"])
    assert "still being started" in done.output


def test_a_path_is_never_cut(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cache / ("deep" * 40)
    monkeypatch.setenv("FOREBAY_CACHE", str(place))
    model = place / "models" / "SmolLM2-135M-Instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert str(model) in CliRunner().invoke(app, ["models"]).output
