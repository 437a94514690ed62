"""Hostile bodies and prompts: the loop goes on, memory stays bounded, and the answer is clear."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gorgo_plugin import Prompt, PromptError, Router, Settings
from gorgo_plugin.fleet import bench_hostile
from gorgo_plugin.fleet.bench_hostile import chat_body
from gorgo_plugin.prompt.sources import embedded_tokenizer
from gorgo_plugin.runtime import Runtime

CHAT = "/v1/chat/completions"
REPLICAS = [{"name": name, "url": "http://127.0.0.1:9", "kv_tokens": 16_000} for name in ("a", "b")]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    settings = {"replicas": REPLICAS, "metrics": {"path": None}, "prepare": {"estimate_above_chars": None}}
    runtime = Runtime(Settings.model_validate(settings), gateway="test")
    yield runtime
    runtime.close()


def nested(depth: int) -> Any:
    content: Any = "x"
    for _ in range(depth):
        content = [content]
    return content


@pytest.mark.parametrize("unit", ["a", " ", "^", "\n", "'", "1", "漢", "<|im_", "<|im_start|>", " \n", "a\u0301"])
async def test_a_long_run_of_anything_gets_the_ids_of_the_whole(runtime: Runtime, unit: str) -> None:
    text = unit * (120_000 // len(unit))
    prompt = await runtime.prepare({"prompt": text}, "/v1/completions")
    assert prompt.tokens.tolist() == embedded_tokenizer().tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"messages": [{"role": "user", "content": ' + b"[" * 100_000, "body: JSON nested too deeply"),
        ({"messages": [{"role": "user", "content": nested(50_000)}]}, "messages[0].content[0]: expected an object"),
        (chat_body("x" * 300_000)[:-4] + b'\xff"}]}', "body: not valid UTF-8"),
        (chat_body("\ud800" * 50_000), "body: not valid JSON"),
        (b'{"messages": [' + b"{" * 1_000_000, "body: not valid JSON"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused_at_once(runtime: Runtime, body: Any, sentence: str) -> None:
    began_s = time.process_time()
    with pytest.raises(PromptError) as refused:
        await runtime.prepare(body, CHAT)
    assert str(refused.value).startswith(sentence)
    assert time.process_time() - began_s < 1.0


async def test_lone_surrogates_that_python_lets_through_are_replaced(runtime: Runtime) -> None:
    prompt = await runtime.prepare({"prompt": "\ud800" * 100_000}, "/v1/completions")
    expected = embedded_tokenizer().tokenizer.encode("\ufffd" * 100_000).ids
    assert (prompt.tokens.tolist(), prompt.exact) == (expected, False)


@pytest.mark.parametrize("raw", [True, False])
async def test_very_many_empty_messages_are_a_prompt(runtime: Runtime, raw: bool) -> None:
    body = chat_body(*[""] * 30_000)
    async with asyncio.timeout(10):
        prompt = await runtime.prepare(body if raw else json.loads(body), CHAT)
    assert len(prompt) > 150_000


async def test_two_million_token_ids_are_a_prompt(runtime: Runtime) -> None:
    prompt = await runtime.prepare({"prompt": [7] * 2_000_000}, "/v1/completions")
    assert len(prompt) == 2_000_000
    with pytest.raises(PromptError, match="prompt: expected whole numbers"):
        await runtime.prepare({"prompt": [*([7] * 100_000), 0.5]}, "/v1/completions")
    with pytest.raises(PromptError, match="prompt: expected"):
        await runtime.prepare({"prompt": [*([7] * 100_000), [7]]}, "/v1/completions")


def test_very_many_prompts_without_a_common_prefix_leave_a_bounded_index() -> None:
    router = Router(Settings.model_validate({"replicas": REPLICAS}))
    tokens = np.random.default_rng(0).integers(0, 2**17, (6000, 64), dtype=np.uint32)
    for row in tokens:
        decision = router.route(Prompt(row))
        router.first_token(decision.flight_id)
        router.finish(decision.flight_id)
    index = router._models[""].index
    assert all(index.held_blocks(slot) <= 1000 for slot in (0, 1))
    assert len(index._root.children) <= 2 * 1000
    assert sum(map(len, index._heaps.values())) <= 3 * 1000
    assert not any(flight.hashes for flight in router._recent.values())


async def test_the_benchmark_says_how_late_the_loop_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_hostile, "WARM_S", 0.2)
    warm, *mixed = await bench_hostile.bench_stalls(3, 3000, lambda _: None)
    assert warm.cold_p50_ms is None
    assert len(mixed) == 3
    for row in mixed:
        assert row.cold_p50_ms is not None
        assert row.warm_requests > 0
        assert row.stall_p50_ms <= row.stall_p999_ms <= row.stall_max_ms
