"""Request bodies as Envoy hands them over: unpacked through a cap, and asked to report their usage."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest

from gorgo_plugin import PromptError
from gorgo_plugin.envoy_ext_proc.bodies import asking_for_usage, stream_reports_usage, unpacked
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

TEXT = json.dumps({"model": "m", "prompt": "where does the river go? " * 100}).encode()
LIMIT = 65_536


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(TEXT)),
        ("x-gzip", gzip.compress(TEXT)),
        (" GZip ", gzip.compress(TEXT)),
        ("deflate", zlib.compress(TEXT)),
        ("", TEXT),
        ("identity", TEXT),
    ],
)
def test_a_body_is_unpacked(encoding: str, body: bytes) -> None:
    assert unpacked(body, encoding, LIMIT) == TEXT


@pytest.mark.parametrize(
    ("encoding", "body", "sentence"),
    [
        ("br", TEXT, "content-encoding: 'br' is not read here; gzip and deflate are"),
        ("gzip, gzip", gzip.compress(gzip.compress(TEXT)), "is not read here"),
        ("x" * 500, TEXT, "'" + "x" * 40 + "' is not read here"),
        ("gzip", TEXT, "body: damaged gzip data"),
        ("gzip", gzip.compress(TEXT)[:-9], "body: gzip data that ends too early"),
        ("gzip", b"", "body: gzip data that ends too early"),
        ("gzip", gzip.compress(TEXT)[:-8] + bytes(8), "body: damaged gzip data"),
        ("deflate", b"\x00\x00", "body: damaged deflate data"),
        ("gzip", gzip.compress(bytes(LIMIT + 1)), f"body: more than {LIMIT} bytes when unpacked"),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused_in_one_sentence(encoding: str, body: bytes, sentence: str) -> None:
    with pytest.raises(PromptError) as caught:
        unpacked(body, encoding, LIMIT)
    assert sentence in str(caught.value)


def test_a_body_may_unpack_to_just_the_limit() -> None:
    assert len(unpacked(gzip.compress(bytes(LIMIT)), "gzip", LIMIT)) == LIMIT


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = gzip.compress(bytes(64 * 2**20))
    tracemalloc.start()
    try:
        with pytest.raises(PromptError):
            unpacked(bomb, "gzip", LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 10 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("endpoint", [RESPONSES, MESSAGES, EMBEDDINGS])
def test_streams_of_other_endpoints_always_report_their_usage(endpoint: str) -> None:
    assert stream_reports_usage(b"{}", endpoint)
    assert asking_for_usage(b'{"stream":true}', endpoint) is None


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("body", "reports"),
    [
        (b"{}", False),
        (b'{"stream_options": {"include_usage": true}}', True),
        (b'{"stream_options":{"include_usage" :\n true}}', True),
        (b'{"stream_options": {"include_usage": false}}', False),
        (b'{"stream_options": null}', False),
        (rb'{"prompt": "say \"include_usage\": true"}', False),
    ],
)
def test_a_stream_reports_its_usage_when_the_client_asked(endpoint: str, body: bytes, reports: bool) -> None:
    assert stream_reports_usage(body, endpoint) == reports


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "m", "stream": True},
        {"stream_options": None},
        {"stream_options": {}},
        {"stream_options": {"continuous_usage_stats": True}},
        {"prompt": 'say "stream_options": {"include_usage": true}'},
        {"tools": [{"parameters": {"stream_options": {"type": "string"}}}]},
    ],
)
def test_usage_is_asked_for_and_the_rest_of_the_body_stays(fields: dict[str, Any]) -> None:
    for text in (json.dumps(fields), json.dumps(fields, indent=2), " \n" + json.dumps(fields)):
        asking = asking_for_usage(text.encode(), CHAT)
        assert asking is not None
        options = {**(fields.get("stream_options") or {}), "include_usage": True}
        assert json.loads(asking) == {**fields, "stream_options": options}


def test_a_client_that_refuses_its_usage_is_left_alone() -> None:
    assert asking_for_usage(b'{"stream": true, "stream_options": {"include_usage": false}}', CHAT) is None


def test_what_the_client_wrote_stays_byte_for_byte() -> None:
    body = b'{ "z":1.0,\t"a": "\\u00e4",\n"z":2 }'
    asking = asking_for_usage(body, CHAT)
    assert asking is not None
    assert asking.endswith(body.removeprefix(b"{ "))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nothing", b'{"stream_options": 7}', b'{"stream_options": ', b'["stream_options"]']
)
def test_of_a_body_that_is_not_understood_nothing_is_asked(body: bytes) -> None:
    assert asking_for_usage(body, CHAT) is None
