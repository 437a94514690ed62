"""The mock replica over real sockets, in this process; see test_mock_upstream_process for it as a command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gorgo_plugin.fleet.engine import EngineProfile
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.fleet.server import MockReplica, MockSettings

FAST = EngineProfile(t0_ms=1.0, a_ms=0.002, decode_ms=0.5, decode_per_request_ms=0.0, noise=0.0)
CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def replica(profile: EngineProfile = FAST, **settings: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a running replica."""
    mock = MockReplica(MockSettings(name="mock-1", profile=profile, **settings))
    runner = web.AppRunner(mock.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
            yield client
    finally:
        await runner.cleanup()


def chat(text: str = "Hello", max_tokens: int = 5, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **fields}


def words(count: int, key: str = "prompt") -> str:
    return Passage(key, count).text


async def post(client: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    async with client.post(path, json=body) as response:
        return response.status, await response.json()


async def stream(client: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """The server-sent events of an answer: their names ("" without one) and data."""
    events = []
    async with client.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200
        name = ""
        async for raw in response.content:
            line = raw.decode().strip()
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append((name, data if data == "[DONE]" else json.loads(data)))
    return events


async def state(client: aiohttp.ClientSession) -> dict[str, Any]:
    async with client.get("/mock/state") as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def until_idle(client: aiohttp.ClientSession) -> dict[str, Any]:
    async with asyncio.timeout(5):
        while not (now := await state(client))["idle"]:
            await asyncio.sleep(0.01)
    return now


async def test_a_chat_is_answered_with_as_many_tokens_as_asked_and_its_usage() -> None:
    async with replica() as client:
        status, answer = await post(client, CHAT, chat(max_tokens=7))
    assert status == 200
    assert len(answer["choices"][0]["message"]["content"].split()) == 7
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["system_fingerprint"] == "mock-1"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    ("path", "body", "usage"),
    [
        ("/v1/completions", {"prompt": "Once", "max_tokens": 3}, {"completion_tokens": 3}),
        ("/v1/completions", {"prompt": [1, 2, 3, 4], "max_tokens": 3}, {"prompt_tokens": 4}),
        ("/v1/responses", {"input": "Once", "max_output_tokens": 3}, {"output_tokens": 3}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}, {"output_tokens": 3}),
        ("/v1/embeddings", {"input": ["one", "two"]}, {"completion_tokens": 0}),
    ],
)
async def test_every_endpoint_answers_with_its_own_usage(path: str, body: Any, usage: dict[str, int]) -> None:
    async with replica() as client:
        status, answer = await post(client, path, body)
    assert status == 200
    assert {name: answer["usage"][name] for name in usage} == usage


async def test_embeddings_come_as_numbers_or_base64_one_for_each_input() -> None:
    async with replica() as client:
        _, numbers = await post(client, "/v1/embeddings", {"input": ["a", "b"]})
        _, packed = await post(client, "/v1/embeddings", {"input": "a", "encoding_format": "base64"})
    assert [len(item["embedding"]) for item in numbers["data"]] == [8, 8]
    assert isinstance(packed["data"][0]["embedding"], str)


async def test_a_streamed_chat_begins_with_role_and_content_together_and_ends_with_done() -> None:
    async with replica() as client:
        events = [data for _, data in await stream(client, CHAT, chat(max_tokens=4))]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[0]["choices"][0]["delta"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1] == "[DONE]"


async def test_streamed_usage_comes_only_when_asked_for() -> None:
    async with replica() as client:
        silent = await stream(client, CHAT, chat())
        told = await stream(client, CHAT, chat(stream_options={"include_usage": True}))
    assert not any("usage" in data for _, data in silent if data != "[DONE]")
    assert told[-2][1]["choices"] == []
    assert told[-2][1]["usage"]["completion_tokens"] == 5


async def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    async with replica(rtt_ms=10, jitter_ms=20, seed=3) as client:
        _, whole = await post(client, CHAT, chat(max_tokens=60))
        events = await stream(client, CHAT, chat(max_tokens=60))
    pieces = [data["choices"][0]["delta"].get("content", "") for _, data in events if data != "[DONE]"]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len(pieces) == 61


async def test_a_stream_interval_sends_the_first_token_alone_and_then_several_at_once() -> None:
    async with replica(stream_interval=8) as client:
        events = await stream(client, CHAT, chat(max_tokens=20))
    pieces = [data["choices"][0]["delta"].get("content", "") for _, data in events if data != "[DONE]"]
    assert [len(piece.split()) for piece in pieces] == [1, 8, 8, 3, 0]


async def test_a_streamed_response_is_created_before_its_first_token_and_completed_with_usage() -> None:
    async with replica() as client:
        events = await stream(client, "/v1/responses", {"input": words(100), "max_output_tokens": 3})
    names = [name for name, _ in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names.count("response.output_text.delta") == 3
    assert names[-1] == "response.completed"
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert events[-1][1]["response"]["usage"]["input_tokens_details"] == {"cached_tokens": 0}


async def test_streamed_messages_follow_anthropics_order_and_count_cached_tokens_apart() -> None:
    body = {"messages": [{"role": "user", "content": words(100)}], "max_tokens": 3}
    async with replica() as client:
        await stream(client, "/v1/messages", body)
        events = await stream(client, "/v1/messages", body)
        _, whole = await post(client, "/v1/messages", body)
    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    usage = events[-2][1]["usage"]
    assert usage["cache_read_input_tokens"] == 96
    assert 0 < usage["input_tokens"] < 20
    assert whole["usage"] == usage


async def test_a_repeated_prompt_is_cached_up_to_its_last_token() -> None:
    async with replica() as client:
        _, first = await post(client, CHAT, chat(words(500)))
        _, second = await post(client, CHAT, chat(words(500)))
    tokens = first["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (tokens - 1) // 16 * 16


async def test_a_conversations_next_turn_finds_the_reply_cached_too() -> None:
    question, output = words(200), 150
    async with replica() as client:
        _, first = await post(client, CHAT, chat(question, max_tokens=output))
        reply = first["choices"][0]["message"]
        turn = [{"role": "user", "content": question}, reply, {"role": "user", "content": "And then?"}]
        _, second = await post(client, CHAT, {**chat(), "messages": turn})
    known = first["usage"]["prompt_tokens"] + output
    assert known - 32 < second["usage"]["prompt_tokens_details"]["cached_tokens"] < known


async def test_models_and_cache_salts_do_not_share_a_cache() -> None:
    async with replica(models=("m", "n")) as client:
        await post(client, CHAT, chat(words(100)))
        _, other = await post(client, CHAT, {**chat(words(100)), "model": "n"})
        _, salted = await post(client, CHAT, chat(words(100), cache_salt="tenant"))
        _, same = await post(client, CHAT, chat(words(100)))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (other, salted, same)]
    assert cached == [0, 0, 96]


async def test_headers_come_long_before_the_first_token() -> None:
    slow = EngineProfile(a_ms=0.5, noise=0.0)
    async with replica(slow) as client:
        began = time.monotonic()
        async with client.post(CHAT, json=chat(words(8_000), stream=True)) as response:
            headers_s = time.monotonic() - began
            await response.content.readline()
            content_s = time.monotonic() - began
    assert content_s > 4.0
    assert headers_s < content_s / 2


async def test_the_injected_round_trip_is_in_health_and_in_the_first_token() -> None:
    async with replica(rtt_ms=300) as client:
        health_s, chat_s = [], []
        for _ in range(4):
            began = time.monotonic()
            async with client.get("/health") as response:
                assert response.status == 200
            health_s.append(time.monotonic() - began)
            began = time.monotonic()
            await post(client, CHAT, chat(max_tokens=1))
            chat_s.append(time.monotonic() - began)
    assert 0.3 <= min(health_s) < 0.6  # twice there and back would take that
    assert 0.3 <= min(chat_s) < 0.6


async def test_chunks_on_a_long_way_back_are_under_way_at_the_same_time() -> None:
    async with replica(rtt_ms=400) as client:
        began = time.monotonic()
        await stream(client, CHAT, chat(max_tokens=100))
        took_s = time.monotonic() - began
    assert 0.4 < took_s < 4.0  # 100 tokens take 150 ms; one after the other they would take 20 s


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT, chat(model="n") | {"model": "n"}, 404, "`n` does not exist"),
        (CHAT, {"model": "m"}, 400, "messages"),
        (CHAT, [1], 400, "JSON object"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens"),
        (CHAT, chat(max_tokens=200_000), 400, "at most 131072 tokens"),
        (CHAT, {**chat(), "model": 5}, 400, "model: expected a string"),
        ("/v1/rerank", {}, 404, "Not Found"),
        ("/tokenize", {"model": "n", "prompt": "x"}, 404, "does not exist"),
    ],
)
async def test_a_bad_request_is_refused_as_vllm_does(path: str, body: Any, status: int, said: str) -> None:
    async with replica() as client:
        got, answer = await post(client, path, body)
    assert got == status
    assert answer["error"]["code"] == status
    assert said in answer["error"]["message"]


