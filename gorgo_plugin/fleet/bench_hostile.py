"""What cold and hostile prompts do to a gateway's event loop, its memory and its answers."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gorgo_plugin.decision import Prompt
from gorgo_plugin.errors import PromptError
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.prompt.endpoints import CHAT
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.settings import Settings

REPLICAS = 8
TICK_S = 0.001
WARM_EVERY_S = 0.004  # 250 requests a second, what one worker of a gateway serves
COLD_AT_A_TIME = 4
COLD_EVERY_S = 0.1  # of each of them; those that are not waited for would else come by the thousand
WARM_S = 5.0  # of the run without cold prompts
WARM_CHATS, WARM_TURNS = 16, 12
COLD_CHARS_A_TOKEN = 4.25  # of the standard library's sources in the embedded vocabulary
BLOCK_TOKENS = 16
BRANCHES = 6000  # more than the index walks
CACHED_TOKENS = 100_000  # a replica's cache here, so that it overflows
DEEP = 100_000


@dataclass(frozen=True, slots=True)
class LoopRow:
    """How late one event loop ran in a run, in ms, and how long prompts took to prepare."""

    traffic: str
    warm_requests: int
    stall_p50_ms: float
    stall_p999_ms: float
    stall_max_ms: float
    warm_p99_ms: float
    cold_p50_ms: float | None
    cold_max_ms: float | None


@dataclass(frozen=True, slots=True)
class HostileRow:
    """One hostile input: what it took, how late the loop ran meanwhile, what memory it left, and the answer."""

    case: str
    ms: float
    stall_ms: float
    kept_mb: float
    answer: str


class _Loop:
    """How late the running loop wakes."""

    def __init__(self) -> None:
        self.late_ms: list[float] = []

    async def watch(self) -> None:
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.late_ms.append((time.perf_counter() - due_s) * 1e3)


@asynccontextmanager
async def _watched() -> AsyncIterator[_Loop]:
    loop = _Loop()
    watching = asyncio.create_task(loop.watch())
    await asyncio.sleep(5 * TICK_S)
    loop.late_ms.clear()
    try:
        yield loop
    finally:
        watching.cancel()


def settings(**prepare: Any) -> Settings:
    """Replicas that nobody asks anything, and the given settings of preparing."""
    replicas = [
        {"name": f"r{k}", "url": f"http://127.0.0.1:{9000 + k}", "kv_tokens": CACHED_TOKENS} for k in range(REPLICAS)
    ]
    return Settings.model_validate({"replicas": replicas, "metrics": {"path": None}, "prepare": prepare})


@cache
def _lines() -> list[str]:
    """Lines of this Python's standard library: words of all kinds, unlike a passage's."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [line for path in sources for line in path.read_text(encoding="utf-8", errors="replace").splitlines(True)]


def cold_text(seed: int, tokens: int) -> str:
    """About so many tokens of text that was never seen."""
    rng, left, chosen = random.Random(seed), int(tokens * COLD_CHARS_A_TOKEN), [f"cold {seed}\n"]
    while left > 0:
        chosen.append(rng.choice(_lines()))
        left -= len(chosen[-1])
    return "".join(chosen)


def chat_body(*contents: str) -> bytes:
    """The body of a chat."""
    messages = [{"role": "user" if k % 2 == 0 else "assistant", "content": text} for k, text in enumerate(contents)]
    return json.dumps({"model": "m", "stream": True, "messages": messages}).encode()


async def bench_stalls(cold: int, tokens: int, said: Callable[[str], None]) -> list[LoopRow]:
    """The loop under warm traffic alone, and mixed with `cold` prompts of `tokens` tokens each."""
    rows = []
    bodies = [chat_body(cold_text(seed, tokens)) for seed in range(cold)]
    for name, prepare in _variants(cold, tokens).items():
        said(name)
        runtime = Runtime(settings(**prepare), gateway="bench")
        try:
            rows.append(await _mixed(runtime, name, bodies if prepare else []))
        finally:
            await runtime.stop()
    return rows


