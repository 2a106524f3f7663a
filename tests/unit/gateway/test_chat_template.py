"""Chat templates: what Hugging Face's may rely on, and what they may not do."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from services.gateway import text_model
from services.gateway.chat_template import ChatTemplate
from services.gateway.messages import for_template
from services.gateway.sandbox import DEADLINE, Sandbox
from shared.errors import InvalidRequest
from tests.unit.gateway.tiny_tokenizers import byte_level, write_model

USER: list[dict[str, Any]] = [{"role": "user", "content": "<b>\u00e9"}]


def render(source: str, **arguments: Any) -> str:
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}).render(USER, None, arguments)


def test_blocks_leave_no_blank_lines() -> None:
    assert (
        render("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\nend")
        == "user\nend"
    )


def test_json_is_not_escaped_for_html() -> None:
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<b>\u00e9"}'
    assert render("{{ {'a': [1]} | tojson(indent=2) }}") == json.dumps({"a": [1]}, indent=2)


def test_loops_can_be_left_and_generation_is_only_a_mark() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ messages[0].role }}{% endgeneration %}") == "user"


def test_special_tokens_and_arguments_are_variables() -> None:
    assert render("{{ bos_token }}{{ add_generation_prompt }}{{ thinking }}", thinking=False) == "<s>TrueFalse"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_a_refusal_of_the_template_is_the_request_s_fault() -> None:
    with pytest.raises(InvalidRequest, match="no system here"):
        render("{{ raise_exception('no system here') }}")
    with pytest.raises(InvalidRequest, match="chat template"):
        render("{{ messages[0].content + 1 }}")


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.clear() }}"]
)
def test_a_template_can_neither_change_the_request_nor_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(source: str) -> None:
    sandbox = Sandbox()
    with pytest.raises(SecurityError, match="takes too long"):
        sandbox.render(sandbox.from_string(source), {}, max_seconds=0.05)


@pytest.mark.parametrize("source", ["{{ 9 ** 9 ** 9 ** 9 }}", "{{ 'a' * 10 ** 9 }}", "{{ 'a' * 1000000000 }}"])
def test_a_template_can_build_nothing_huge_by_multiplying(source: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses"):
        render(source)


def test_a_template_may_still_multiply_and_loop_as_templates_do() -> None:
    assert render("{{ 3 * 4 }}{{ '-' * 3 }}") == "12---"
    loop = "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}"
    assert render(loop) == "1TrueTrue1"
    assert render("{% for k, v in messages[0].items() if k == 'role' %}{{ v }}{% else %}none{% endfor %}") == "user"
    assert render("{% for x in absent %}{{ x }}{% else %}none{% endfor %}") == "none"


def test_the_deadline_of_a_rendering_is_out_of_the_client_s_reach() -> None:
    assert render("{% for i in range(3) %}{{ i }}{% endfor %}", **{DEADLINE: 0.0}) == "012"


def test_a_template_that_knows_no_developer_hears_a_system_message() -> None:
    assert for_template([{"role": "developer", "content": "x"}], ["{{ m.role }}"])[0]["role"] == "system"
    assert for_template([{"role": "developer", "content": "x"}], ["developer"])[0]["role"] == "developer"


def test_a_malformed_template_is_found_when_the_model_is_read() -> None:
    with pytest.raises(ValueError, match="malformed"):
        ChatTemplate({"default": "{% if %}"}, {})


def test_tools_choose_the_template_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].function.name }}"}, {})
    assert template.render(USER) == "plain"
    assert template.render(USER, [{"type": "function", "function": {"name": "add"}}]) == "add"


def test_a_template_file_wins_over_the_one_in_the_configuration(tmp_path: Path) -> None:
    directory = write_model(tmp_path, byte_level())
    (directory / "chat_template.jinja").write_text("from the file {{ eos_token }}")
    template = text_model.load(directory).chat_template
    assert template is not None
    assert template.render(USER) == "from the file <|end|>"


def test_defaults_come_from_generation_config(tmp_path: Path) -> None:
    directory = write_model(tmp_path, byte_level())
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": 1}')
    assert text_model.load(directory).defaults == {"temperature": 0.6, "top_k": 20.0}


def test_a_broken_directory_is_told_and_an_absent_one_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        text_model.load(tmp_path)
    assert text_model.load(tmp_path / "absent").tokenizer is None