async def test_a_prompt_longer_than_the_cache_is_refused_and_the_replica_goes_on() -> None:
    async with replica(EngineProfile(kv_tokens=160)) as client:
        status, answer = await post(client, CHAT, chat(words(500)))
        assert status == 400
        assert "KV cache" in answer["error"]["message"]
        assert (await post(client, CHAT, chat("Hi")))[0] == 200


async def test_anthropics_errors_have_anthropics_shape() -> None:
    async with replica() as client:
        status, answer = await post(client, "/v1/messages", {"model": "n", "messages": []})
    assert (status, answer["type"]) == (404, "error")


async def test_tokenize_counts_what_usage_reports() -> None:
    async with replica() as client:
        _, tokenized = await post(client, "/tokenize", {"messages": chat("Hello there")["messages"]})
        _, answer = await post(client, CHAT, chat("Hello there"))
        _, plain = await post(client, "/tokenize", {"prompt": "Hello there"})
    assert tokenized["count"] == len(tokenized["tokens"]) == answer["usage"]["prompt_tokens"]
    assert plain["count"] < tokenized["count"]


async def test_models_are_listed() -> None:
    async with replica(models=("m", "n")) as client, client.get("/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["m", "n"]


async def samples(client: aiohttp.ClientSession) -> dict[str, float]:
    async with client.get("/metrics") as response:
        page = await response.text()
    pairs = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in pairs}


