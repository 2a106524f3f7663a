"""Figures of quality: what they say of models that are equal, and that they tell right calls from wrong ones."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench.quality import bfcl, calls, compare, divergence
from bench.quality.calls import Case
from bench.quality.intervals import bootstrap, mean
from cli.main import app
from shared.engine import stream
from shared.engine.models import registry, tiny
from shared.engine.models.api import Model, Placement
from shared.engine.stream import all_logits
from shared.errors import InvalidRequest, Unsupported, WorkerLost
from tests.oracle import driver

WINDOWS = [[token * 37 % 499 for token in range(start, start + 150)] for start in (0, 150, 300)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.write("glm-5.2-even", path := tmp_path_factory.mktemp("tiny"))
    return path


def load(path: Path) -> Model:
    return registry.load(path, Placement(torch.float32, 1, "torch"))


def test_a_stream_gives_the_logits_of_one_long_step(model_dir: Path) -> None:
    model = load(model_dir)
    streamed = torch.cat(list(stream.logits(model, WINDOWS[0])))
    torch.testing.assert_close(streamed, all_logits(model, WINDOWS[0]), rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_those_of_the_executor(model_dir: Path) -> None:
    expected = driver.generate(driver.load(model_dir), WINDOWS[0][:40], 12)
    assert stream.greedy(load(model_dir), WINDOWS[0][:40], 12) == expected


def test_a_model_differs_in_nothing_from_itself(model_dir: Path) -> None:
    model = load(model_dir)
    with divergence.Predictions(model, WINDOWS) as predictions:
        rows = np.concatenate(divergence.compare(predictions, model, WINDOWS))
    assert rows.shape == (3 * 149, 4)
    assert np.array_equal(rows[:, divergence.BASE], rows[:, divergence.QUANT])
    assert (rows[:, divergence.AGREES] == 1).all()
    assert (rows[:, divergence.DIVERGENCE] == 0).all()


def test_what_is_measured_of_two_models_is_what_their_logits_say(model_dir: Path, tmp_path: Path) -> None:
    tiny.write("glm-5.2-even", tmp_path, seed=1)
    one, other, tokens = load(model_dir), load(tmp_path), WINDOWS[0]
    with divergence.Predictions(one, [tokens]) as predictions:
        (rows,) = divergence.compare(predictions, other, [tokens])
    p, q = (all_logits(model, tokens[:-1]).double().log_softmax(-1) for model in (one, other))
    came = torch.tensor(tokens[1:])[:, None]
    expected = torch.stack(
        [
            -p.gather(1, came)[:, 0],
            -q.gather(1, came)[:, 0],
            torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1),
            (p.argmax(-1) == q.argmax(-1)).double(),
        ],
        dim=1,
    )
    torch.testing.assert_close(torch.from_numpy(rows), expected, rtol=1e-3, atol=1e-3)


def test_models_of_different_vocabularies_are_not_compared(model_dir: Path) -> None:
    model = load(model_dir)
    with divergence.Predictions(model, WINDOWS[:1]) as predictions:
        predictions.vocab_size += 1
        with pytest.raises(InvalidRequest, match="513 and 512 words"):
            divergence.compare(predictions, model, WINDOWS[:1])


def test_a_short_rest_of_a_text_is_no_window() -> None:
    assert [len(window) for window in divergence.windows(range(100), 40)] == [40, 40, 20]
    assert [len(window) for window in divergence.windows(range(99), 40)] == [40, 40]


def test_answers_agree_until_they_first_differ() -> None:
    assert divergence.agreed_length([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert divergence.agreed_length([1, 2], [1, 2]) == 2


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    noise = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        units = [noise.normal(3.0, 1.0, (5, 1)) + noise.normal() for _ in range(30)]  # texts that hang together
        found = bootstrap(units, mean(0), seed)
        held += found.low <= 3.0 <= found.high
    assert 85 <= held <= 99


def test_equal_seeds_give_equal_intervals() -> None:
    units = [np.array([[float(value)]]) for value in range(20)]
    assert bootstrap(units, mean(0), 1) == bootstrap(units, mean(0), 1) != bootstrap(units, mean(0), 2)


def test_figures_draw_both_models_together() -> None:
    """Texts that are hard are hard for both: of a ratio that is the same everywhere there is no doubt."""
    surprise = np.random.default_rng(0).uniform(1, 9, (12, 50, 1))
    tokens = [np.concatenate([s, s + 0.1, s * 0, s * 0], axis=1) for s in surprise]
    answers = compare.Answers((True, False, False), (True, True, False), True)
    found = compare.figures(tokens, [64, 0, 20], answers, compare.Settings())
    ratio = found["perplexity ratio"]
    assert ratio["low"] == pytest.approx(ratio["high"]) == pytest.approx(np.exp(0.1))
    assert found["base perplexity"]["low"] < found["base perplexity"]["value"] < found["base perplexity"]["high"]
    assert found["greedy tokens until they differ"]["value"] == 28
    assert found["greedy answers that never differ"]["value"] == pytest.approx(1 / 3)
    assert found["difference of function calls right"]["value"] == pytest.approx(1 / 3)


def test_the_cases_ask_for_what_their_functions_take() -> None:
    cases = calls.cases()
    assert len(cases) >= 30
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case.tools}
        for call in case.expected:
            schema = known[call["name"]]
            assert call["arguments"].keys() <= schema["properties"].keys(), case.name
            required = {name for name, values in call["arguments"].items() if None not in values}
            assert set(schema["required"]) <= required, case.name


def first_right(case: Case) -> list[dict[str, Any]]:
    return [
        {"name": call["name"], "arguments": {name: v[0] for name, v in call["arguments"].items() if v[0] is not None}}
        for call in case.expected
    ]


@pytest.mark.parametrize("case", calls.cases(), ids=lambda case: case.name)
def test_what_a_case_expects_is_right_and_anything_else_is_not(case: Case) -> None:
    made = first_right(case)
    assert calls.right(case, made)
    assert not calls.right(case, [*made, {"name": "get_weather", "arguments": {"city": "Ur"}}])
    if made:
        name = next(iter(made[0]["arguments"]))
        assert calls.right(case, made[::-1])
        assert not calls.right(case, made[1:])
        assert not calls.right(case, [{**made[0], "arguments": {**made[0]["arguments"], name: "no"}}, *made[1:]])
        assert not calls.right(case, [{**made[0], "arguments": {**made[0]["arguments"], "more": 1}}, *made[1:]])


def test_strings_are_compared_without_case_and_truth_is_no_number() -> None:
    case = Case("", (), "", ({"name": "f", "arguments": {"a": ["Oslo"], "b": [1]}},))
    assert calls.right(case, [{"name": "f", "arguments": {"a": " oslo ", "b": 1.0}}])
    assert not calls.right(case, [{"name": "f", "arguments": {"a": "Oslo", "b": True}}])
    assert not calls.right(case, [{"name": "f", "arguments": None}])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]', ["a", "b"]),
        ('Sure! ```json\n{"name": "a", "arguments": {"x": [1]}}\n```', ["a"]),
        ("I cannot [really] do that.", []),
        ('{"answer": 3}', []),
    ],
)
def test_calls_are_found_in_words(text: str, names: list[str]) -> None:
    assert [call["name"] for call in calls.calls_in(text)] == names


class Gateway(BaseHTTPRequestHandler):
    """Answers every question with its first case's call; `refuses` tools, or everything."""

    refuses = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call = first_right(calls.cases()[0])[0]
        message: dict[str, Any] = {"content": json.dumps([call])}
        if "tools" in body:
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            message = {"content": None, "tool_calls": [{"function": function}]}
        refused = self.refuses == "all" or (self.refuses == "tools" and "tools" in body)
        answer = {"error": {"param": self.refuses}} if refused else {"choices": [{"message": message}]}
        self.send_response(501 if refused else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None: ...


@contextmanager
def gateway(refusing: str) -> Iterator[str]:
    kind = type("Refusing", (Gateway,), {"refuses": refusing})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("refusing", "native"), [("", True), ("tools", False)])
