"""Outputs that are held to a grammar: they are of it, and the same however they are computed.

A small random model with the vocabulary of the default one says most of them: it is of no grammar's mind by itself."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from tokenizers import Tokenizer

from services.gateway.parsers import demanded
from services.gateway.parsers.formats import Formats, Parsing
from services.gateway.parsers.tags import TagScanner
from shared.engine.api import EngineRequest, SamplingParams
from shared.engine.grammars import Grammars
from shared.engine.speculation.speculator import Speculation
from shared.errors import InvalidRequest, Unsupported
from shared.grammar import Grammar, Kind
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL
from tests.law.conftest import MakeExecutor, TinyModels, behind, default_model, sim, tiny_model
from tests.law.worker import Worker

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain", "chess"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
PERSON = Grammar(Kind.JSON_SCHEMA, json.dumps(SCHEMA))
GREEDY = SamplingParams(max_tokens=80, grammar=PERSON)
SAMPLED = replace(GREEDY, temperature=1.0, seed=11, repetition_penalty=1.1)


@dataclass(frozen=True)
class Model:
    make_executor: MakeExecutor
    tokenizer: Tokenizer
    grammars: Grammars

    def worker(self, *, ahead: bool = False, speculation: Speculation | None = None, num_pages: int = 64) -> Worker:
        executor = self.make_executor(num_pages)
        return Worker(behind(executor) if ahead else executor, speculation=speculation, grammars=self.grammars)

    def request(
        self, sampling: SamplingParams, text: str = "Describe a person as JSON.", name: str = "r"
    ) -> EngineRequest:
        return EngineRequest(name, tuple(self.tokenizer.encode(text).ids), sampling)

    def text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids))


def with_tokenizer_of(path: Path, make_executor: MakeExecutor) -> Model:
    file, spec = path / "tokenizer.json", make_executor(1).spec
    grammars = Grammars(file, spec.vocab_size, spec.eos_token_ids)
    return Model(make_executor, Tokenizer.from_file(str(file)), grammars)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = store.resolve(DEFAULT_MODEL)
    return with_tokenizer_of(path, tiny_model("llama-tied", tmp_path_factory.mktemp("tiny"), vocab_size=49_152))


@pytest.fixture(scope="module")
def default() -> Model:
    return with_tokenizer_of(*default_model())


@dataclass(frozen=True)
class Prophet:
    """Proposes what will be said, but for every third token: it proposes to open a turn, which no grammar allows."""

    said: Sequence[int]

    def propose(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        drafts = enumerate(self.said[len(tokens) : len(tokens) + num_drafts], len(tokens))
        return [token_id if position % 3 else 1 for position, token_id in drafts]


def require_person(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"name", "age", "likes"}
    assert isinstance(found["name"], str)
    assert 0 <= found["age"] <= 150
    assert 1 <= len(found["likes"]) <= 2
    assert set(found["likes"]) <= {"tea", "rain", "chess"}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_same_person_however_it_is_computed(sampling: SamplingParams, model: Model) -> None:
    request = model.request(sampling)
    tokens = model.worker().run(request)
    require_person(model.text(tokens))

    assert model.worker(ahead=True).run(request) == tokens, "chosen where the logits are"
    said = [*request.prompt_token_ids, *tokens]
    drafting = model.worker(speculation=Speculation(4, adaptive=False, make_proposer=lambda: Prophet(said)))
    assert drafting.run(request) == tokens, "drafted"
    counts = drafting.engine.draft_counts()
    assert 0 < sum(counts.accepted) < sum(counts.verified)

    reader, owner = model.worker(), model.worker()
    first, pages = reader.pull(request, owner)
    assert first + reader.run(replace(request, output_token_ids=tuple(first)), pages) == tokens, "prefilled elsewhere"
    for num_said in (1, len(tokens) // 2):
        resumed = replace(request, output_token_ids=tuple(tokens[:num_said]), resumed=True)
        assert model.worker().run(resumed) == tokens[num_said:], "continued after a fault"


def test_beside_others_that_are_free(model: Model) -> None:
    free = SamplingParams(max_tokens=30, ignore_eos=True)
    wanted = {str(i): model.worker().run(model.request(s, name=str(i))) for i, s in enumerate((free, GREEDY, SAMPLED))}
    for ahead in (False, True):
        worker = model.worker(ahead=ahead, num_pages=16)  # too few for all at once: somebody is preempted
        for i, sampling in enumerate((free, GREEDY, SAMPLED)):
            worker.submit(model.request(sampling, name=str(i)))
        worker.finish()
        assert worker.outputs == wanted


@pytest.mark.parametrize(
    ("grammar", "is_of_it"),
    [
        (
            Grammar(Kind.REGEX, "[A-Z]{3}-[0-9]{4}"),
            lambda text: len(text) == 8 and text[3] == "-" and text[4:].isdigit(),
        ),
        (Grammar(Kind.LARK, 'start: "perhaps" | "never"'), lambda text: text in ("perhaps", "never")),
        (Grammar(Kind.LARK, 'root ::= half "-" half\nhalf ::= "ab" | "ba"'), lambda text: text[:3] in ("ab-", "ba-")),
    ],
    ids=["regex", "lark", "gbnf"],
)
def test_other_grammars(grammar: Grammar, is_of_it: Callable[[str], bool], model: Model) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=1.5, seed=3, grammar=grammar)
    assert is_of_it(model.text(model.worker().run(model.request(sampling))))


def test_a_person_by_the_default_model(default: Model) -> None:
    tokens = default.worker().run(default.request(GREEDY))
    require_person(default.text(tokens))
    assert default.worker(ahead=True).run(default.request(GREEDY)) == tokens


@pytest.mark.parametrize("style", ["hermes", "glm"])
def test_calls_that_are_demanded_are_read_as_calls(style: Literal["hermes", "glm"], default: Model) -> None:
    """Its tags are text to the default model."""
    city = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tools = {"weather": {"parameters": city}}
    grammar = Grammar(Kind.LARK, demanded.grammar(style, tools, {}, single=True))
    sampling = SamplingParams(max_tokens=120, temperature=1.0, seed=2, grammar=grammar)
    text = default.text(default.worker().run(default.request(sampling)))
    parsing = Parsing(Formats(tools=style), tools=tools)
    parser, scanner = parsing.parser(), TagScanner(parsing.tags)
    for piece in (*scanner.feed(text), *scanner.flush()):
        parser.feed(piece)
    parser.finish(by_model=True)
    calls = parser.take().calls
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls))["city"] in ("Rome", "Oslo")


def test_free_up_to_the_end_of_its_thoughts(default: Model) -> None:
    free = default.worker().run(default.request(SamplingParams(max_tokens=12, ignore_eos=True)))
    end = free[5]
    assert end not in free[:5]
    held = replace(GREEDY, grammar=replace(PERSON, behind_token_id=end))
    tokens = default.worker().run(default.request(held))
    assert tokens[:6] == free[:6]
    require_person(default.text(tokens[6:]))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"grammar": Grammar(Kind.JSON_SCHEMA, '{"type": "nothing"}')}, "cannot be used: Invalid type"),
        ({"grammar": Grammar(Kind.JSON_SCHEMA, "[")}, "cannot be read"),
        ({"grammar": Grammar(Kind.REGEX, "(((")}, "cannot be used"),
        ({"grammar": Grammar(Kind.LARK, "start: nobody")}, "unknown name"),
        ({"min_tokens": 3}, "min_tokens cannot be had with a grammar"),
        ({"ignore_eos": True}, "ignore_eos cannot be had with a grammar"),
    ],
    ids=["schema", "no JSON", "regex", "lark", "min_tokens", "ignore_eos"],
)
def test_what_cannot_be_held_to(changes: dict[str, Any], param: str, model: Model) -> None:
    worker = model.worker()
    with pytest.raises(InvalidRequest, match=param):
        worker.submit(model.request(replace(GREEDY, **changes)))
    assert not worker.engine.has_work()


def test_an_output_so_far_that_is_not_of_its_grammar(model: Model) -> None:
    said = replace(model.request(GREEDY), output_token_ids=tuple(model.tokenizer.encode("Hello").ids))
    with pytest.raises(InvalidRequest, match="the output so far is not of its grammar"):
        model.worker().submit(said)


def test_a_model_without_text() -> None:
    with pytest.raises(Unsupported, match="cannot be held to a grammar"):
        Worker(sim(8)).submit(EngineRequest("r", (5, 6), GREEDY))


class Alternating:
    """A grammar's matcher, for a model without text: tokens of one kind and of another in turns."""

    error = ""
    KINDS = (5, 6, 7), (8, 9)

    def __init__(self, num_said: int) -> None:
        self._num_said = num_said

    def advance(self, token_ids: Sequence[int]) -> None:
        self._num_said += len(token_ids)

    def allowed(self, drafts: Sequence[int]) -> tuple[bytes, ...]:
        turns = range(self._num_said, self._num_said + len(drafts) + 1)
        return tuple(sum(1 << token_id for token_id in self.KINDS[turn % 2]).to_bytes(28, "little") for turn in turns)