async def test_metrics_have_vllms_names_and_count_what_was_cached() -> None:
    async with replica() as client:
        for _ in range(2):
            await post(client, CHAT, chat(words(100), max_tokens=1))
        page = await samples(client)
    assert page["vllm:num_requests_running"] == page["vllm:num_requests_waiting"] == 0
    assert page["vllm:prefix_cache_hits_total"] == 96
    assert page["vllm:prefix_cache_queries_total"] > 200
    assert page["vllm:time_to_first_token_seconds_count"] == 2
    assert page["vllm:cache_config_info"] == 1
    assert 0 <= page["vllm:kv_cache_usage_perc"] < 1


async def test_metrics_have_sglangs_names_when_asked_for() -> None:
    async with replica(metrics_style="sglang") as client:
        page = await samples(client)
    names = {"num_running_reqs", "num_queue_reqs", "num_used_tokens", "token_usage", "cache_hit_rate"}
    assert {f"sglang:{name}" for name in names} <= set(page)


async def test_a_restart_shows_in_the_start_time_breaks_what_runs_and_empties_the_cache() -> None:
    async with replica(EngineProfile(a_ms=0.5)) as client:
        await post(client, CHAT, chat(words(100), max_tokens=1))
        before = await samples(client)
        running = asyncio.create_task(post(client, CHAT, chat(words(4_000, "other"))))
        while (await state(client))["idle"]:
            await asyncio.sleep(0.01)
        async with client.post("/mock/restart") as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await running
        after = await samples(client)
        _, answer = await post(client, CHAT, chat(words(100), max_tokens=1))
    assert after["process_start_time_seconds"] > before["process_start_time_seconds"]
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("moment", ["before the headers", "before the first token", "in the stream", "whole"])
async def test_a_client_that_leaves_frees_the_engine(moment: str) -> None:
    slow = EngineProfile(a_ms=0.2, decode_ms=50.0)
    body = chat(words(10 if moment == "in the stream" else 20_000), max_tokens=1_000, stream=moment != "whole")
    async with replica(slow) as client:
        task = asyncio.create_task(_read(client, body, moment))
        while (await state(client))["idle"]:
            await asyncio.sleep(0.01)
        if moment in ("before the headers", "whole"):
            task.cancel()
        await asyncio.wait([task])
        began = time.monotonic()
        await until_idle(client)
        assert time.monotonic() - began < 4.0  # a chunk takes 0.4 s, the whole request would take 50 s


