"""The real Envoy while the external-processing service is down, killed, hung, restarted, or answers garbage."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import socketserver
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.type.v3.http_status_pb2 import HttpStatus

from gorgo_plugin.envoy_ext_proc import messages
from gorgo_plugin.envoy_ext_proc.server import grpc_service
from tests.envoy_gateway import Gateway, TlsFleet, running, tls_fleet
from tests.litellm_proxy import wait_until

HOSTS = {
    "us-east.localhost": "us-east",
    "eu-central.localhost": "eu-central",
    "ap-northeast.localhost": "ap-northeast",
}
SERVICE = "gorgo-ext-proc"
SLACK_S = 5.0  # for a busy machine
END = "data: [DONE]\n\n"
names = (f"c{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path_factory.mktemp("replicas"), HOSTS) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def shared(fleet: TlsFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway"), fleet.replicas, envoy=fleet.envoy) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway, fleet: TlsFleet) -> Gateway:
    """The shared gateway with all well."""
    for engine in fleet.engines.values():
        engine.reset()
    if shared.service is None or shared.service.poll() is not None:
        shared.start_service()
    wait_until_routed(shared)
    shared.wait_for_replicas()
    return shared


def chat(name: str | None = None, turns: int = 1, stream: bool = False) -> dict[str, Any]:
    """A conversation after so many turns; a new one without a name."""
    name = name or next(names)
    turn = [{"role": "user", "content": f"{name} " * 1000}, {"role": "assistant", "content": "hi"}]
    return {"model": "m", "stream": stream, "messages": (turn * turns)[:-1]}


def is_whole(answer: httpx.Response) -> bool:
    """Whether a request was answered to the end."""
    return answer.status_code == 200 and (answer.text.endswith(END) or "usage" in answer.json())


def is_routed(gateway: Gateway) -> bool:
    """Whether a request is served, and whether it was routed."""
    answer = gateway.post(chat())
    assert is_whole(answer)
    return "x-gorgo-replica" in answer.headers


def wait_until_routed(gateway: Gateway) -> None:
    """Wait until the service is in effect: Envoy may hold one that has just ended for well."""
    gateway.wait_for_service()
    wait_until(lambda: is_routed(gateway), 15.0, "requests to be routed", gateway.log_text)


def serves(gateway: Gateway, requests: int = 6) -> None:
    """Requests are served, streamed or not."""
    for number in range(requests):
        assert is_whole(gateway.post(chat(stream=number % 2 == 0)))


# Down


def test_without_the_service_the_fleet_is_served_evenly_and_once_it_is_there_requests_are_routed(
    tmp_path: Path, fleet: TlsFleet
) -> None:
    with contextlib.closing(Gateway(tmp_path, fleet.replicas, envoy=fleet.envoy)) as gateway:
        gateway.start_envoy()
        gateway.wait_for_replicas()
        before = fleet.counts()
        for number in range(40):
            answer = gateway.post(chat(stream=number % 2 == 0), headers={"x-gorgo-replica": "us-east"})
            assert is_whole(answer)
            assert "x-gorgo-replica" not in answer.headers
        assert all(after > before[name] for name, after in fleet.counts().items())
        assert all("x-gorgo-replica" not in headers for one in fleet.engines.values() for headers in one.headers)

        gateway.start_service()
        gateway.wait_for_service()
        wait_until_routed(gateway)
        gateway.wait_until_at_rest()


def test_without_the_service_a_request_is_retried_elsewhere(gateway: Gateway, fleet: TlsFleet) -> None:
    gateway.kill_service()
    fleet.engines["us-east"].behaviour.status = 503
    serves(gateway, 60)  # each is sent there first by a chance of one in three
    assert len(fleet.engines["us-east"].requests) > 0


# Killed


def test_the_service_may_be_killed_between_requests(gateway: Gateway) -> None:
    assert is_routed(gateway)
    gateway.kill_service()
    for _ in range(6):
        assert not is_routed(gateway)


def test_no_request_fails_when_the_service_is_killed_under_load(gateway: Gateway, fleet: TlsFleet) -> None:
    fleet.behave(before_headers_s=0.03, between_tokens_s=0.01)
    stop = threading.Event()
    routed: list[bool] = []

    def client(number: int) -> list[str]:
        wrong = []
        with httpx.Client(base_url=gateway.url, timeout=30.0) as own:
            for turn in itertools.count(1):
                if stop.is_set():
                    return wrong
                body = chat(f"load {number}", turn % 6 + 1, stream=(number + turn) % 2 == 0)
                answer = own.post("/v1/chat/completions", json=body)
                if not is_whole(answer):
                    wrong.append(f"{answer.status_code}: {answer.text[:200]}")
                routed.append("x-gorgo-replica" in answer.headers)
        return wrong

    with ThreadPoolExecutor(8) as clients:
        loads = [clients.submit(client, number) for number in range(8)]
        try:
            wait_until(lambda: len(routed) > 100, what="requests under way")
            gateway.kill_service()
            wait_until(lambda: routed.count(False) > 50, what="requests without the service")
            gateway.start_service()
            wait_until(lambda: all(routed[-50:]), 30.0, "routed requests")
        finally:
            stop.set()
        assert [load.result() for load in loads] == [[]] * 8
    gateway.wait_until_at_rest()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_does_not_notice_that_the_service_ends_mid_stream(
    gateway: Gateway, fleet: TlsFleet, end: signal.Signals
) -> None:
    # More than Envoy and the connection to the service hold, for a service that does not read on.
    fleet.behave(tokens=10_000)
    with gateway.client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        assert "x-gorgo-replica" in answer.headers
        pieces = answer.iter_text()
        text = next(pieces)
        gateway.signal_service(end)
        text += "".join(pieces)
    assert text.endswith(END)
    assert re.findall(r'"w(\d+) "', text) == [str(number) for number in range(10_000)]
    gateway.signal_service(signal.SIGCONT)
    if end == signal.SIGSTOP:
        gateway.wait_until_at_rest()
    else:
        assert gateway.service is not None
        gateway.service.wait(10)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_answer_has_not_begun_is_answered_when_the_service_ends(
    gateway: Gateway, fleet: TlsFleet, end: signal.Signals, stream: bool
) -> None:
    fleet.behave(before_headers_s=0.3)
    with ThreadPoolExecutor(1) as client:
        under_way = client.submit(gateway.post, chat(stream=stream))
        wait_until(lambda: any(engine.open_requests for engine in fleet.engines.values()), what="it to be under way")
        gateway.signal_service(end)
        answer = under_way.result(30)
    gateway.signal_service(signal.SIGCONT)
    assert is_whole(answer)
    if end == signal.SIGSTOP:
        gateway.wait_until_at_rest()


# Hung


def test_a_hung_service_delays_requests_by_its_timeout_until_the_health_check_finds_it(gateway: Gateway) -> None:
    timeout_s = gateway.settings.envoy.message_timeout_s
    gateway.signal_service(signal.SIGSTOP)
    try:
        delays = [timed(gateway)]
        while gateway.healthy(SERVICE):
            delays.append(timed(gateway))
        assert delays[0] > 0.9 * timeout_s  # timers of Envoy begin with the turn of its loop
        assert max(delays) < timeout_s + SLACK_S
        assert min(timed(gateway) for _ in range(5)) < timeout_s / 2
    finally:
        gateway.signal_service(signal.SIGCONT)
    wait_until_routed(gateway)
    gateway.wait_until_at_rest()


def timed(gateway: Gateway) -> float:
    """Seconds until a request was answered."""
    started = time.perf_counter()
    assert is_whole(gateway.post(chat()))
    return time.perf_counter() - started


# Garbage


class Noise(socketserver.BaseRequestHandler):
    """Speaks no protocol."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.recv(4096)
            self.request.sendall(b"220 mail.example ESMTP\r\n" * 20)


