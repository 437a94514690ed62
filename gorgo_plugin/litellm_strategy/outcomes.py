"""What LiteLLM's answers and exceptions say of an attempt: how it failed, and where its content begins."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx

from gorgo_plugin.runtime.outcomes import field, kind_of_status

CHAIN_LIMIT = 8  # links of an exception's causes; LiteLLM wraps the transport's error about five times

# Of a responses stream, sent when the request is accepted, long before the first token.
_LIFECYCLE_EVENTS = frozenset(
    {
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_summary_part.added",
    }
)


def failure_kind(error: BaseException) -> str:
    """The kind of failure, as `Router.fail` takes it.

    The outermost exception carries the status LiteLLM made of it; what happened is further inside. The search ends at
    the first certain sign, because the causes of a retry's failure lead on into those of the attempt before.
    """
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "disconnect"
    for link in _causes(error):
        if isinstance(link, (httpx.ConnectError, httpx.ConnectTimeout, ConnectionRefusedError, socket.gaierror)):
            return "unreached"
        if isinstance(link, (httpx.TimeoutException, TimeoutError)):
            return "timeout"
        if isinstance(link, httpx.HTTPStatusError):
            return kind_of_status(link.response.status_code)
    return kind_of_status(getattr(error, "status_code", None))


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(CHAIN_LIMIT):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def has_content(chunk: Any) -> bool:
    """Whether a piece of a streamed answer shows that the first token is there."""
    if isinstance(chunk, bytes):  # server-sent events of Anthropic messages
        return b"content_block_delta" in chunk
    if isinstance(chunk, str):
        return "content_block_delta" in chunk
    kind = field(chunk, "type")
    if kind is not None:
        return getattr(kind, "value", kind) not in _LIFECYCLE_EVENTS
    choices = field(chunk, "choices")
    if not choices:
        return False
    choice = choices[0]
    if field(choice, "text") or field(choice, "finish_reason"):
        return True
    delta = field(choice, "delta")
    return any(field(delta, name) for name in ("content", "tool_calls", "reasoning_content", "reasoning"))
