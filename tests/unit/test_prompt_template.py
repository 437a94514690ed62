"""Chat templates: the environment they are written for, its bounds, and what happens when one refuses."""

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gorgo_plugin import Settings
from gorgo_plugin.prompt import PromptBuilder
from gorgo_plugin.prompt import template as template_module
from gorgo_plugin.prompt.dialects import read_chat
from gorgo_plugin.prompt.template import ChatTemplate, TemplateFailure
from tests import prompt_tokenizers as small

CHAT = "/v1/chat/completions"


def render(template: str, messages: Any = None, **fields: Any) -> str:
    chat = ChatTemplate(template, {"bos_token": "<s>"}, lambda: datetime(2024, 2, 3))
    body = {"messages": messages or [{"role": "user", "content": "Hi"}], **fields}
    return "".join(chat.render(read_chat(body), lambda medium: f"[{medium.payload}]"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ add_generation_prompt }}", "<s>True"),
        ("{{ tools is none }} {{ documents is none }} {{ unknown }}|", "True True |"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}", "user\n"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{{ {'b': '<é>', 'a': [1.5, none]} | tojson }}", '{"b": "<é>", "a": [1.5, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2024"),
        ("{% generation %}{% set x = 1 %}a{% endgeneration %}b", "ab"),
        ("{{ {'items': 1}.items() | list }}{{ {'x': 2}.x }}", "[('items', 1)]2"),
        ("{{ ''.__class__ }}{% for x in [1] %}{{ loop._iterator }}{{ loop.first }}{% endfor %}", "True"),
        ("{{ '=' * 5 }} {{ 2 ** 10 }}", "===== 1024"),
        ("{{ messages[0].content.upper() }} {{ messages[0]['content'].format }}", "HI "),
    ],
)
def test_templates_find_what_transformers_offers(template: str, expected: str) -> None:
    text = render(template)
    assert text == expected or (template.endswith("format }}") and text.startswith(expected))


def test_documents_and_template_arguments_of_the_body_reach_the_template() -> None:
    text = render(
        "{{ documents[0].text }} {{ enable_thinking }} {{ reasoning_effort }}",
        documents=[{"text": "doc"}],
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
    )
    assert text == "doc False low"


def test_template_arguments_cannot_replace_the_messages() -> None:
    assert render("{{ messages[0].content }}", chat_template_kwargs={"messages": [{"content": "other"}]}) == "Hi"


def test_arguments_of_tool_calls_reach_the_template_as_objects() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"x": "é"}'}}]},
        {"role": "tool", "tool_call_id": "c", "name": "f", "content": "r"},
    ]
    template = (
        "{{ messages[0].content == '' }} {{ messages[0].tool_calls[0].function.arguments | tojson }} "
        "{{ messages[1].tool_call_id }} {{ messages[1].name }}"
    )
    assert render(template, messages) == 'True {"x": "é"} c f'


PARTS = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "a\n[u]\nb"),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", "a\n[u]\nb"),
        ("{% for m in messages %}{{ '' + m.content }}{% endfor %}", "a\n[u]\nb"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}{% endfor %}",
            "a|[u]|b|",
        ),
    ],
)
def test_parts_reach_templates_that_know_parts_and_others_get_a_string(template: str, expected: str) -> None:
    assert render(template, [{"role": "user", "content": PARTS}]) == expected


def test_a_template_that_knows_parts_only_gets_every_content_as_parts() -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    assert render(template) == "Hi"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.missing.missing }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for m in messages %}{{ m.update({'x': 1}) }}{% endfor %}",
        "{{ 'x' * 2000000 }}",
        "{{ 2000000 * 'x' }}",
        "{{ ([0] * 2000000) | length }}",
        "{{ 10 ** 1000 }}",
        "{{ 10 ** 'x' }}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_goes_wild_is_stopped(template: str) -> None:
    with pytest.raises(TemplateFailure):
        render(template)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "RENDERED_CHARS", 1000)
    assert len(render("{% for i in range(90) %}xxxxxxxx{% endfor %}")) == 720
    for endless in ("{% for i in range(200) %}xxxxxxxx{% endfor %}", "{% for i in range(1001) %}{{ '' }}{% endfor %}"):
        with pytest.raises(TemplateFailure):
            render(endless)


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + small.CHATML


@pytest.fixture
def builder(tmp_path: Path) -> PromptBuilder:
    return PromptBuilder(Settings(tokenizer=small.save(tmp_path, small.chatml(), REFUSES_SYSTEM)), secret=b"test")


def test_a_refused_conversation_comes_out_as_chatml_and_not_exact(builder: PromptBuilder) -> None:
    accepted = builder.prepare({"messages": [{"role": "user", "content": "Hi"}]}, CHAT)
    refused = builder.prepare({"messages": [{"role": "system", "content": "Hi"}]}, CHAT)
    text = small.chatml().decode(refused.tokens.tolist(), skip_special_tokens=False)
    assert text == "<|im_start|>system\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (accepted.exact, refused.exact) == (True, False)


def test_refusals_are_counted_and_logged_once_without_the_prompt(
    builder: PromptBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    assert builder.describe("")["template_failures"] == 0
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            builder.prepare({"messages": [{"role": "system", "content": "private words"}]}, CHAT)
    assert builder.describe("")["template_failures"] == 3
    assert len(caplog.records) == 1
    assert "private" not in caplog.text


def test_a_tokenizer_without_a_template_takes_chatml_and_is_not_exact(tmp_path: Path) -> None:
    builder = PromptBuilder(Settings(tokenizer=small.save(tmp_path, small.chatml())), secret=b"test")
    prompt = builder.prepare({"messages": [{"role": "user", "content": "Hi"}]}, CHAT)
    assert builder.describe("")["chat_template"] == "chatml"
    assert not prompt.exact
    assert builder.prepare({"prompt": "Hi"}, "/v1/completions").exact


@pytest.mark.parametrize(
    ("endpoint", "body", "exact"),
    [
        ("/v1/messages", {"system": "S", "messages": [{"role": "user", "content": "Hi"}]}, True),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}, False),
        ("/v1/responses", {"instructions": "S", "input": "Hi"}, True),
        ("/v1/responses", {"input": "Hi", "previous_response_id": "resp_1"}, False),
        ("/v1/responses", {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a\ud800"}]}, False),
    ],
)
def test_a_translation_engines_differ_on_is_not_exact(tmp_path: Path, endpoint: str, body: Any, exact: bool) -> None:
    folder = small.save(tmp_path, small.chatml(), small.CHATML)
    assert PromptBuilder(Settings(tokenizer=folder), secret=b"test").prepare(body, endpoint).exact is exact