def test_requests_are_served_while_something_else_listens_in_place_of_the_service(gateway: Gateway) -> None:
    gateway.kill_service()
    host, _, port = gateway.settings.envoy.listen.rpartition(":")
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer((host, int(port)), Noise) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            serves(gateway)  # while Envoy takes it for the service
            wait_until(lambda: not gateway.healthy(SERVICE), what="the health check to fail")
            serves(gateway)
        finally:
            server.shutdown()
            thread.join(10)


Process = Callable[[Any, Any], Awaitable[None]]


def answering(*answers: bytes) -> Process:
    """A service that gives these answers, whatever it is asked."""

    async def process(_requests: object, context: Any) -> None:
        for answer in answers:
            await context.read()
            await context.write(answer)
        await context.read()

    return process


async def raising(_requests: object, context: Any) -> None:
    await context.read()
    raise RuntimeError("injected")


async def leaving(_requests: object, context: Any) -> None:
    await context.read()


def refusing() -> bytes:
    """An answer of its own, which a service is not allowed here."""
    own = pb.ImmediateResponse(status=HttpStatus(code=500))
    return bytes(pb.ProcessingResponse(immediate_response=own).SerializeToString())


HEADERS = messages.UNCHANGED["request_headers"]
GARBAGE: dict[str, Process] = {
    "no protobuf": answering(b"\xff" * 50),
    "no protobuf after the headers": answering(HEADERS, b"\xff" * 50),
    "an answer to what was not asked": answering(messages.UNCHANGED["response_headers"]),
    "the same answer again and again": answering(HEADERS, HEADERS, HEADERS),
    "an empty answer": answering(b""),
    "an error to the client": answering(refusing()),
    "a replica that does not exist": answering(HEADERS, messages.routed("nobody", "", "x-1", None)),
    "an exception": raising,
    "an end without an answer": leaving,
}


