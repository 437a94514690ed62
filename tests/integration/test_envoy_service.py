"""The service as a process: health, reflection, pages, reload, TLS, an orderly end, and mistakes at its start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
import yaml
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gorgo_plugin import Settings
from gorgo_plugin.cli import main
from gorgo_plugin.envoy_ext_proc.names import SERVICE
from gorgo_plugin.envoy_ext_proc.server import _reload
from gorgo_plugin.runtime import Runtime
from tests.envoy_gateway import SERVE, Gateway, running
from tests.litellm_proxy import wait_until
from tests.stub_engine import Behaviour, StubEngine

Engines = tuple[StubEngine, StubEngine]
CHAT = "/v1/chat/completions"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def body(text: str = "where does the river go? ", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text * 400}], **fields}


def replicas_of(engines: Engines) -> list[dict[str, Any]]:
    return [{"name": one.name, "region": f"{one.name}-region", "url": one.url} for one in engines]


@pytest.fixture(scope="module")
def process(engine_pair: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("service"), replicas_of(engine_pair)) as gateway:
        yield gateway


@pytest.fixture
def gateway(process: Gateway, engines: Engines) -> Iterator[Gateway]:
    yield process
    process.wait_until_at_rest()


def check(channel: grpc.Channel, service: str) -> int:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return int(answer.status)


# gRPC


@pytest.mark.parametrize("service", ["", SERVICE])
def test_the_health_service_says_it_serves(gateway: Gateway, service: str) -> None:
    with grpc.insecure_channel(gateway.settings.envoy.listen) as channel:
        assert check(channel, service) == SERVING


def test_the_health_service_knows_no_other_services(gateway: Gateway) -> None:
    with (
        grpc.insecure_channel(gateway.settings.envoy.listen) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        check(channel, "another")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(gateway: Gateway) -> None:
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(gateway.settings.envoy.listen) as channel:
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([question]), timeout=5)
    names = {service.name for service in answer.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_reflection_describes_the_processing_service(gateway: Gateway) -> None:
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
    with grpc.insecure_channel(gateway.settings.envoy.listen) as channel:
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([question]), timeout=5)
    assert answer.file_descriptor_response.file_descriptor_proto


# Pages


def test_metrics_are_served_as_prometheus_reads_them(gateway: Gateway) -> None:
    gateway.post(body())
    answer = gateway.looking.get(f"{gateway.status_url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'gorgo_flights_open{region="near-region",replica="near"' in answer.text
    assert gateway.metric("gorgo_decisions_total", policy="gorgo") >= 1


def test_status_shows_the_state_and_no_prompt(gateway: Gateway) -> None:
    gateway.post(body("a secret of the client "))
    gateway.wait_until_at_rest()
    status = gateway.status()
    assert status["gateway"] == "envoy"
    assert (status["mode"], status["active"], status["settings_error"]) == ("on", True, None)
    assert status["flights"] == {"near": 0, "far": 0}
    assert status["streams"] == 0
    assert "secret" not in json.dumps(status)


def explain(gateway: Gateway, asked: Any) -> httpx.Response:
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    return gateway.looking.post(f"{gateway.status_url}/gorgo/explain", content=content)


def test_explain_tells_where_a_request_would_go_and_routes_nothing(gateway: Gateway) -> None:
    home = gateway.post(body()).headers["x-gorgo-replica"]
    gateway.wait_until_at_rest()
    before = gateway.status()["counters"]
    explained = explain(gateway, {"body": body(), "endpoint": CHAT, "model": None}).json()
    assert explained["gateway"] == "envoy"
    assert explained["replica"] == home
    assert explained["replicas"][home]["cached_tokens"] > 100
    assert gateway.status()["counters"] == before


@pytest.mark.parametrize(
    "asked",
    [
        b"no JSON",
        b"\xff",
        b"[" * 100_000,
        [],
        {},
        {"body": body(), "endpoint": 7},
        {"body": body(), "endpoint": "/v1/audio/speech"},
        {"body": {"messages": 7}, "endpoint": CHAT},
        {"body": body(), "endpoint": CHAT, "model": 7},
    ],
)
def test_a_question_that_cannot_be_read_is_answered_with_one_sentence(gateway: Gateway, asked: Any) -> None:
    answer = explain(gateway, asked)
    assert answer.status_code == 400
    assert answer.json().keys() == {"error"}
    assert len(answer.json()["error"]) > 10


def gorgo_explain(folder: Path, gateway: Gateway, asked: Any, *more: str) -> Any:
    (folder / "body.json").write_text(json.dumps(asked))
    config, url = str(gateway.folder / "gorgo.yaml"), f"{gateway.status_url}/gorgo/status"
    return CliRunner().invoke(
        main, ["explain", "--config", config, "--request", str(folder / "body.json"), "--status-url", url, *more]
    )


def test_the_explain_command_asks_the_service(gateway: Gateway, tmp_path: Path) -> None:
    home = gateway.post(body()).headers["x-gorgo-replica"]
    gateway.wait_until_at_rest()
    outcome = gorgo_explain(tmp_path, gateway, body(), "--json")
    assert outcome.exit_code == 0, outcome.output
    explained = json.loads(outcome.output)
    assert explained["replica"] == home
    assert explained["replicas"][home]["cached_tokens"] > 100
    assert "its score is the lowest" in gorgo_explain(tmp_path, gateway, body()).output


def test_the_explain_command_quotes_what_the_service_refuses(gateway: Gateway, tmp_path: Path) -> None:
    outcome = gorgo_explain(tmp_path, gateway, {"model": "m", "messages": 7})
    assert outcome.exit_code == 1
    assert outcome.output.startswith(f"Error: {gateway.status_url}/gorgo/explain answered 400: messages: expected")
    assert outcome.output.count("\n") == 1


# Reload


def test_a_reload_puts_a_new_fleet_into_use(gateway: Gateway, engines: Engines) -> None:
    both = replicas_of(engines)
    try:
        for replica, engine in zip(both, engines, strict=True):
            gateway.reload(replicas=[replica])
            for number in range(4):
                assert gateway.post(body(f"{engine.name} {number} ")).headers["x-gorgo-replica"] == engine.name
            assert gateway.status()["flights"].keys() == {engine.name}
    finally:
        gateway.reload()
    assert [len(engine.requests) for engine in engines] == [4, 4]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("replicas: [", "not readable as YAML"),
        ("replicas: []", "replicas: at least one is needed"),
        ("polcy: gorgo", "polcy: unknown setting (did you mean 'policy'?)"),
        ("tokenizer: /no/such/file", "tokenizer: '/no/such/file' is no file"),
    ],
)
def test_a_broken_file_leaves_the_last_good_settings_in_force(gateway: Gateway, text: str, sentence: str) -> None:
    errors = gateway.metric("gorgo_settings_errors_total")
    config = gateway.folder / "gorgo.yaml"
    fleet = "" if text.startswith("replicas") else yaml.safe_dump({"replicas": gateway.content["replicas"]})
    config.write_text(f"{fleet}{text}\n")
    gateway.signal_service(signal.SIGHUP)
    try:
        wait_until(lambda: gateway.status()["settings_error"], 10.0, "the error", gateway.log_text)
        wait_until(lambda: gateway.metric("gorgo_settings_errors_total") == errors + 1, what="the count")
        assert sentence in gateway.status()["settings_error"]
        assert gateway.post(body()).headers["x-gorgo-replica"]
    finally:
        gateway.reload()
    assert gateway.status()["settings_error"] is None


def test_of_two_reloads_that_overlap_the_last_one_stands() -> None:
    settings = {"replicas": [{"name": "a", "url": "http://127.0.0.1:1"}]}
    runtime = Runtime(Settings.model_validate(settings), gateway="envoy")
    try:
        lock, reading, asked = threading.Lock(), threading.Event(), iter((10.0, 20.0))

        def read_settings() -> Settings:
            interval_s = next(asked)
            if interval_s == 10.0:  # a slow read, which the second reload would overtake
                reading.set()
                time.sleep(0.3)
            return Settings.model_validate({**settings, "probe": {"interval_s": interval_s}})

        first = threading.Thread(target=_reload, args=(lock, runtime, read_settings))
        first.start()
        reading.wait(5)
        _reload(lock, runtime, read_settings)
        first.join()
        assert runtime.settings.probe.interval_s == 20.0
    finally:
        runtime.close()


def test_a_service_started_in_mode_off_measures_once_it_is_switched_on(engines: Engines, tmp_path: Path) -> None:
    with contextlib.closing(Gateway(tmp_path, replicas_of(engines), mode="composite")) as gateway:
        gateway.content["mode"] = "off"
        gateway.start_service()
        assert gateway.status()["active"] is False
        gateway.reload(mode="on")
        assert (gateway.status()["active"], gateway.status()["reason"]) == (True, "mode is on")
        wait_until(lambda: gateway.status()["replicas"]["near"]["latency"]["rtt_ms"] is not None, what="a round trip")


# An orderly end


@dataclass
class Answers:
    """What clients got: (status, whether the stream was complete, whether gorgo chose) of each request."""

    seen: list[tuple[int, bool, bool]]
    enough: threading.Event

    def keep_asking(self, url: str) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not self.enough.is_set():
                answer = client.post(CHAT, json=body(f"request {len(self.seen)} ", stream=True))
                complete, chosen = answer.text.endswith("[DONE]\n\n"), "x-gorgo-replica" in answer.headers
                self.seen.append((answer.status_code, complete, chosen))


def test_sigterm_under_load_loses_no_request(engines: Engines, tmp_path: Path) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(tokens=10, between_tokens_s=0.03)
    drain_s, grace_s = 4.0, 5.0
    timing = {"drain_s": drain_s, "grace_s": grace_s}
    with (
        running(tmp_path, replicas_of(engines), envoy=timing) as gateway,
        grpc.insecure_channel(gateway.settings.envoy.listen) as channel,
        ThreadPoolExecutor(6) as clients,
    ):
        assert gateway.service is not None
        answers = Answers([], threading.Event())
        asking = [clients.submit(answers.keep_asking, gateway.url) for _ in range(6)]
        try:
            wait_until(lambda: len(answers.seen) >= 12)
            started = time.monotonic()
            gateway.signal_service(signal.SIGTERM)
            wait_until(lambda: check(channel, SERVICE) == NOT_SERVING, 3.0)
            assert gateway.service.wait(drain_s + grace_s + 20.0) == 0
            assert time.monotonic() - started >= drain_s
            ended = len(answers.seen)
            wait_until(lambda: len(answers.seen) >= ended + 12)
        finally:
            answers.enough.set()
        for client in asking:
            client.result(30)
        log = gateway.log_text()
    assert {(status, complete) for status, complete, _ in answers.seen} == {(200, True)}
    assert any(chosen for _, _, chosen in answers.seen)
    assert not answers.seen[-1][2]
    assert "Traceback" not in log


def test_a_stream_that_outlives_the_grace_goes_on_without_the_service(engines: Engines, tmp_path: Path) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(tokens=40, between_tokens_s=0.05)
    with running(tmp_path, replicas_of(engines), envoy={"drain_s": 0.1, "grace_s": 0.2}) as gateway:
        assert gateway.service is not None
        with gateway.client.stream("POST", CHAT, json=body(stream=True)) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            gateway.signal_service(signal.SIGTERM)
            assert gateway.service.wait(30) == 0
            text += "".join(pieces)
    assert text.count("data:") == 43
    assert text.endswith("[DONE]\n\n")


# Between Envoy and the service


@dataclass
class Certificates:
    """Files of a certificate authority, the service's certificate and Envoy's."""

    folder: Path
    settings: dict[str, str]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name, certificate in (("service", authority.issue_cert("gorgo")), ("envoy", authority.issue_cert("envoy"))):
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    files = {
        "cert_file": "service.pem",
        "key_file": "service.key",
        "client_ca_file": "ca.pem",
        "ca_file": "ca.pem",
        "envoy_cert_file": "envoy.pem",
        "envoy_key_file": "envoy.key",
    }
    return Certificates(folder, {name: str(folder / file) for name, file in files.items()})


def test_with_mutual_tls_envoy_is_served_and_a_client_without_certificate_refused(
    engines: Engines, certificates: Certificates, tmp_path: Path
) -> None:
    ca, key, certificate = ((certificates.folder / name).read_bytes() for name in ("ca.pem", "envoy.key", "envoy.pem"))
    with running(tmp_path, replicas_of(engines), envoy={"tls": certificates.settings}) as gateway:
        # Envoy gives a connection 0.25 s, in which the service must shake hands.
        wait_until(lambda: "x-gorgo-replica" in gateway.post(body()).headers, what="a request to be routed")
        gateway.wait_until_at_rest()
        address, named = gateway.settings.envoy.listen, [("grpc.ssl_target_name_override", "gorgo")]
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), named) as channel:
            assert check(channel, SERVICE) == SERVING
        for credentials in (grpc.ssl_channel_credentials(ca), grpc.ssl_channel_credentials()):
            with grpc.secure_channel(address, credentials, named) as channel, pytest.raises(grpc.RpcError) as caught:
                check(channel, SERVICE)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_over_a_unix_socket_envoy_is_served_and_a_second_service_is_refused(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")  # a socket's path holds 107 characters
    with running(folder, replicas_of(engines), envoy={"listen": f"unix:{folder}/s"}) as gateway:
        assert gateway.post(body()).headers["x-gorgo-replica"] in ("near", "far")
        settings = {**gateway.content, "envoy": {**gateway.content["envoy"], "status_listen": None}}
        code, errors = started(settings, folder / "second")
        assert (code, errors) == (
            1,
            f"Error: envoy.listen: cannot listen on unix:{folder}/s (Address already in use)\n",
        )
        assert gateway.post(body()).headers["x-gorgo-replica"] in ("near", "far")
        gateway.wait_until_at_rest()


# Mistakes at the start


def started(settings: dict[str, Any], folder: Path) -> tuple[int, str]:
    """The exit code and the errors of a service that cannot start."""
    folder.mkdir(exist_ok=True)
    (folder / "gorgo.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-c", SERVE, "ext-proc", "--config", str(folder / "gorgo.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr


ONE = {"replicas": [{"name": "a", "url": "http://127.0.0.1:9"}]}


@pytest.mark.parametrize("field", ["listen", "status_listen"])
def test_a_port_in_use_is_one_sentence(tmp_path: Path, field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        envoy = {"listen": "127.0.0.1:0", "status_listen": "127.0.0.1:0", field: address}
        code, errors = started({**ONE, "envoy": envoy}, tmp_path)
    assert code == 1
    assert errors.startswith(f"Error: envoy.{field}: cannot listen on {address} (")
    assert "address already in use" in errors.lower()
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "field"),
    [(None, "key_file: cannot read"), ("no certificate", "cert_file, key_file: ")],
)
def test_a_certificate_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: str | None, field: str) -> None:
    if content is not None:
        (tmp_path / "pem").write_text(content)
    tls = dict.fromkeys(("cert_file", "key_file", "ca_file"), str(tmp_path / "pem"))
    envoy = {"listen": "127.0.0.1:0", "status_listen": None, "tls": tls}
    code, errors = started({**ONE, "envoy": envoy}, tmp_path)
    assert code == 1
    assert errors.startswith(f"Error: envoy.tls.{field}")
    assert str(tmp_path / "pem") in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("command", ["ext-proc", "envoy-config"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("replicas: [", "not readable as YAML"),
        ("- a list", "expected a mapping of settings"),
        ("replicas: []", "replicas: at least one is needed"),
        ("envoy: {lisen: '127.0.0.1:1'}", "envoy.lisen: unknown setting (did you mean 'listen'?)"),
        ("envoy: {listen: somewhere}", "envoy.listen: expected host:port"),
        ("envoy: {listen: 'unix:relative'}", "envoy.listen: expected unix:/path"),
        (
            "envoy: {max_message_timeout_s: 0.1}",
            "envoy: max_message_timeout_s: must not be less than message_timeout_s",
        ),
        ("replicas: [{name: a, url: 'ftp://x'}]", "replicas.0.url: expected http://host:port"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_that_names_it(
    tmp_path: Path, command: str, text: str, sentence: str
) -> None:
    (tmp_path / "gorgo.yaml").write_text(text)
    outcome = CliRunner().invoke(main, [command, "--config", str(tmp_path / "gorgo.yaml")])
    assert outcome.exit_code == 1
    assert outcome.output.startswith(f"Error: {tmp_path}/gorgo.yaml: ")
    assert sentence in outcome.output
    assert outcome.output.count("\n") == 1


def test_a_reload_asked_for_while_the_service_starts_does_not_end_it(tmp_path: Path) -> None:
    fifo = tmp_path / "gorgo.yaml"
    os.mkfifo(fifo)
    listening = {"listen": "127.0.0.1:0", "status_listen": "127.0.0.1:0", "drain_s": 0}
    text = yaml.safe_dump({"replicas": [{"name": "a", "url": "http://127.0.0.1:1"}], "envoy": listening})
    command = [sys.executable, "-c", SERVE, "ext-proc", "--config", str(fifo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            with fifo.open("w") as file:  # opens once the service does
                service.send_signal(signal.SIGHUP)
                file.write(text)
            assert service.stdout is not None
            assert "listen" in json.loads(service.stdout.readline())
        finally:
            service.terminate()
        assert service.wait(30) == 0
