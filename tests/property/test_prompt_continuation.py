"""A chat that goes on is prepared as if it had come for the first time."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from gorgo_plugin import Prompt, Settings
from gorgo_plugin.errors import PromptError
from gorgo_plugin.prompt import PromptBuilder, continuation
from gorgo_plugin.prompt.continuation import Known
from gorgo_plugin.prompt.endpoints import CHAT

TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [
                "},{",
                "}, {",
                "}]",
                "]}",
                '"',
                "\\",
                '{"role":"user"}',
                "<|im_end|>",
                "<|im_start|>",
                "漢",
                "é",
                "\n",
                " a",
            ]
        ),
        max_size=8,
    ).map("".join),
    st.integers(0, 400).map(lambda words: "some words " * words),
)
CONTENTS = st.one_of(
    TEXTS,
    st.lists(
        st.one_of(
            TEXTS.map(lambda text: {"type": "text", "text": text}),
            st.just({"type": "image_url", "image_url": {"url": "http://x/y"}}),
        ),
        max_size=3,
    ),
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENTS},
    optional={
        "name": st.just("n"),
        "tool_calls": st.just(
            [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x":[{},{}]}'}}]
        ),
    },
)
TOOL: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"anyOf": [{"a": 1}, {"b": 2}]}}}]


def tool(strict: Any) -> list[Any]:
    return [{"type": "function", "function": {**TOOL[0]["function"], "parameters": {"strict": strict}}}]


TOOLS = st.sampled_from(
    [
        None,
        TOOL,
        [{"type": "function", "function": {"name": "f", "parameters": {"anyOf": [{"a": True}, {"b": 2}]}}}],
    ]
)
EXTRAS: dict[str, Any] = {
    "model": st.sampled_from(["m", "n"]),
    "stream": st.booleans(),
    "tools": TOOLS,
    "stop": st.just([{"a": 1}]),
    "user": st.sampled_from(["u", "v"]),
    "cache_salt": st.just("salt"),
    "max_tokens": st.integers(1, 9),
    "continue_final_message": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "add_special_tokens": st.booleans(),
    "chat_template_kwargs": st.just({"a": [{}]}),
}
LONG = {"role": "system", "content": "you are a helpful assistant, as long as needed. " * 60}


@cache
def going_on() -> PromptBuilder:
    return PromptBuilder(Settings(), secret=b"s")


@cache
def forgetful() -> PromptBuilder:
    return PromptBuilder(Settings.model_validate({"prepare": {"cache_bytes": 0}}), secret=b"s")


def body(messages: list[Any], before: dict[str, Any], after: dict[str, Any], spaced: bool) -> bytes:
    separators = None if spaced else (",", ":")
    return json.dumps({**before, "messages": messages, **after}, separators=separators, ensure_ascii=spaced).encode(
        "utf-8", "surrogatepass"
    )


def prepared(builder: PromptBuilder, sent: Any) -> Prompt | str:
    try:
        return builder.prepare(sent, CHAT)
    except PromptError as error:
        return str(error)


def assert_alike(one: Prompt | str, other: Prompt | str) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert np.array_equal(one.tokens, other.tokens)
    for name in ("model", "stream", "max_output_tokens", "affinity_key", "cache_key", "exact"):
        assert getattr(one, name) == getattr(other, name), name


@st.composite
def talks(draw: st.DrawFn) -> list[bytes]:
    """The bodies of some conversations, which share their beginnings."""
    bodies: list[bytes] = []
    messages: list[Any] = [LONG]
    spaced = draw(st.booleans())
    fields = draw(st.fixed_dictionaries({}, optional=EXTRAS))
    names = draw(st.permutations(sorted(fields)))
    split = draw(st.integers(0, len(names)))
    for _ in range(draw(st.integers(2, 5))):
        messages = [*messages, *draw(st.lists(MESSAGES, max_size=3))]
        if draw(st.integers(0, 5)) == 0:
            fields = {**fields, **draw(st.fixed_dictionaries({}, optional={name: EXTRAS[name] for name in fields}))}
        if draw(st.integers(0, 7)) == 0:
            messages = [*messages[:-1], {"role": "user"}] if draw(st.booleans()) else messages[:-1]
        before, after = {n: fields[n] for n in names[:split]}, {n: fields[n] for n in names[split:]}
        bodies.append(body(messages, before, after, spaced))
    return bodies


@settings(max_examples=150)
@given(talks())
def test_a_chat_that_goes_on_is_prepared_as_if_it_came_for_the_first_time(bodies: list[bytes]) -> None:
    for sent in bodies:
        assert_alike(prepared(going_on(), sent), prepared(forgetful(), sent))


@settings(max_examples=150)
@given(talks())
def test_a_mapping_that_goes_on_is_prepared_as_if_it_came_for_the_first_time(bodies: list[bytes]) -> None:
    for given_as in map(json.loads, bodies):
        assert_alike(prepared(going_on(), given_as), as_it_is(given_as))


@pytest.mark.parametrize(
    "tail", [b"]}", b"", b"]", b',{"role":"user"', b'],"messages":[{"role":"user","content":"other"}]}', b'],"x":}']
)
def test_what_follows_a_known_beginning_may_be_anything(tail: bytes) -> None:
    known = body([LONG, {"role": "user", "content": "hi"}], {"model": "m"}, {"stream": True}, False)
    going_on().prepare(known, CHAT)
    sent = known[: known.index(b'],"stream"')] + b',{"role":"user","content":"more"}' + tail
    assert_alike(prepared(going_on(), sent), prepared(forgetful(), sent))


def test_most_bodies_that_go_on_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(Known, "rest", lambda self, body, rest=Known.rest: found.append(rest(self, body)) or found[-1])
    builder = PromptBuilder(Settings(), secret=b"s")
    shapes = (({"model": "m"}, {"tools": TOOL}), ({"tools": TOOL}, {}), ({}, {"stop": [{"a": 1}]}))
    for number, (spaced, (before, after)) in enumerate(itertools.product((True, False), shapes)):
        messages = [{**LONG, "name": f"{number}"}]
        for turn in range(4):
            messages = [*messages, {"role": "assistant", "content": "a {}"}, {"role": "user", "content": f"{turn}"}]
            builder.prepare(body(messages, before, after, spaced), CHAT)
    assert len(found) == 2 * 3 * 3
    assert None not in found


class Turn(BaseModel):
    """A message as LiteLLM hands on what it answered itself."""

    role: str
    content: str | None = None
    tool_calls: list[Any] | None = None


def test_a_mapping_of_texts_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(Known, "rest", lambda self, body, rest=Known.rest: found.append(rest(self, body)) or found[-1])
    builder = PromptBuilder(Settings(), secret=b"s")
    messages = [LONG]
    for turn in range(3):
        messages = [*messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": f"{turn}"}]
        sent = {"model": "m", "temperature": 0.5, "messages": messages, "stream": True}
        assert_alike(builder.prepare(sent, CHAT), as_it_is(sent))
    assert [rest is not None for rest in found] == [True, True]


def as_it_is(sent: Any) -> Prompt | str:
    """What becomes of a mapping that is not written as JSON."""
    with patch.object(PromptBuilder, "_written", lambda *_: None):
        return prepared(forgetful(), sent)


@pytest.mark.parametrize(
    "odd",
    [
        "\ud800",
        object(),
        {1: 2},
        float("nan"),
        10**30,
        b"bytes",
        {"a", "b"},
        [1, "x" * 9_000],
        {"x" * 9_000: 1},
        [0.5] * 9_000,
        10**6_000,
        "x" * 9_000,
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_a_mapping_of_more_than_texts_is_read_as_it_is(odd: Any) -> None:
    messages = [LONG, {"role": "user", "content": "hi"}]
    for sent in (
        {"messages": [LONG, {"role": "user", "content": "hi", "extra": odd}]},
        {"messages": [LONG, {"role": "user", "content": odd}]},
        {"messages": [LONG, {"role": odd, "content": "hi"}]},
        {"messages": messages, f"{type(odd)}" * 100_000: 1},
        {"messages": messages, "documents": odd},
        {"tools": odd, "messages": messages},
        {"user": odd, "messages": messages},
        {"messages": messages, "model": odd},
        {"messages": odd},
        {"messages": tuple(messages)},
        {"messages": [*map(MappingProxyType, messages)]},
        {"messages": [Turn(**fields) for fields in messages]},
    ):
        for _ in range(2):
            assert_alike(prepared(going_on(), sent), as_it_is(sent))


def test_what_is_kept_beside_the_messages_counts_and_salts_are_not_kept() -> None:
    builder = PromptBuilder(Settings.model_validate({"prepare": {"cache_bytes": 2_000_000}}), secret=b"s")
    for number in range(50):
        documents = [{"title": f"{number}", "text": "word " * 10_000}]
        builder.prepare(body([{**LONG, "name": f"{number}"}], {"documents": documents}, {}, False), CHAT)
    held = builder.describe()["continuations"]
    assert 0 < held["conversations"] < 5
    before = held["conversations"]
    builder.prepare(body([LONG], {"cache_salt": "secret"}, {}, False), CHAT)
    assert builder.describe()["continuations"]["conversations"] == before
    builder.prepare(body([LONG], {}, {"cache_salt": "secret"}, False), CHAT)
    assert b"secret" not in repr(dict(builder._continuations._known)).encode()


def test_conversations_that_go_on_are_found_again_and_bounded_in_bytes() -> None:
    builder = PromptBuilder(Settings.model_validate({"prepare": {"cache_bytes": 200_000}}), secret=b"s")
    rng = random.Random(0)
    for _ in range(100):
        text = " ".join(str(rng.random()) for _ in range(300))
        builder.prepare(body([{"role": "user", "content": text}], {}, {}, False), CHAT)
    held = builder.describe()["continuations"]
    assert 1 < held["conversations"] < 100
    assert held["bytes"] <= 100_000


@pytest.mark.parametrize(
    "changed",
    [
        {"tools": None},
        {"tools": tool(1)},
        {"model": "n"},
        {"cache_salt": "other"},
        {"add_special_tokens": True},
        {"continue_final_message": True},
        {"stream": False},
    ],
    ids=str,
)
def test_a_field_that_changes_between_two_turns_is_read_anew(changed: dict[str, Any]) -> None:
    fields = {"model": "m", "tools": tool(True), "cache_salt": "one", "stream": True}
    messages = [LONG, {"role": "user", "content": "hi"}]
    going_on().prepare(body(messages, {}, fields, False), CHAT)
    sent = body([*messages, {"role": "user", "content": "more"}], {}, fields | changed, False)
    assert_alike(prepared(going_on(), sent), prepared(forgetful(), sent))


def test_a_body_made_to_look_like_many_known_ones_is_hashed_a_few_times() -> None:
    messages = [LONG]
    for _ in range(30):  # every turn ends alike
        messages = [*messages, {"role": "user", "content": "the same words, and more than a mark of them"}]
        going_on().prepare(body(messages, {"model": "m"}, {}, False), CHAT)
    known = body(messages, {"model": "m"}, {}, False)
    altered = known.replace(b"helpful", b"hopeful", 1)
    with patch.object(continuation, "_digest", wraps=continuation._digest) as hashed:
        assert going_on()._continuations.find(altered) is None
    assert hashed.call_count == continuation.HASHED


def test_a_conversation_of_many_turns_is_found_at_each() -> None:
    messages, found = [{**LONG, "name": "many turns"}], 0
    for turn in range(20):
        messages = [*messages, {"role": "user", "content": f"turn {turn}"}]
        sent = body(messages, {"model": "m"}, {}, False)
        found += going_on()._continuations.find(sent) is not None
        assert_alike(prepared(going_on(), sent), prepared(forgetful(), sent))
    assert found == 19


def test_a_chat_that_comes_again_goes_on_from_its_end() -> None:
    sent = body([{**LONG, "name": "again"}, {"role": "user", "content": "once more"}], {"model": "m"}, {}, False)
    first = prepared(going_on(), sent)
    known = going_on()._continuations.find(sent)
    assert known is not None
    assert known.rest(sent) == {"model": "m", "messages": []}
    assert_alike(prepared(going_on(), sent), first)


def test_a_list_of_messages_that_ends_in_a_comma_is_no_json() -> None:
    sent = body([{**LONG, "name": "comma"}, {"role": "user", "content": "once"}], {"model": "m"}, {}, False)
    going_on().prepare(sent, CHAT)
    assert sent.endswith(b"}]}")
    with pytest.raises(PromptError, match="not valid JSON"):
        going_on().prepare(sent[:-2] + b",]}", CHAT)