def _variants(cold: int, tokens: int) -> dict[str, dict[str, Any]]:
    mixed = f"warm, and {cold} cold ones of {tokens:,} tokens"
    return {
        "warm": {},
        f"{mixed}, estimated": {"estimate_above_chars": 100_000},
        f"{mixed}, waited for": {"estimate_above_chars": None},
        f"{mixed}, waited for, by tokenizers": {"estimate_above_chars": None, "encoder": "tokenizers"},
    }


async def _mixed(runtime: Runtime, name: str, bodies: Sequence[bytes]) -> LoopRow:
    chats = [[Passage(f"warm/{k}/{turn}", 150).text for turn in range(WARM_TURNS)] for k in range(WARM_CHATS)]
    warm_ms: list[float] = []
    cold_ms: list[float] = []
    pending = iter(bodies)

    async def serve(body: bytes, ms: list[float]) -> None:
        began_s = time.perf_counter()
        prompt = await runtime.prepare(body, CHAT)
        decision = runtime.router.route(prompt)
        ms.append((time.perf_counter() - began_s) * 1e3)
        runtime.router.first_token(decision.flight_id)
        runtime.router.finish(decision.flight_id)

    async def colds() -> None:
        for body in pending:
            next_s = time.perf_counter() + COLD_EVERY_S
            await serve(body, cold_ms)
            await asyncio.sleep(max(next_s - time.perf_counter(), 0.0))

    warm_bodies = [chat_body(*chat[:turn]) for turn in range(1, WARM_TURNS + 1, 2) for chat in chats]
    gc.collect()
    async with _watched() as loop:
        mixing = asyncio.gather(*(colds() for _ in range(COLD_AT_A_TIME)))
        until_s = time.perf_counter() + (0 if bodies else WARM_S)
        while not mixing.done() or time.perf_counter() < until_s:
            await serve(warm_bodies[len(warm_ms) % len(warm_bodies)], warm_ms)
            await asyncio.sleep(WARM_EVERY_S)
        await mixing
    p50, p999, most = np.percentile(loop.late_ms, (50, 99.9, 100)).tolist()
    cold_p50, cold_most = np.percentile(cold_ms, (50, 100)).tolist() if cold_ms else (None, None)
    return LoopRow(name, len(warm_ms), p50, p999, most, float(np.percentile(warm_ms, 99)), cold_p50, cold_most)


async def bench_hostile(prefixes: int, said: Callable[[str], None]) -> list[HostileRow]:
    """Hostile bodies through `Runtime.prepare`, and hostile prompts through the router."""
    rows = []
    runtime = Runtime(settings(estimate_above_chars=None), gateway="bench")
    try:
        for case, make in _bodies().items():
            said(case)
            rows.append(await _prepared(runtime, case, make()))
    finally:
        await runtime.stop()
    for case, work in (("branching", _branching), ("prefixes", lambda: _prefixes(prefixes))):
        said(case)
        rows += work()
    return rows


def _bodies() -> dict[str, Callable[[], Any]]:
    deep: Any = "x"
    for _ in range(DEEP):
        deep = [deep]
    return {
        "2M tokens": lambda: chat_body(cold_text(-1, 2_000_000)),
        "2M tokens as token ids": lambda: {"prompt": [7] * 2_000_000},
        "one word of 1M letters": lambda: chat_body("a" * 1_000_000),
        "1M spaces": lambda: chat_body(" " * 1_000_000),
        "1M signs": lambda: chat_body("^" * 1_000_000),
        "1M special tokens' beginnings": lambda: chat_body("<|im_" * 200_000),
        "100k special tokens": lambda: chat_body("<|im_start|>" * 100_000),
        "1M ideographs": lambda: chat_body("漢" * 1_000_000),
        "100k empty messages": lambda: chat_body(*[""] * 100_000),
        f"JSON {DEEP:,} lists deep": lambda: b'{"messages": [{"role": "user", "content": ' + b"[" * DEEP + b"]" * DEEP,
        f"a mapping {DEEP:,} lists deep": lambda: {"messages": [{"role": "user", "content": deep}]},
        "8 MB that end in no UTF-8": lambda: chat_body("x" * 8_000_000)[:-4] + b'\xff"}]}',
        "a mapping of 1M lone surrogates": lambda: {"messages": [{"role": "user", "content": "\ud800" * 1_000_000}]},
        "1M lone surrogates": lambda: b'{"messages": [{"role": "user", "content": "' + b"\\ud800" * 1_000_000 + b'"}]}',
        "32 MB of braces": lambda: b'{"messages": [' + b"{" * 32_000_000,
    }