async def _read(client: aiohttp.ClientSession, body: dict[str, Any], moment: str) -> None:
    """Send a request and leave at the moment named."""
    async with client.post(CHAT, json=body) as response:
        if moment == "whole":
            await response.read()
        if moment == "in the stream":
            await response.content.readline()
        response.close()


async def set_fault(client: aiohttp.ClientSession, **fault: Any) -> None:
    status, _ = await post(client, "/mock/fault", fault)
    assert status == 200


async def test_a_replica_told_to_err_answers_500_at_once_while_its_health_is_good() -> None:
    async with replica(EngineProfile(a_ms=0.4, noise=0.0)) as client:
        await set_fault(client, kind="error")
        began = time.monotonic()
        status, _ = await post(client, CHAT, chat(words(20_000)))
        assert status == 500
        assert time.monotonic() - began < 3.0  # its prefill would take three times as long
        async with client.get("/health") as response:
            assert response.status == 200
        await set_fault(client, kind="error", health=True)
        async with client.get("/health") as response:
            assert response.status == 500
        await set_fault(client, kind="none")
        assert (await post(client, CHAT, chat()))[0] == 200


async def test_a_replica_told_to_limit_rates_answers_429() -> None:
    async with replica() as client:
        await set_fault(client, kind="rate-limit")
        async with client.post(CHAT, json=chat()) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"


async def test_a_replica_told_to_hang_answers_nothing_and_serves_others_after() -> None:
    async with replica() as client:
        await set_fault(client, kind="hang")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await post(client, CHAT, chat())
        await set_fault(client, kind="none")
        assert (await post(client, CHAT, chat()))[0] == 200


async def test_a_replica_told_to_reset_breaks_the_connection() -> None:
    async with replica() as client:
        await set_fault(client, kind="reset")
        with pytest.raises(aiohttp.ClientError):
            await post(client, CHAT, chat())
        assert (await until_idle(client))["received"] == 1


async def test_a_replica_told_to_cut_breaks_the_connection_after_the_first_content() -> None:
    async with replica() as client:
        await set_fault(client, kind="cut")
        async with client.post(CHAT, json=chat(max_tokens=50, stream=True)) as response:
            assert b'"content"' in await response.content.readline()
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        await until_idle(client)


async def test_a_fault_can_begin_late_end_by_itself_and_strike_only_some() -> None:
    async with replica() as client:
        await set_fault(client, kind="error", after=2, count=3)
        assert [(await post(client, CHAT, chat()))[0] for _ in range(7)] == [200, 200, 500, 500, 500, 200, 200]
        await set_fault(client, kind="error", probability=0.5)
        assert {(await post(client, CHAT, chat()))[0] for _ in range(20)} == {200, 500}


async def test_an_unknown_fault_is_refused_by_name() -> None:
    async with replica() as client:
        status, answer = await post(client, "/mock/fault", {"kind": "explode"})
        assert status == 400
        assert "kind" in answer["error"]["message"]
        assert (await state(client))["fault"]["kind"] == "none"


async def test_a_long_cold_prompt_does_not_keep_others_waiting() -> None:
    async with replica() as client:
        await post(client, CHAT, chat())
        body = json.dumps(chat(words(90_000), max_tokens=1)).encode()
        task = asyncio.create_task(client.post(CHAT, data=body))
        others = 0
        while not task.done():
            async with client.get("/health"):
                others += 1
        async with await task as response:
            assert response.status == 200
    assert others > 20  # where 450,000 characters are tokenized on the loop, there are a few before and after


async def test_a_body_of_many_megabytes_is_taken() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 20_000_000}}
    body = chat() | {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}]}
    async with replica() as client:
        status, answer = await post(client, CHAT, body)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] > 500
