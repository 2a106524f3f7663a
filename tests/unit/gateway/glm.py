"""A model that reads and writes as GLM does: its tags, its ids where they are known, and templates after its format.

The templates were written from the description of the format, and those of 5 and 5.1 write what an independent renderer
writes (docs/LOG.md); a checkpoint brings its own. Of the vocabulary only
the added tokens and one word have their true ids: what is tested are tags and the layout of prompts, not how text is
cut into tokens.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from tests.unit.gateway.tiny_tokenizers import byte_level

# Consecutive ids from FIRST_ID; gaps are tokens that text models do not use.
FIRST_ID = 154820
ADDED = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *(f"<|unused_{i}|>" for i in range(11)),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
]
TAGS = ADDED[21:]
HI = 13041

# What differs between releases, as variables in front of the rest.
RELEASES = {
    "5": {"effort": False, "whole_tools": True, "empty_thought": "never"},  # 4.7 too
    "5.1": {"effort": False, "whole_tools": False, "empty_thought": "turn"},
    "5.2": {"effort": True, "whole_tools": False, "empty_thought": "always"},
}

BODY = """[gMASK]<sop>
{%- set thinking = enable_thinking is not defined or enable_thinking -%}
{%- if thinking and effort %}<|system|>Reasoning Effort: {{ 'High' if reasoning_effort == 'high' else 'Max' }}
{%- endif -%}
{%- set ns = namespace(last_user=-1, declared={}) -%}
{%- if tools %}<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{% for tool in tools if not tool.function.defer_loading -%}
{%- if whole_tools %}{% set ns.declared = tool %}{% else %}{% set ns.declared = {} -%}
{%- for key, value in tool.function.items() if key not in ('defer_loading', 'strict') -%}
{%- set ns.declared = dict(ns.declared, **{key: value}) %}{% endfor %}{% endif -%}
{{ ns.declared | tojson }}
{% endfor %}</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>\
<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'system' %}<|system|>{{ m.content }}
{%- elif m.role == 'user' %}<|user|>{{ m.content }}
{%- elif m.role == 'assistant' -%}
{%- set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1]
                                          if '</think>' in m.content else '') -%}
{%- set this_turn = loop.index0 > ns.last_user -%}
{%- set keep = thought and (this_turn or clear_thinking is false) -%}
{%- set opens = keep or empty_thought == 'always' or (empty_thought == 'turn' and thinking and this_turn) -%}
<|assistant|>{{ '<think>' if opens else '' }}{{ thought if keep else '' }}</think>
{{- m.content.split('</think>')[-1].strip() }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}
{%- for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key><arg_value>
{{- value if value is string else value | tojson }}</arg_value>{% endfor %}</tool_call>{% endfor -%}
{%- elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif -%}
<tool_response>{{ m.content }}</tool_response>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{{ '<think>' if thinking or empty_thought == 'always' else '' }}
{{- '' if thinking else '</think>' }}{% endif -%}"""


def template(release: str) -> str:
    """The template of a release of RELEASES."""
    chosen = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in RELEASES[release].items())
    return chosen.replace("True", "true").replace("False", "false") + BODY


TEMPLATE = template("5.2")


def tokenizer() -> Tokenizer:
    """Bytes, the word that the known prompt has, and every added token at GLM's own id."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {f"<filler {i}>": i for i in range(len(alphabet), FIRST_ID) if i != HI} | {"Hi": HI}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[("H", "i")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return _with_tags(found)


def small_tokenizer() -> Tokenizer:
    """The same tags behind a small vocabulary."""
    return _with_tags(byte_level())


def _with_tags(found: Tokenizer) -> Tokenizer:
    for token in ADDED:
        if token in TAGS:
            found.add_tokens([AddedToken(token, special=False, normalized=False)])
        else:
            found.add_special_tokens([token])
    return found
