"""Which cluster a command talks to: the one it was told, else the one that runs on this machine."""

from typing import Annotated, NoReturn

import httpx
import typer

from cli import state
from services.gateway.api_keys import bearer
from shared import config
from shared.models.store import default_cache

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 5.0


def as_redis(url: str) -> str:
    """What a --redis flag says, if it can be one."""
    try:
        return url and config.checked_redis_url(url)
    except ValueError as error:
        raise typer.BadParameter(f"{error}") from None


RedisUrl = Annotated[
    str, typer.Option("--redis", metavar="URL", callback=as_redis, help="Blackboard of another cluster, by its URL.")
]
GatewayUrl = Annotated[
    str,
    typer.Option("--url", metavar="URL", help="Gateway, as http://HOST:PORT; default: the cluster on this machine."),
]
ApiKey = Annotated[
    str,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="FOREBAY_API_KEY",
        help="For a gateway that asks for one.",
        show_default=False,
    ),
]


def url_of(given: str) -> str:
    """The URL of the gateway to talk to."""
    if given:
        return (given if "://" in given else f"http://{given}").rstrip("/").removesuffix("/v1")
    run = state.find(default_cache())
    if run and not run.url:
        fail("the cluster on this machine is still being started; `forebay status` shows how far it is")
    return run.url if run else DEFAULT_URL


def client(url: str, timeout_s: float, api_key: str = "") -> httpx.Client:
    """A client that waits at most `timeout_s` for each part of an answer."""
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(base_url=url, timeout=timeout, headers=bearer(api_key), trust_env=False)


def model_names(http: httpx.Client) -> list[str]:
    """The models that the cluster serves; ends the command with a message if it cannot be asked."""
    try:
        answer = http.get("/v1/models")
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            what = "refuses this API key" if "Authorization" in http.headers else "asks for an API key"
            fail(f"{http.base_url} {what}: --api-key, or FOREBAY_API_KEY in the environment")
        answer.raise_for_status()
    except httpx.HTTPError as error:
        fail(f"no answer from {http.base_url}: {error}; is a cluster up? `forebay up` starts one")
    return [model["id"] for model in answer.json()["data"]]


def fail(message: str) -> NoReturn:
    """End the command with a message."""
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(1)
