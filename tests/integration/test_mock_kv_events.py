"""A router that follows the KV events of a mock engine prices what the engine will find, also under eviction."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import aiohttp
from prometheus_client import generate_latest

from gorgo_plugin import Prompt, Settings
from gorgo_plugin.fleet.processes import first_line, running
from gorgo_plugin.runtime import Runtime

GORGO = (sys.executable, "-c", "from gorgo_plugin.cli import main; main(prog_name='gorgo')")
WAIT_S = 10.0


async def told(runtime: Runtime, client: aiohttp.ClientSession) -> None:
    """The router knows all that the engine holds."""
    while True:
        async with client.get("/mock/state") as response:
            blocks = (await response.json())["cached_blocks"]
        events = runtime.status()["replicas"]["a"]["cache"]["events"]
        if (0 if events is None else events["tokens"]) == 16 * blocks:
            return
        await asyncio.sleep(0.02)


async def test_the_estimate_equals_what_the_engine_reports_also_under_eviction_and_after_a_restart(
    tmp_path: Path,
) -> None:
    options = [
        "--kv-events",
        "tcp://127.0.0.1:*",
        "--kv-tokens",
        "1024",
        "--ms-per-token",
        "0.001",
        "--output-tokens",
        "2",
    ]
    rng = random.Random(7)
    stems = [[rng.randrange(1000, 9000) for _ in range(256)] for _ in range(6)]
    async with running("mock", [*GORGO, "mock-upstream", *options], tmp_path / "log", read_output=True) as child:
        ready = await first_line(child)
        replica = {"name": "a", "url": ready["url"], "models": ["m"], "kv_events": ready["kv_events"]}
        runtime = Runtime(Settings.model_validate({"replicas": [replica], "metrics": {"interval_s": 0.2}}))
        runtime.ensure_started()

        async with aiohttp.ClientSession(ready["url"]) as client, asyncio.timeout(4 * WAIT_S):
            while not runtime.status()["replicas"]["a"]["kv_events"]["connected"]:
                await asyncio.sleep(0.01)
            reported, estimated = [], []
            for number in range(16):
                ids = [
                    *rng.choice(stems)[: rng.choice((64, 200, 256))],
                    *(rng.randrange(1000, 9000) for _ in range(40)),
                ]
                if number != 12:  # the restart is told by the first event after it
                    await told(runtime, client)
                estimated.append(runtime.router.explain(Prompt(ids, model="m")).costs["a"].cached_tokens)
                body = {"model": "m", "prompt": ids, "max_tokens": 2}
                async with client.post("/v1/completions", json=body) as response:
                    usage = (await response.json())["usage"]
                reported.append(usage["prompt_tokens_details"]["cached_tokens"])
                if number == 11:
                    async with client.post("/mock/restart") as response:
                        assert response.status == 200
            assert estimated[:12] == reported[:12]
            assert estimated[13:] == reported[13:]
            assert sum(reported) > 0
            shown, metrics = runtime.status()["replicas"]["a"], generate_latest().decode()
        await runtime.stop()
    assert shown["cache"]["source"] == "kv-events"
    assert shown["kv_events"]["restarts"] == 1
    assert shown["cache"]["engine_kv_tokens"] == 1024
    restarts = [line for line in metrics.splitlines() if line.startswith("gorgo_kv_event_troubles_total{")]
    assert len(restarts) == 1
    assert 'kind="restart"' in restarts[0]
    assert restarts[0].endswith(" 1.0")
