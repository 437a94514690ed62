"""Requests through the real Envoy with the real service."""

from __future__ import annotations

from pathlib import Path

from tests.envoy_gateway import running
from tests.stub_engine import StubEngine


def test_first(tmp_path: Path) -> None:
    with StubEngine("near") as near, StubEngine("far") as far:
        replicas = [{"name": one.name, "region": one.name, "url": one.url} for one in (near, far)]
        with running(tmp_path, replicas) as gateway:
            for stream in (True, False):
                body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "hi " * 500}]}
                answer = gateway.post(body)
                assert answer.status_code == 200
                print(answer.headers)
            gateway.wait_until_at_rest()
            print(gateway.status()["counters"])
            assert len(near.requests) + len(far.requests) == 2