async def _prepared(runtime: Runtime, case: str, body: Any) -> HostileRow:
    endpoint = CHAT if isinstance(body, bytes) or "messages" in body else "/v1/completions"
    gc.collect()
    before_mb = _resident_mb()
    async with _watched() as loop:
        began_s = time.perf_counter()
        try:
            prompt = await runtime.prepare(body, endpoint)
            runtime.router.finish(runtime.router.route(prompt).flight_id)
            answer = f"{len(prompt):,} tokens"
        except PromptError as error:
            answer = str(error)
        ms = (time.perf_counter() - began_s) * 1e3
        await asyncio.sleep(2 * TICK_S)
    del body
    gc.collect()
    return HostileRow(case, ms, max(loop.late_ms), _resident_mb() - before_mb, answer)


def _branching() -> Iterator[HostileRow]:
    """A prompt that another one left at every block of it."""
    from gorgo_plugin.router import Router

    router = Router(settings().model_copy(update={"replicas": []}))
    router.set_replicas([one.model_copy(update={"kv_tokens": 10**9}) for one in settings().replicas])
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 2**17, BRANCHES * BLOCK_TOKENS, dtype=np.uint32)
    other = Prompt(rng.integers(0, 2**17, BRANCHES * BLOCK_TOKENS, dtype=np.uint32))
    before_mb = _resident_mb()
    router.finish(router.route(other).flight_id)
    for blocks in range(BRANCHES):
        left = np.concatenate([trunk[: blocks * BLOCK_TOKENS], np.full(BLOCK_TOKENS, 2**17 + blocks, dtype=np.uint32)])
        router.finish(router.route(Prompt(left), ["r0"]).flight_id)
    kept_mb = _resident_mb() - before_mb
    for case, prompt in ((f"a branch at each of {BRANCHES:,} blocks", Prompt(trunk)), ("as long without", other)):
        times = []
        for _ in range(50):
            began_s = time.perf_counter()
            router.explain(prompt)
            times.append((time.perf_counter() - began_s) * 1e3)
        yield HostileRow(case, float(np.median(times)), max(times), kept_mb, "a decision")


def _prefixes(count: int) -> Iterator[HostileRow]:
    """Prompts that have nothing in common, to replicas whose caches are soon full."""
    from gorgo_plugin.router import Router

    router = Router(settings())
    rng = np.random.default_rng(0)
    part = max(count // 4, 1)
    for quarter in range(4):
        prompts = rng.integers(0, 2**17, (part, 4 * BLOCK_TOKENS), dtype=np.uint32)
        gc.collect()
        before_mb, times = _resident_mb(), []
        for tokens in prompts:
            began_s = time.perf_counter()
            decision = router.route(Prompt(tokens))
            router.first_token(decision.flight_id)
            router.finish(decision.flight_id)
            times.append((time.perf_counter() - began_s) * 1e3)
        held = sum(
            model["index_tokens"] for one in router.snapshot()["replicas"].values() for model in one["models"].values()
        )
        case = f"distinct prefixes {quarter * part:,} to {(quarter + 1) * part:,}"
        row = float(np.median(times)), float(np.percentile(times, 99.9)), _resident_mb() - before_mb
        yield HostileRow(case, *row, f"{held:,} tokens in the index")


def _resident_mb() -> float:
    """Memory of this process now; where the system does not tell, the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
