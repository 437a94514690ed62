"""The real Envoy in front of TLS replicas by hostname that fail one way or another, and clients that leave."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from gorgo_plugin.envoy_ext_proc.envoy_yaml import Mode
from tests.envoy_gateway import Gateway, TlsFleet, running, tls_fleet, tls_for
from tests.litellm_proxy import wait_until
from tests.stub_engine import Behaviour, StubEngine

HOSTS = {
    "us-east-a.localhost": "us-east",
    "us-east-b.localhost": "us-east",
    "eu-central.localhost": "eu-central",
    "ap-northeast.localhost": "ap-northeast",
}
PAUSE = {"backoff_s": 0.5, "backoff_max_s": 0.5}  # long enough to be seen, short enough to be waited for
PROBE = {"interval_s": 2.0}  # a replica that is gone must be found by a request, not by two probes before it
names = (f"c{number}" for number in itertools.count())


def chat(name: str, turns: int = 1, stream: bool = False, model: str = "m") -> dict[str, Any]:
    """A conversation after so many turns; each adds about 200 ms of prefill.

    Only streams teach how fast a replica is. These engines take no time, so one stream answered at once would draw all
    further conversations: streams are a model of their own, or one that fails.
    """
    messages = []
    for turn in range(turns):
        messages += [{"role": "user", "content": f"{name} {turn} " * 2000}, {"role": "assistant", "content": "hi"}]
    return {"model": model, "stream": stream, "messages": messages[:-1]}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path_factory.mktemp("replicas"), HOSTS) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def shared(fleet: TlsFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(
        tmp_path_factory.mktemp("gateway"), fleet.replicas, envoy=fleet.envoy, health=PAUSE, probe=PROBE
    ) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway, fleet: TlsFleet) -> Iterator[Gateway]:
    """The shared gateway with all well; at the end no flight may be left."""
    fleet.behave()
    shared.wait_for_replicas()
    shared.wait_until_available()
    for engine in fleet.engines.values():
        engine.reset()
    yield shared
    fleet.behave()
    shared.wait_until_at_rest()


def first_turn(gateway: Gateway) -> tuple[str, str]:
    """A new conversation, and the replica that got it."""
    name = next(names)
    answer = gateway.post(chat(name))
    assert answer.status_code == 200
    gateway.wait_until_at_rest()  # an open flight would price the next turn
    return name, answer.headers["x-gorgo-replica"]


def first_turn_at(gateway: Gateway, replica: str) -> tuple[str, str]:
    """A new conversation that this replica got: among equals chance decides."""
    for _ in range(50):
        name, first = first_turn(gateway)
        if first == replica:
            return name, first
    raise AssertionError(f"no conversation came to {replica}")


def served_whole(answer: Any) -> bool:
    """Whether a stream was answered to its end."""
    return answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")


def moved(gateway: Gateway, replica: str) -> float:
    """Requests that the gateway had to send elsewhere than to this replica."""
    return gateway.metric("gorgo_failures_total", kind="moved", replica=replica)


# TLS


def test_each_replica_is_asked_for_by_its_own_name(gateway: Gateway, fleet: TlsFleet) -> None:
    for _ in fleet.engines:
        first_turn(gateway)
    names = {host.partition(".")[0]: {host} for host in HOSTS}
    assert {name: engine.server_names for name, engine in fleet.engines.items()} == names


@pytest.mark.parametrize("impostor", ["its certificate is for another name", "its certificate is of another authority"])
def test_a_replica_that_cannot_prove_its_name_serves_nothing(tmp_path: Path, impostor: str) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    wrong = tls_for(ca, "ap-northeast.localhost") if "name" in impostor else tls_for(stranger, "us-east.localhost")
    envoy = {"replica_ca_file": str(tmp_path / "ca.pem"), "health_path": None}
    with (
        StubEngine("us-east", tls=wrong, host="us-east.localhost") as bad,
        StubEngine("eu-central", tls=tls_for(ca, "eu-central.localhost"), host="eu-central.localhost") as good,
    ):
        replicas = [{"name": one.name, "region": one.name, "url": one.url} for one in (bad, good)]
        with running(tmp_path / "gateway", replicas, envoy=envoy) as gateway:

            def chosen_first() -> bool:
                assert first_turn(gateway)[1] == "eu-central"
                return moved(gateway, "us-east") > 0

            wait_until(chosen_first, 10.0, "the impostor to be chosen")
            gateway.wait_until_at_rest()
            assert bad.server_names == {"us-east.localhost"}
    assert bad.requests == []


# Replicas that fail


@contextlib.contextmanager
def behaving(engine: StubEngine, **behaviour: Any) -> Iterator[None]:
    engine.behaviour = Behaviour(**behaviour)
    yield
    engine.behaviour = Behaviour()


FAULTS: dict[str, Callable[[StubEngine], AbstractContextManager[None]]] = {
    "answers 503": lambda engine: behaving(engine, status=503),
    "answers 429": lambda engine: behaving(engine, status=429),
    "resets before the headers": lambda engine: behaving(engine, reset=True),
    "is gone": StubEngine.gone,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_is_retried_elsewhere_and_what_happened_is_learned(
    gateway: Gateway, fleet: TlsFleet, fault: str
) -> None:
    name, first = first_turn(gateway)
    before = moved(gateway, first)
    with FAULTS[fault](fleet.engines[first]):
        answer = gateway.post(chat(name, 2, stream=True))
        health = gateway.health(first)
        assert served_whole(answer)
        second = answer.headers["x-gorgo-replica"]
        assert second != first
        assert moved(gateway, first) == before + 1
        assert health["failures_in_a_row"] >= 1
        assert gateway.health(second)["failures_in_a_row"] == 0
        assert len(fleet.engines[second].requests) == 1

    gateway.wait_for_replicas()
    gateway.wait_until_available()
    for turns in (3, 4):  # its prefix is where it was served, though the first is back
        assert gateway.post(chat(name, turns)).headers["x-gorgo-replica"] == second


def test_a_replica_in_the_same_region_is_the_one_to_fail_over_to(gateway: Gateway, fleet: TlsFleet) -> None:
    name, first = first_turn_at(gateway, "us-east-a")
    fleet.engines[first].behaviour.status = 503
    assert gateway.post(chat(name, 2)).headers["x-gorgo-replica"] == "us-east-b"


def test_a_paused_replica_gets_its_conversations_back(gateway: Gateway, fleet: TlsFleet) -> None:
    name, first = first_turn(gateway)
    other, _ = first_turn_at(gateway, first)
    fleet.engines[first].behaviour.status = 503
    assert gateway.post(chat(name, 2)).headers["x-gorgo-replica"] != first
    passed_over = gateway.explain(chat(other, 2))["replica"] != first
    assert passed_over or gateway.health(first)["available"]  # its pause may be over on a machine that stalls
    fleet.engines[first].behaviour = Behaviour()
    gateway.wait_until_available()
    assert gateway.post(chat(other, 2)).headers["x-gorgo-replica"] == first
    wait_until(lambda: gateway.health(first)["failures_in_a_row"] == 0, what="its answer to be learned")


def test_a_replica_that_fails_its_health_checks_is_passed_over_and_that_is_learned(
    gateway: Gateway, fleet: TlsFleet
) -> None:
    name, first = first_turn(gateway)
    before = moved(gateway, first)
    fleet.engines[first].behaviour.health_status = 500
    wait_until(lambda: not gateway.healthy(first), what="the health check to fail")
    answer = gateway.post(chat(name, 2, stream=True))
    health = gateway.health(first)
    second = answer.headers["x-gorgo-replica"]
    assert served_whole(answer)
    assert second != first
    assert len(fleet.engines[first].requests) == 1  # of the first turn
    assert moved(gateway, first) == before + 1
    assert health["failures_in_a_row"] == 1
    fleet.engines[first].behaviour = Behaviour()
    gateway.wait_for_replicas()
    gateway.wait_until_available()
    assert gateway.post(chat(name, 3)).headers["x-gorgo-replica"] == second


def test_a_fleet_whose_health_checks_all_fail_is_still_asked(gateway: Gateway, fleet: TlsFleet) -> None:
    fleet.behave(health_status=500)
    for name in fleet.engines:
        wait_until(lambda name=name: not gateway.healthy(name), what="the health check to fail")
    for number in range(8):
        assert served_whole(gateway.post(chat(next(names), stream=True, model="streamed"))), number


def test_the_answer_of_the_engine_reaches_the_client_when_all_fail(gateway: Gateway, fleet: TlsFleet) -> None:
    fleet.behave(status=503)
    answer = gateway.post(chat(next(names)))
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "injected 503"
    assert sum(fleet.counts().values()) == 1 + gateway.settings.envoy.retries
    gateway.wait_until_at_rest()


def test_a_request_that_the_engine_refuses_is_not_retried_and_does_not_count_against_it(
    gateway: Gateway, fleet: TlsFleet
) -> None:
    name, first = first_turn(gateway)
    fleet.engines[first].behaviour.status = 400
    answer = gateway.post(chat(name, 2))
    assert answer.status_code == 400
    assert answer.headers["x-gorgo-replica"] == first
    assert gateway.health(first)["failures_in_a_row"] == 0


def test_an_answer_that_breaks_off_ends_its_flight(gateway: Gateway, fleet: TlsFleet) -> None:
    name, first = first_turn(gateway)
    fleet.engines[first].behaviour = Behaviour(break_after_tokens=2, between_tokens_s=0.1)
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.post(chat(name, 2, stream=True))
    gateway.wait_until_at_rest()


# Other ways of Envoy to pick


@contextlib.contextmanager
def plain(folder: Path, mode: Mode) -> Iterator[tuple[Gateway, dict[str, StubEngine]]]:
    """Three replicas by IP address, without TLS."""
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(StubEngine(name)) for name in ("near", "middle", "far")}
        replicas = [{"name": name, "region": name, "url": engine.url} for name, engine in engines.items()]
        with running(folder, replicas, mode, health=PAUSE) as gateway:
            yield gateway, engines


def test_aggregate_clusters_retry_elsewhere_too(tmp_path: Path) -> None:
    with plain(tmp_path, "aggregate") as (gateway, engines):
        gateway.wait_for_replicas()
        for fault in (Behaviour(status=503), Behaviour(reset=True)):
            name, first = first_turn(gateway)
            before, engines[first].behaviour = moved(gateway, first), fault
            answer = gateway.post(chat(name, 2, stream=True))
            second = answer.headers["x-gorgo-replica"]
            assert served_whole(answer)
            assert second != first
            assert moved(gateway, first) == before + 1
            assert gateway.health(first)["failures_in_a_row"] >= 1
            engines[first].behaviour = Behaviour()
            gateway.wait_until_available()
            assert gateway.post(chat(name, 3)).headers["x-gorgo-replica"] == second
        gateway.wait_until_at_rest()


def test_override_host_retries_down_the_ranked_list(tmp_path: Path) -> None:
    with plain(tmp_path, "override-host") as (gateway, engines):
        of_address = {engine.url.removeprefix("http://"): name for name, engine in engines.items()}
        for _ in range(4):
            name, first = first_turn(gateway)
            engines[first].behaviour.status = 503
            answer = gateway.post(chat(name, 2, stream=True))
            listed = engines[first].headers[-1]["x-gateway-destination-endpoint"].split(",")
            ranked = [of_address[address] for address in listed]
            assert served_whole(answer)
            assert sorted(ranked) == sorted(engines)
            assert ranked[0] == first
            assert answer.headers["x-gorgo-replica"] == ranked[1]
            assert moved(gateway, first) >= 1
            engines[first].behaviour = Behaviour()
            gateway.wait_until_available()
            assert gateway.post(chat(name, 3)).headers["x-gorgo-replica"] == ranked[1]
        gateway.wait_until_at_rest()

        gateway.kill_service()
        before = {name: len(engine.requests) for name, engine in engines.items()}
        for _ in range(6):  # a client's own list is not followed
            assert gateway.post(chat("x"), headers={"x-gateway-destination-endpoint": listed[0]}).status_code == 200
        assert all(len(engine.requests) > before[name] for name, engine in engines.items())


def test_a_region_that_cannot_stand_in_a_header_is_left_out(tmp_path: Path) -> None:
    with StubEngine("one") as engine:
        replicas = [{"name": "one", "region": "two\nlines", "url": engine.url}]
        with running(tmp_path, replicas) as gateway:
            answer = gateway.post(chat("x"))
            assert answer.status_code == 200
            assert answer.headers["x-gorgo-replica"] == "one"
            assert "x-gorgo-region" not in answer.headers


# The prefix


def test_later_turns_land_on_the_replica_of_two_in_a_region_that_has_the_prefix(
    gateway: Gateway, fleet: TlsFleet
) -> None:
    homes: list[tuple[str, str]] = []
    while not {"us-east-a", "us-east-b"} <= {home for _, home in homes}:
        assert len(homes) < 50
        homes.append(first_turn(gateway))
    for turns in (2, 3):
        for name, home in homes:
            gateway.wait_until_at_rest()
            answer = gateway.post(chat(name, turns))
            assert answer.headers["x-gorgo-replica"] == home
            assert int(answer.headers["x-gorgo-cached-tokens"]) > 100 * (turns - 1)


# Clients


def test_a_routing_header_of_the_client_is_stripped(gateway: Gateway, fleet: TlsFleet) -> None:
    name, first = first_turn(gateway)
    for other in fleet.engines:
        answer = gateway.post(chat(name), headers={"x-gorgo-replica": other})
        assert answer.headers["x-gorgo-replica"] == first
    assert len(fleet.engines[first].requests) == 1 + len(fleet.engines)
    for _ in range(40):  # not a prompt, so not routed: Envoy spreads them over all
        gateway.post({}, "/v1/rerank", headers={"x-gorgo-replica": first})
    assert all(fleet.counts().values())
    seen = [header for engine in fleet.engines.values() for headers in engine.headers for header in headers]
    assert "x-gorgo-replica" not in seen


LEAVES: dict[str, dict[str, float]] = {
    "before the headers": {"before_headers_s": 30.0},
    "before the first token": {"before_first_token_s": 30.0},
    "mid-stream": {"between_tokens_s": 30.0},
}


@pytest.mark.parametrize("leaves", LEAVES)
def test_a_client_that_leaves_ends_its_flight_and_does_not_count_against_the_replica(
    gateway: Gateway, fleet: TlsFleet, leaves: str
) -> None:
    name, first = first_turn(gateway)
    engine = fleet.engines[first]
    engine.behaviour = Behaviour(**LEAVES[leaves])  # type: ignore[arg-type]
    before = gateway.metric("gorgo_failures_total")
    with leaving(gateway, chat(name, 2, stream=True)) as connection:
        wait_until(lambda: engine.open_requests == 1, what="the request to arrive")
        wait_until(lambda: gateway.status()["flights"][first] == 1, what="its flight to be the only one")
        if leaves != "before the headers":
            answer = connection.getresponse()
            assert answer.getheader("x-gorgo-replica") == first
            if leaves == "mid-stream":
                assert answer.readline().startswith(b"data:")
    gateway.wait_until_at_rest()
    wait_until(lambda: engine.open_requests == 0, what="the replica to be told")
    assert gateway.health(first)["failures_in_a_row"] == 0
    left = gateway.metric("gorgo_failures_total", kind="disconnect", replica=first)
    assert gateway.metric("gorgo_failures_total") - before == (leaves != "mid-stream")
    assert left >= (leaves != "mid-stream")


def test_clients_that_leave_at_any_moment_leave_nothing_behind(gateway: Gateway, fleet: TlsFleet) -> None:
    def failures() -> list[int]:
        return [replica["health"]["failures_in_a_row"] for replica in gateway.status()["replicas"].values()]

    rng, before = random.Random(0), failures()  # what tests before this one left is over when a replica has answered
    fleet.behave(before_headers_s=0.02, before_first_token_s=0.02, between_tokens_s=0.01)
    moments = [(next(names), rng.uniform(0.0, 0.12), rng.random() < 0.7) for _ in range(64)]

    def leave(moment: tuple[str, float, bool]) -> None:
        name, after_s, stream = moment
        with leaving(gateway, chat(name, 2, stream, model="streamed")):
            time.sleep(after_s)

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(leave, moments))
    gateway.wait_until_at_rest()
    state = gateway.status()
    assert state["counters"]["swept_flights"] == state["counters"]["unknown_flights"] == 0
    assert all(now <= then for now, then in zip(failures(), before, strict=True))


@contextlib.contextmanager
def leaving(gateway: Gateway, body: dict[str, Any]) -> Iterator[http.client.HTTPConnection]:
    """A client with a request under way, gone at the end of the block."""
    connection = http.client.HTTPConnection(gateway.settings.envoy.gateway_listen, timeout=10)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    try:
        yield connection
    finally:
        connection.close()
