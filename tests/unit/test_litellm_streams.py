"""Streams whose first events are read ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gorgo_plugin.litellm_strategy.streams import HELD_EVENTS, begin

EMPTY = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
TOKEN = {"choices": [{"delta": {"content": "a"}}]}


class Stream:
    """A stream as LiteLLM's are: a class with attributes."""

    def __init__(self, *events: Any) -> None:
        self.events = list(events)
        self.closed = False
        self.hidden: dict[str, Any] = {}

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self.events:
            raise StopAsyncIteration
        event = self.events.pop(0)
        if event is None:
            await asyncio.Event().wait()
        if isinstance(event, Exception):
            raise event
        return event

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("count", [0, 1, 3, HELD_EVENTS, HELD_EVENTS + 3])
@pytest.mark.parametrize("tokens", [0, 2])
async def test_nothing_of_a_stream_is_missing_or_out_of_order(count: int, tokens: int) -> None:
    given = [{**EMPTY, "number": number} for number in range(count)] + [TOKEN] * tokens
    stream, content = await begin(Stream(*given))
    assert [event async for event in stream] == given
    assert content == (tokens > 0 and count < HELD_EVENTS)


async def test_a_stream_is_read_no_further_than_its_first_content() -> None:
    source = Stream(EMPTY, TOKEN, TOKEN, RuntimeError("later"))
    stream, _ = await begin(source)
    assert len(source.events) == 2
    with pytest.raises(RuntimeError, match="later"):
        [event async for event in stream]


async def test_what_fails_before_the_first_content_is_raised_and_closed() -> None:
    source = Stream(EMPTY, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        await begin(source)
    assert source.closed


async def test_a_wait_that_is_cancelled_closes_the_stream() -> None:
    source = Stream(EMPTY, None)
    task = asyncio.create_task(begin(source))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed


async def test_a_stream_read_ahead_is_taken_for_itself() -> None:
    source = Stream(TOKEN)
    stream: Any = (await begin(source))[0]
    assert isinstance(stream, Stream)
    stream.hidden["a"] = 1
    stream.later = 2
    assert (source.hidden, source.later) == ({"a": 1}, 2)  # type: ignore[attr-defined]
    await stream.aclose()
    assert source.closed


async def test_a_generator_is_read_ahead_and_closed() -> None:
    ended = []

    async def generate() -> AsyncIterator[Any]:
        try:
            yield TOKEN
            yield TOKEN
        finally:
            ended.append(True)

    stream: Any = (await begin(generate()))[0]
    assert await anext(stream) == TOKEN
    await stream.aclose()
    assert ended == [True]
