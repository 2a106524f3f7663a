"""Whether a model calls functions right: a few cases of our own, asked of a gateway and checked by name and arguments.

A model whose chat template knows no tools is told of them in words, and asked to answer in JSON; both kinds of asking
are compared only with themselves.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.gateway.api_keys import bearer
from shared.errors import InvalidRequest, WorkerLost

TIMEOUT_S, MAX_TOKENS, NUM_AT_A_TIME = 300.0, 256, 8
CASES = Path(__file__).with_name("calls.json")
INSTRUCTIONS = (
    "You can call functions. To call some, answer with nothing but a JSON array of objects, each with the function's "
    '"name" and its "arguments", an object. If no function helps, answer in plain words. The functions:\n'
)
Call = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A question with the functions that may be called. `expected` is the calls that are right, in any order, each
    argument with all values that are; a value None may be left out. It is empty where none should be called."""

    name: str
    tools: tuple[Mapping[str, Any], ...]
    question: str
    expected: tuple[Call, ...]


def cases(path: Path = CASES) -> list[Case]:
    """The cases in a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    functions: Mapping[str, Any] = content["functions"]
    return [
        Case(
            entry["name"],
            tuple({"type": "function", "function": {"name": name} | functions[name]} for name in entry["functions"]),
            entry["question"],
            tuple(entry["expected"]),
        )
        for entry in content["cases"]
    ]


class Asker:
    """Asks a gateway, with an API key if it wants one. `native` is whether its model is given tools as such; the first
    question finds it out."""

    def __init__(self, url: str, model: str, api_key: str = "") -> None:
        self._http = httpx.Client(base_url=url, headers=bearer(api_key), timeout=TIMEOUT_S, trust_env=False)
        self._model = model
        self.native = True

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def are_right(self, cases: Sequence[Case]) -> tuple[bool, ...]:
        """Of each case, as `is_right`; several are asked at a time once the first has shown how."""
        first = self.is_right(cases[0])
        with ThreadPoolExecutor(NUM_AT_A_TIME) as pool:
            return (first, *pool.map(self.is_right, cases[1:]))

    def is_right(self, case: Case) -> bool:
        """Ask, and check. Raises InvalidRequest or WorkerLost if there is no answer."""
        return right(case, self._native(case) if self.native else self._told(case))

    def _native(self, case: Case) -> list[Call]:
        body = {"messages": [{"role": "user", "content": case.question}], "tools": list(case.tools)}
        answer = self._post(body)
        if answer.is_error and _about_tools(answer):
            self.native = False
            return self._told(case)
        return [_read(call["function"]) for call in _message(answer).get("tool_calls") or ()]

    def _told(self, case: Case) -> list[Call]:
        functions = "\n".join(json.dumps(tool["function"]) for tool in case.tools)
        messages = [
            {"role": "system", "content": INSTRUCTIONS + functions},
            {"role": "user", "content": case.question},
        ]
        return list(calls_in(_message(self._post({"messages": messages})).get("content") or ""))

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        options = {"model": self._model, "temperature": 0, "max_tokens": MAX_TOKENS}
        try:
            return self._http.post("/v1/chat/completions", json={**options, **body})
        except httpx.HTTPError as error:
            raise WorkerLost(f"no answer from {self._http.base_url}: {error}") from None


def _message(answer: httpx.Response) -> Mapping[str, Any]:
    if answer.is_error:
        raise InvalidRequest(f"the gateway refused a question: {answer.text}")
    found: Mapping[str, Any] = answer.json()["choices"][0]["message"]
    return found


def _about_tools(answer: httpx.Response) -> bool:
    try:
        return bool(answer.json()["error"]["param"] == "tools")
    except (ValueError, KeyError, TypeError):
        return False


def _read(function: Mapping[str, Any]) -> Call:
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = None  # no JSON: never right
    return {"name": function["name"], "arguments": arguments}


def calls_in(text: str) -> Iterator[Call]:
    """The calls that a text begins with or has in it as JSON: the first array of them, or the first single one."""
    for start in (index for index, letter in enumerate(text) if letter in "[{"):
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        entries = found if isinstance(found, list) else [found]
        if all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
            yield from ({"name": entry["name"], "arguments": entry.get("arguments", {})} for entry in entries)
            return


def right(case: Case, made: Sequence[Call]) -> bool:
    """Whether exactly the expected calls were made."""
    left = list(made)
    for expected in case.expected:
        fitting = next((call for call in left if _fits(call, expected)), None)
        if fitting is None:
            return False
        left.remove(fitting)
    return not left


def _fits(call: Call, expected: Call) -> bool:
    wanted, arguments = expected["arguments"], call["arguments"]
    if call["name"] != expected["name"] or not isinstance(arguments, dict) or not arguments.keys() <= wanted.keys():
        return False
    return all(_plain(arguments.get(name)) in map(_plain, values) for name, values in wanted.items())


def _plain(value: Any) -> Any:
    """Letter case and outer spaces count for nothing in a string; a truth value is no number."""
    if isinstance(value, str):
        return value.strip().casefold()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return (type(value).__name__, value) if isinstance(value, bool) else value
