"""Answers as they pass by in pieces: where the first token is, and what usage the end reports."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from gorgo_plugin.envoy_ext_proc.answers import TAIL_BYTES, Tail, shows_first_token
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from gorgo_plugin.runtime.outcomes import Usage
from tests.stub_engine import OUTPUT_TOKENS, Behaviour, prompt_tokens, streamed_answer, whole_answer

MESSAGE = [{"role": "user", "content": "where does the river go? " * 9}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": MESSAGE, "stream_options": {"include_usage": True}},
    COMPLETIONS: {"model": "m", "prompt": MESSAGE[0]["content"], "stream_options": {"include_usage": True}},
    RESPONSES: {"model": "m", "input": MESSAGE[0]["content"]},
    EMBEDDINGS: {"model": "m", "input": MESSAGE[0]["content"]},
    MESSAGES: {"model": "m", "messages": MESSAGE},
}
STREAMED = [endpoint for endpoint in BODIES if endpoint != EMBEDDINGS]


def observed(piece: bytes) -> bytes:
    message = pb.ProcessingRequest(observability_mode=True)
    message.response_body.body = piece
    return bytes(message.SerializeToString())


def usage_in(endpoint: str, pieces: Iterable[bytes]) -> Usage:
    tail = Tail(endpoint)
    for piece in pieces:
        tail.add(observed(piece))
    return tail.usage()


def stream_of(endpoint: str, **behaviour: Any) -> list[bytes]:
    return [event.encode() for event in streamed_answer(endpoint, BODIES[endpoint], Behaviour(**behaviour))]


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("cached", [0, 16])
def test_usage_is_read_from_a_whole_answer(endpoint: str, cached: int) -> None:
    answer = json.dumps(whole_answer(endpoint, BODIES[endpoint], cached)).encode()
    embeds = endpoint == EMBEDDINGS
    expected = Usage(prompt_tokens(BODIES[endpoint]), None if embeds else cached, None if embeds else OUTPUT_TOKENS)
    assert usage_in(endpoint, [answer]) == expected


@pytest.mark.parametrize("endpoint", STREAMED)
def test_usage_is_read_from_a_stream(endpoint: str) -> None:
    expected = Usage(prompt_tokens(BODIES[endpoint]), 16, OUTPUT_TOKENS)
    assert usage_in(endpoint, stream_of(endpoint, cached_tokens=16)) == expected


@pytest.mark.parametrize("endpoint", STREAMED)
def test_usage_is_read_wherever_the_pieces_are_cut(endpoint: str) -> None:
    text = b"".join(stream_of(endpoint, cached_tokens=16, tokens=1))
    expected = Usage(prompt_tokens(BODIES[endpoint]), 16, OUTPUT_TOKENS)
    for size in (1, 2, 3, 7, 50, 1000):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert usage_in(endpoint, pieces) == expected, size


@pytest.mark.parametrize("endpoint", STREAMED)
def test_usage_is_read_at_the_end_of_a_long_stream_of_which_little_is_kept(endpoint: str) -> None:
    pieces = stream_of(endpoint, cached_tokens=16, tokens=20_000)
    assert sum(map(len, pieces)) > 20 * TAIL_BYTES
    tail = Tail(endpoint)
    tracemalloc.start()
    try:
        for piece in pieces:
            tail.add(observed(piece))
        assert tracemalloc.get_traced_memory()[1] < 16 * TAIL_BYTES  # with what other threads allocate
    finally:
        tracemalloc.stop()
    assert tail.usage() == Usage(prompt_tokens(BODIES[endpoint]), 16, OUTPUT_TOKENS)


def test_of_several_usages_the_last_counts() -> None:
    counts = [b'data: {"usage": {"prompt_tokens": 9, "completion_tokens": %d}}\n\n' % output for output in (1, 2, 3)]
    assert usage_in(CHAT, counts) == Usage(9, None, 3)


def test_an_empty_usage_before_the_end_does_not_count() -> None:
    pieces = [b'data: {"choices": [], "usage": null}\n\n'] * 3
    pieces.insert(2, b'data: {"usage": {"prompt_tokens": 9}}\n\n')
    assert usage_in(CHAT, pieces) == Usage(9, None, None)


def test_usage_in_the_text_of_an_answer_is_text() -> None:
    content = 'say "usage": {"prompt_tokens": 7}'
    answer = {"choices": [{"message": {"content": content}}]}
    assert usage_in(CHAT, [json.dumps(answer).encode()]) == Usage()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no JSON",
        b'{"usage": null}',
        b'{"usage": {',
        b'{"usage": {"prompt_tokens": ',
        b'{"usage": {prompt_tokens: 7}}',
        b'{"usage": {"prompt_tokens": "\xff"}}',
        b'{"usage": {"prompt_tokens": "many"}}',
        b'{"usage": {"prompt_tokens": -7}}',
        b'{"usage": {' + b'"a": {' * 3000,
    ],
)
@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
def test_an_answer_without_a_readable_usage_reports_none(endpoint: str, text: bytes) -> None:
    assert usage_in(endpoint, [text]) == Usage()


@pytest.mark.parametrize("endpoint", STREAMED)
def test_the_first_token_is_where_the_first_content_is(endpoint: str) -> None:
    shown = [shows_first_token(piece, endpoint) for piece in stream_of(endpoint)]
    before = {CHAT: 0, COMPLETIONS: 0, RESPONSES: 2, MESSAGES: 2}[endpoint]
    assert shown.index(True) == before


def test_a_comment_that_keeps_a_stream_open_is_no_token() -> None:
    assert not shows_first_token(b": still here\n\n", CHAT)


def test_embeddings_have_no_first_token() -> None:
    assert not shows_first_token(b"data: {}", EMBEDDINGS)
