"""What answers and exceptions say of an attempt."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gorgo_plugin.litellm_strategy.outcomes import failure_kind, has_content
from gorgo_plugin.runtime.outcomes import Usage, usage_of

REQUEST = httpx.Request("POST", "http://a:1")


def status_error(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(status, request=REQUEST))


class GatewayError(Exception):
    """As LiteLLM wraps what its transport raised: with a status of its own making."""

    def __init__(self, status_code: int | None = 500) -> None:
        super().__init__("wrapped")
        self.status_code = status_code


def wrapped(cause: BaseException | None, status: int | None = 500, times: int = 3) -> BaseException:
    error = cause
    for _ in range(times):
        outer = GatewayError(status)
        outer.__cause__ = error
        error = outer
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (wrapped(httpx.ConnectError("refused")), "unreached"),
        (wrapped(httpx.ConnectTimeout("no answer"), 408), "unreached"),
        (wrapped(ConnectionRefusedError()), "unreached"),
        (wrapped(socket.gaierror()), "unreached"),
        (wrapped(httpx.ReadTimeout("slow"), 408), "timeout"),
        (wrapped(TimeoutError()), "timeout"),
        (wrapped(None, 408), "timeout"),
        (wrapped(None, 504), "timeout"),
        (wrapped(status_error(500)), "rejected"),
        (wrapped(status_error(429), 429), "rejected"),
        (wrapped(status_error(401), 401), "rejected"),
        (wrapped(status_error(404), 404), "rejected"),
        (wrapped(status_error(400), 400), "invalid"),
        (wrapped(status_error(413), 413), "invalid"),
        (wrapped(status_error(422), 400), "invalid"),
        (wrapped(httpx.RemoteProtocolError("closed")), "rejected"),
        (wrapped(None, None), "rejected"),
        (asyncio.CancelledError(), "disconnect"),
        (GeneratorExit(), "disconnect"),
    ],
)
def test_a_failure_is_judged_by_what_happened(error: BaseException, kind: str) -> None:
    assert failure_kind(error) == kind


def test_the_failure_of_an_attempt_before_does_not_count() -> None:
    second = status_error(500)
    second.__context__ = wrapped(httpx.ConnectError("refused"))  # raised while the first one was handled
    assert failure_kind(wrapped(second)) == "rejected"


def test_causes_that_go_round_in_a_circle_end() -> None:
    one, other = GatewayError(), GatewayError()
    one.__cause__, other.__cause__ = other, one
    assert failure_kind(one) == "rejected"


DETAILS = {"prompt_tokens_details": {"cached_tokens": 64}}


@pytest.mark.parametrize(
    ("response", "usage"),
    [
        ({"usage": {"prompt_tokens": 100, "completion_tokens": 5, **DETAILS}}, Usage(100, 64, 5)),
        ({"usage": {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 0}}}, Usage(100, 0, None)),
        ({"usage": {"prompt_tokens": 100, "prompt_tokens_details": None}}, Usage(100, None, None)),
        (
            {
                "usage": {
                    "prompt_tokens": 100,
                    "cache_read_input_tokens": 0,
                    "prompt_tokens_details": {"cached_tokens": 0},
                }
            },
            Usage(100),
        ),
        (
            {"usage": {"input_tokens": 100, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 64}}},
            Usage(100, 64, 5),
        ),
        ({"usage": {"input_tokens": 36, "output_tokens": 5, "cache_read_input_tokens": 64}}, Usage(100, 64, 5)),
        (
            {"usage": {"input_tokens": 6, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 30}},
            Usage(100, 64),
        ),
        ({"usage": {"input_tokens": 100}}, Usage(100)),
        ({"response": {"usage": {"input_tokens": 100}}}, Usage(100)),
        ({"usage": {"prompt_tokens": "many"}}, Usage()),
        ({"usage": {"prompt_tokens": True}}, Usage()),
        ({"usage": None}, Usage()),
        (None, Usage()),
        (b"data: {}", Usage()),
    ],
)
def test_usage_is_read_in_every_shape(response: Any, usage: Usage) -> None:
    assert usage_of(response) == usage
    if isinstance(response, dict):
        assert usage_of(as_objects(response)) == usage


def as_objects(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{name: as_objects(item) for name, item in value.items()})


@pytest.mark.parametrize(
    ("chunk", "content"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, False),
        ({"choices": [{"delta": {"content": "w"}}]}, True),
        ({"choices": [{"delta": {"reasoning_content": "w"}}]}, True),
        ({"choices": [{"delta": {"tool_calls": [{}]}}]}, True),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, True),
        ({"choices": [{"text": "w"}]}, True),
        ({"choices": []}, False),
        ({"type": "response.created"}, False),
        ({"type": "response.output_item.added"}, False),
        ({"type": "response.output_text.delta"}, True),
        ({"type": "response.completed"}, True),
        (b'event: message_start\ndata: {"type": "message_start"}\n\n', False),
        (b"event: content_block_delta\ndata: {}\n\n", True),
        ("event: content_block_delta\ndata: {}\n\n", True),
    ],
)
def test_the_first_token_is_told_from_what_comes_before_it(chunk: Any, content: bool) -> None:
    assert has_content(chunk) is content
    assert has_content(as_objects(chunk)) is content
