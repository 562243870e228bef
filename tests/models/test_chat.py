"""Chat templates: the same text as transformers, and no way out of the sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest

from fxlm.compiler.errors import InvalidModel, InvalidRequest
from fxlm.models.bundled import BUNDLED
from fxlm.models.chat import ChatTemplate
from tests.checkpoints import save_tokenizer, train_tokenizer

CHATML = """{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
    {%- else %}{{ message.content | trim }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{{ bos_token }}{% set ns = namespace(found=false) %}
{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
[INST] {{ m['content'].strip() }} [/INST]{% set ns.found = true %}
{% if loop.index > 90 %}{% break %}{% endif %}{% endfor %}
{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{% if documents %}{{ documents | length }}{% endif %}{{ '%s-%d' % ('a', 3) }}
{{ ['x', 'y'] | join(', ') }}{{ custom | default('none') }}{{ dict(a=1) }}{{ eos_token }}"""
REASONING = """{% for m in messages %}{{ m.role }}:{% if m.reasoning_content is defined %}
<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}
{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}
{{ 'é<&' | tojson }}{{ 'ab' | center(6) }}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " hi <|im_end|> \n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "why", "name": None},
        {"role": "user", "content": "ünï 🦊"},
    ],
    [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"é": [1, None, True]}}}],
        },
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def pair(path: Path, template: str | dict[str, str]) -> tuple[ChatTemplate, Any]:
    from transformers import AutoTokenizer

    save_tokenizer(train_tokenizer("bpe"), path, bos_token="<s>", eos_token="</s>")
    named = {"default": template} if isinstance(template, str) else template
    (path / "additional_chat_templates").mkdir()
    for name, source in named.items():
        folder = path if name == "default" else path / "additional_chat_templates"
        file = "chat_template.jinja" if name == "default" else f"{name}.jinja"
        (folder / file).write_text(source)
    ours = ChatTemplate.open(path)
    assert ours is not None
    return ours, AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("template", [CHATML, LLAMA, REASONING])
def test_equals_transformers(template: str, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path, template)
    for chat in CHATS:
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False, "tools": TOOLS, "custom": "set"},
            {"add_generation_prompt": False, "documents": [{"title": "t", "text": "x"}]},
        ):
            expected = theirs.apply_chat_template(chat, tokenize=False, **options)
            assert ours.render(chat, **options) == expected  # type: ignore[arg-type]


def test_continue_final_message_equals_transformers(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path, CHATML)
    blocks = [{"type": "text", "text": "so far "}]
    for last in ("so far", "so far  ", blocks):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": last}]
        if last is blocks:
            ours = ChatTemplate(
                CHATML.replace("{{ message.content }}", "{{ message.content[0].text }}")
            )
            theirs.chat_template = ours.sources["default"]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        expected = theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours.render(chat, **options) == expected  # type: ignore[arg-type]


def test_named_templates(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path, {"default": "plain", "tool_use": "{{ tools | length }} tools"})
    assert ours.render(CHATS[0]) == theirs.apply_chat_template(CHATS[0], tokenize=False) == "plain"
    assert ours.render(CHATS[0], tools=TOOLS) == "1 tools"


def test_template_of_the_tokenizer_config(tmp_path: Path) -> None:
    assert ChatTemplate.open(tmp_path) is None
    config: dict[str, Any] = {"chat_template": "{{ eos_token }}", "eos_token": {"content": "<e>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = ChatTemplate.open(tmp_path)
    assert ours is not None
    assert ours.render(CHATS[0]) == "<e>"
    config["chat_template"] = [{"name": "other", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = ChatTemplate.open(tmp_path)
    assert ours is not None
    with pytest.raises(InvalidRequest, match="no default"):
        ours.render(CHATS[0])


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_equals_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    ours = ChatTemplate.open(BUNDLED[name]) if BUNDLED[name].is_dir() else None
    if ours is None:
        pytest.skip("not trained yet")
    theirs = AutoTokenizer.from_pretrained(BUNDLED[name])
    for chat in CHATS[:2]:
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.render(chat) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].nope.deeper }}", "nope"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 'x' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{% set ns = namespace(_x=1) %}{{ ns }}", "_x"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "long"),
        ("{% set x = 'ab' * 999 %}{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}"
         "{% endfor %}{% endfor %}", "too long"),
        ("{{ 'a' * 10**9 }}", "too long"),
        ("{{ ['a'] * 10**9 }}", "too long"),
        ("{{ 9 ** 9 ** 9 }}", "power"),
        ("{{ 'a' | center(10**10) }}", "too long"),
        ("{{ 'a'.ljust(10**10) }}", "too long"),
        ("{{ '%9999999999d' % 1 }}", "width"),
        ("{{ '%9999999999d' | format(1) }}", "width"),
        ("{{ '{:9999999999}'.format(1) }}", "width"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
         "{% endfor %}", "too long"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
         "{% endfor %}", "too long"),
        ("{{ (['a' * 9999] * 999999) | join }}", "too long"),
        ("{{ messages | tojson(indent=10**9) }}", "indent"),
    ],
)  # fmt: skip
def test_hostile_templates_end_as_a_bad_request(source: str, words: str) -> None:
    template = ChatTemplate(source, seconds=0.1)
    with pytest.raises(InvalidRequest) as error:
        template.render(CHATS[0])
    assert words in str(error.value)
    assert error.value.param == "messages"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(field: str) -> None:
    template = ChatTemplate("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    message = {"role": "assistant", "content": "x", field: "why"}
    assert template.render([message]) == "whywhy"


def test_bad_arguments_name_themselves() -> None:
    template = ChatTemplate("{{ messages[0].content }}")

    def refused(param: str, messages: Any, **options: Any) -> None:
        with pytest.raises(InvalidRequest) as error:
            template.render(messages, **options)
        assert error.value.param == param

    refused("messages", [])
    refused("messages", ["text"])
    refused("continue_final_message", CHATS[0], continue_final_message=True)
    nested: Any = "x"
    for _ in range(200):
        nested = [nested]
    refused("messages", [{"role": "user", "content": nested}])
    ending = {"add_generation_prompt": False, "continue_final_message": True}
    refused("continue_final_message", [{"role": "user", "content": None}], **ending)
    dropping = ChatTemplate("nothing")
    with pytest.raises(InvalidRequest, match="drops"):
        dropping.render(CHATS[0], add_generation_prompt=False, continue_final_message=True)


def test_rich_objects_reach_templates_as_plain_values() -> None:
    class Text(str):
        def write(self) -> str:
            return "written"

    template = ChatTemplate("{{ messages[0].content.write is defined }}{{ extra }}")
    text = template.render([{"role": "user", "content": Text("x")}], extra=object())
    assert text == "False<object>"


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nonsense %}"])
def test_broken_template_is_the_models_fault(source: str) -> None:
    with pytest.raises(InvalidModel, match="line 1"):
        ChatTemplate(source)
