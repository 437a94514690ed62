"""Streamed answers: the first token belongs to its attempt.

Engines send a stream's headers when they take a request, before its prefill. For LiteLLM an attempt ends there, so
what dies or hangs in the seconds until the first token would reach the client as an error. Here the attempt lasts until
the first content is there, and a failure before it is retried elsewhere like any other. Clients wait no longer: the
proxy sends no headers of its own before the first event either.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import anyio

from gorgo_plugin.litellm_strategy.outcomes import has_content

HELD_EVENTS = 8  # events that may come before the first content; a responses stream begins with four to six


class Begun:
    """A stream whose first events were read ahead. It is taken for the stream itself: LiteLLM looks at its class."""

    __slots__ = ("__weakref__", "_gorgo_held", "_gorgo_stream")

    def __init__(self, stream: AsyncIterator[Any], held: deque[Any]) -> None:
        object.__setattr__(self, "_gorgo_stream", stream)
        object.__setattr__(self, "_gorgo_held", held)

    @property  # type: ignore[misc]  # what isinstance() asks next to the type
    def __class__(self) -> type:
        return type(self._gorgo_stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gorgo_stream, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._gorgo_stream, name, value)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Any]:
        if self._gorgo_held:
            return _ready(self._gorgo_held.popleft())
        following: Coroutine[Any, Any, Any] = self._gorgo_stream.__anext__()
        return following


async def begin(stream: AsyncIterator[Any]) -> tuple[AsyncIterator[Any], bool]:
    """Wait for the first content of a stream.

    Returns:
        The stream, with nothing missing, and whether content has come: a stream may end without any.

    Raises:
        Exception: the stream failed before its first content; it is closed.
    """
    held: deque[Any] = deque()
    content = False
    try:
        async for event in stream:
            held.append(event)
            content = has_content(event)
            if content or len(held) == HELD_EVENTS:
                break
    except BaseException:
        with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
            await stream.aclose()  # type: ignore[attr-defined]  # those of LiteLLM's streams that hold a connection
        raise
    return Begun(stream, held), content


async def _ready(event: Any) -> Any:
    return event
