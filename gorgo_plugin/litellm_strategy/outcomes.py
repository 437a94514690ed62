"""What LiteLLM's answers and exceptions say of an attempt: how it failed, what it used, where its content begins."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

CHAIN_LIMIT = 8  # links of an exception's causes; LiteLLM wraps the transport's error about five times

_INVALID = frozenset({400, 413, 422})  # the request's own fault; the replica is well
_TIMEOUT = frozenset({408, 504})
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


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as an engine counted them; None where it does not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


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
            return _kind_of_status(link.response.status_code)
    return _kind_of_status(getattr(error, "status_code", None))


def _kind_of_status(status: Any) -> str:
    if status in _INVALID:
        return "invalid"
    return "timeout" if status in _TIMEOUT else "rejected"


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(CHAIN_LIMIT):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def usage_of(response: Any) -> Usage:
    """Usage in any of the shapes: OpenAI chat and completions, embeddings, responses, Anthropic messages."""
    usage = field(response, "usage")
    if usage is None:
        usage = field(field(response, "response"), "usage")  # the event that completes a responses stream
    if usage is None:
        return Usage()
    prompt = field(usage, "prompt_tokens")
    if prompt is not None:
        cached = _count(field(field(usage, "prompt_tokens_details"), "cached_tokens"))
        if cached == 0 and field(usage, "cache_read_input_tokens") is not None:
            cached = None  # LiteLLM's own reading of an Anthropic answer says 0 also where the engine said nothing
        return Usage(_count(prompt), cached, _count(field(usage, "completion_tokens")))
    prompt, output = _count(field(usage, "input_tokens")), _count(field(usage, "output_tokens"))
    read = _count(field(usage, "cache_read_input_tokens"))
    if read is None:
        return Usage(prompt, _count(field(field(usage, "input_tokens_details"), "cached_tokens")), output)
    # Anthropic's input tokens are those that were neither read from the cache nor written to it.
    written = _count(field(usage, "cache_creation_input_tokens")) or 0
    return Usage(None if prompt is None else prompt + read + written, read, output)


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


def field(holder: Any, name: str) -> Any:
    """A field of a mapping or an object; None where there is none."""
    if isinstance(holder, Mapping):
        return holder.get(name)
    return getattr(holder, name, None)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
