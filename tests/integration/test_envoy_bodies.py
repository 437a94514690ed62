"""Bodies of every kind through the real Envoy: what the client gets, and a service that stays well."""

from __future__ import annotations

import gzip
import json
import random
import statistics
import string
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.envoy_gateway import Gateway, running
from tests.litellm_proxy import wait_until
from tests.stub_engine import StubEngine

Engines = tuple[StubEngine, StubEngine]
CHAT = "/v1/chat/completions"
LIMIT_BYTES = 32 * 2**20


def words(size: int, seed: int) -> str:
    """Text that no tokenizer has seen before."""
    draw = random.Random(seed)
    made = " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(size // 6))
    return (made * 2)[:size]


def chat(size: int, seed: int) -> bytes:
    """A chat whose body has about this many bytes."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": words(size, seed)}]}).encode()


def padded(size: int) -> bytes:
    """A chat whose body has exactly this many bytes, most of them white space."""
    body = chat(1000, seed=size)
    return body[:-1] + b" " * (size - len(body)) + b"}"


@dataclass(frozen=True)
class Case:
    """A body, and what the client gets for it: the status, and whether gorgo chose the replica."""

    body: bytes
    status: int
    routed: bool
    headers: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    """Bodies that are counted as not to be read."""
    reaches_an_engine: bool = True


def gzipped(body: bytes, status: int = 200, routed: bool = True, unread: int = 0, encoding: str = "gzip") -> Case:
    return Case(body, status, routed, {"content-encoding": encoding}, unread)


CASES = {
    "a chat": Case(chat(2000, 1), 200, routed=True),
    "malformed JSON": Case(b'{"model": "m", "messages": [', 400, routed=False, unread=1),
    "no JSON object": Case(b"[1, 2]", 400, routed=False, unread=1),
    "no UTF-8": Case(b'{"model": "\xff\xfe"}', 400, routed=False, unread=1),
    "no prompt": Case(b'{"model": "m"}', 200, routed=False, unread=1),
    "empty": Case(b"", 400, routed=False),
    "a chat of 5 MB never seen": Case(chat(5_000_000, 2), 200, routed=True),
    "just under the limit": Case(padded(LIMIT_BYTES - 1), 200, routed=True),
    "at the limit": Case(padded(LIMIT_BYTES), 200, routed=True),
    "over the limit": Case(padded(LIMIT_BYTES + 1), 413, routed=False, reaches_an_engine=False),
    "gzip": gzipped(gzip.compress(chat(20_000, 3))),
    "GZIP": gzipped(gzip.compress(chat(20_000, 4)), encoding="GZIP"),
    "deflate": gzipped(zlib.compress(chat(20_000, 5)), encoding="deflate"),
    "identity": gzipped(chat(2000, 6), encoding="identity"),
    "gzip that ends too early": gzipped(gzip.compress(chat(20_000, 7))[:-500], 400, routed=False, unread=1),
    "gzip that is none": gzipped(chat(2000, 8), 400, routed=False, unread=1),
    # The engine refuses it too, with a limit of its own.
    "a gzip bomb": gzipped(gzip.compress(b'{"a":"' + bytes(3 * LIMIT_BYTES)), 413, routed=False, unread=1),
    "an encoding nobody knows": gzipped(chat(2000, 9), routed=False, unread=1, encoding="x-own"),
}


@pytest.fixture(scope="module")
def process(engine_pair: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    replicas = [{"name": one.name, "region": one.name, "url": one.url} for one in engine_pair]
    # Time enough for the largest bodies on a slow machine; what happens when it is not, a test of its own shows.
    timeouts = {"message_timeout_s": 10.0, "max_message_timeout_s": 30.0}
    with running(tmp_path_factory.mktemp("bodies"), replicas, envoy=timeouts) as gateway:
        yield gateway


@pytest.fixture
def gateway(process: Gateway, engines: Engines) -> Iterator[Gateway]:
    """The gateway; after the test it must be at rest, and route as ever."""
    yield process
    process.wait_until_at_rest()
    assert process.service is not None
    assert process.service.poll() is None
    assert "x-gorgo-replica" in process.post(chat(500, 0)).headers


def unread(gateway: Gateway) -> float:
    return gateway.metric("gorgo_fallbacks_total", reason="prompt-error")


@pytest.mark.parametrize("name", CASES)
def test_the_client_gets_an_answer_for_every_body(gateway: Gateway, engines: Engines, name: str) -> None:
    case = CASES[name]
    before = unread(gateway)
    answer = gateway.post(case.body, headers=case.headers)
    assert answer.status_code == case.status
    assert ("x-gorgo-replica" in answer.headers) == case.routed
    assert unread(gateway) - before == case.unread
    if case.status == 200:
        (served,) = [engine for engine in engines if engine.requests]
        assert answer.headers.get("x-gorgo-replica", served.name) == served.name
        assert len(served.requests) == 1
    assert ("x-envoy-upstream-service-time" in answer.headers) == case.reaches_an_engine


def test_a_chunked_upload_of_nothing_is_the_engines_to_refuse(gateway: Gateway) -> None:
    before = unread(gateway)
    assert gateway.client.post(CHAT, content=iter(())).status_code == 400
    assert unread(gateway) - before == 1


@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("size", [2_000, 500_000])
def test_a_body_in_pieces_is_routed_as_a_whole(gateway: Gateway, engines: Engines, http2: bool, size: int) -> None:
    body = chat(size, seed=size + http2)
    pieces = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    with httpx.Client(base_url=gateway.url, http1=not http2, http2=http2, timeout=30) as client:
        answer = client.post(CHAT, content=pieces)
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert "x-gorgo-replica" in answer.headers
    assert [*engines[0].bodies, *engines[1].bodies] == [body]


def test_a_body_over_the_limit_without_a_length_is_refused_by_envoy(gateway: Gateway, engines: Engines) -> None:
    pieces = (bytes(2**20) for _ in range(40))
    assert gateway.client.post(CHAT, content=pieces).status_code == 413
    assert not engines[0].requests
    assert not engines[1].requests


def test_while_a_long_prompt_is_tokenized_others_are_routed(gateway: Gateway) -> None:
    done = threading.Event()
    taken_s: list[float] = []
    unrouted: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=gateway.url, timeout=30) as client:
            while not done.is_set():
                started = time.perf_counter()
                answer = client.post(CHAT, content=chat(500, seed=100 + len(taken_s)))
                taken_s.append(time.perf_counter() - started)
                if "x-gorgo-replica" not in answer.headers:
                    unrouted.append(answer.status_code)

    others = threading.Thread(target=ask)
    others.start()
    try:
        assert "x-gorgo-replica" in gateway.post(chat(3_000_000, 10)).headers
    finally:
        done.set()
        others.join()
    assert not unrouted
    assert len(taken_s) > 10
    assert statistics.median(taken_s) < 0.2


def test_a_prompt_that_takes_longer_than_envoy_waits_is_served_unrouted(gateway: Gateway, engines: Engines) -> None:
    waits = {"estimate_above_chars": None, "encoder": "tokenizers"}
    gateway.reload(envoy={"message_timeout_s": 0.25, "max_message_timeout_s": 0.25}, prepare=waits)
    abandoned = gateway.metric("gorgo_fallbacks_total", reason="abandoned")
    try:
        body = chat(5_000_000, 11)
        answer = gateway.post(body)
        assert answer.status_code == 200
        assert "x-gorgo-replica" not in answer.headers
        assert [*engines[0].bodies, *engines[1].bodies] == [body]
        given_up = abandoned + 1
        wait_until(lambda: gateway.metric("gorgo_fallbacks_total", reason="abandoned") == given_up, what="the count")
    finally:
        gateway.reload()


def test_a_very_long_prompt_is_routed_on_an_estimate_within_what_envoy_waits(gateway: Gateway) -> None:
    gateway.reload(envoy={"message_timeout_s": 0.25, "max_message_timeout_s": 0.25})
    try:
        assert "x-gorgo-replica" in gateway.post(chat(5_000_000, 12)).headers
        reasons = ("only-candidate-by-estimate", "cheapest-by-estimate", "near-tie-by-estimate")
        assert sum(gateway.metric("gorgo_decisions_total", reason=reason) for reason in reasons) >= 1
    finally:
        gateway.reload()
