"""Requests through the real Envoy with the real service: routed, learned from, and otherwise left as they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from gorgo_plugin.envoy_ext_proc.envoy_yaml import Mode
from gorgo_plugin.envoy_ext_proc.messages import UNCHANGED
from gorgo_plugin.envoy_ext_proc.server import grpc_service
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tests.envoy_gateway import Gateway, running
from tests.litellm_proxy import wait_until
from tests.stub_engine import Behaviour, StubEngine, prompt_tokens, streamed_answer, whole_answer

Engines = tuple[StubEngine, StubEngine]
TEXT = "where does the river go? " * 400  # its prefill outweighs what a busy machine measures over loopback
TURN = [{"role": "user", "content": TEXT}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": TURN},
    COMPLETIONS: {"model": "m", "prompt": TEXT},
    RESPONSES: {"model": "m", "input": TEXT},
    EMBEDDINGS: {"model": "m", "input": [TEXT, "short"]},
    MESSAGES: {"model": "m", "messages": TURN, "max_tokens": 8},
}
STREAMED = [path for path in BODIES if path != EMBEDDINGS]
ASKED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def process(engine_pair: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    served = {"near": ["m"], "far": ["m", "e"]}
    replicas = [
        {"name": one.name, "region": f"{one.name}-region", "url": one.url, "models": served[one.name]}
        for one in engine_pair
    ]
    with running(tmp_path_factory.mktemp("gateway"), replicas) as gateway:
        yield gateway


@pytest.fixture
def gateway(process: Gateway, engines: Engines) -> Iterator[Gateway]:
    """The gateway with its settings as at the start; after the test it must be at rest."""
    yield process
    process.wait_until_at_rest()


@pytest.fixture
def changed(gateway: Gateway) -> Iterator[Gateway]:
    """The gateway, for a test that changes its settings."""
    yield gateway
    gateway.wait_until_at_rest()
    gateway.reload()


def asked_of(engines: Engines) -> list[tuple[str, dict[str, Any]]]:
    return [request for engine in engines for request in engine.requests]


def only(values: Any) -> Any:
    (value,) = values
    return value


@contextlib.contextmanager
def counted(gateway: Gateway, **metrics: float) -> Iterator[None]:
    """Over the block, these metrics (of gorgo_) grow by so much, once the gateway is at rest."""
    before = {name: gateway.metric(f"gorgo_{name}") for name in metrics}
    yield
    gateway.wait_until_at_rest()
    grown = {name: gateway.metric(f"gorgo_{name}") - before[name] for name in metrics}
    assert grown == metrics


def streams_to_service(gateway: Gateway) -> int:
    """Streams that Envoy has opened to the service so far, health checks not among them."""
    stats = gateway.looking.get(f"{gateway.admin_url}/stats?filter=cluster.gorgo-ext-proc.upstream_rq_total").text
    return int(stats.rsplit(":", 1)[1])


# What passes through, and what is learned from it


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_answer_passes_as_it_is_and_its_usage_is_learned(gateway: Gateway, engines: Engines, path: str) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(cached_tokens=16)
    body, cached = BODIES[path], 0 if path == EMBEDDINGS else 16  # the stub's embeddings do not report cached tokens
    expected = {"prompt_tokens_total": prompt_tokens(body), "reported_cached_tokens_total": cached}
    with counted(gateway, decisions_total=1, ttft_seconds_count=0, fallbacks_total=0, failures_total=0, **expected):
        answer = gateway.post(body, path)
    assert answer.status_code == 200
    assert answer.json() == whole_answer(path, body, 16)
    assert only(asked_of(engines)) == (path, body)


@pytest.mark.parametrize("path", STREAMED)
def test_a_streamed_answer_passes_as_it_is_and_its_first_token_and_usage_are_learned(
    gateway: Gateway, engines: Engines, path: str
) -> None:
    behaviour = Behaviour(cached_tokens=32, before_first_token_s=0.05, between_tokens_s=0.01)
    for engine in engines:
        engine.behaviour = behaviour
    body = {**BODIES[path], **(ASKED if path in (CHAT, COMPLETIONS) else {"stream": True})}
    expected = {"prompt_tokens_total": prompt_tokens(body), "reported_cached_tokens_total": 32}
    with counted(gateway, decisions_total=1, ttft_seconds_count=1, fallbacks_total=0, failures_total=0, **expected):
        answer = gateway.post(body, path)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text == "".join(streamed_answer(path, body, behaviour))


def test_how_fast_a_replica_decodes_is_learned_where_its_usage_is_known(gateway: Gateway, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(tokens=12, between_tokens_s=0.03)

    def learned() -> int:
        gateway.wait_until_at_rest()
        models = [replica["models"].get("m", {}) for replica in gateway.status()["replicas"].values()]
        return sum(model.get("itl_samples", 0) for model in models)

    before = learned()
    for body, more in (({**BODIES[CHAT], **ASKED}, 1), ({**BODIES[CHAT], "stream": True}, 0), (BODIES[CHAT], 0)):
        gateway.post(body, CHAT)
        assert learned() == before + more
        before += more


def test_the_learned_ttft_is_the_one_the_client_has(gateway: Gateway, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(before_first_token_s=0.3, between_tokens_s=0.05)
    late_s = []
    for _ in range(4):
        before = gateway.metric("gorgo_ttft_seconds_sum")
        started = time.perf_counter()
        with gateway.client.stream("POST", CHAT, json={**BODIES[CHAT], "stream": True}) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            client_s = time.perf_counter() - started
            assert b"[DONE]" in b"".join(pieces)
        gateway.wait_until_at_rest()
        learned_s = gateway.metric("gorgo_ttft_seconds_sum") - before
        assert learned_s > 0.29
        late_s.append(learned_s - client_s)
    assert min(late_s) < 0.02  # a service that is stalled sees it later, never earlier


def test_later_turns_go_where_the_prefix_is(gateway: Gateway, engines: Engines) -> None:
    messages: list[dict[str, Any]] = []
    homes, cached = set(), []
    for turn in range(5):
        messages.append({"role": "user", "content": f"turn {turn} of the prefix test: " + TEXT})
        answer = gateway.post({"model": "m", "messages": messages})
        homes.add(answer.headers["x-gorgo-replica"])
        cached.append(int(answer.headers["x-gorgo-cached-tokens"]))
        messages.append({"role": "assistant", "content": f"answer {turn}"})
        gateway.wait_until_at_rest()
    assert len(homes) == 1
    assert cached == sorted(set(cached))
    assert len(only(engine for engine in engines if engine.requests).requests) == 5


@pytest.mark.parametrize("mode", ["override-host", "aggregate"])
def test_the_other_modes_send_requests_where_they_were_decided_to_go(
    engines: Engines, tmp_path: Path, mode: Mode
) -> None:
    replicas = [{"name": one.name, "region": one.name, "url": one.url} for one in engines]
    with running(tmp_path, replicas, mode) as other, counted(other, decisions_total=8, failures_total=0):
        for number in range(4):
            first = other.post({"model": "m", "prompt": f"{number} {TEXT}"}, COMPLETIONS)
            other.wait_until_at_rest()
            second = other.post({"model": "m", "prompt": f"{number} {TEXT} and then?"}, COMPLETIONS)
            assert second.headers["x-gorgo-replica"] == first.headers["x-gorgo-replica"]
        for engine in engines:
            assert other.metric("gorgo_decisions_total", replica=engine.name) == len(engine.requests)


def test_an_engines_error_reaches_the_client_and_is_told_apart(gateway: Gateway, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour = Behaviour(status=422)
    before = gateway.metric("gorgo_failures_total", kind="invalid")
    answer = gateway.post(BODIES[CHAT])
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "injected 422"
    assert len(asked_of(engines)) == 1
    gateway.wait_until_at_rest()
    assert gateway.metric("gorgo_failures_total", kind="invalid") == before + 1


def test_a_model_goes_to_the_replicas_that_serve_it(gateway: Gateway, engines: Engines) -> None:
    for number in range(4):
        assert gateway.post({"model": "e", "input": f"{number} {TEXT}"}, EMBEDDINGS).status_code == 200
    assert [len(engine.requests) for engine in engines] == [0, 4]


def test_of_an_unknown_model_the_client_gets_the_engines_own_answer(gateway: Gateway, engines: Engines) -> None:
    for engine in engines:
        engine.models = ["m", "e"]
    with counted(gateway, decisions_total=0, fallbacks_total=1):
        answer = gateway.post({**BODIES[CHAT], "model": "unheard-of"})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert "x-gorgo-region" not in answer.headers
    assert len(asked_of(engines)) == 1


def test_a_replica_may_have_an_odd_name(engines: Engines, tmp_path: Path) -> None:
    names = ["ünï co:lon/slash", '$1 %REQ(:path)% "x"']
    replicas = [{"name": name, "region": name, "url": one.url} for name, one in zip(names, engines, strict=True)]
    with running(tmp_path, replicas) as odd, counted(odd, decisions_total=12, failures_total=0):
        for number in range(12):
            assert odd.post({"model": "m", "prompt": f"{number} {TEXT}"}, COMPLETIONS).status_code == 200
        for name, engine in zip(names, engines, strict=True):
            label = name.replace('"', '\\"')
            assert odd.metric("gorgo_decisions_total", replica=label) == len(engine.requests)
    assert len(asked_of(engines)) == 12


# Usage of streams


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_without_request_stream_usage_the_body_stays_and_the_first_token_is_learned(
    gateway: Gateway, engines: Engines, path: str
) -> None:
    body = json.dumps({**BODIES[path], "stream": True}, indent=1).encode()
    with counted(gateway, ttft_seconds_count=1, prompt_tokens_total=0, failures_total=0):
        answer = gateway.post(body, path)
    assert only([*engines[0].bodies, *engines[1].bodies]) == body
    assert '"usage"' not in answer.text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("options", [None, {"continuous_usage_stats": False}])
def test_with_request_stream_usage_the_engine_is_asked_for_it(
    changed: Gateway, engines: Engines, path: str, options: dict[str, Any] | None
) -> None:
    changed.reload(envoy={"request_stream_usage": True})
    body = {**BODIES[path], "stream": True, **({} if options is None else {"stream_options": options})}
    with counted(changed, ttft_seconds_count=1, prompt_tokens_total=prompt_tokens(body), failures_total=0):
        answer = changed.post(body, path)
    seen = only(asked_of(engines))[1]
    assert seen == {**body, "stream_options": {**(options or {}), "include_usage": True}}
    sent = only([*engines[0].bodies, *engines[1].bodies])
    assert only([*engines[0].headers, *engines[1].headers])["content-length"] == str(len(sent))
    assert answer.text.count('"usage"') == 1


@pytest.mark.parametrize("fields", [ASKED, {}])
def test_a_body_that_asks_for_its_usage_or_does_not_stream_is_left_byte_for_byte(
    changed: Gateway, engines: Engines, fields: dict[str, Any]
) -> None:
    changed.reload(envoy={"request_stream_usage": True})
    body = json.dumps({**BODIES[CHAT], **fields}, indent=3).encode()
    with counted(changed, prompt_tokens_total=prompt_tokens(json.loads(body))):
        assert changed.post(body).status_code == 200
    assert only([*engines[0].bodies, *engines[1].bodies]) == body


@pytest.mark.parametrize("http2", [False, True])
def test_a_body_without_a_length_is_asked_for_its_usage_too(changed: Gateway, engines: Engines, http2: bool) -> None:
    changed.reload(envoy={"request_stream_usage": True})
    body = {**BODIES[CHAT], "stream": True}
    with (
        httpx.Client(base_url=changed.url, http1=not http2, http2=http2) as client,
        counted(changed, decisions_total=1, prompt_tokens_total=prompt_tokens(body), failures_total=0),
    ):
        sent = (piece for piece in [json.dumps(body).encode()])
        assert client.post(CHAT, content=sent).status_code == 200
    assert only(asked_of(engines))[1] == {**body, "stream_options": {"include_usage": True}}


def test_a_long_stream_is_read_to_its_usage(changed: Gateway, engines: Engines) -> None:
    changed.reload(envoy={"request_stream_usage": True})
    for engine in engines:
        engine.behaviour = Behaviour(tokens=3000, cached_tokens=8)
    body = {**BODIES[CHAT], "stream": True}
    expected = {"prompt_tokens_total": prompt_tokens(body), "reported_cached_tokens_total": 8}
    with counted(changed, ttft_seconds_count=1, failures_total=0, **expected):
        assert changed.post(body).text.endswith("data: [DONE]\n\n")


# Headers


@pytest.mark.parametrize(
    ("shown", "names"),
    [
        ("none", set()),
        ("region", {"x-gorgo-region"}),
        ("debug", {"x-gorgo-region", "x-gorgo-replica", "x-gorgo-predicted-ttft-ms", "x-gorgo-cached-tokens"}),
    ],
)
def test_response_headers_show_what_the_settings_say(
    changed: Gateway, engines: Engines, shown: str, names: set[str]
) -> None:
    changed.reload(response_headers=shown)
    for body in (BODIES[CHAT], {**BODIES[CHAT], "stream": True}):
        for engine in engines:
            engine.requests.clear()
        headers = changed.post(body).headers
        assert {name for name in headers if name.startswith("x-gorgo")} == names
        home = only({engine.name for engine in engines if engine.requests})
        assert headers.get("x-gorgo-region", f"{home}-region") == f"{home}-region"


def test_a_clients_routing_header_is_stripped(gateway: Gateway, engines: Engines) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": f"new to both: {TEXT}"}]}
    gateway.post(body)
    home, other = engines if engines[0].requests else engines[::-1]
    for _ in range(3):
        gateway.wait_until_at_rest()
        answer = gateway.post(body, headers={"x-gorgo-replica": other.name})
        assert answer.headers["x-gorgo-replica"] == home.name
    assert not other.requests
    assert not any("x-gorgo-replica" in headers for headers in home.headers)


def test_a_clients_routing_header_has_no_effect_on_what_is_not_routed(gateway: Gateway) -> None:
    answers = [gateway.client.get("/v1/models", headers={"x-gorgo-replica": "far"}).json() for _ in range(24)]
    assert {answer["served_by"] for answer in answers} == {"near", "far"}


async def test_keys_and_cookies_never_reach_the_service(engines: Engines, tmp_path: Path) -> None:
    seen: list[Any] = []
    kinds = {"request_headers", "request_body", "response_headers", "response_body"}

    async def recording(_: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            seen.append(message)
            if not message.observability_mode:
                await context.write(UNCHANGED[message.WhichOneof("request")])

    replicas = [{"name": one.name, "region": one.name, "url": one.url} for one in engines]
    gateway = Gateway(tmp_path, replicas)
    secret = {"authorization": "Bearer sk-secret", "x-api-key": "sk-secret", "cookie": "session=sk-secret"}
    try:
        async with (
            grpc_service(gateway.settings.envoy, recording),
            httpx.AsyncClient(base_url=gateway.url, timeout=10.0) as client,
        ):
            await asyncio.to_thread(gateway.start_envoy)
            await asyncio.to_thread(gateway.wait_for_service)
            answer = await client.post(CHAT, json={**BODIES[CHAT], "stream": True}, headers=secret)
            assert answer.status_code == 200
            async with asyncio.timeout(10):
                while {message.WhichOneof("request") for message in seen} != kinds:
                    await asyncio.sleep(0.01)
    finally:
        gateway.close()
    assert not any(b"sk-secret" in pb.ProcessingRequest.SerializeToString(message) for message in seen)
    received = only([*engines[0].headers, *engines[1].headers])
    assert secret.items() <= received.items()


# What is left alone


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", CHAT),
        ("POST", "/v1/audio/speech"),
        ("POST", "/tokenize"),
        ("POST", f"{CHAT}/batch"),
        ("DELETE", f"{RESPONSES}/resp_1"),
    ],
)
def test_other_requests_pass_and_the_service_hears_nothing_of_them(
    gateway: Gateway, engines: Engines, method: str, path: str
) -> None:
    streams = streams_to_service(gateway)
    with counted(gateway, decisions_total=0, fallbacks_total=0):
        answer = gateway.client.request(method, path, json={"model": "m"} if method == "POST" else None)
    if method == "POST":
        assert answer.json() == {"path": path}
    elif path == "/v1/models":
        assert answer.json()["served_by"] in ("near", "far")
    else:
        assert answer.status_code == 405  # the engine's word
    assert not any(name.startswith("x-gorgo") for name in answer.headers)
    assert streams_to_service(gateway) == streams


def test_a_routed_request_opens_two_streams_to_the_service(gateway: Gateway) -> None:
    streams = streams_to_service(gateway)
    gateway.post(BODIES[CHAT])
    assert streams_to_service(gateway) == streams + 2


@pytest.mark.parametrize("path", ["/chat/completions", f"{CHAT}/", f"{CHAT}?version=1"])
def test_other_spellings_of_an_endpoint_are_routed_too(gateway: Gateway, path: str) -> None:
    with counted(gateway, decisions_total=1):
        assert gateway.post(BODIES[CHAT], path).headers["x-gorgo-replica"]


def test_off_decides_nothing_and_changes_nothing(changed: Gateway, engines: Engines) -> None:
    changed.reload(mode="off", envoy={"request_stream_usage": True})
    body = json.dumps({**BODIES[CHAT], "stream": True}).encode()
    with counted(changed, decisions_total=0, fallbacks_total=0, ttft_seconds_count=0):
        answer = changed.post(body)
    assert answer.text == "".join(streamed_answer(CHAT, json.loads(body), Behaviour()))
    assert not any(name.startswith("x-gorgo") for name in answer.headers)
    assert only([*engines[0].bodies, *engines[1].bodies]) == body
    status = changed.status()
    assert (status["active"], status["reason"]) == (False, "mode is off")


def test_shadow_decides_and_learns_and_changes_nothing(changed: Gateway, engines: Engines) -> None:
    changed.reload(mode="shadow", response_headers="none", envoy={"request_stream_usage": True})
    body = json.dumps({**BODIES[CHAT], "stream": True}, indent=1).encode()
    with counted(changed, decisions_total=24, ttft_seconds_count=24, failures_total=0):
        answers = [changed.post(body) for _ in range(24)]
    assert {answer.text for answer in answers} == {"".join(streamed_answer(CHAT, json.loads(body), Behaviour()))}
    assert not any(name.startswith("x-gorgo") for answer in answers for name in answer.headers)
    assert {*engines[0].bodies, *engines[1].bodies} == {body}
    assert all(engine.requests for engine in engines)  # Envoy spreads them; gorgo would keep to one replica


def test_in_shadow_flights_are_where_envoy_sent_them(changed: Gateway, engines: Engines) -> None:
    changed.reload(mode="shadow")
    for engine in engines:
        engine.behaviour = Behaviour(before_first_token_s=30.0)
    left = threading.Event()

    def hold() -> None:
        with changed.client.stream("POST", CHAT, json={**BODIES[CHAT], "stream": True}):
            left.wait(10)

    with ThreadPoolExecutor(8) as clients:
        for _ in range(8):
            clients.submit(hold)
        try:
            wait_until(lambda: sum(engine.open_requests for engine in engines) == 8)
            wanted = {engine.name: engine.open_requests for engine in engines}
            wait_until(lambda: changed.status()["flights"] == wanted, 5.0, f"flights to be {wanted}")
        finally:
            left.set()


# Ways to send


def test_an_http2_client_is_served_alike(gateway: Gateway, engines: Engines) -> None:
    with httpx.Client(base_url=gateway.url, http1=False, http2=True) as client, counted(gateway, decisions_total=2):
        for body in (BODIES[CHAT], {**BODIES[CHAT], "stream": True}):
            answer = client.post(CHAT, json=body)
            assert answer.http_version == "HTTP/2"
            assert answer.status_code == 200
            assert answer.headers["x-gorgo-replica"] in ("near", "far")
    assert len(asked_of(engines)) == 2


def test_a_chunked_upload_is_put_together_and_routed(gateway: Gateway, engines: Engines) -> None:
    body = json.dumps({**BODIES[CHAT], "messages": TURN * 50}).encode()
    pieces = (body[start : start + 1000] for start in range(0, len(body), 1000))
    with counted(gateway, decisions_total=1, fallbacks_total=0):
        answer = gateway.client.post(CHAT, content=pieces, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert only([*engines[0].bodies, *engines[1].bodies]) == body