class Alternation:
    """In the place of `Grammars`."""

    def begin(self, _grammar: Grammar, output: Sequence[int]) -> Alternating:
        return Alternating(len(output))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafted_by_a_layer_of_the_model_beside_one_that_is_free(
    sampling: SamplingParams, tiny_models: TinyModels
) -> None:
    """On the host, where steps are launched ahead, and where drafts are refused by the grammar alone."""
    make_executor, speculation = tiny_models.make_executor("glm-mtp"), Speculation(3, adaptive=False)
    free = replace(sampling, grammar=None, max_tokens=30, repetition_penalty=1.0)
    held = EngineRequest("held", tuple(range(20, 60)), replace(sampling, max_tokens=40))
    beside = EngineRequest("free", tuple(range(60, 110)), free)

    def outputs(*requests: EngineRequest, ahead: bool = False, drafts: bool = True) -> dict[str, list[int]]:
        executor, grammars = make_executor(64), cast(Grammars, Alternation())
        worker = Worker(
            behind(executor) if ahead else executor, speculation=speculation if drafts else None, grammars=grammars
        )
        for request in requests:
            worker.submit(request)
        worker.finish()
        return worker.outputs

    wanted = outputs(held, drafts=False) | outputs(beside, drafts=False)
    assert len(wanted["held"]) == 40
    assert all(token_id in Alternating.KINDS[turn % 2] for turn, token_id in enumerate(wanted["held"]))
    for ahead in (False, True):
        assert outputs(held, beside, ahead=ahead) == wanted
        assert outputs(beside, held, ahead=ahead) == wanted
