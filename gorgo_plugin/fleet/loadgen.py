"""Open-loop load: every request leaves at its time, whatever became of the others, and is timed as a client sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from gorgo_plugin.fleet.workload import WorkloadRequest

REQUEST_TIMEOUT_S = 180.0  # longer than any queue a demo builds up; a request that takes longer counts as an error
_CHAT = "/v1/chat/completions"
_DATA = b"data:"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: the gateway's base URL, the model's name and the key it wants."""

    url: str
    model: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Shot:
    """One request ready to be sent: when, and its body."""

    at_s: float
    body: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        late_ms: how much later than planned it left; the load generator's own fault.
        ttft_ms: from sending to the first chunk with content; None on error.
        e2e_ms: from sending to the end; None on error.
        replica: who answered, told by the answer's id.
        prompt_tokens: as reported in the usage.
        cached_tokens: of these, read from the prefix cache.
        output_tokens: as reported in the usage.
        error: what went wrong, None when nothing did.
    """

    late_ms: float
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    replica: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def shots(requests: Sequence[WorkloadRequest], model: str) -> list[Shot]:
    """Encode a workload as streamed chat completions."""
    return [
        Shot(
            request.at_s,
            msgspec.json.encode(
                {
                    "model": model,
                    "messages": request.chat_messages(),
                    "max_tokens": request.output_tokens,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "user": request.session,
                }
            ),
        )
        for request in requests
    ]


async def replay(
    target: Target, planned: Sequence[Shot], on_done: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Send every shot at its time and wait for all answers; outcomes are in the order of the shots."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {target.api_key}", "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession(target.url, timeout=timeout, connector=connector, headers=headers) as session,
        asyncio.TaskGroup() as group,
    ):
        start_s = time.monotonic()

        async def send(shot: Shot) -> Outcome:
            await asyncio.sleep(start_s + shot.at_s - time.monotonic())
            late_ms = (time.monotonic() - start_s - shot.at_s) * 1e3
            outcome = await _send(session, shot.body, late_ms)
            on_done(outcome)
            return outcome

        tasks = [group.create_task(send(shot)) for shot in planned]
    return [task.result() for task in tasks]


async def _send(session: aiohttp.ClientSession, body: bytes, late_ms: float) -> Outcome:
    sent_s = time.monotonic()
    try:
        async with session.post(_CHAT, data=body) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                return Outcome(late_ms, error=f"status {response.status}: {text[:200]}")
            return await _read_stream(response, sent_s, late_ms)
    except TimeoutError:
        return Outcome(late_ms, error=f"not answered in full within {REQUEST_TIMEOUT_S:.0f} s")
    except (aiohttp.ClientError, msgspec.DecodeError) as error:
        return Outcome(late_ms, error=f"{type(error).__name__}: {error}"[:200])


async def _read_stream(response: aiohttp.ClientResponse, sent_s: float, late_ms: float) -> Outcome:
    ttft_ms: float | None = None
    replica = ""
    usage: dict[str, Any] = {}
    async for chunk in _chunks(response):
        if "error" in chunk:
            return Outcome(late_ms, error=f"in stream: {chunk['error']}"[:200])
        replica = replica or _replica(chunk.get("id"))
        if ttft_ms is None and any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ())):
            ttft_ms = (time.monotonic() - sent_s) * 1e3
        usage = chunk.get("usage") or usage
    if ttft_ms is None:
        return Outcome(late_ms, replica=replica, error="the stream ended without content")
    details = usage.get("prompt_tokens_details") or {}
    return Outcome(
        late_ms,
        ttft_ms=ttft_ms,
        e2e_ms=(time.monotonic() - sent_s) * 1e3,
        replica=replica,
        prompt_tokens=usage.get("prompt_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
        output_tokens=usage.get("completion_tokens") or 0,
    )


def _replica(answer_id: Any) -> str:
    """`chatcmpl-us-east-17` came from us-east. The id is what LiteLLM hands on for every provider, unlike the
    `system_fingerprint`, which it drops from streams of hosted_vllm."""
    return answer_id.partition("-")[2].rpartition("-")[0] if isinstance(answer_id, str) else ""


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for line in response.content:
        if not line.startswith(_DATA):
            continue
        data = line[len(_DATA) :].strip()
        if data == b"[DONE]":
            return
        yield msgspec.json.decode(data)
