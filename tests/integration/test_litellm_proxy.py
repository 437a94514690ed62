"""The real LiteLLM proxy with gorgo: every endpoint, retries and limits, changes at run time."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import ARGS, set_args
from tests.litellm_proxy import KEY, Proxy, deployment, wait_until
from tests.stub_engine import StubEngine, prompt_tokens

Engines = tuple[StubEngine, StubEngine]
WORDS = "a river runs under the old stone bridge and the wind carries leaves over the water "


def long_text() -> str:
    """Some 3,000 tokens that nobody has sent before."""
    return f"{uuid.uuid4()} " + WORDS * 160


def chat(content: Any, model: str = "m", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


ENDPOINTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": lambda text: {"model": "m", "prompt": text},
    "/v1/responses": lambda text: {"model": "m", "input": text, "instructions": "be brief"},
    "/v1/messages": lambda text: {**chat(text, "am"), "max_tokens": 8, "system": "be brief"},
    "/v1/embeddings": lambda text: {"model": "m", "input": text},
}
STREAMING = [path for path in ENDPOINTS if "embeddings" not in path]


def ask(gateway: Proxy, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
    answer = gateway.post(path, body, **kwargs)
    assert answer.status_code == 200, answer.text
    return answer


def cached(answer: httpx.Response) -> int:
    return int(answer.headers["x-gorgo-cached-tokens"])


def asked(engines: Engines) -> tuple[int, int]:
    return len(engines[0].requests), len(engines[1].requests)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_answer_comes_back_and_a_repeated_prompt_goes_where_it_is_cached(gateway: Proxy, path: str) -> None:
    body = ENDPOINTS[path](long_text())
    first = ask(gateway, path, body)
    second = ask(gateway, path, body)
    assert second.headers["x-gorgo-replica"] == first.headers["x-gorgo-replica"]
    assert second.headers["x-gorgo-region"] == first.headers["x-gorgo-replica"] + "-region"
    # Embeddings fill no cache that a later prompt could use, but their text is hashed all the same.
    assert cached(second) > cached(first)


@pytest.mark.parametrize("path", STREAMING)
def test_a_streamed_answer_comes_back_whole_and_goes_where_it_is_cached(gateway: Proxy, path: str) -> None:
    text = long_text()
    first = ask(gateway, path, ENDPOINTS[path](text) | {"stream": True})
    second = ask(gateway, path, ENDPOINTS[path](text) | {"stream": True})
    assert "w3" in first.text
    assert second.headers["x-gorgo-replica"] == first.headers["x-gorgo-replica"]
    assert cached(second) > cached(first)


@pytest.mark.parametrize("path", STREAMING)
def test_a_first_token_is_learned_from_when_it_comes_not_from_the_headers(
    gateway: Proxy, engines: Engines, path: str
) -> None:
    for engine in engines:
        engine.behaviour.before_first_token_s = 0.15
    body = ENDPOINTS[path](long_text()) | {"stream": True}
    before = samples(gateway, body["model"])
    ask(gateway, path, body)
    wait_until(lambda: samples(gateway, body["model"]) == before + 1)
    ask(gateway, path, ENDPOINTS[path](long_text()))  # not streamed: its first token is not seen
    assert samples(gateway, body["model"]) == before + 1


def test_how_fast_a_replica_decodes_is_learned_from_streamed_answers(gateway: Proxy, engines: Engines) -> None:
    for engine in engines:
        engine.behaviour.tokens, engine.behaviour.between_tokens_s = 12, 0.03
    before = samples(gateway, "m", "itl_samples")
    ask(gateway, "/v1/chat/completions", chat(long_text(), stream=True))
    wait_until(lambda: samples(gateway, "m", "itl_samples") == before + 1)
    ask(gateway, "/v1/chat/completions", chat(long_text()))
    assert samples(gateway, "m", "itl_samples") == before + 1
    assert any(replica["models"]["m"]["itl_ms"] > 0.0 for replica in gateway.status()["replicas"].values())


def samples(gateway: Proxy, model: str, of: str = "samples") -> int:
    """First tokens learned from."""
    replicas = gateway.status()["replicas"].values()
    return sum(replica["models"][model][of] for replica in replicas if model in replica["models"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", STREAMING)
def test_what_the_engine_says_it_had_cached_corrects_the_index(
    gateway: Proxy, engines: Engines, path: str, stream: bool
) -> None:
    if stream and path == "/v1/completions":
        pytest.skip("LiteLLM does not ask for the usage of a streamed completion")
    solo = "solo-am" if path == "/v1/messages" else "solo"  # one replica, so that all of it is believed there
    old, new = (ENDPOINTS[path](long_text()) | {"stream": stream, "model": solo} for _ in range(2))
    for body in (old, new):
        ask(gateway, path, body)
    assert cached(ask(gateway, path, new)) > 100
    # The engine has lost most of the newer one: the older must be gone with it.
    engines[0].behaviour.cached_tokens = 16
    ask(gateway, path, new)
    wait_until(lambda: held(gateway, "near", solo) < 1.5 * prompt_tokens(new), what="the index to forget")
    assert cached(ask(gateway, path, old)) < 100


def held(gateway: Proxy, replica: str, model: str) -> int:
    """Tokens believed cached."""
    return int(gateway.status()["replicas"][replica]["models"][model]["index_tokens"])


def test_the_messages_api_over_an_openai_engine_is_routed(gateway: Proxy) -> None:
    body = {**chat(long_text()), "max_tokens": 8, "stream": True}
    answer = ask(gateway, "/v1/messages", body)
    assert "w3" in answer.text
    assert answer.headers["x-gorgo-replica"] in ("near", "far")


def test_tools_are_part_of_the_prompt(gateway: Proxy) -> None:
    function = {"name": "look_up", "description": WORDS * 4, "parameters": {"type": "object", "properties": {}}}
    body = chat("what is there? " + long_text(), tools=[{"type": "function", "function": function}])
    ask(gateway, "/v1/chat/completions", body)
    with_tools = cached(ask(gateway, "/v1/chat/completions", body))
    without = cached(ask(gateway, "/v1/chat/completions", {**body, "tools": None}))
    assert with_tools > without


def test_an_image_is_known_again_and_another_is_not(gateway: Proxy) -> None:
    def body(image: str) -> dict[str, Any]:
        url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        return chat([url, {"type": "text", "text": "what is in it?"}])

    image = uuid.uuid4().hex
    ask(gateway, "/v1/chat/completions", body(image))
    assert cached(ask(gateway, "/v1/chat/completions", body(image))) > 100
    assert cached(ask(gateway, "/v1/chat/completions", body(uuid.uuid4().hex))) < 100


def test_a_prompt_of_token_ids_is_routed_by_them(gateway: Proxy, engines: Engines) -> None:
    start = uuid.uuid4().int % 50_000
    body = {"model": "m", "prompt": list(range(start, start + 4000))}
    ask(gateway, "/v1/completions", body)
    # 4,000 ids are 250 blocks of 16; the last block is never wholly cached. The stub's usage scales nothing here.
    assert cached(ask(gateway, "/v1/completions", body)) == 3984
    assert engines[0].requests + engines[1].requests
    assert all(sent["prompt"] == body["prompt"] for _, sent in engines[0].requests + engines[1].requests)


def test_a_growing_conversation_stays_where_its_cache_is(gateway: Proxy, engines: Engines) -> None:
    turns = [{"role": "user", "content": long_text()}]
    replicas = set()
    for _ in range(5):
        answer = ask(gateway, "/v1/chat/completions", {"model": "m", "messages": turns})
        replicas.add(answer.headers["x-gorgo-replica"])
        turns += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": WORDS}]
    assert len(replicas) == 1


def test_neither_headers_nor_metadata_of_a_client_steer_the_choice(gateway: Proxy, engines: Engines) -> None:
    text = long_text()
    home = ask(gateway, "/v1/chat/completions", chat(text)).headers["x-gorgo-replica"]
    other = "far" if home == "near" else "near"
    forged = {"gorgo": {"replica": other, "tried": [home]}, "model_info": {"gorgo": {"name": other}}}
    headers = {"x-gorgo-replica": other, "x-gorgo-region": other, "x-litellm-call-id": "the-same-for-all"}
    for _ in range(4):
        body = chat(text, metadata=forged, litellm_trace_id="the-same-for-all", gorgo=forged)
        answer = ask(gateway, "/v1/chat/completions", body, headers=headers)
        assert answer.headers["x-gorgo-replica"] == home


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine_moves_the_request_to_the_other_replica(
    gateway: Proxy, engines: Engines, stream: bool
) -> None:
    text = long_text()
    home = ask(gateway, "/v1/chat/completions", chat(text, "retried")).headers["x-gorgo-replica"]
    bad, good = engines if home == "near" else engines[::-1]
    bad.behaviour.status = 500
    answer = ask(gateway, "/v1/chat/completions", chat(text, "retried", stream=stream))
    assert answer.headers["x-gorgo-replica"] == good.name
    assert len(good.requests) == 1
    assert gateway.status()["replicas"][bad.name]["health"]["failures_in_a_row"] >= 1
    bad.reset()
    wait_until(lambda: gateway.status()["replicas"][bad.name]["health"]["paused_s"] == 0.0)
    wait_until(
        lambda: (
            ask(gateway, "/v1/chat/completions", chat(long_text(), "retried")).headers["x-gorgo-replica"] == bad.name
        )
    )


@pytest.mark.parametrize("events", [0, 2])
@pytest.mark.parametrize("path", STREAMING)
def test_a_stream_that_breaks_before_its_first_token_is_tried_elsewhere(
    gateway: Proxy, engines: Engines, path: str, events: int
) -> None:
    if events and path == "/v1/completions":
        pytest.skip("its first event is its first token")
    body = ENDPOINTS[path](long_text()) | {"stream": True}
    if path != "/v1/messages":
        body["model"] = "retried"  # has a fallback to another group, which its other replica comes before
    home = ask(gateway, path, body).headers["x-gorgo-replica"]
    bad, good = engines if home == "near" else engines[::-1]
    bad.behaviour.break_after_tokens = events if path != "/v1/chat/completions" else min(events, 1)
    answer = ask(gateway, path, body)
    assert "w3" in answer.text
    assert answer.text.count("w0 ") == 1  # a random id may hold the letters, but no space
    assert answer.headers["x-gorgo-replica"] == good.name
    assert (len(bad.requests), len(good.requests)) == (2, 1)
    assert gateway.status()["replicas"][bad.name]["health"]["failures_in_a_row"] >= 1


@pytest.mark.parametrize("path", STREAMING)
def test_a_stream_that_hangs_before_its_first_token_is_tried_elsewhere(
    gateway: Proxy, engines: Engines, path: str
) -> None:
    body = ENDPOINTS[path](long_text()) | {"stream": True}
    home = ask(gateway, path, body).headers["x-gorgo-replica"]
    bad, good = engines if home == "near" else engines[::-1]
    bad.behaviour.before_first_token_s = 30.0
    # Time enough for the other, which would else be given up as well where the machine stalls.
    answer = ask(gateway, path, body, headers={"x-litellm-stream-timeout": "3"})
    assert "w3" in answer.text
    assert answer.headers["x-gorgo-replica"] == good.name


def test_a_refused_connection_costs_no_request(gateway: Proxy) -> None:
    for _ in range(4):
        answer = ask(gateway, "/v1/chat/completions", chat(long_text(), "half-gone"))
        assert answer.headers["x-gorgo-replica"] == "near"
    assert gateway.status()["replicas"]["gone"]["health"]["available"] is False


def test_a_request_that_is_itself_at_fault_does_not_speak_against_the_replica(gateway: Proxy, engines: Engines) -> None:
    def failures() -> list[int]:
        return [gateway.status()["replicas"][engine.name]["health"]["failures_in_a_row"] for engine in engines]

    before = failures()  # what tests before this one left is over when a replica has answered
    for engine in engines:
        engine.behaviour.status = 400
    assert gateway.post("/v1/chat/completions", chat(long_text())).status_code == 400
    assert all(now <= then for now, then in zip(failures(), before, strict=True))


def test_litellm_cools_a_deployment_down_after_a_429(gateway: Proxy, engines: Engines) -> None:
    text = long_text()
    home = ask(gateway, "/v1/chat/completions", chat(text, "limited")).headers["x-gorgo-replica"]
    limited, other = engines if home == "near" else engines[::-1]
    limited.behaviour.status = 429
    assert ask(gateway, "/v1/chat/completions", chat(text, "limited")).headers["x-gorgo-replica"] == other.name
    limited.reset()
    # Cached there, well again, yet still cooling down.
    assert ask(gateway, "/v1/chat/completions", chat(text, "limited")).headers["x-gorgo-replica"] == other.name
    assert not limited.requests


def test_a_model_fallback_is_routed_like_any_request(gateway: Proxy) -> None:
    answer = ask(gateway, "/v1/chat/completions", chat(long_text(), "gone"))
    assert answer.headers["x-gorgo-replica"] in ("near", "far")


def test_tags_and_order_are_kept(gateway: Proxy) -> None:
    for tag, replica in (("a", "near"), ("b", "far")):
        for _ in range(3):
            answer = ask(gateway, "/v1/chat/completions", chat(long_text(), "tagged", metadata={"tags": [tag]}))
            assert answer.headers["x-gorgo-replica"] == replica
    for _ in range(3):
        assert ask(gateway, "/v1/chat/completions", chat(WORDS, "ordered")).headers["x-gorgo-replica"] == "far"


def test_a_routing_group_of_another_strategy_is_left_alone(gateway: Proxy, engines: Engines) -> None:
    before = gateway.status()["counters"]["routed"]
    for _ in range(24):
        assert "x-gorgo-region" not in ask(gateway, "/v1/chat/completions", chat(WORDS, "plain")).headers
    assert min(asked(engines)) >= 2  # by chance less than once in 10**5 runs
    assert gateway.status()["counters"]["routed"] == before


def test_deployments_without_api_base_get_their_share_and_one_warning(gateway: Proxy, engines: Engines) -> None:
    answers = [ask(gateway, "/v1/chat/completions", chat(WORDS, "mixed")) for _ in range(30)]
    mocked = sum(answer.json()["choices"][0]["message"]["content"] == "mocked" for answer in answers)
    assert 3 <= mocked <= 27  # half; outside less than once in 10**5 runs
    assert asked(engines)[0] == 30 - mocked
    answer = ask(gateway, "/v1/chat/completions", chat(WORDS, "unpriced"))
    assert answer.json()["choices"][0]["message"]["content"] == "mocked"
    assert "x-gorgo-region" not in answer.headers
    assert gateway.log_text().count("model group 'mixed' has deployments without api_base") == 1


def test_an_answer_from_litellms_cache_teaches_nothing(gateway: Proxy, engines: Engines) -> None:
    body = chat(long_text(), cache={"use-cache": True})
    ask(gateway, "/v1/chat/completions", body)
    wait_until(lambda: _answered_from_cache(gateway, body, engines))
    wait_until(lambda: sum(gateway.status()["flights"].values()) == 0)


def _answered_from_cache(gateway: Proxy, body: dict[str, Any], engines: Engines) -> bool:
    before = asked(engines)
    ask(gateway, "/v1/chat/completions", body)
    return asked(engines) == before


@pytest.mark.parametrize("stream", [False, True])
def test_pass_through_is_routed_by_its_prompt(gateway: Proxy, engines: Engines, stream: bool) -> None:
    body = chat(long_text(), "vm", **({"stream": True} if stream else {}))  # LiteLLM streams at `stream: false`, too
    for _ in range(3):
        ask(gateway, "/vllm/v1/chat/completions", body)
        wait_until(lambda: sum(gateway.status()["flights"].values()) == 0)
    assert sorted(asked(engines)) == [0, 3]


def test_the_default_headers_tell_the_region_and_nothing_of_others_caches(gateway: Proxy) -> None:
    set_args(gateway, response_headers="region")
    headers = ask(gateway, "/v1/chat/completions", chat(WORDS)).headers
    assert [name for name in headers if name.startswith("x-gorgo")] == ["x-gorgo-region"]
    set_args(gateway, response_headers="none")
    headers = ask(gateway, "/v1/chat/completions", chat(WORDS)).headers
    assert not [name for name in headers if name.startswith("x-gorgo")]


def test_status_needs_litellms_key(gateway: Proxy) -> None:
    # LiteLLM refuses a wrong key with 400 where it has no database, and fails on none without the prisma package.
    for headers in ({"Authorization": "Bearer sk-wrong"}, {"Authorization": ""}):
        answer = httpx.get(f"{gateway.url}/gorgo/status", headers=headers)
        assert answer.status_code >= 400
        assert "flights" not in answer.text


def test_explain_tells_an_admin_why_a_request_would_go_where_it_would(gateway: Proxy, tmp_path: Path) -> None:
    body = chat(long_text())
    cached_at = ask(gateway, "/v1/chat/completions", body).headers["x-gorgo-region"]
    request, config = tmp_path / "body.json", tmp_path / "config.yaml"
    request.write_text(json.dumps(body))
    config.write_text((gateway.log.parent / "config.yaml").read_text())
    command = [sys.executable, "-c", "from gorgo_plugin.cli import main; main()", "explain", "--json"]
    options = ["--config", str(config), "--request", str(request), "--status-url", gateway.url, "--key", KEY]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    explained = json.loads(done.stdout)
    assert explained["region"] == cached_at
    assert explained["replicas"][explained["replica"]]["cached_tokens"] > 0
    before = gateway.status()["counters"]["routed"]
    unknown = gateway.post("/gorgo/explain", {"body": chat("x", model="nobody"), "endpoint": "/v1/chat/completions"})
    assert (unknown.status_code, unknown.json()["detail"]) == (
        400,
        "model: 'nobody' is no model group that gorgo routes",
    )
    assert httpx.post(f"{gateway.url}/gorgo/explain", json={"body": body}).status_code >= 400
    assert gateway.status()["counters"]["routed"] == before


def test_shadow_leaves_the_choice_to_litellm_and_learns_all_the_same(gateway: Proxy, engines: Engines) -> None:
    set_args(gateway, mode="shadow")
    text = long_text()
    before = gateway.status()["counters"]["routed"]
    answers = [ask(gateway, "/v1/chat/completions", chat(text)) for _ in range(24)]
    assert min(asked(engines)) >= 2  # at random, though the text is cached
    assert gateway.status()["counters"]["routed"] == before + 24
    for answer in answers:
        assert answer.headers["x-gorgo-replica"] in ("near", "far")


def test_off_leaves_everything_to_litellm(gateway: Proxy, engines: Engines) -> None:
    set_args(gateway, mode="off")
    before = gateway.status()["counters"]["routed"]
    text = long_text()
    for _ in range(24):
        assert "x-gorgo-region" not in ask(gateway, "/v1/chat/completions", chat(text)).headers
    assert min(asked(engines)) >= 2
    status = gateway.status()
    assert status["counters"]["routed"] == before
    assert (status["active"], status["mode"]) == (False, "off")


def test_bad_settings_keep_the_last_good_ones_and_say_so(gateway: Proxy) -> None:
    set_args(gateway, policy="nearest")
    settings = set_args(gateway, polcy="random")
    assert settings["routing_strategy_args"] == {**ARGS, "policy": "nearest"}
    status = gateway.status()
    assert status["policy"] == "nearest"
    assert status["settings_error"] == (
        "router_settings.routing_strategy_args.polcy: unknown setting (did you mean 'policy'?)"
    )
    assert "polcy: unknown setting" in gateway.log_text()
    ask(gateway, "/v1/chat/completions", chat(WORDS))
    set_args(gateway, policy="random")
    assert gateway.status()["settings_error"] is None


def test_new_settings_keep_what_was_learned_of_the_round_trips(gateway: Proxy) -> None:
    wait_until(lambda: gateway.status()["replicas"]["near"]["latency"]["rtt_ms"] is not None)
    set_args(gateway, policy="least-load")
    status = gateway.status()
    assert status["policy"] == "least-load"
    assert status["replicas"]["near"]["latency"]["rtt_ms"] is not None


def test_a_deployment_added_and_deleted_at_run_time_is_followed(gateway: Proxy) -> None:
    with StubEngine("late") as late:
        entry = deployment("late-group", late.url, name="late", region="elsewhere")
        entry["model_info"]["id"] = "late-id"
        assert gateway.post("/test/add", entry).status_code == 200
        answer = ask(gateway, "/v1/chat/completions", chat(WORDS, "late-group"))
        assert answer.headers["x-gorgo-region"] == "elsewhere"
        assert "late" in gateway.status()["replicas"]
        assert gateway.post("/test/delete", {"id": "late-id"}).status_code == 200
        wait_until(lambda: ask(gateway, "/v1/embeddings", {"model": "m", "input": "x"}) and _left(gateway, "late"))


def _left(gateway: Proxy, replica: str) -> bool:
    return replica not in gateway.status()["replicas"]


def test_a_bad_deployment_added_at_run_time_is_served_and_keeps_the_last_good_state(gateway: Proxy) -> None:
    with StubEngine("bad") as bad:
        entry = deployment("bad-group", bad.url, regoin="elsewhere")
        entry["model_info"]["id"] = "bad-id"
        assert gateway.post("/test/add", entry).status_code == 200
        answer = ask(gateway, "/v1/chat/completions", chat(WORDS, "bad-group"))
        assert "x-gorgo-region" not in answer.headers
        assert "model_info.gorgo.regoin: unknown setting (did you mean 'region'?)" in gateway.status()["settings_error"]
        assert ask(gateway, "/v1/chat/completions", chat(WORDS)).headers["x-gorgo-replica"] in ("near", "far")
        assert gateway.post("/test/delete", {"id": "bad-id"}).status_code == 200
        wait_until(
            lambda: (
                ask(gateway, "/v1/embeddings", {"model": "m", "input": "x"})
                and gateway.status()["settings_error"] is None
            ),
            more=lambda: str(gateway.status()["settings_error"]),
        )
