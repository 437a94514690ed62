"""The first paper's distributed balancers: a real LiteLLM proxy in each of two regions, each with its own knowledge.

A balancer knows its own engine and the other balancer, which serves what it is sent on its own engine alone: under the
other balancer's address there is a model whose only deployment that is, so a request takes one hop at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests import litellm_proxy
from tests.litellm_proxy import KEY, Proxy, deployment, proxy_config, wait_until
from tests.stub_engine import Behaviour, StubEngine

ONE_WAY_S = 0.04
HELD_S = 12.0
ROOM = 5  # requests in flight below which the policy keeps everything local
LONG = "a river runs under the bridge " * 400  # some 2,400 tokens


class Way:
    """The way to the other region: what is sent to its port crosses it, and comes out at a balancer.

    The engines' metrics over there are read along it, too.
    """

    def __init__(self) -> None:
        self.balancer = self.engine = ""
        self.port = litellm_proxy.free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        loop, ready = asyncio.new_event_loop(), threading.Event()
        stopped = asyncio.Event()

        async def serve() -> None:
            app = web.Application(client_max_size=2**26)
            app.router.add_route("*", "/{path:.*}", self._cross)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            async with aiohttp.ClientSession() as self._session:
                ready.set()
                await stopped.wait()
            await runner.cleanup()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            assert ready.wait(10)
            yield
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(10)
            loop.close()

    async def _cross(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(ONE_WAY_S)
        if request.path == "/health":
            await asyncio.sleep(ONE_WAY_S)
            return web.Response()
        to = self.engine if request.path == "/metrics" else self.balancer
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        body = await request.read()
        async with self._session.request(request.method, to + request.path, data=body, headers=headers) as answer:
            await asyncio.sleep(ONE_WAY_S)
            back = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await back.prepare(request)
            async for piece in answer.content.iter_any():
                await back.write(piece)
            return back


@dataclass
class Region:
    """A region: its engine, its balancer, and the way to it from the other one."""

    engine: StubEngine
    way: Way
    proxy: Proxy

    def ask(self, pool: ThreadPoolExecutor, text: str) -> Future[str]:
        """A client of this region sends a chat to its balancer; the text of the streamed answer."""

        def send() -> str:
            body = {"model": "llama", "messages": [{"role": "user", "content": text}], "stream": True}
            with self.proxy.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert answer.status_code == 200, answer.read()
                return "".join(answer.iter_text())

        return pool.submit(send)

    def fill(self, pool: ThreadPoolExecutor, name: str) -> list[Future[str]]:
        """Keep its engine busy with as many long prompts as it takes for the next one to be better off elsewhere."""
        self.engine.behaviour = Behaviour(before_first_token_s=HELD_S)
        before = len(self.engine.requests)
        asked = []
        for number in range(ROOM):
            asked.append(self.ask(pool, f"{name} {number} {LONG}"))
            wait_until(lambda: len(self.engine.requests) == before + len(asked), what=f"{name} to hold another")
        return asked


def config(own: str, engine: StubEngine, other: str, way: Way) -> dict[str, Any]:
    peer = deployment("llama", way.url, "openai/llama-here", name=other, region=other)
    peer["litellm_params"]["api_key"] = KEY
    return proxy_config(
        [
            deployment("llama", engine.url, "openai/m", name=own, region=own),
            peer,
            deployment("llama-here", engine.url, "openai/m", name=own, region=own),
        ],
        router_settings={
            "routing_strategy_args": {
                "policy": "gorgo-v1-distributed",
                "probe": {"path": "/health", "interval_s": 0.2},
            }
        },
    )


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Region, Region]]:
    folder, ways = tmp_path_factory.mktemp("balancers"), (Way(), Way())  # to the east, to the west
    with contextlib.ExitStack() as stack:
        east, west = (stack.enter_context(StubEngine(name)) for name in ("east", "west"))
        for way, engine in zip(ways, (east, west), strict=True):
            way.engine = engine.url
            stack.enter_context(way.open())
        proxies = [
            stack.enter_context(litellm_proxy.running(config(own, engine, other, way), Path(folder, own)))
            for own, engine, other, way in (("east", east, "west", ways[1]), ("west", west, "east", ways[0]))
        ]
        for way, proxy in zip(ways, proxies, strict=True):
            way.balancer = proxy.url
        made = Region(east, ways[0], proxies[0]), Region(west, ways[1], proxies[1])
        for region, other in (made, made[::-1]):
            wait_until(lambda: _knows(region.proxy, other.engine.name), 30, "the round trips", region.proxy.log_text)  # noqa: B023
        yield made


def _knows(proxy: Proxy, other: str) -> bool:
    """Whether the way to the other region is known to be long, and how busy its engine is."""
    known = proxy.status()["replicas"][other]
    return (known["latency"]["rtt_ms"] or 0.0) > ONE_WAY_S * 1000.0 and known["gauges"]["running"] is not None


def routed(region: Region) -> int:
    counters: dict[str, int] = region.proxy.status()["counters"]
    return counters["routed"]


@pytest.fixture(autouse=True)
def _at_rest(regions: tuple[Region, Region]) -> Iterator[None]:
    yield
    for region in regions:
        region.engine.reset()
        wait_until(lambda: not any(region.proxy.status()["flights"].values()), 30, "no flight to be open")  # noqa: B023


def test_what_a_region_has_room_for_stays_there(regions: tuple[Region, Region]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for region in regions:
            for asked in [region.ask(pool, f"{region.engine.name} {number}") for number in range(4)]:
                assert "[DONE]" in asked.result(30)
    assert [len(region.engine.requests) for region in regions] == [4, 4]


def test_what_it_has_no_room_for_takes_one_hop_to_the_other_balancer(regions: tuple[Region, Region]) -> None:
    east, west = regions
    before = routed(east), routed(west)
    with ThreadPoolExecutor(16) as pool:
        held = east.fill(pool, "held")
        assert "[DONE]" in east.ask(pool, "a short one").result(HELD_S / 2)
        assert (len(east.engine.requests), len(west.engine.requests)) == (ROOM, 1)
        assert routed(east) - before[0] == ROOM + 1
        assert routed(west) - before[1] == 1  # its balancer decided as well, among its own
        assert all("[DONE]" in one.result(30) for one in held)


def test_no_request_is_sent_back(regions: tuple[Region, Region]) -> None:
    """Both are full: what the first sends on, as it knows nothing of the other's queue, the other keeps."""
    east, west = regions
    before = routed(east), routed(west)
    with ThreadPoolExecutor(16) as pool:
        held = [*east.fill(pool, "held"), *west.fill(pool, "held")]
        asked = east.ask(pool, "a short one")
        wait_until(lambda: len(west.engine.requests) == ROOM + 1, what="the other engine to have it")
        assert len(east.engine.requests) == ROOM
        assert (routed(east) - before[0], routed(west) - before[1]) == (ROOM + 1, ROOM + 1)
        assert all("[DONE]" in one.result(30) for one in [*held, asked])
