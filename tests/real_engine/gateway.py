"""The real LiteLLM proxy in front of the engines, and one request to it as a client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from gorgo_plugin import Router, Settings
from gorgo_plugin.fleet.gateway import API_KEY, litellm_proxy
from tests.real_engine.engines import BLOCK_TOKENS, MODELS, Engine
from tests.real_engine.model import HEADERS

REQUEST_TIMEOUT_S = 60.0  # the longest prompt takes 3 s on a core of its own
MAX_TOKENS = 80  # more than two blocks, so that generated tokens fill blocks of their own
_NOT_SHOWN = ("tokens", "text")
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Turn:
    """One request and what came of it.

    Attributes:
        model: model group asked.
        replica: who served it, as the response headers say.
        tokens: the prompt's ids as counted here, shape (n,).
        estimated_tokens: believed cached when it was routed.
        predicted_ms: the TTFT predicted then.
        prompt_tokens, cached_tokens, output_tokens: as the engine reported.
        ttft_ms: from sending to the first content, as the client saw it.
        text: the answer.
    """

    model: str
    replica: str
    tokens: NDArray[np.uint32]
    estimated_tokens: int
    predicted_ms: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_ms: float
    text: str

    @property
    def over_tokens(self) -> int:
        """Estimated less reported."""
        return self.estimated_tokens - self.cached_tokens

    def figures(self) -> dict[str, Any]:
        """As plain data, without texts and ids."""
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NOT_SHOWN}
        return {"local_tokens": len(self.tokens), **shown}


class RequestFailed(Exception):
    """The gateway answered with an error."""


class Gateway:
    """One running proxy, asked with streamed chat completions."""

    def __init__(self, session: aiohttp.ClientSession, counter: Router, words: Sequence[int]) -> None:
        """`counter` counts tokens as the proxy's own router does; `words` are ids of whole words."""
        self._session = session
        self._counter = counter
        self._words = list(words)

    async def ask(
        self,
        model: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> Turn:
        """Send one request and read its answer to the end.

        Raises:
            RequestFailed: it was not answered with 200.
        """
        body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if tools:
            body |= {"tools": tools, "tool_choice": "none"}
        if model != "chatml":
            body["allowed_token_ids"] = self._words
        raw = json.dumps(body).encode()
        local = await asyncio.to_thread(self._counter.prepare, raw, _CHAT)
        sent_s = time.monotonic()
        async with self._session.post(_CHAT, data=raw) as answer:
            if answer.status != 200:
                raise RequestFailed(f"status {answer.status}: {(await answer.text())[:400]}")
            text, usage, first_s = await _read(answer)
            headers = answer.headers
        return Turn(
            model=model,
            replica=headers["x-gorgo-replica"],
            tokens=np.asarray(local.tokens),
            estimated_tokens=int(headers["x-gorgo-cached-tokens"]),
            predicted_ms=float(headers["x-gorgo-predicted-ttft-ms"]),
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            output_tokens=usage["completion_tokens"],
            ttft_ms=(first_s - sent_s) * 1e3,
            text=text,
        )

    async def status(self) -> dict[str, Any]:
        """/gorgo/status."""
        async with self._session.get("/gorgo/status") as answer:
            found: dict[str, Any] = await answer.json()
            return found


async def _read(answer: aiohttp.ClientResponse) -> tuple[str, dict[str, Any], float]:
    """(text, usage, time of the first content) of a stream of server-sent events."""
    text, first_s = "", None
    usage: dict[str, Any] = {}
    async for line in answer.content:
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        chunk = json.loads(line[5:])
        if "error" in chunk:
            raise RequestFailed(f"in the stream: {str(chunk['error'])[:400]}")
        for choice in chunk.get("choices", ()):
            text += choice["delta"].get("content") or ""
            first_s = time.monotonic() if first_s is None and text else first_s
        usage = chunk.get("usage") or usage
    if not usage or first_s is None:
        raise RequestFailed("the stream ended without content or usage")
    return text, usage, first_s


def settings(model: Path, **more: Any) -> dict[str, Any]:
    """The gateway's settings: all model groups with the model's tokenizer, one with the other template."""
    return {
        "tokenizer": str(model),
        "block_tokens": BLOCK_TOKENS,
        "models": {"headers": {"chat_template": str(model / "headers.jinja")}},
        "response_headers": "debug",
        **more,
    }


@contextlib.asynccontextmanager
async def gateway(
    engines: Sequence[Engine],
    model: Path,
    folder: Path,
    name: str,
    words: Sequence[int],
    own: dict[str, dict[str, Any]],
    **more: Any,
) -> AsyncIterator[Gateway]:
    """Run the proxy for the length of the block.

    Args:
        engines: what it stands in front of.
        model: folder of the model.
        folder: for its configuration and log.
        name: of this proxy.
        words: ids of whole words.
        own: engine name -> further settings of its replica.
        more: further settings of the gateway.

    Raises:
        ProcessError: it did not become ready.
    """
    arguments = settings(model, **more)
    config = {
        "model_list": [_deployment(engine, group, own[engine.name]) for group in MODELS for engine in engines],
        "general_settings": {"master_key": API_KEY},
        "litellm_settings": {"callbacks": ["gorgo_plugin.litellm_strategy.callback"]},
        "router_settings": {"routing_strategy": "gorgo", "routing_strategy_args": arguments},
    }
    counter = Router(Settings.model_validate(arguments))
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    fresh = aiohttp.TCPConnector(force_close=True)  # a server may close an idle connection just when it is used again
    async with (
        litellm_proxy(config, folder, name) as (target, _),
        aiohttp.ClientSession(target.url, connector=fresh, headers=headers, timeout=timeout) as session,
    ):
        yield Gateway(session, counter, words)


def _deployment(engine: Engine, group: str, own: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {"model": f"hosted_vllm/{group}", "api_base": f"{engine.url}/v1", "api_key": "none"}
    if group == "headers":
        params["extra_body"] = {"chat_template": HEADERS}
    return {
        "model_name": group,
        "litellm_params": params,
        "model_info": {"gorgo": {"name": engine.name, "region": engine.name, **own}},
    }
