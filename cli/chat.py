"""`forebay chat`: a conversation in the terminal, through the same REST interface as everybody else."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from cli.target import ApiKey, GatewayUrl, client, fail, model_names, url_of

TIMEOUT_S = 120.0
Message = dict[str, str]


def chat(
    prompt: Annotated[str, typer.Argument(help="Say this and leave after the answer.")] = "",
    url: GatewayUrl = "",
    api_key: ApiKey = "",
    model: Annotated[str, typer.Option(help="Model; default: the first that is served.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
) -> None:
    """Talk to the model; an empty line or Ctrl-D leaves, Ctrl-C ends an answer early."""
    with client(url_of(url), TIMEOUT_S, api_key) as http:
        names = model_names(http)
        if not names:
            fail("the cluster serves no model yet; `forebay status` shows its processes")
        options = {"model": model or names[0], "temperature": temperature, "max_tokens": max_tokens}
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for said in [prompt] if prompt else _lines(options["model"]):
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": _answer(http, options, messages)})


def _lines(model: Any) -> Iterator[str]:
    console = Console(stderr=True)
    console.print(f"[dim]{model}; an empty line leaves[/dim]")
    while True:
        try:
            said = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not said:
            return
        yield said


def _answer(http: httpx.Client, options: dict[str, Any], messages: list[Message]) -> str:
    """Print an answer as it comes; return it."""
    parts: list[str] = []
    try:
        for text in stream_answer(http, options | {"messages": messages}):
            parts.append(text)
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        pass
    except httpx.HTTPError as error:
        fail(f"the answer broke off: {error}" if parts else str(error))
    typer.echo()
    return "".join(parts)


def stream_answer(http: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of a chat completion. Raises httpx.HTTPError with the server's message if there is a fault."""
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        if answer.is_error:
            answer.read()
            raise httpx.HTTPStatusError(_message(answer.text), request=answer.request, response=answer)
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise httpx.HTTPStatusError(_message(data), request=answer.request, response=answer)
            yield from (choice["delta"].get("content") or "" for choice in event["choices"])


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body
