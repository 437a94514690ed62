"""The demo: three mock replicas in three regions, a real gateway, and one replay for each row of a table."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from gorgo_plugin.fleet.gateway import GATEWAYS, MODEL, Row, Setup
from gorgo_plugin.fleet.loadgen import Outcome, Shot, Target, replay, shots
from gorgo_plugin.fleet.mooncake import TraceWindow, pick_window, read_trace, trace_requests
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.fleet.processes import Child, first_line, running
from gorgo_plugin.fleet.topology import REGIONS, mock_command
from gorgo_plugin.fleet.workload import ConversationSettings, WorkloadRequest, conversations

MIN_TRACE_REUSE = 0.35
TRACE_REQUESTS = 300
TRACE_STRETCH = 2.0  # one hour of the trace is too much for three such engines; its README says 2 to 3
# Conversations fit 600k tokens an engine; of the trace nothing would survive long enough to be reused.
CONVERSATION_KV_TOKENS = 600_000
TRACE_KV_TOKENS = 4_000_000
STREAM_INTERVAL = 8  # tokens per chunk: chunks cost the gateway, not the engine, and it is the engine that is compared
WARM_UP_REQUESTS = 6
WARM_UP_SPACING_S = 0.25
SETTLE_S = 1.0  # for the last warm-up answers' log events and a few probes of each replica

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What to compare, and on what.

    Attributes:
        trace: Mooncake-format file; None: generated conversations.
        requests: requests of a row; None: as many as the workload's default.
        rows: names of the gateway's rows.
        seed: seeds the workload, the engines and our policies.
        time_scale: stretches the arrivals; None: 1 for conversations, 2 for a trace.
        out: folder for the figures, the plot and the logs.
        workers: processes of LiteLLM; each knows its own dispatches only.
        gateway: name of one of `gateway.GATEWAYS`.
    """

    trace: Path | None = None
    requests: int | None = None
    rows: tuple[str, ...] = GATEWAYS["litellm"].default_rows
    seed: int = 0
    time_scale: float | None = None
    out: Path = field(default_factory=lambda: Path("out/demo"))
    workers: int = 1
    gateway: str = "litellm"


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of every row, and where they came from.

    Attributes:
        requests: in order of arrival, times as they will be replayed.
        window: the part of a trace they are; None when generated.
        kv_tokens: cache of each replica.
    """

    requests: list[WorkloadRequest]
    window: TraceWindow | None
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's outcomes, in the order of the workload."""

    row: Row
    outcomes: list[Outcome]
    took_s: float


def load_workload(settings: DemoSettings) -> Workload:
    """Generate or read what is replayed.

    Raises:
        WorkloadError: the trace cannot be read, or has no window with enough reuse.
    """
    if settings.trace is not None:
        records = read_trace(settings.trace)
        window = pick_window(records, settings.requests or TRACE_REQUESTS, MIN_TRACE_REUSE, settings.seed)
        stretch = settings.time_scale or TRACE_STRETCH
        return Workload(trace_requests(window, stretch), window, TRACE_KV_TOKENS)
    sizes = ConversationSettings() if settings.requests is None else ConversationSettings(requests=settings.requests)
    scale = settings.time_scale or 1.0
    requests = [replace(request, at_s=request.at_s * scale) for request in conversations(settings.seed, sizes)]
    return Workload(requests, None, CONVERSATION_KV_TOKENS)


async def run_rows(
    settings: DemoSettings, workload: Workload, announce: Announce, on_done: Callable[[str], None]
) -> list[RowResult]:
    """Replay the workload for each row. Ends early, with every child process stopped, on SIGTERM or cancellation.

    Raises:
        ProcessError: a replica or the gateway did not start or ended.
    """
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    settings.out.mkdir(parents=True, exist_ok=True)
    planned = shots(workload.requests, MODEL)
    rows = GATEWAYS[settings.gateway].rows
    return [await _run_row(rows[name], settings, workload, planned, announce, on_done) for name in settings.rows]


async def _run_row(
    row: Row,
    settings: DemoSettings,
    workload: Workload,
    planned: Sequence[Shot],
    announce: Announce,
    on_done: Callable[[str], None],
) -> RowResult:
    began_s = time.monotonic()
    gateway = GATEWAYS[settings.gateway]
    announce(f"{row.name}: starting replicas and {gateway.title}")
    async with mock_fleet(settings.seed, workload.kv_tokens, settings.out) as fleet:
        urls = {name: url for name, (url, _child) in fleet.items()}
        setup = Setup(urls, workload.kv_tokens, settings.seed, settings.out, settings.workers)
        async with gateway.serve(row, setup) as (target, processes):
            announce(f"{row.name}: warming up")
            await _warm_up(target, processes[0])
            announce(f"{row.name}: replaying")
            children = [*processes, *(child for _url, child in fleet.values())]
            outcomes = await _while_alive(children, replay(target, planned, lambda outcome: on_done(row.name)))
    return RowResult(row, outcomes, time.monotonic() - began_s)


@contextlib.asynccontextmanager
async def mock_fleet(seed: int, kv_tokens: int, folder: Path) -> AsyncIterator[dict[str, tuple[str, Child]]]:
    """One mock replica per region, fresh and cold: region name -> (base URL, process).

    Raises:
        ProcessError: one did not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        children = {
            region.name: await stack.enter_async_context(
                running(
                    region.name,
                    mock_command(region, seed, kv_tokens, MODEL, STREAM_INTERVAL),
                    folder / f"{region.name}.log",
                    read_output=True,
                )
            )
            for region in REGIONS
        }
        yield {name: ((await first_line(child))["url"], child) for name, child in children.items()}


async def _warm_up(target: Target, gateway: Child) -> None:
    """Unrelated prompts, so that no row pays for imports and connections.

    Raises:
        ProcessError: not one was answered.
    """
    planned = [
        Shot(
            index * WARM_UP_SPACING_S,
            msgspec.json.encode(
                {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": Passage(f"warm-up/{index}", 300).text}],
                    "max_tokens": 8,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "user": f"warm-up-{index}",
                }
            ),
        )
        for index in range(WARM_UP_REQUESTS)
    ]
    outcomes = await replay(target, planned)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if len(errors) == len(outcomes):
        raise gateway.failure(f"answered no request ({errors[0]})")
    await asyncio.sleep(SETTLE_S)


async def _while_alive(children: Sequence[Child], work: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
    """Await the replay; give up at once when a process that it needs ends."""
    replaying = asyncio.ensure_future(work)
    ends = {asyncio.ensure_future(child.process.wait()): child for child in children}
    try:
        await asyncio.wait([replaying, *ends], return_when=asyncio.FIRST_COMPLETED)
        for child in children:
            child.check()
        outcomes: list[Outcome] = await replaying
        return outcomes
    finally:
        for waiting in (replaying, *ends):
            waiting.cancel()
        await asyncio.gather(replaying, *ends, return_exceptions=True)
