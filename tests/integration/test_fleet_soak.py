"""`gorgo soak`: a short one with all its processes, and how it judges."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gorgo_plugin.fleet.processes import running
from gorgo_plugin.fleet.soak import Sample, SoakResult, faults, memory_trend, verdict
from gorgo_plugin.fleet.soak_load import Counts, Talks

GORGO = (sys.executable, "-c", "from gorgo_plugin.cli import main; main(prog_name='gorgo')")
SAMPLE = Sample(
    at_s=0.0,
    rss_mb=150.0,
    envoy_rss_mb=60.0,
    descriptors=34,
    threads=22,
    flights=10,
    streams=20,
    routed=100,
    swept_flights=0,
    cache_bytes=4_000_000,
    index_tokens=600_000,
)


def result(mb_per_minute: float = 0.0, rest: Sample | None = None, descriptors_per_minute: float = 0.0) -> SoakResult:
    """What ten minutes would have found whose memory or descriptors grow this quickly."""
    samples = [
        replace(
            SAMPLE,
            at_s=float(at_s),
            rss_mb=150.0 + mb_per_minute * at_s / 60 + at_s % 3 * 0.1,
            descriptors=34 + round(descriptors_per_minute * at_s / 60),
        )
        for at_s in range(0, 601, 5)
    ]
    half = samples[len(samples) // 2 :]
    trend = memory_trend([one.at_s for one in half], [one.rss_mb for one in half])
    at_rest = replace(SAMPLE, flights=0, streams=0)
    return SoakResult(600.0, Counts(sent=100, answered=100), samples, rest or at_rest, 3.0, trend, trend)


@pytest.mark.timeout(180)
async def test_a_short_soak_ends_with_nothing_open_and_does_not_judge_memory(tmp_path: Path) -> None:
    command = [*GORGO, "soak", "--minutes=0.1", "--rate=15", "--leaving=0.3", f"--out={tmp_path}"]
    async with running("soak", command, tmp_path / "log") as run:
        status = await asyncio.wait_for(run.process.wait(), 150)
    said = (tmp_path / "log").read_text()
    assert status == 0, said
    assert "too short" in said
    written = json.loads((tmp_path / "soak.json").read_text())
    counts = written["counts"]
    assert counts["sent"] == 90
    assert counts["failed"] == 0, counts
    assert counts["answered"] + sum(counts["left"].values()) == 90
    assert sum(counts["left"].values()) > 10
    assert written["rest"]["routed"] > 40
    assert written["rest"]["flights"] == written["rest"]["streams"] == written["rest"]["swept_flights"] == 0
    assert written["trend"] is None


async def test_a_soak_that_is_interrupted_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [*GORGO, "soak", f"--out={tmp_path}"]
    async with running("soak", command, tmp_path / "log") as run:
        async with asyncio.timeout(60):
            while len(children := psutil.Process(run.pid).children(recursive=True)) < 5:
                run.check()
                await asyncio.sleep(0.05)
        run.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(run.process.wait(), 60) != 0
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_memory_that_stays_is_as_it_should_be() -> None:
    assert faults(result()) == []
    assert "memory is flat at 150 MB" in verdict(result())


def test_memory_that_grows_by_half_a_megabyte_a_minute_is_a_fault() -> None:
    assert faults(result(mb_per_minute=0.5)) == ["memory grew by 1.6% over the second half"]


def test_memory_given_back_is_no_fault() -> None:
    assert faults(result(mb_per_minute=-2.0)) == []


def test_one_leap_of_a_single_sample_is_no_trend() -> None:
    trend = memory_trend([0.0, 5.0, 10.0, 15.0, 20.0], [100.0, 100.0, 180.0, 100.0, 100.0])
    assert trend.mb_per_hour == 0.0


def test_descriptors_that_pile_up_are_a_fault() -> None:
    assert faults(result(descriptors_per_minute=3)) == ["descriptors went from 52 to 60 over the second half"]


@pytest.mark.parametrize("left", ["flights", "streams", "swept_flights"])
def test_whatever_is_left_open_is_a_fault(left: str) -> None:
    rest = replace(SAMPLE, **{"flights": 0, "streams": 0, "swept_flights": 0, left: 1})
    (fault,) = faults(result(rest=rest))
    assert left.removeprefix("swept_") in fault


def test_a_failed_request_is_a_fault_that_says_what_failed() -> None:
    found = result()
    found.counts.fail("POST /v1/messages: status 503, not 200")
    assert faults(found) == ["1 requests failed (first: POST /v1/messages: status 503, not 200)"]


def test_the_same_seed_asks_the_same_of_every_endpoint_and_grows_its_conversations() -> None:
    one, other = Talks(1), Talks(1)
    asks = [one.next() for _ in range(600)]
    assert asks == [other.next() for _ in range(600)]
    assert {ask.path.rpartition("/")[2] for ask in asks} >= {"completions", "messages", "responses", "embeddings"}
    assert {ask.expected for ask in asks} == {200, 400, 404}
    sizes = [len(ask.body) for ask in asks if ask.expected == 200 and not ask.packed and ask.body]
    assert min(sizes) < 2_000
    assert 60_000 < max(sizes) < 95_000
