"""The service sees a first token when the client does."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tests.envoy_gateway import Gateway, running
from tests.litellm_proxy import wait_until
from tests.stub_engine import Behaviour, StubEngine

REQUESTS, BOUND_MS = 25, 5.0
ATTEMPTS = 3  # a busy machine takes them apart, and never closer: of the headers it would be 50 ms each time


def clients_ttft_s(gateway: Gateway, number: int) -> float:
    text = f"request {number}: " + "some words " * 200
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]}
    began_s = time.monotonic()
    with gateway.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        ttft_s = time.monotonic() - began_s
        for _ in pieces:
            pass
    return ttft_s


def distances_ms(gateway: Gateway, first: int) -> list[float]:
    found = []
    for number in range(first, first + REQUESTS):
        seen_s, seen = gateway.metric("gorgo_ttft_seconds_sum"), gateway.metric("gorgo_ttft_seconds_count")
        ttft_s = clients_ttft_s(gateway, number)
        wait_until(lambda seen=seen: gateway.metric("gorgo_ttft_seconds_count") == seen + 1)
        found.append((ttft_s - (gateway.metric("gorgo_ttft_seconds_sum") - seen_s)) * 1e3)
    return found


def test_the_service_sees_first_tokens_when_the_client_does(tmp_path: Path) -> None:
    with StubEngine("near") as near, StubEngine("far") as far:
        replicas = [{"name": one.name, "region": one.name, "url": one.url} for one in (near, far)]
        with running(tmp_path, replicas) as gateway:
            near.behaviour = far.behaviour = Behaviour(before_first_token_s=0.05, between_tokens_s=0.01)
            clients_ttft_s(gateway, 0)
            for attempt in range(ATTEMPTS):
                distance_ms = statistics.median(distances_ms(gateway, 1 + attempt * REQUESTS))
                print(f"client's TTFT less the service's: median {distance_ms:.2f} ms")
                if abs(distance_ms) < BOUND_MS:
                    break
    assert abs(distance_ms) < BOUND_MS
