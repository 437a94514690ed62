"""What LiteLLM hands a selector, read back into a request body."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gorgo_plugin.litellm_strategy.calls import read_call

MESSAGES = [{"role": "user", "content": "hi"}]


def through_proxy(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"litellm_logging_obj": SimpleNamespace(call_type=kind), **kwargs}


def wrapped(prompt: Any) -> list[dict[str, Any]]:
    """As LiteLLM's router wraps the prompt of a completion."""
    return [{"role": "user", "content": prompt}]


@pytest.mark.parametrize(
    ("messages", "given", "kwargs", "endpoint", "body"),
    [
        (MESSAGES, None, through_proxy("acompletion", tools=[1]), "/v1/chat/completions", {"tools": [1]}),
        (wrapped("hi"), None, through_proxy("atext_completion"), "/v1/completions", {"messages": wrapped("hi")}),
        (MESSAGES, None, through_proxy("anthropic_messages", system="s"), "/v1/messages", {"system": "s"}),
        (
            None,
            "hi",
            through_proxy("aresponses", instructions="i"),
            "/v1/responses",
            {"input": "hi", "instructions": "i"},
        ),
        (None, ["a"], through_proxy("aembedding"), "/v1/embeddings", {"input": ["a"]}),
        (MESSAGES, None, {}, "/v1/chat/completions", {"messages": MESSAGES}),
        (wrapped([1, 2]), None, {}, "/v1/completions", {"messages": wrapped([1, 2])}),
        (None, "hi", {}, "/v1/embeddings", {"input": "hi"}),
        (None, "hi", {"input": "hi"}, "/v1/responses", {"input": "hi"}),
        (MESSAGES, None, {"messages": MESSAGES}, "/v1/messages", {"messages": MESSAGES}),
    ],
)
def test_a_call_is_read_as_the_endpoint_it_came_to(
    messages: Any, given: Any, kwargs: dict[str, Any], endpoint: str, body: dict[str, Any]
) -> None:
    call = read_call(messages, given, kwargs)
    assert call is not None
    assert call.endpoint == endpoint
    assert body.items() <= dict(call.body).items()


@pytest.mark.parametrize("kind", ["aimage_generation", "aspeech", "arerank", "agenerate_content"])
def test_a_call_without_a_prompt_is_none_of_ours(kind: str) -> None:
    assert read_call(None, "a prompt of another kind", through_proxy(kind)) is None


def test_a_call_of_nothing_is_none_of_ours() -> None:
    assert read_call(None, None, {}) is None


def test_metadata_never_reaches_the_prompt() -> None:
    call = read_call(MESSAGES, None, through_proxy("acompletion", metadata={"session_id": "forged"}, user="me"))
    assert call is not None
    assert "metadata" not in call.body
    assert call.body["user"] == "me"


def test_fields_that_separate_caches_are_kept_from_the_extra_body_too() -> None:
    call = read_call(MESSAGES, None, through_proxy("acompletion", extra_body={"cache_salt": "s"}))
    assert call is not None
    assert call.body["cache_salt"] == "s"


def test_pass_through_is_read_from_the_body_as_it_came() -> None:
    body = {"model": "m", "messages": MESSAGES, "stream": True, "metadata": {"user_id": "forged"}}
    call = read_call(None, None, {"json": body, "endpoint": "v1/chat/completions", "method": "POST"})
    assert call is not None
    assert (call.endpoint, call.stream, call.unseen) == ("/v1/chat/completions", True, True)
    assert dict(call.body) == {"model": "m", "messages": MESSAGES, "stream": True}


def test_pass_through_to_what_holds_no_prompt_is_none_of_ours() -> None:
    assert read_call(None, None, {"json": {"x": 1}, "endpoint": "v1/audio/speech"}) is None
    assert read_call(None, None, {"json": None, "endpoint": "v1/chat/completions"}) is None
