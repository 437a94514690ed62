"""The load generator and the demo, with real replicas, the real LiteLLM proxy and the real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from gorgo_plugin.fleet.demo import mock_fleet
from gorgo_plugin.fleet.engine import EngineProfile
from gorgo_plugin.fleet.loadgen import Shot, Target, replay, shots
from gorgo_plugin.fleet.processes import running
from gorgo_plugin.fleet.server import MockReplica, MockSettings
from gorgo_plugin.fleet.workload import ConversationSettings, conversations

GORGO = (sys.executable, "-c", "from gorgo_plugin.cli import main; main(prog_name='gorgo')")


@contextlib.asynccontextmanager
async def target(profile: EngineProfile) -> AsyncIterator[Target]:
    runner = web.AppRunner(
        MockReplica(MockSettings(name="us-east", profile=profile, stream_interval=8)).app(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Target(f"http://127.0.0.1:{runner.addresses[0][1]}", "m", "key")
    finally:
        await runner.cleanup()


async def test_a_replay_measures_every_request_and_finds_the_reuse_of_the_conversations() -> None:
    requests = conversations(0, ConversationSettings(requests=60, rate_per_s=60.0, think_s=0.05))
    async with target(EngineProfile(t0_ms=1.0, a_ms=0.001, decode_ms=0.2)) as to:
        outcomes = await replay(to, shots(requests, "m"))
    assert [outcome.error for outcome in outcomes] == [None] * 60
    assert {outcome.replica for outcome in outcomes} == {"us-east"}
    assert [outcome.output_tokens for outcome in outcomes] == [request.output_tokens for request in requests]
    assert all(0 < (outcome.ttft_ms or 0) <= (outcome.e2e_ms or 0) for outcome in outcomes)
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.prompt_tokens == pytest.approx(len(request.token_ids()), rel=0.05, abs=40)
    cached = sum(outcome.cached_tokens for outcome in outcomes) / sum(outcome.prompt_tokens for outcome in outcomes)
    assert 0.3 < cached < 0.9


async def test_requests_leave_at_their_times_whatever_became_of_those_before() -> None:
    requests = conversations(0, ConversationSettings(requests=20, rate_per_s=40.0))
    planned = shots(requests, "m")
    one_at_a_time = EngineProfile(t0_ms=2.0, a_ms=0.06, decode_ms=0.0, decode_per_request_ms=0.0, max_running=1)
    began = time.monotonic()
    async with target(one_at_a_time) as to:
        outcomes = await replay(to, planned)
    took_s = time.monotonic() - began
    assert took_s > 4.0  # arrivals are over after half a second
    assert max(outcome.late_ms for outcome in outcomes) < 1e3 * took_s / 2


async def test_a_request_that_is_refused_or_meets_nobody_is_an_error_not_a_measurement() -> None:
    async with target(EngineProfile()) as to:
        refused = await replay(to, [Shot(0.0, b'{"model": "unknown", "messages": []}')])
    nobody = await replay(to, [Shot(0.0, b"{}")])
    assert (refused[0].error or "").startswith("status 404")
    assert refused[0].ttft_ms is None
    assert "ClientConnector" in (nobody[0].error or "")


async def test_the_fleets_regions_are_as_far_away_as_they_say(tmp_path: Path) -> None:
    async with mock_fleet(0, 600_000, tmp_path) as fleet:
        body = b'{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"stream":true}'
        nearest, middle, far = [
            # A stall makes some later, none earlier.
            min([(await replay(Target(url, "m", "key"), [Shot(0.0, body)]))[0].ttft_ms or 0.0 for _ in range(5)])
            for url, _child in fleet.values()
        ]
    assert 37 < nearest < 150
    assert 250 < middle < 400
    assert 420 < far < 600


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("gateway", "title", "own", "rows"),
    [
        ("litellm", "LiteLLM", "simple-shuffle", "simple-shuffle"),  # it takes ten seconds to start: once is enough
        ("envoy", "Envoy", "round-robin", "round-robin,gorgo"),
    ],
)
async def test_the_demo_compares_the_gateways_strategy_with_ours_and_writes_what_it_found(
    tmp_path: Path, gateway: str, title: str, own: str, rows: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *GORGO,
        "demo",
        f"--gateway={gateway}",
        f"--rows={rows}",
        "--requests=12",
        f"--out={tmp_path}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output
    assert f"{own}*" in output
    assert f"* {title}'s own strategy" in output
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["settings"]["gateway"] == gateway
    assert [row["name"] for row in written["rows"]] == rows.split(",")
    for row in written["rows"]:
        assert row["summary"]["errors"] == 0, row["outcomes"]
        assert sum(row["summary"]["by_replica"].values()) == 12
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("gateway", "processes", "number"), [("litellm", 4, signal.SIGTERM), ("envoy", 5, signal.SIGINT)]
)
async def test_a_demo_that_is_interrupted_leaves_no_process_behind(
    tmp_path: Path, gateway: str, processes: int, number: signal.Signals
) -> None:
    command = [*GORGO, "demo", f"--gateway={gateway}", "--rows=gorgo", "--requests=12", f"--out={tmp_path}"]
    async with running("demo", command, tmp_path / "log") as demo:
        async with asyncio.timeout(60):
            while len(children := psutil.Process(demo.pid).children(recursive=True)) < processes:
                demo.check()
                await asyncio.sleep(0.05)
        demo.process.send_signal(number)
        assert await asyncio.wait_for(demo.process.wait(), 30) != 0
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows=nearest,fastest"], "unknown row 'fastest'"),
        (["--gateway=envoy", "--rows=simple-shuffle"], "unknown row 'simple-shuffle'; known: round-robin, "),
        (["--gateway=envoy", "--workers=2"], "--workers: 2: Envoy runs in one process"),
        (["--trace=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--requests=3"], "--requests"),
    ],
)
async def test_a_demo_that_cannot_be_run_says_why_in_a_sentence(options: list[str], said: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *GORGO, "demo", *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await asyncio.wait_for(process.communicate(), 30))[0].decode()
    assert process.returncode != 0
    assert said in output
    assert "Traceback" not in output
