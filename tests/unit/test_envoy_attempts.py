"""One request behind Envoy: how what Envoy tells of it becomes an ending of its flight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gorgo_plugin import Settings
from gorgo_plugin.envoy_ext_proc.attempts import EnvoyAttempt, failure_kind
from gorgo_plugin.envoy_ext_proc.messages import Served
from gorgo_plugin.prompt.endpoints import CHAT
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.outcomes import Usage

REPLICAS = [{"name": name, "region": f"{name}-region", "url": "http://127.0.0.1:9"} for name in ("near", "far")]


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    runtime = Runtime(Settings.model_validate({"replicas": REPLICAS, "response_headers": "debug"}), gateway="envoy")
    yield runtime
    runtime.close()


def opened(runtime: Runtime, *, stream: bool = True, reads_usage: bool = False) -> EnvoyAttempt:
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "where does the river go? " * 20}]}
    prompt = runtime.router.prepare(body, CHAT)
    decision = runtime.router.route(prompt, ["near"])
    return EnvoyAttempt(runtime, decision, prompt, "boot-1", CHAT, reads_usage)


def flights(runtime: Runtime) -> dict[str, Any]:
    return runtime.router.snapshot()["flights"]  # type: ignore[no-any-return]


def failures_in_a_row(runtime: Runtime, name: str) -> Any:
    return runtime.router.snapshot()["replicas"][name]["health"]["failures_in_a_row"]


def answer(status: int = 200, replica: str | None = "near", attempts: int = 1, details: str = "via_upstream") -> Served:
    return Served(status, replica, attempts, details)


@pytest.mark.parametrize(
    ("status", "details", "kind"),
    [
        (500, "via_upstream", "rejected"),
        (503, "", "rejected"),
        (429, "via_upstream", "rejected"),
        (400, "via_upstream", "invalid"),
        (413, "via_upstream", "invalid"),
        (401, "via_upstream", "invalid"),
        (404, "via_upstream", "invalid"),
        (504, "via_upstream", "timeout"),
        (503, "no_healthy_upstream", "unreached"),
        (503, "upstream_reset_before_response_started{remote_connection_failure,connection_refused}", "unreached"),
        (503, "upstream_reset_before_response_started{connection_termination}", "rejected"),
        (504, "upstream_per_try_idle_timeout", "timeout"),
        (504, "response_timeout", "timeout"),
        (413, "request_payload_too_large", "disconnect"),
    ],
)
def test_what_envoy_says_of_an_error_becomes_a_kind_of_failure(status: int, details: str, kind: str) -> None:
    assert failure_kind(answer(status, None, 1, details)) == kind


async def test_an_error_of_the_replica_ends_the_flight(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer(500))
    assert attempt.closed == "rejected"
    assert failures_in_a_row(runtime, "near") == 1
    assert flights(runtime) == {"near": 0, "far": 0}


async def test_an_answer_from_elsewhere_moves_the_flight_and_is_a_failure_of_the_first(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer(replica="far", attempts=2))
    assert (attempt.replica, attempt.region, attempt.closed) == ("far", "far-region", None)
    assert flights(runtime) == {"near": 0, "far": 1}
    assert failures_in_a_row(runtime, "near") == 1
    assert attempt.headers() == {"x-gorgo-region": "far-region", "x-gorgo-replica": "far"}  # it was not predicted


def samples(runtime: Runtime, name: str) -> Any:
    return runtime.router.snapshot()["replicas"][name]["models"]["m"]["samples"]


@pytest.mark.parametrize(("attempts", "learned"), [(1, 1), (2, 0)])
async def test_the_time_of_two_tries_at_one_replica_teaches_no_rate(
    runtime: Runtime, attempts: int, learned: int
) -> None:
    runtime.router.observe_rtt("near", 0.0)
    attempt = opened(runtime)
    attempt.served(answer(attempts=attempts))
    attempt.first_token()
    attempt.finish()
    assert samples(runtime, "near") == learned
    assert failures_in_a_row(runtime, "near") == 0


async def test_in_shadow_an_answer_from_elsewhere_speaks_against_nobody(runtime: Runtime) -> None:
    runtime.reload(Settings.model_validate({"replicas": REPLICAS, "mode": "shadow"}))
    attempt = opened(runtime)
    attempt.served(answer(replica="far"))
    assert flights(runtime) == {"near": 0, "far": 1}
    assert failures_in_a_row(runtime, "near") == 0


async def test_an_answer_of_nobody_known_leaves_the_flight_where_it_is(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer(replica=None))
    assert attempt.replica == "near"
    assert flights(runtime) == {"near": 1, "far": 0}


async def test_a_request_that_ends_before_its_answer_was_abandoned(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.left(watched=True)
    assert attempt.closed == "disconnect"
    assert failures_in_a_row(runtime, "near") == 0


async def test_where_nothing_is_watched_an_answer_that_began_counts_as_given(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer())
    attempt.left(watched=False)
    assert attempt.closed == "finished"


async def test_a_stream_whose_first_token_was_seen_is_finished_at_its_end(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer())
    attempt.first_token()
    attempt.left(watched=True)
    assert attempt.closed == "finished"


async def test_of_an_answer_that_was_watched_in_vain_nothing_is_learned(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer())
    attempt.left(watched=True)
    assert attempt.closed is None
    attempt.settle()
    assert attempt.closed == "disconnect"


async def test_usage_may_come_a_moment_after_the_end(runtime: Runtime) -> None:
    attempt = opened(runtime, reads_usage=True)
    attempt.served(answer())
    attempt.first_token()
    attempt.left(watched=True)
    assert attempt.closed is None
    attempt.usage(Usage(120, 16, 4))
    attempt.finish()
    assert attempt.closed == "finished"
    assert runtime.router.snapshot()["counters"]["unknown_flights"] == 0


async def test_a_stream_without_its_usage_is_finished_all_the_same(runtime: Runtime) -> None:
    attempt = opened(runtime, reads_usage=True)
    attempt.served(answer())
    attempt.first_token()
    attempt.left(watched=True)
    attempt.settle()
    assert attempt.closed == "finished"
    assert flights(runtime) == {"near": 0, "far": 0}


async def test_an_ending_is_taken_once(runtime: Runtime) -> None:
    attempt = opened(runtime)
    attempt.served(answer(503, details="no_healthy_upstream"))
    attempt.first_token()
    attempt.usage(Usage(120, 16, 4))
    attempt.finish()
    attempt.left(watched=True)
    assert attempt.closed == "unreached"
    assert runtime.router.snapshot()["counters"]["unknown_flights"] == 0
