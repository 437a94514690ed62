"""Very long unseen text is routed on an estimate, and its flight gets the tokens afterwards."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from gorgo_plugin import Decision, Prompt, Settings
from gorgo_plugin.envoy_ext_proc.attempts import EnvoyAttempt
from gorgo_plugin.fleet.passages import Passage
from gorgo_plugin.litellm_strategy.ledger import LiteLLMAttempt
from gorgo_plugin.prompt.vocabulary import Vocabulary
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.attempts import Attempt
from gorgo_plugin.runtime.threads import LATER_MOST, LatePrompt

CHAT = "/v1/chat/completions"
REPLICAS = [{"name": name, "url": "http://127.0.0.1:9"} for name in ("a", "b")]
LONG = Passage("estimate", 4000).text


def chat(text: str, *before: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content} for content in (*before, text)]}


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    settings = {"replicas": REPLICAS, "metrics": {"path": None}, "prepare": {"estimate_above_chars": 10_000}}
    runtime = Runtime(Settings.model_validate(settings), gateway="test")
    yield runtime
    await runtime.stop()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Tokenizing of much text waits for it."""
    gate, encode = threading.Event(), Vocabulary.encode

    def waiting(self: Vocabulary, texts: list[str], spread: Any = map) -> Any:
        if sum(map(len, texts)) > 10_000:
            assert gate.wait(10)
        return encode(self, texts, spread)

    monkeypatch.setattr(Vocabulary, "encode", waiting)
    yield gate
    gate.set()


def queued(runtime: Runtime, decision: Decision) -> float:
    return float(runtime.router.snapshot()["replicas"][decision.replica]["load"]["queued_tokens"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def litellm_attempt(runtime: Runtime, decision: Decision, prompt: Prompt) -> Attempt:
    return LiteLLMAttempt(runtime, decision, prompt)


def envoy_attempt(runtime: Runtime, decision: Decision, prompt: Prompt) -> Attempt:
    return EnvoyAttempt(runtime, decision, prompt, "boot-1", CHAT, False)


@pytest.mark.parametrize("open_attempt", [litellm_attempt, envoy_attempt])
@pytest.mark.parametrize("raw", [False, True])
async def test_a_long_unseen_prompt_is_routed_at_once_and_gets_its_tokens(
    runtime: Runtime, gate: threading.Event, open_attempt: Callable[..., Attempt], raw: bool
) -> None:
    fields = chat(LONG) | {"stream": True}  # or it would leave the queue when its prefill is thought to end
    body: Any = json.dumps(fields).encode() if raw else fields
    prompt = await runtime.prepare(body, CHAT)
    assert (len(prompt.tokens), prompt.exact) == (0, False)
    decision = runtime.router.route(prompt)
    assert decision.reason.endswith("-by-estimate")
    attempt = open_attempt(runtime, decision, prompt)
    assert queued(runtime, decision) == len(prompt)
    gate.set()
    whole = await runtime.prepare(body, CHAT, estimate=False)
    await until(lambda: queued(runtime, decision) == len(whole.tokens))
    cached = runtime.router.explain(whole).costs[decision.replica].cached_tokens
    assert cached == (len(whole) - 1) // 16 * 16
    assert isinstance(prompt, LatePrompt)
    assert prompt.latest().tokens.tolist() == whole.tokens.tolist()  # what a retry is routed by
    attempt.fail("timeout")
    assert queued(runtime, decision) == 0


async def test_what_was_seen_before_is_known_and_what_follows_is_estimated_by_the_text_so_far(
    runtime: Runtime, gate: threading.Event
) -> None:
    gate.set()
    first = await runtime.prepare(chat(LONG), CHAT, estimate=False)
    gate.clear()
    prompt = await runtime.prepare(chat(Passage("more", 4000).text, LONG), CHAT)
    known = prompt.tokens.tolist()
    assert len(first) - 30 < len(known) < len(first)
    assert known == first.tokens[: len(known)].tolist()
    assert prompt.estimated_tokens == pytest.approx(4000, rel=0.1)


async def test_a_prompt_with_less_unseen_text_is_waited_for(runtime: Runtime) -> None:
    assert (await runtime.prepare(chat(Passage("short", 1500).text), CHAT)).estimated_tokens == 0
    await runtime.prepare(chat(LONG), CHAT, estimate=False)
    assert (await runtime.prepare(chat(LONG), CHAT)).estimated_tokens == 0


async def test_no_more_than_some_prompts_wait_to_be_tokenized(runtime: Runtime, gate: threading.Event) -> None:
    prompts = [await runtime.prepare(chat(Passage(f"{k}", 4000).text), CHAT) for k in range(LATER_MOST + 2)]
    assert [isinstance(prompt, LatePrompt) for prompt in prompts] == [True] * LATER_MOST + [False] * 2
    assert all(len(prompt) > 3000 for prompt in prompts)
    gate.set()
    last = prompts[LATER_MOST - 1]
    assert isinstance(last, LatePrompt)
    await until(lambda: last.latest() is not last)
    assert isinstance(await runtime.prepare(chat(Passage("next", 4000).text), CHAT), LatePrompt)


async def test_a_stop_waits_for_no_prompt_that_nobody_waits_for(gate: threading.Event) -> None:
    settings = {"replicas": REPLICAS, "metrics": {"path": None}, "prepare": {"estimate_above_chars": 10_000}}
    runtime = Runtime(Settings.model_validate(settings), gateway="test")
    prompts = [await runtime.prepare(chat(Passage(f"{k}", 4000).text), CHAT) for k in range(3)]
    stopping = asyncio.create_task(runtime.stop())
    await asyncio.sleep(0)
    gate.set()
    await stopping
    for prompt in prompts:
        assert isinstance(prompt, LatePrompt)
        prompt.attach(runtime.router, 1)  # given up or there: either way nothing fails
        assert len(prompt.latest()) > 3000