def test_a_model_without_tools_is_told_of_them_in_words(refusing: str, native: bool) -> None:
    with gateway(refusing) as url, calls.Asker(url, "model") as asker:
        assert asker.are_right(calls.cases()) == (True, *[False] * (len(calls.cases()) - 1))
        assert asker.native is native


def test_a_gateway_that_answers_nothing_is_a_fault() -> None:
    with (
        gateway("all") as url,
        calls.Asker(url, "model") as asker,
        pytest.raises(InvalidRequest, match="refused a question"),
    ):
        asker.is_right(calls.cases()[0])
    with calls.Asker("http://127.0.0.1:1", "model") as asker, pytest.raises(WorkerLost, match="no answer"):
        asker.is_right(calls.cases()[0])


def test_a_model_without_a_tokenizer_and_a_text_that_is_short_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"no tokenizer\.json"):
        compare.run(model_dir, model_dir, compare.Settings(), None)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        compare.run(model_dir, model_dir, compare.Settings(text=tmp_path / "none.txt"), None)


STAND_IN = """
import json, os, sys
from pathlib import Path
wanted = json.loads(sys.argv[2])
assert os.environ["OPENAI_BASE_URL"] == "http://gateway/v1"
assert os.environ["OPENAI_API_KEY"] == KEY
score = {"num_cases": wanted["limit"], "num_refused": REFUSED, "refusal": "no tools here"}
Path(wanted["scores"]).write_text(json.dumps({name: score for name in wanted["categories"]}))
"""


