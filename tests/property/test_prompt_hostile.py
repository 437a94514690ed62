"""Whatever a body holds, the answer is a prompt or one sentence that names the field."""

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gorgo_plugin import Prompt, PromptError, Settings
from gorgo_plugin.prompt import ENDPOINTS, PromptBuilder
from gorgo_plugin.prompt.builder import well_formed

TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content | trim }}{{ m.name }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{{ m.reasoning_content }}{% endfor %}"
)
BUILDERS = [
    PromptBuilder(Settings.model_validate({"prepare": {"image_tokens": 4}, **template}), secret=b"test")
    for template in ({}, {"chat_template": TEMPLATE})
]

KEYS = st.sampled_from(
    [
        *("role", "content", "type", "text", "name", "tool_calls", "function", "arguments", "id", "image_url", "url"),
        *("source", "data", "input", "tool_use_id", "call_id", "output", "summary", "thinking", "description"),
        *("parameters", "input_schema", "session_id", "user_id"),
    ]
)
KINDS = st.sampled_from(
    [
        *("text", "input_text", "output_text", "image_url", "input_image", "image", "tool_use", "tool_result"),
        *("thinking", "function_call", "function_call_output", "reasoning", "message", "refusal", "document", "base64"),
    ]
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
# Surrogates too: a JSON parser may hand them over.
STRINGS = st.text(st.characters(), max_size=6) | KINDS | ROLES
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | STRINGS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | STRINGS, inner, max_size=5),
    max_leaves=12,
)
TYPED = st.dictionaries(KEYS, VALUES, max_size=4).flatmap(
    lambda other: st.fixed_dictionaries({"type": KINDS, "text": STRINGS}).map(lambda part: other | part)
)
MESSAGES = st.fixed_dictionaries({"role": ROLES, "content": STRINGS | st.lists(TYPED, max_size=4) | VALUES}).flatmap(
    lambda message: st.dictionaries(KEYS, VALUES, max_size=3).map(lambda other: other | message)
)
FIELDS = {
    "messages": st.lists(MESSAGES | TYPED, max_size=4) | VALUES,
    "input": st.lists(MESSAGES | TYPED, max_size=4) | VALUES,
    "prompt": VALUES | st.lists(st.integers(0, 9), max_size=4),
    "system": VALUES,
    "instructions": VALUES,
    "tools": st.lists(TYPED, max_size=3) | VALUES,
    "metadata": VALUES,
    "model": VALUES,
    "stream": VALUES,
    "max_tokens": VALUES,
    "cache_salt": VALUES,
    "user": VALUES,
    "chat_template_kwargs": VALUES,
    "continue_final_message": st.booleans(),
}
BODIES = st.fixed_dictionaries({}, optional=FIELDS)


def check(body: Any, endpoint: str) -> None:
    for builder in BUILDERS:
        check_one(builder, body, endpoint)


def check_one(builder: PromptBuilder, body: Any, endpoint: str) -> None:
    try:
        prompt = builder.prepare(body, endpoint)
    except PromptError as error:
        sentence = str(error)
        assert ": " in sentence
        assert "\n" not in sentence
        assert "cannot be read as a prompt" not in sentence  # the last resort, for objects that raise
    else:
        assert isinstance(prompt, Prompt)
        for name in (prompt.model, prompt.cache_key, prompt.affinity_key or ""):
            assert len(name.encode()) <= 4 * 256


@settings(max_examples=400)
@given(body=BODIES | VALUES, endpoint=st.sampled_from(ENDPOINTS))
@example(body={"messages": [{"role": "user", "content": [{"type": [], "text": 1}]}]}, endpoint="/v1/chat/completions")
@example(body={"messages": [{"role": "user", "content": "a"}], "cache_salt": "\ud800"}, endpoint="/v1/chat/completions")
def test_any_mapping_is_a_prompt_or_a_clear_error(body: Any, endpoint: str) -> None:
    check(body, endpoint)


@settings(max_examples=200)
@given(body=BODIES | VALUES, endpoint=st.sampled_from(ENDPOINTS))
def test_any_json_is_a_prompt_or_a_clear_error(body: Any, endpoint: str) -> None:
    check(json.dumps(body).encode(), endpoint)


@settings(max_examples=200)
@given(body=st.binary(max_size=40), endpoint=st.sampled_from(ENDPOINTS))
def test_any_bytes_are_a_prompt_or_a_clear_error(body: bytes, endpoint: str) -> None:
    check(body, endpoint)
    check(b'{"messages": [{"role": "user", "content": "' + body + b'"}]}', endpoint)


@given(text=st.text(st.sampled_from("aé漢🙂\ud800\udbff\udc00\udfff"), max_size=12))
def test_lone_surrogates_are_replaced_as_a_codec_would(text: str) -> None:
    assert well_formed(text) == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
