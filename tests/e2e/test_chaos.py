"""Fifty clients, a third of which leave; one replica is killed and comes back, one hangs, one answers 500."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from gorgo_plugin.fleet.gateway import MODEL, ROWS, litellm_config, litellm_proxy
from gorgo_plugin.fleet.loadgen import Target
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.fleet.processes import Child, first_line, free_port, running

CLIENTS = 50
REQUESTS_EACH = 4
OUTPUT_TOKENS = 24
LEAVES = ("before the headers", "before the first token", "mid-stream")
NAMES = ("steady", "mortal", "hanging", "failing")


@dataclass
class Seen:
    """What the clients saw."""

    complete: int = 0
    left: int = 0
    broken_mid_stream: int = 0
    lost: list[str] = field(default_factory=list)


@asynccontextmanager
async def replica(name: str, port: int, folder: Path, *options: str) -> AsyncIterator[Child]:
    command = (
        *(sys.executable, "-c", "from gorgo_plugin.cli import main; main()", "mock-upstream"),
        *(f"--name={name}", f"--model={MODEL}", f"--port={port}", "--rtt-ms=20", "--ms-per-token=0.05", *options),
    )
    async with running(name, command, folder / f"{name}.log", read_output=True) as child:
        await first_line(child)
        yield child


def body(rng: random.Random, session: int, turn: int) -> bytes:
    messages = [{"role": "system", "content": Passage(f"app/{session % 5}", 600).text}]
    for number in range(turn + 1):
        messages.append({"role": "user", "content": Passage(f"{session}/{number}", rng.randint(50, 400)).text})
    return msgspec.json.encode(
        {
            "model": MODEL,
            "messages": messages,
            "max_tokens": OUTPUT_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def client(session: aiohttp.ClientSession, number: int, seen: Seen) -> None:
    rng = random.Random(number)
    leave = LEAVES[number // 3 % 3] if number % 3 == 0 else None
    for turn in range(REQUESTS_EACH):
        await asyncio.sleep(rng.expovariate(1.0))
        await one_request(session, body(rng, number, turn), leave, rng, seen)


async def one_request(
    session: aiohttp.ClientSession, data: bytes, leave: str | None, rng: random.Random, seen: Seen
) -> None:
    got_body = False
    try:
        if leave == "before the headers":
            async with asyncio.timeout(rng.uniform(0.005, 0.05)), session.post("/v1/chat/completions", data=data):
                seen.left += 1  # the headers were there first
            return
        async with session.post("/v1/chat/completions", data=data) as response:
            if leave == "before the first token":
                seen.left += 1
                return
            text = b""
            async for chunk in response.content.iter_any():
                got_body, text = True, text + chunk
                if leave == "mid-stream":
                    seen.left += 1
                    return
            if response.status == 200 and b"data: [DONE]" in text and b'"error"' not in text:
                seen.complete += 1
            elif response.status == 200 and b'"content"' in text:
                seen.broken_mid_stream += 1
            else:
                seen.lost.append(f"{response.status}: {text[:300]!r}")
    except TimeoutError:
        seen.left += 1
    except aiohttp.ClientError as error:
        if got_body:
            seen.broken_mid_stream += 1
        else:
            seen.lost.append(repr(error))


async def status(session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get("/gorgo/status") as response:
        assert response.status == 200
        found: dict[str, Any] = await response.json()
        return found


async def until_at_rest(session: aiohttp.ClientSession, target: Target) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            state = await status(session)
            loads = [entry["load"] for entry in state["replicas"].values()]
            if not any(state["flights"].values()) and not any(load["waiting"] + load["decoding"] for load in loads):
                return state
            await asyncio.sleep(0.2)


@pytest.mark.timeout(300)
async def test_nothing_leaks_and_no_request_that_could_be_served_is_lost(tmp_path: Path) -> None:
    ports = {name: free_port() for name in NAMES}
    config = litellm_config(ROWS["gorgo"], {name: f"http://127.0.0.1:{ports[name]}" for name in NAMES}, 200_000, seed=1)
    config["router_settings"] |= {"num_retries": 3, "retry_after": 0, "cooldown_time": 2}
    config["router_settings"]["routing_strategy_args"] |= {
        "probe": {"path": "/health", "interval_s": 0.3, "timeout_s": 1.0},
        "metrics": {"interval_s": 0.5},
    }
    for entry in config["model_list"]:
        entry["litellm_params"] |= {"timeout": 4, "stream_timeout": 4}
    async with AsyncExitStack() as stack:
        for name, options in {"steady": (), "hanging": ("--fault=hang",), "failing": ("--fault=error",)}.items():
            await stack.enter_async_context(replica(name, ports[name], tmp_path, *options))
        mortal_life = AsyncExitStack()
        mortal = await mortal_life.enter_async_context(replica("mortal", ports["mortal"], tmp_path))
        target, _ = await stack.enter_async_context(litellm_proxy(config, tmp_path, "chaos"))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                target.url,
                headers={"Authorization": f"Bearer {target.api_key}", "Content-Type": "application/json"},
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=120),
            )
        )
        seen = Seen()
        clients = [asyncio.create_task(client(session, number, seen)) for number in range(CLIENTS)]
        await asyncio.sleep(4)
        mortal.process.kill()
        await mortal.process.wait()
        await asyncio.sleep(3)
        await mortal_life.aclose()
        await stack.enter_async_context(replica("mortal", ports["mortal"], tmp_path))
        await asyncio.gather(*clients)

        state = await until_at_rest(session, target)
        print(
            f"complete {seen.complete}, left {seen.left}, broken mid-stream {seen.broken_mid_stream}, lost {seen.lost}"
        )
        assert seen.lost == []
        assert seen.complete + seen.left + seen.broken_mid_stream == CLIENTS * REQUESTS_EACH
        assert seen.complete > CLIENTS * REQUESTS_EACH / 2
        assert state["counters"]["forgotten_caches"] >= 1
        assert state["counters"]["swept_flights"] == 0

        # A restart seen at rest: no credit may be left.
        async with session.post(f"http://127.0.0.1:{ports['steady']}/mock/restart") as response:
            assert response.status < 300
        async with asyncio.timeout(20):
            while any(
                entry["index_tokens"] for entry in (await status(session))["replicas"]["steady"]["models"].values()
            ):
                await asyncio.sleep(0.2)
