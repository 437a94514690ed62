"""Two vLLM engines on this machine's processors, each with its own core and cache."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from gorgo_plugin.fleet.processes import Child, ProcessError, free_port, running, until
from tests.real_engine.environment import Unavailable
from tests.real_engine.model import CONTEXT_TOKENS, KV_BYTES_PER_TOKEN

BLOCK_TOKENS = 32  # vLLM's attention on CPUs takes multiples of 32 only
KV_BYTES = 64 * 2**20
KV_TOKENS = KV_BYTES // KV_BYTES_PER_TOKEN
# Names of one model, so that each learns for itself how answers come back: ChatML with answers of random tokens, ChatML
# with answers of whole words, and the other template, which trims answers, with whole words.
MODELS = ("chatml", "words", "headers")
NAMES = ("alpha", "beta")


@dataclass(slots=True)
class Engine:
    """One engine.

    Attributes:
        name: of the replica.
        url: where its API listens.
        events, replay: ZMQ addresses of its KV events and of their replay; files, so that nothing listens outside.
        child: its process.
    """

    name: str
    url: str
    events: str
    replay: str
    child: Child
    _start: Callable[[], Awaitable[Child]]

    async def serves(self) -> None:
        """Await that it answers.

        Raises:
            ProcessError: it ended, or did not serve in time.
        """
        await until(self.child, self._healthy)

    async def restart(self) -> None:
        """End it and start it anew at the same addresses.

        Raises:
            ProcessError: it ended, or did not serve in time.
        """
        await self.child.stop()
        self.child = await self._start()
        await self.serves()

    async def reset_cache(self) -> None:
        """Empty its prefix cache; only an engine without a request does it."""
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.post(f"{self.url}/reset_prefix_cache") as answer,
        ):
            await answer.read()

    async def step(self, model: str) -> None:
        """Let it work, so that it publishes the events that it holds back until then."""
        body = {"model": model, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 1}
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.post(f"{self.url}/v1/chat/completions", json=body) as answer,
        ):
            await answer.read()

    async def _healthy(self) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


@contextlib.asynccontextmanager
async def engines(
    python: Path,
    model: Path,
    folder: Path,
    names: Sequence[str] = NAMES,
    kv_bytes: int = KV_BYTES,
    context_tokens: int = CONTEXT_TOKENS,
) -> AsyncIterator[list[Engine]]:
    """Run engines for the length of the block, each on one of the cores this program may use.

    Args:
        python: the interpreter of their environment.
        model: folder of the model.
        folder: for their logs and caches.
        names: of the engines.
        kv_bytes: size of each one's KV cache.
        context_tokens: longest prompt with its answer.

    Raises:
        Unavailable: one of them ended, or did not serve in time.
    """
    cores = sorted(os.sched_getaffinity(0))
    async with contextlib.AsyncExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgo-kv-"))
        started = []
        for index, name in enumerate(names):
            port, events, replay = free_port(), f"ipc://{sockets}/{name}-events", f"ipc://{sockets}/{name}-replay"
            command = [
                *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
                *_arguments(model, events, replay, kv_bytes, context_tokens),
            ]
            environment = _environment(cores[index % len(cores)], folder / f"{name}.cache")

            async def start(
                name: str = name, command: list[str] = command, environment: dict[str, str] = environment
            ) -> Child:
                child = running(f"engine {name}", command, folder / f"{name}.log", environment)
                return await stack.enter_async_context(child)

            started.append(Engine(name, f"http://127.0.0.1:{port}", events, replay, await start(), start))
        try:
            for engine in started:
                await engine.serves()
        except ProcessError as error:
            raise Unavailable(str(error)) from None
        yield started


def _arguments(model: Path, events: str, replay: str, kv_bytes: int, context_tokens: int) -> list[str]:
    publisher = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events, "replay_endpoint": replay}
    return [
        *("--model", str(model), "--served-model-name", *MODELS, "--load-format", "dummy", "--dtype", "bfloat16"),
        *("--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--kv-cache-memory-bytes", str(kv_bytes)),
        *("--max-model-len", str(context_tokens), "--enable-prompt-tokens-details", "--generation-config", "vllm"),
        *("--trust-request-chat-template", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--disable-uvicorn-access-log", "--kv-events-config", json.dumps(publisher)),
    ]


def _environment(core: int, cache: Path) -> dict[str, str]:
    return {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # serves /reset_prefix_cache
        "VLLM_CACHE_ROOT": str(cache),
    }
