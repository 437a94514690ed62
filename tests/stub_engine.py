"""An OpenAI- and Anthropic-compatible upstream in a thread, whose every answer a test can set. It computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

OUTPUT_TOKENS = 5


def prompt_tokens(body: dict[str, Any]) -> int:
    """About as many as an engine would count: a quarter of the characters, or the token ids."""
    prompt = body.get("prompt", body.get("input", body.get("messages")))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    return max(len(prompt if isinstance(prompt, str) else json.dumps(prompt)) // 4, 1)


def usage(body: dict[str, Any], cached: int | None) -> dict[str, Any]:
    """Usage as chats and completions report it."""
    count = prompt_tokens(body)
    details = None if cached is None else {"cached_tokens": cached}
    return {
        "prompt_tokens": count,
        "completion_tokens": OUTPUT_TOKENS,
        "total_tokens": count + OUTPUT_TOKENS,
        "prompt_tokens_details": details,
    }


def responses_usage(body: dict[str, Any], cached: int | None) -> dict[str, Any]:
    """Usage as responses report it."""
    count = prompt_tokens(body)
    return {
        "input_tokens": count,
        "output_tokens": OUTPUT_TOKENS,
        "total_tokens": count + OUTPUT_TOKENS,
        "input_tokens_details": {"cached_tokens": cached or 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def messages_usage(body: dict[str, Any], cached: int | None) -> dict[str, Any]:
    """Usage as Anthropic messages report it: input tokens are those not read from the cache."""
    given = {} if cached is None else {"cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
    return {"input_tokens": prompt_tokens(body) - (cached or 0), "output_tokens": OUTPUT_TOKENS, **given}


@dataclass
class Behaviour:
    """How the next requests are answered: a status, and seconds to wait at each point."""

    status: int = 200
    health_status: int = 200
    """Of `/health`."""
    reset: bool = False
    """Close the connection before the headers of an answer."""
    before_headers_s: float = 0.0
    before_first_token_s: float = 0.0
    between_tokens_s: float = 0.0
    tokens: int = 4
    break_after_tokens: int | None = None
    """Close the connection there."""
    cached_tokens: int | None = None
    """Reported with the usage, where it is given."""


@dataclass
class StubEngine:
    """One upstream on a free port of 127.0.0.1."""

    name: str = "stub"
    behaviour: Behaviour = field(default_factory=Behaviour)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    open_requests: int = 0
    port: int = 0
    tls: ssl.SSLContext | None = None
    """Serves https where given."""
    host: str = "127.0.0.1"
    """Host of its URL; it listens on 127.0.0.1 whatever the name."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each request, names in lower case."""
    server_names: set[str | None] = field(default_factory=set)
    """By which TLS clients have asked for it (SNI)."""
    bodies: list[bytes] = field(default_factory=list)
    """Of each request, as they came (unpacked)."""
    models: list[str] | None = None
    """Served; 404 for others. None: all."""

    def __enter__(self) -> StubEngine:
        if self.tls is not None:
            self.tls.sni_callback = lambda _socket, name, _context: self.server_names.add(name)
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10), "the stub engine did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """Nothing listens on its port meanwhile."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def url(self) -> str:
        """Its base URL, without /v1."""
        return f"{'http' if self.tls is None else 'https'}://{self.host}:{self.port}"

    def reset(self) -> None:
        """Behave, and forget what was asked."""
        self.behaviour = Behaviour()
        self.requests.clear()
        self.headers.clear()
        self.bodies.clear()
        self.models = None

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run(ready))
        self._loop.close()

    async def _run(self, ready: threading.Event) -> None:
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self.tls)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        ready.set()
        await self._stopped.wait()
        await runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n")

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.behaviour.health_status)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [], "served_by": self.name})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except (ValueError, web.RequestPayloadError):
            body = None
        if not isinstance(body, dict):
            error = {"message": "no JSON object", "type": "BadRequestError"}
            return web.json_response({"error": error}, status=400)
        self.requests.append((request.path, body))
        self.bodies.append(await request.read())
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.open_requests += 1
        try:
            behaviour = self.behaviour
            if behaviour.reset:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            if behaviour.status != 200:
                error = {"message": f"injected {behaviour.status}", "type": "injected", "code": str(behaviour.status)}
                return web.json_response({"error": error}, status=behaviour.status)
            if self.models is not None and body.get("model") not in self.models:
                error = {"message": "no such model", "type": "NotFoundError"}
                return web.json_response({"error": error}, status=404)
            await asyncio.sleep(behaviour.before_headers_s)
            if body.get("stream"):
                return await self._stream(request, body, behaviour)
            await asyncio.sleep(behaviour.before_first_token_s)
            return web.json_response(whole_answer(request.path, body, behaviour.cached_tokens))
        finally:
            self.open_requests -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], behaviour: Behaviour) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(behaviour.before_first_token_s)
        for count, event in enumerate(streamed_answer(request.path, body, behaviour)):
            if count == behaviour.break_after_tokens:
                assert request.transport is not None
                request.transport.abort()
                break
            await response.write(event.encode())
            await asyncio.sleep(behaviour.between_tokens_s)
        return response


