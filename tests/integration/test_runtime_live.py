"""The whole Runtime: real sockets, real threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gorgo_plugin import PromptError, Router, Settings, SettingsError
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.runtime import longer_than

WAIT_S = 10.0
CHAT = "/v1/chat/completions"


def chat(text: str, **other: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **other}


@pytest.fixture
def listener() -> Iterator[int]:
    """Port of something that accepts connections, as an engine's port does."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        yield sock.getsockname()[1]


def settings(port: int, **other: Any) -> Settings:
    return Settings.model_validate(
        {
            "replicas": [
                {"name": "a", "region": "east", "url": f"http://key:pw@127.0.0.1:{port}/v1?token=pw"},
                {"name": "b", "region": "west", "url": "http://127.0.0.1:1/v1"},
            ],
            "probe": {"interval_s": 0.05, "timeout_s": 0.5},
            "metrics": {"path": None},
            **other,
        }
    )


@contextlib.asynccontextmanager
async def started(config: Settings) -> AsyncIterator[Runtime]:
    runtime = Runtime(config, gateway="test")
    runtime.ensure_started()
    try:
        yield runtime
    finally:
        await runtime.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def gorgo_threads() -> Callable[[], list[str]]:
    """Names of the threads that the test's own runtime has; other tests may have left one serving."""
    before = set(threading.enumerate())
    return lambda: [t.name for t in threading.enumerate() if t.name.startswith("gorgo-") and t not in before]