def settings(python: Path, directory: Path, api_key: str = "") -> bfcl.Settings:
    return bfcl.Settings("http://gateway", "model", python, directory, ("multiple",), limit=3, api_key=api_key)


def stand_in(directory: Path, *, num_refused: int = 0, key: str = "none") -> Path:
    """A Python whose suite is STAND_IN, and expects that API key."""
    said = STAND_IN.replace("REFUSED", str(num_refused)).replace("KEY\n", f"{key!r}\n")
    (directory / "stand_in.py").write_text(said)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec {sys.executable} {directory}/stand_in.py "$@"\n')
    python.chmod(0o755)
    return python


def test_the_suite_runs_in_an_environment_of_its_own(tmp_path: Path) -> None:
    python = stand_in(tmp_path, num_refused=2)
    assert bfcl.run(settings(python, tmp_path / "out"))["multiple"]["num_cases"] == 3
    stand_in(tmp_path, num_refused=3)
    with pytest.raises(InvalidRequest, match="every question of multiple was refused: no tools here"):
        bfcl.run(settings(python, tmp_path / "out"))
    (tmp_path / "stand_in.py").write_text("raise SystemExit(3)")
    with pytest.raises(WorkerLost, match="ended with 3"):
        bfcl.run(settings(python, tmp_path / "out"))


def test_the_suite_sends_the_api_key_that_its_user_has(tmp_path: Path) -> None:
    """As the gateway itself would read it; and nobody prints it by chance."""
    asked = settings(stand_in(tmp_path, key="secret"), tmp_path / "out", "secret=team,other")
    assert bfcl.run(asked)["multiple"]["num_cases"] == 3
    assert "secret" not in repr(asked)


def test_a_suite_that_is_not_installed_is_said(tmp_path: Path) -> None:
    for python, fault in (
        (Path(sys.executable), "has no package bfcl-eval: python3 -m venv"),
        (tmp_path, "cannot be run"),
    ):
        with pytest.raises(Unsupported, match=fault):
            bfcl.run(settings(python, tmp_path / "out"))


def test_the_commands_name_what_is_wrong(model_dir: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["eval", "quant", str(model_dir), str(model_dir), "--no-calls"])
    assert told.exit_code == 1
    assert "no tokenizer.json" in " ".join(told.output.split())
    told = CliRunner().invoke(app, ["eval", "bfcl", "--url", "http://127.0.0.1:1", "--out", str(tmp_path / "out")])
    assert told.exit_code == 1
    assert "no answer from" in told.output
