"""A cluster whose gateway asks for API keys, and the commands that talk to it."""

import httpx
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.e2e.cluster import RunningCluster


def test_a_cluster_that_asks_for_keys_comes_up_and_is_talked_to(
    guarded_cluster: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOREBAY_API_KEY", raising=False)
    url = guarded_cluster.url
    assert httpx.get(f"{url}/v1/models").status_code == 401

    listing = ["models", "--url", url]
    refused = CliRunner().invoke(app, listing)
    assert (refused.exit_code, "asks for an API key" in refused.output) == (1, True)
    assert "sim" in CliRunner().invoke(app, [*listing, "--api-key", "secret"]).output
    refused = CliRunner().invoke(app, [*listing, "--api-key", "guessed"])
    assert (refused.exit_code, "refuses this API key" in refused.output) == (1, True)

    # The suite is not installed here: who gets as far as that was let in.
    suite = ["eval", "bfcl", "--url", url, "--model", "sim"]
    for given, said in ((), "asks for an API key"), (("--api-key", "guessed"), "refuses this API key"):
        assert said in CliRunner().invoke(app, [*suite, *given]).output
    assert "bfcl-eval" in CliRunner().invoke(app, [*suite, "--api-key", "secret"]).output

    monkeypatch.setenv("FOREBAY_API_KEY", "other=team")  # as the gateway itself would read it
    assert "sim" in CliRunner().invoke(app, listing).output
    measure = ["bench", "serve", "--url", url, "--requests", "2", "--warmup", "0", "--output-tokens", "4"]
    assert CliRunner().invoke(app, measure).exit_code == 0
