"""Two vLLM engines on this machine's processors, each with its own core and cache."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp

from gorgo_plugin.fleet.processes import Child, ProcessError, free_port, running, until
from tests.real_engine.environment import Unavailable
from tests.real_engine.model import CONTEXT_TOKENS, KV_BYTES_PER_TOKEN

BLOCK_TOKENS = 32  # vLLM's attention on CPUs takes multiples of 32 only
KV_BYTES = 64 * 2**20
KV_TOKENS = KV_BYTES // KV_BYTES_PER_TOKEN
MODELS = ("chatml", "headers")  # names of one model; the second is asked with the other template
NAMES = ("alpha", "beta")


@dataclass(frozen=True, slots=True)
class Engine:
    """One running engine.

    Attributes:
        name: of the replica.
        url: where its API listens.
        events, replay: ZMQ addresses of its KV events and of their replay, as a subscriber connects to them.
        child: its process.
    """

    name: str
    url: str
    events: str
    replay: str
    child: Child


@contextlib.asynccontextmanager
async def engines(python: Path, model: Path, folder: Path) -> AsyncIterator[list[Engine]]:
    """Run both engines, on the first two cores this program may use, for the length of the block.

    Raises:
        Unavailable: one of them ended, or did not serve in time.
    """
    cores = sorted(os.sched_getaffinity(0))
    async with contextlib.AsyncExitStack() as stack:
        started = []
        for index, name in enumerate(NAMES):
            context = _start(name, cores[index % len(cores)], python, model, folder)
            started.append(await stack.enter_async_context(context))
        try:
            for engine in started:
                await until(engine.child, partial(_healthy, engine.url))
        except ProcessError as error:
            raise Unavailable(str(error)) from None
        yield started


@contextlib.asynccontextmanager
async def _start(name: str, core: int, python: Path, model: Path, folder: Path) -> AsyncIterator[Engine]:
    port, events, replay = (free_port() for _ in range(3))
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += _arguments(model, {"endpoint": f"tcp://*:{events}", "replay_endpoint": f"tcp://*:{replay}"})
    environment = _environment(core, folder / f"{name}.cache")
    async with running(f"engine {name}", command, folder / f"{name}.log", environment) as child:
        url, loopback = f"http://127.0.0.1:{port}", "tcp://127.0.0.1"
        yield Engine(name, url, f"{loopback}:{events}", f"{loopback}:{replay}", child)


async def _healthy(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def reset_cache(engine: Engine) -> None:
    """Empty an engine's prefix cache; only an engine without a request does it."""
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        await session.post(f"{engine.url}/reset_prefix_cache")


def _arguments(model: Path, endpoints: Mapping[str, str]) -> list[str]:
    events = {"enable_kv_cache_events": True, "publisher": "zmq", **endpoints}
    return [
        *("--model", str(model), "--served-model-name", *MODELS, "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", str(KV_BYTES)),
        *("--max-model-len", str(CONTEXT_TOKENS), "--enable-prompt-tokens-details", "--generation-config", "vllm"),
        *("--trust-request-chat-template", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--disable-uvicorn-access-log", "--kv-events-config", json.dumps(events)),
    ]


def _environment(core: int, cache: Path) -> dict[str, str]:
    return {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # serves /reset_prefix_cache
        "VLLM_CACHE_ROOT": str(cache),
    }