def whole_answer(path: str, body: dict[str, Any], cached: int | None) -> dict[str, Any]:
    """A whole answer of the endpoint."""
    model = body.get("model", "m")
    base = {"id": "c", "created": 1, "model": model, "usage": usage(body, cached)}
    if path.endswith("/chat/completions"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        return {**base, "object": "chat.completion", "choices": [choice]}
    if path.endswith("/completions"):
        return {
            **base,
            "object": "text_completion",
            "choices": [{"index": 0, "text": "hi", "finish_reason": "stop"}],
        }
    if path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}]
        count = prompt_tokens(body)
        return {**base, "object": "list", "data": data, "usage": {"prompt_tokens": count, "total_tokens": count}}
    if path.endswith("/responses"):
        return _response(model, responses_usage(body, cached))
    if path.endswith("/messages"):
        return _message(model, messages_usage(body, cached), [{"type": "text", "text": "hi"}], "end_turn")
    return {"path": path}


def streamed_answer(path: str, body: dict[str, Any], behaviour: Behaviour) -> Iterable[str]:
    """The server-sent events of a streamed answer of the endpoint."""
    model, cached = body.get("model", "m"), behaviour.cached_tokens
    words = [f"w{index} " for index in range(behaviour.tokens)]
    if path.endswith("/responses"):
        return _named(_response_events(model, words, responses_usage(body, cached)))
    if path.endswith("/messages"):
        return _named(_message_events(model, words, messages_usage(body, cached)))
    chat = path.endswith("/chat/completions")
    base = {"id": "c", "object": "chat.completion.chunk" if chat else "text_completion", "created": 1, "model": model}
    texts: list[dict[str, Any]] = [{"delta": {"content": word}} if chat else {"text": word} for word in words]
    if chat:
        texts.insert(0, {"delta": {"role": "assistant", "content": ""}})
    chunks = [{**base, "choices": [{"index": 0, **text, "finish_reason": None}]} for text in texts]
    end = {"delta": {}} if chat else {"text": ""}
    chunks.append({**base, "choices": [{"index": 0, **end, "finish_reason": "stop"}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**base, "choices": [], "usage": usage(body, cached)})
    return [*(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks), "data: [DONE]\n\n"]


def _named(events: list[dict[str, Any]]) -> list[str]:
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]


def _response(model: str, counted: dict[str, Any] | None) -> dict[str, Any]:
    status = "in_progress" if counted is None else "completed"
    text = {"type": "output_text", "text": "hi", "annotations": []}
    item = {"type": "message", "id": "msg_1", "status": status, "role": "assistant", "content": [text]}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": model,
        "status": status,
        "output": [] if counted is None else [item],
        "usage": counted,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "temperature": 1,
        "top_p": 1,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
    }


def _response_events(model: str, words: list[str], counted: dict[str, Any]) -> list[dict[str, Any]]:
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    item = {"type": "message", "id": "msg_1", "status": "in_progress", "role": "assistant", "content": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response(model, None)},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        *({"type": "response.output_text.delta", "delta": word, **where} for word in words),
        {"type": "response.completed", "response": _response(model, counted)},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _message(
    model: str, counted: dict[str, Any], content: list[dict[str, Any]], stop_reason: str | None
) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": counted,
    }


def _message_events(model: str, words: list[str], counted: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "message_start", "message": _message(model, counted, [], None)},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in words),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": counted,
        },
        {"type": "message_stop"},
    ]
