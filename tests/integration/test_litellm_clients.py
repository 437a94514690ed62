"""Clients that leave, at each moment: no flight stays open, and nothing is learned from them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import httpx
import pytest

from tests.integration.conftest import set_args
from tests.integration.test_litellm_proxy import ENDPOINTS, STREAMING, Engines, ask, chat, long_text
from tests.litellm_proxy import KEY, Proxy, wait_until
from tests.stub_engine import Behaviour

WAIT_S = 0.4  # what the engines are slow by; clients leave after half of it


def open_flights(gateway: Proxy) -> int:
    return sum(gateway.status()["flights"].values())


def failures(gateway: Proxy, engines: Engines) -> int:
    """Failures in a row, over both replicas."""
    replicas = gateway.status()["replicas"]
    return sum(replicas[engine.name]["health"]["failures_in_a_row"] for engine in engines)


def leave(gateway: Proxy, path: str, body: dict[str, Any], after_bytes: bool) -> None:
    """Send a request and hang up, after the first bytes of the answer or before them."""
    timeout = httpx.Timeout(10.0, read=None if after_bytes else WAIT_S / 2)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        gateway.client.stream("POST", path, json=body, timeout=timeout) as answer,
    ):
        next(answer.iter_raw(), None)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", STREAMING)
def test_a_client_that_leaves_before_the_headers_leaves_no_flight(
    gateway: Proxy, engines: Engines, path: str, stream: bool
) -> None:
    for engine in engines:
        engine.behaviour.before_headers_s = WAIT_S
    leave(gateway, path, ENDPOINTS[path](long_text()) | {"stream": stream}, after_bytes=False)
    wait_until(lambda: open_flights(gateway) == 0)


@pytest.mark.parametrize("path", STREAMING)
def test_a_client_that_leaves_before_the_first_token_leaves_no_flight(
    gateway: Proxy, engines: Engines, path: str
) -> None:
    for engine in engines:
        engine.behaviour.before_first_token_s = WAIT_S
    leave(gateway, path, ENDPOINTS[path](long_text()) | {"stream": True}, after_bytes=False)
    wait_until(lambda: open_flights(gateway) == 0)


@pytest.mark.parametrize("path", STREAMING)
def test_a_client_that_leaves_mid_stream_leaves_no_flight(gateway: Proxy, engines: Engines, path: str) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(tokens=1500, between_tokens_s=0.02)
    leave(gateway, path, ENDPOINTS[path](long_text()) | {"stream": True}, after_bytes=True)
    wait_until(lambda: open_flights(gateway) == 0)


def test_a_client_that_leaves_a_pass_through_leaves_no_flight(gateway: Proxy, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(tokens=200, between_tokens_s=0.02)
    leave(gateway, "/vllm/v1/chat/completions", chat(long_text(), "vm", stream=True), after_bytes=True)
    wait_until(lambda: open_flights(gateway) == 0)


def test_a_client_that_leaves_does_not_speak_against_the_replica(gateway: Proxy, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour.before_first_token_s = WAIT_S
    before = failures(gateway, engines)
    leave(gateway, "/v1/chat/completions", chat(long_text(), stream=True), after_bytes=False)
    wait_until(lambda: open_flights(gateway) == 0)
    assert failures(gateway, engines) == before


def test_a_stream_that_breaks_ends_its_flight_and_speaks_against_the_replica(gateway: Proxy, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(break_after_tokens=3)
    before = failures(gateway, engines)
    gateway.post("/v1/chat/completions", chat(long_text(), stream=True))
    wait_until(lambda: open_flights(gateway) == 0)
    assert failures(gateway, engines) > before
    for engine in engines:
        engine.reset()
    wait_until(lambda: _well(gateway, engines))


def _well(gateway: Proxy, engines: Engines) -> bool:
    ask(gateway, "/v1/chat/completions", chat(long_text()))
    replicas = gateway.status()["replicas"]
    return all(replicas[engine.name]["health"]["available"] for engine in engines)


async def test_many_clients_of_which_a_third_leave_lose_no_answer_and_leave_no_flight(
    gateway: Proxy, engines: Engines
) -> None:
    set_args(gateway, response_headers="region")
    engines[0].behaviour = Behaviour(before_first_token_s=0.05, between_tokens_s=0.01, tokens=8)
    engines[1].behaviour = Behaviour(status=500)
    rng = random.Random(7)
    texts = [long_text() for _ in range(6)]

    async def client(asking: httpx.AsyncClient, number: int) -> int | None:
        path = STREAMING[number % len(STREAMING)]
        body = ENDPOINTS[path](rng.choice(texts)) | {"stream": number % 2 == 0}
        if number % 3:
            return (await asking.post(path, json=body)).status_code
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asking.post(path, json=body), rng.choice([0.01, 0.1, 0.3]))
        return None

    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=50)
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=60.0, limits=limits) as asking:
        statuses = await asyncio.gather(*(client(asking, number) for number in range(100)))
    assert [status for status in statuses if status is not None] == [200] * 66
    for engine in engines:
        engine.reset()
    wait_until(lambda: open_flights(gateway) == 0)


async def test_requests_that_share_ids_a_client_chose_stay_apart(gateway: Proxy, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(before_first_token_s=0.1)
    before = failures(gateway, engines)
    headers = {"Authorization": f"Bearer {KEY}", "x-litellm-call-id": "same", "x-litellm-trace-id": "same"}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=60.0) as asking:
        bodies = [chat(long_text(), stream=number % 2 == 0, litellm_trace_id="same") for number in range(16)]
        answers = await asyncio.gather(*(asking.post("/v1/chat/completions", json=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [200] * 16
    wait_until(lambda: open_flights(gateway) == 0)
    assert failures(gateway, engines) <= before