async def test_probes_fill_the_latency_table_and_a_dead_replica_delays_no_other(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        await until(lambda: runtime.status()["replicas"]["a"]["latency"]["rtt_ms"] is not None)
        await until(lambda: not runtime.status()["replicas"]["b"]["health"]["probe_ok"])
        shown = runtime.status()["replicas"]
        assert 0.0 < shown["a"]["latency"]["rtt_ms"] < 50.0
        assert shown["a"]["probe"]["last_error"] is None
        assert shown["b"]["latency"]["rtt_ms"] is None
        assert shown["b"]["probe"]["last_error"] == "refused"


async def test_stopping_leaves_no_thread_behind_and_a_late_request_is_still_prepared(
    listener: int, gorgo_threads: Callable[[], list[str]]
) -> None:
    async with started(settings(listener, prepare={"inline_chars": 0})) as runtime:
        await runtime.prepare(chat("something long enough to go to a thread"), CHAT)
        assert len(gorgo_threads()) == 2
    assert gorgo_threads() == []
    runtime.ensure_started()
    assert len(await runtime.prepare(chat("late and new"), CHAT)) > 0
    assert gorgo_threads() == []


def test_it_serves_callers_without_a_loop_and_outlives_the_loops_of_others(
    listener: int, gorgo_threads: Callable[[], list[str]]
) -> None:
    runtime = Runtime(settings(listener))

    async def use() -> int:
        runtime.ensure_started()
        return len(await runtime.prepare(chat("x" * 10_000), CHAT))

    lengths = {asyncio.run(use()), asyncio.run(use()), len(runtime.prepare_sync(chat("x" * 10_000), CHAT))}
    assert len(lengths) == 1
    deadline = time.monotonic() + WAIT_S
    while runtime.status()["replicas"]["a"]["probe"]["successes"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    runtime.close()
    assert gorgo_threads() == []


def test_a_runtime_that_is_dropped_without_being_stopped_ends_its_thread(listener: int) -> None:
    runtime = Runtime(settings(listener), gateway="dropped")
    runtime.ensure_started()
    gone = weakref.ref(runtime)
    thread = next(thread for thread in threading.enumerate() if thread.name == "gorgo-dropped")
    del runtime
    gc.collect()
    assert gone() is None
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_program_that_never_stops_it_ends_quietly(listener: int) -> None:
    program = f"""
import asyncio
from gorgo_plugin import Settings
from gorgo_plugin.runtime import Runtime
probe = {{"path": "/health", "interval_s": 0.01, "timeout_s": 5.0}}
replicas = [{{"name": "a", "url": "http://127.0.0.1:{listener}"}}, {{"name": "b", "url": "http://127.0.0.1:1"}}]
runtime = Runtime(Settings.model_validate({{"replicas": replicas, "probe": probe, "prepare": {{"inline_chars": 0}}}}))
runtime.ensure_started()
asyncio.run(runtime.prepare({{"prompt": "hello"}}, "/v1/completions"))
while not runtime.status()["replicas"]["b"]["probe"]["failures"]: pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert [line for line in done.stderr.splitlines() if "does not answer probes" not in line] == []


async def test_prompts_under_way_are_finished_when_it_stops(listener: int) -> None:
    runtime = Runtime(settings(listener, prepare={"inline_chars": 0, "threads": 1}))
    under_way = [asyncio.create_task(runtime.prepare(chat(f"{i} " * 20_000), CHAT)) for i in range(4)]
    await asyncio.sleep(0)
    await runtime.stop()
    assert [len(prompt) > 1000 for prompt in await asyncio.gather(*under_way)] == [True] * 4


async def test_a_reload_with_more_threads_loses_no_prompt_and_no_thread(
    listener: int, gorgo_threads: Callable[[], list[str]]
) -> None:
    async with started(settings(listener, prepare={"inline_chars": 0, "threads": 1})) as runtime:
        under_way = [asyncio.create_task(runtime.prepare(chat(f"{i} " * 20_000), CHAT)) for i in range(4)]
        await asyncio.sleep(0)
        runtime.reload(settings(listener, prepare={"inline_chars": 0, "threads": 2}))
        assert [len(prompt) > 1000 for prompt in await asyncio.gather(*under_way)] == [True] * 4
        await runtime.prepare(chat("new"), CHAT)
        await until(lambda: gorgo_threads().count("gorgo-prepare_0") == 1)


async def test_mode_off_starts_nothing(listener: int, gorgo_threads: Callable[[], list[str]]) -> None:
    async with started(settings(listener, mode="off")) as runtime:
        assert gorgo_threads() == []
        assert runtime.status()["active"] is False


async def test_status_is_json_and_shows_no_userinfo_no_query_and_no_prompt(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        prompt = await runtime.prepare(chat("a very private matter"), CHAT)
        decision = runtime.router.route(prompt)
        text = json.dumps(runtime.status(), allow_nan=False)
        assert json.loads(text)["flights"] == {decision.replica: 1, "b" if decision.replica == "a" else "a": 0}
        runtime.router.finish(decision.flight_id)
        assert sum(runtime.status()["flights"].values()) == 0
        for secret in ("pw", "key", "private"):
            assert secret not in text
        assert f"http://127.0.0.1:{listener}/v1" in text


async def test_the_state_in_status_can_be_taken_over_by_another_router(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        await until(lambda: runtime.status()["replicas"]["a"]["latency"]["rtt_ms"] is not None)
        status = runtime.status()
    copy = Router(runtime.settings, state=status).snapshot()["replicas"]["a"]
    assert copy["latency"]["rtt_ms"] == status["replicas"]["a"]["latency"]["rtt_ms"]


async def test_metrics_show_what_status_shows(listener: int) -> None:
    async with started(settings(listener, models={"m": {}})) as runtime:
        decision = runtime.router.route(await runtime.prepare(chat("hello"), CHAT))
        await until(lambda: runtime.status()["replicas"]["a"]["latency"]["rtt_ms"] is not None)
        samples = [
            sample for family in text_string_to_metric_families(generate_latest().decode()) for sample in family.samples
        ]
        ours = [sample for sample in samples if sample.labels.get("region") in ("east", "west")]
        measured = {sample.labels["replica"] for sample in ours if sample.name == "gorgo_rtt_seconds"}
        opened = {sample.labels["replica"]: sample.value for sample in ours if sample.name == "gorgo_flights_open"}
        assert measured == {"a"}
        assert opened == {"a": 0.0, "b": 0.0, decision.replica: 1.0}
        prior = runtime.settings.rates.ms_per_token / 1e3
        learned = [sample.value for sample in ours if sample.name == "gorgo_prefill_seconds_per_token"]
        assert learned == pytest.approx([prior, prior])
        assert not any(sample.name.startswith("gorgo_itl_") for sample in ours)  # nothing is known of it yet


async def test_a_reload_of_the_fleet_keeps_the_state_of_replicas_that_stay(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        await until(lambda: runtime.status()["replicas"]["a"]["latency"]["rtt_ms"] is not None)
        router, probes = runtime.router, runtime.status()["replicas"]["a"]["probe"]["successes"]
        changed = settings(listener).model_dump()
        changed["replicas"][1] = {"name": "c", "url": f"http://127.0.0.1:{listener}"}
        runtime.reload(Settings.model_validate(changed))
        assert runtime.router is router
        assert set(runtime.status()["replicas"]) == {"a", "c"}
        assert runtime.status()["replicas"]["a"]["probe"]["successes"] >= probes
        await until(lambda: runtime.status()["replicas"]["c"]["latency"]["rtt_ms"] is not None)


async def test_a_reload_of_the_policy_keeps_what_was_learned(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        await until(lambda: runtime.status()["replicas"]["a"]["latency"]["rtt_ms"] is not None)
        prompt = await runtime.prepare({"prompt": "word " * 500}, "/v1/completions")
        flight = runtime.router.route(prompt, candidates=["a"]).flight_id
        runtime.reload(settings(listener, policy="nearest"))
        status = runtime.status()
        assert status["flights"]["a"] == 1
        runtime.router.finish(flight)
        assert runtime.router.explain(prompt).costs["a"].cached_tokens > 0
        assert status["policy"] == "nearest"
        assert status["replicas"]["a"]["latency"]["rtt_ms"] is not None
        seen = status["replicas"]["a"]["probe"]["successes"]
        await until(lambda: runtime.status()["replicas"]["a"]["probe"]["successes"] > seen)
        await until(lambda: runtime.status()["replicas"]["a"]["latency"]["age_s"] < 0.05)


async def test_a_reload_that_is_refused_leaves_the_last_good_state_and_says_so(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        before = runtime.status()
        with pytest.raises(SettingsError, match=r"^tokenizer: "):
            runtime.reload(settings(listener, tokenizer="/nowhere", policy="nearest"))
        after = runtime.status()
        assert after["policy"] == before["policy"]
        assert after["settings_error"].startswith("tokenizer: '/nowhere'")
        runtime.reload(settings(listener))
        assert runtime.status()["settings_error"] is None


async def test_a_lost_flight_is_swept_while_no_request_comes(listener: int) -> None:
    async with started(settings(listener, flight_ttl_s=2.0)) as runtime:
        runtime.router.route(await runtime.prepare(chat("lost"), CHAT))
        assert sum(runtime.status()["flights"].values()) == 1
        await until(lambda: sum(runtime.status()["flights"].values()) == 0)


@pytest.mark.parametrize("kind", ["mapping", "bytes"])
async def test_a_long_cold_prompt_does_not_hold_the_event_loop(listener: int, kind: str) -> None:
    words = " ".join(f"word{i} {i * 7919 % 10007}" for i in range(60_000))  # about 900 KB
    mapping = chat(words)
    body: Any = json.dumps(mapping).encode() if kind == "bytes" else mapping
    async with started(settings(listener)) as runtime:
        lags: list[float] = []

        async def tick() -> None:
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                lags.append(time.perf_counter() - before)

        ticker = asyncio.create_task(tick())
        prompt = await runtime.prepare(body, CHAT, estimate=False)
        ticker.cancel()
        assert len(prompt) > 100_000
        assert sorted(lags)[len(lags) * 9 // 10] < 0.03


async def test_a_short_prompt_is_prepared_without_a_thread(
    listener: int, gorgo_threads: Callable[[], list[str]]
) -> None:
    async with started(settings(listener)) as runtime:
        await runtime.prepare(chat("hello"), CHAT)
        assert gorgo_threads() == ["gorgo-test"]


def test_every_model_is_warm_before_the_first_request(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str | None] = []
    prepare = Router.prepare

    def noted(router: Router, body: Any, endpoint: str, model: str | None = None) -> Any:
        warmed.append(model)
        return prepare(router, body, endpoint, model)

    monkeypatch.setattr(Router, "prepare", noted)
    refusing = "{{ raise_exception('never') }}"
    Runtime(settings(listener, models={"m": {}, "n": {"chat_template": refusing}})).close()
    assert warmed == ["", "m", "n"]


async def test_an_unreadable_body_is_counted_and_raised(listener: int) -> None:
    async with started(settings(listener)) as runtime:
        with pytest.raises(PromptError):
            await runtime.prepare(b"{not json", CHAT)
        with pytest.raises(PromptError):
            runtime.prepare_sync(b"[]", CHAT)


@pytest.mark.parametrize(
    ("body", "longer"),
    [
        (b"x" * 300, False),
        (b"x" * 301, True),
        ({"messages": [{"content": "x" * 60}, {"content": [{"text": "x" * 40}]}]}, False),
        ({"messages": [{"content": "x" * 60}, {"content": [{"text": "x" * 50}]}]}, True),
        ({"messages": [{"role": "user", "content": "x" * 86}] * 2}, False),
        ({"messages": [{"role": "user", "content": "x" * 87}] * 2}, True),
        ({"messages": [{"role": "x" * 300, "content": ""}]}, True),
        ({"messages": [{"content": "x", "tool_calls": ["y" * 300]}]}, True),
        ({"prompt": list(range(300))}, False),
        ({"prompt": [list(range(120)), list(range(120))]}, True),
        ({"prompt": [list(range(100)), list(range(100))]}, False),
        ({"prompt": [[[[[]]]]]}, False),
        ({"prompt": [[[[[[]]]]]]}, True),
        ({"n": 10**200, "none": None}, False),
        ({"tools": [{}] * 5}, True),
    ],
)
def test_the_length_of_a_body_is_found_without_reading_it_all(body: Any, longer: bool) -> None:
    assert longer_than(body, 300) is longer