@contextlib.contextmanager
def impostor(gateway: Gateway) -> Iterator[Callable[[Process], None]]:
    """A healthy gRPC service in place of the real one; the function yielded sets how it processes."""
    behaviour: list[Process] = [leaving]
    loop, stop, started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def process(requests: object, context: Any) -> None:
        await behaviour[0](requests, context)

    async def serve() -> None:
        async with grpc_service(gateway.settings.envoy, process):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield lambda process: behaviour.__setitem__(0, process)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def test_requests_are_served_whatever_the_service_answers(gateway: Gateway) -> None:
    gateway.kill_service()
    wait_until(lambda: not gateway.healthy(SERVICE), what="the health check to fail")
    with impostor(gateway) as behave:
        gateway.wait_for_service()
        for garbage, process in GARBAGE.items():
            behave(process)
            for stream in (True, False):
                assert is_whole(gateway.post(chat(stream=stream))), garbage


# Restarted


def test_a_restarted_service_routes_with_a_cleared_state_and_ignores_streams_of_its_old_life(
    gateway: Gateway, fleet: TlsFleet
) -> None:
    gateway.post(chat("here before"))
    gateway.wait_until_at_rest()
    assert int(gateway.post(chat("here before", 2)).headers["x-gorgo-cached-tokens"]) > 0
    # One stream whose first token is seen after the restart, so that its observing stream opens in the new life.
    fleet.behave(before_first_token_s=3.5)
    with ThreadPoolExecutor(1) as client:
        old = client.submit(gateway.post, chat(stream=True))
        wait_until(lambda: any(engine.open_requests for engine in fleet.engines.values()), what="it to be under way")
        fleet.behave()
        gateway.kill_service()
        gateway.start_service()
        wait_until_routed(gateway)
        known = gateway.explain(chat("here before", 2))["replicas"]
        assert [replica["cached_tokens"] for replica in known.values()] == [0] * len(HOSTS)
        assert is_whole(old.result(30))
    gateway.wait_until_at_rest()
    counters = gateway.status()["counters"]
    assert (counters["unknown_flights"], counters["swept_flights"]) == (0, 0)
    assert gateway.metric("gorgo_failures_total") == 0
