"""One mock replica over HTTP: what an engine serves, on the engine model, behind an injected network.

OpenAI's chat completions, completions, responses and embeddings and Anthropic's messages, whole and streamed, with
vLLM's `/tokenize`, `/health`, `/metrics`, `/v1/models` and errors. Beside them, for callers on the same machine only,
`/mock/fault`, `/mock/restart` and `/mock/state`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from aiohttp import web
from pydantic import ValidationError

from gorgo_plugin.decision import Prompt
from gorgo_plugin.errors import PromptError
from gorgo_plugin.fleet.answers import ANSWERS, Answer, AnswerHead, Usage, embedding_body, error_body
from gorgo_plugin.fleet.asked import Asked, RequestRefused, decode_object, read_asked
from gorgo_plugin.fleet.block_cache import block_keys
from gorgo_plugin.fleet.driver import EngineDriver
from gorgo_plugin.fleet.engine import Engine, EngineProfile, EngineRequest, Event, Finished, FirstToken
from gorgo_plugin.fleet.engine_metrics import EngineMetrics, MetricsStyle
from gorgo_plugin.fleet.faults import ERROR_DELAY_S, Fault, FaultInjector, FaultKind
from gorgo_plugin.fleet.kv_publisher import KvPublisher
from gorgo_plugin.fleet.network import Network
from gorgo_plugin.fleet.passages import reply_passage
from gorgo_plugin.prompt import PromptBuilder
from gorgo_plugin.prompt.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, MESSAGES, endpoint_of
from gorgo_plugin.settings import Settings

MAX_BODY_BYTES = 64 * 2**20
INLINE_CHARS = 2048  # about 2 ms of tokenizing on the loop; more goes to a thread
CHARS_PER_TOKEN = 5  # of the answers' words, with their spaces
HEADERS_S = (0.010, 0.030)  # a real server's headers come this long after the request, before any token
SHUTDOWN_S = 0.5
_LOOPBACK = ("127.0.0.1", "::1")
_DIED = 70  # exit status of a process told to die

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class MockSettings:
    """One mock replica.

    Attributes:
        name: told in every answer (`system_fingerprint`, and in its id).
        models: the models served; the first is the one meant when a request names none.
        profile: what the engine is like.
        rtt_ms: injected round trip.
        jitter_ms: its standard deviation.
        seed: seeds the engine, the jitter and the faults.
        stream_interval: tokens per streamed chunk after the first, as vLLM's option of that name.
        output_tokens: tokens generated for a request that sets no cap.
        metrics_style: whose metric names `/metrics` uses.
        tokenizer: file or folder; None: the embedded one.
        chat_template: template text or file; None: the tokenizer's own, else ChatML.
        fault: how it fails from the start.
        host: address to bind.
        port: port to bind; 0: a free one.
        kv_events: where to publish KV-cache events over ZeroMQ, tcp://host:port with `*` as port for a free one; None:
            nowhere. Their replay socket takes a free port of the same host.
    """

    name: str = "mock"
    models: tuple[str, ...] = ("m",)
    profile: EngineProfile = field(default_factory=EngineProfile)
    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    seed: int = 0
    stream_interval: int = 1
    output_tokens: int = 128
    metrics_style: MetricsStyle = "vllm"
    tokenizer: str | None = None
    chat_template: str | None = None
    fault: Fault = field(default_factory=Fault)
    host: str = "127.0.0.1"
    port: int = 0
    kv_events: str | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """A request on its way through the engine."""

    id: str
    asked: Asked
    prompt_tokens: int
    output_tokens: int
    arrived_s: float

    @property
    def words(self) -> list[str]:
        """The answer, a token a word."""
        return reply_passage(self.asked.last_text, self.output_tokens).text.split()


class MockReplica:
    """The handlers of one replica. Must be created on a running loop.

    Raises:
        SettingsError: the tokenizer or the template cannot be read.
    """

    def __init__(self, settings: MockSettings) -> None:
        self.settings = settings
        prompt_settings = Settings.model_validate(
            {"tokenizer": settings.tokenizer, "chat_template": settings.chat_template}
        )
        self._builder = PromptBuilder(prompt_settings, secret=settings.name.encode())
        self.publisher = KvPublisher(settings.kv_events, settings.profile.block_tokens) if settings.kv_events else None
        engine = Engine(
            settings.profile,
            settings.seed,
            token_interval=settings.stream_interval,
            record_changes=self.publisher is not None,
        )
        self._driver = EngineDriver(engine, self.publisher.publish if self.publisher else None)
        self._rng = random.Random(f"{settings.name} {settings.seed}")
        self._network = Network(settings.rtt_ms, settings.jitter_ms, self._rng)
        self._faults = FaultInjector(settings.fault, self._rng)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")
        self._numbers = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._received = 0
        self._started_s = time.time()
        self._metrics = EngineMetrics(
            settings.models[0],
            settings.metrics_style,
            settings.profile,
            gauges=lambda: engine.gauges,
            started_s=lambda: self._started_s,
        )

    def app(self) -> web.Application:
        """The application with all routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._behind_network])
        app.add_routes([web.post(path, self._infer) for path in ENDPOINTS])
        app.add_routes(
            [
                web.post("/tokenize", self._tokenize),
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/metrics", self._metrics_page),
                web.get("/mock/state", self._state),
                web.post("/mock/fault", self._set_fault),
                web.post("/mock/restart", self._restart),
            ]
        )
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, app: web.Application) -> None:
        self._driver.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.publisher is not None:
            self.publisher.close()

    # The network and the faults around every route.

    @web.middleware
    async def _behind_network(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/mock/"):
            return await self._administer(request, handler)
        await self._network.cross()
        inference = endpoint_of(request.path) is not None
        self._received += inference
        kind = self._faults.strike(inference)
        response = await self._fail(request, kind)
        if response is None:
            cut = partial(self._infer, cut=True)
            response = await self._answer_or_error(request, cut if inference and kind == "cut" else handler)
        if not response.prepared:
            await self._network.cross()
        return response

    async def _administer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.remote not in _LOOPBACK:
            return _error(403, "/mock/ answers callers on the same machine only")
        return await self._answer_or_error(request, handler)

    async def _answer_or_error(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        anthropic = endpoint_of(request.path) == MESSAGES
        try:
            return await handler(request)
        except RequestRefused as refused:
            return _error(refused.status, str(refused), refused.param, anthropic)
        except PromptError as error:
            return _error(400, str(error), anthropic=anthropic)
        except web.HTTPException as error:
            return _error(error.status, error.reason, anthropic=anthropic)

    async def _fail(self, request: web.Request, kind: FaultKind) -> web.StreamResponse | None:
        """Fail in this way; None when the request is to be served, if only in part."""
        if kind == "error":
            await asyncio.sleep(ERROR_DELAY_S)
            return _error(500, "injected failure")
        if kind == "rate-limit":
            response = _error(429, "injected rate limit")
            response.headers["Retry-After"] = "1"
            return response
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "reset":
            _break(request)
            return web.Response()
        if kind == "die":
            os._exit(_DIED)
        return None

    # Inference.

    async def _infer(self, request: web.Request, cut: bool = False) -> web.StreamResponse:
        """Serve a request for inference; `cut`: only up to its first content."""
        arrived_s = self._loop.time()
        endpoint = endpoint_of(request.path)
        assert endpoint is not None
        asked = read_asked(await request.read(), self.settings.models)
        prompt = await self._prompt(asked, endpoint)
        output_tokens = 0 if endpoint == EMBEDDINGS else self._output_tokens(asked, len(prompt))
        job = _Job(f"{self.settings.name}-{next(self._numbers)}", asked, len(prompt), output_tokens, arrived_s)
        keys = await self._off_loop(output_tokens * CHARS_PER_TOKEN, partial(self._block_keys, job, prompt))
        engine_request = EngineRequest(job.id, len(prompt), output_tokens, keys)
        try:
            events = self._driver.submit(engine_request)
        except ValueError as error:
            raise RequestRefused(400, str(error)) from None
        try:
            if endpoint == EMBEDDINGS or not asked.stream:
                return await self._whole(request, endpoint, job, events, cut)
            return await self._stream(request, self._answer(endpoint, job), job, events, cut)
        finally:
            # What a client that left means to the engine arrives there half a round trip later.
            self._loop.call_later(self._network.one_way_s(), self._driver.cancel, job.id)

    async def _prompt(self, asked: Asked, endpoint: str) -> Prompt:
        plan = self._builder.plan(asked.body, endpoint, asked.model)
        return await self._off_loop(plan.cold_chars, plan.finish)

    async def _off_loop(self, chars: int, work: Callable[[], T]) -> T:
        """Do work that tokenizes `chars` characters: in a thread, when it would hold the loop for long."""
        if chars <= INLINE_CHARS:
            return work()
        return await self._loop.run_in_executor(self._threads, work)

    def _output_tokens(self, asked: Asked, prompt_tokens: int) -> int:
        """How many tokens to generate.

        Raises:
            RequestRefused: prompt and output are longer than the model takes.
        """
        most = self.settings.profile.max_model_tokens
        room = most - prompt_tokens
        wanted = asked.cap or max(1, min(self.settings.output_tokens, room))
        if wanted > room:
            raise RequestRefused(
                400,
                f"This model takes at most {most} tokens; the request has {prompt_tokens} in the prompt and asks for "
                f"{wanted}.",
                "messages" if "messages" in asked.body else "prompt",
            )
        return wanted

    def _block_keys(self, job: _Job, prompt: Prompt) -> list[int]:
        """Keys of the blocks of prompt and answer, in the tokens the answer will have as part of the next prompt."""
        text = " ".join(job.words)
        reply = self._builder.prepare({"prompt": [text], "add_special_tokens": False}, COMPLETIONS, job.asked.model)
        tokens = np.concatenate([prompt.tokens, reply.tokens[: job.output_tokens]])
        keys = block_keys(tokens, self.settings.profile.block_tokens, f"{job.asked.model}\0{prompt.cache_key}")
        if self.publisher is not None:
            self.publisher.learn(keys, tokens, prompt.cache_key)
        return keys

    def _answer(self, endpoint: str, job: _Job) -> Answer:
        head = AnswerHead(
            id=job.id,
            model=job.asked.model,
            replica=self.settings.name,
            created_s=int(time.time()),
            stop="stop" if job.asked.cap is None else "length",
            include_usage=job.asked.include_usage,
        )
        return ANSWERS[endpoint](head)

    async def _whole(
        self, request: web.Request, endpoint: str, job: _Job, events: asyncio.Queue[Event | None], cut: bool
    ) -> web.StreamResponse:
        while not isinstance(event := await events.get(), Finished):
            if event is None or cut:
                _break(request)
                return web.Response()
            if isinstance(event, FirstToken):
                self._metrics.observe_ttft(event.at_s - job.arrived_s)
        usage = Usage(job.prompt_tokens, event.cached_tokens, job.output_tokens)
        if endpoint == EMBEDDINGS:
            inputs = job.asked.body.get("input")
            count = len(inputs) if isinstance(inputs, list) and not isinstance(inputs[0], int) else 1
            base64_encoded = job.asked.body.get("encoding_format") == "base64"
            return _json(embedding_body(job.asked.model, count, base64_encoded, usage))
        return _json(self._answer(endpoint, job).whole(" ".join(job.words), usage))

    async def _stream(
        self, request: web.Request, answer: Answer, job: _Job, events: asyncio.Queue[Event | None], cut: bool
    ) -> web.StreamResponse:
        way_back = self._network.way_back()
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )
        await way_back.arrival(job.arrived_s + self._rng.uniform(*HEADERS_S))
        await response.prepare(request)
        if begin := answer.begin():
            await response.write(begin)
        words = job.words
        sent = 0
        while (event := await events.get()) is not None:
            await way_back.arrival(event.at_s)
            if isinstance(event, FirstToken):
                self._metrics.observe_ttft(event.at_s - job.arrived_s)
                await response.write(answer.first(words[0], Usage(job.prompt_tokens, event.cached_tokens, 1)))
                sent = 1
                if cut:
                    break
                continue
            if event.generated > sent:
                await response.write(answer.more(" " + " ".join(words[sent : event.generated])))
                sent = event.generated
            if isinstance(event, Finished):
                usage = Usage(job.prompt_tokens, event.cached_tokens, event.generated)
                await response.write(answer.end(" ".join(words), usage))
                await response.write_eof()
                return response
        _break(request)
        return response

    # What else an engine serves.

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        asked = read_asked(await request.read(), self.settings.models)
        prompt = await self._prompt(asked, CHAT if "messages" in asked.body else COMPLETIONS)
        most = self.settings.profile.max_model_tokens
        if len(prompt) > most:
            raise RequestRefused(
                400, f"This model takes at most {most} tokens; the prompt has {len(prompt)}.", "prompt"
            )
        return _json({"count": len(prompt), "max_model_len": most, "tokens": prompt.tokens.tolist()})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        most = self.settings.profile.max_model_tokens
        created_s = int(self._started_s)
        return _json(
            {
                "object": "list",
                "data": [
                    {"id": model, "object": "model", "created": created_s, "owned_by": "mock", "max_model_len": most}
                    for model in self.settings.models
                ],
            }
        )

    async def _metrics_page(self, request: web.Request) -> web.StreamResponse:
        page = self._metrics.page()
        return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    # For whoever runs the replica.

    async def _state(self, request: web.Request) -> web.StreamResponse:
        engine = self._driver.engine
        return _json(
            {
                "name": self.settings.name,
                "received": self._received,
                "idle": engine.idle,
                "cached_blocks": engine.cached_blocks,
                "gauges": asdict(engine.gauges),
                "fault": self._faults.fault.model_dump(),
            }
        )

    async def _set_fault(self, request: web.Request) -> web.StreamResponse:
        try:
            fault = Fault.model_validate(decode_object(await request.read()))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise RequestRefused(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        self._faults.set(fault)
        return _json(fault.model_dump())

    async def _restart(self, request: web.Request) -> web.StreamResponse:
        if self.publisher is not None:
            self.publisher.restart()
        self._driver.restart()
        self._started_s = time.time()
        return _json({"started_s": self._started_s})


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _error(status: int, message: str, param: str | None = None, anthropic: bool = False) -> web.Response:
    response = _json(error_body(status, message, param, anthropic))
    response.set_status(status)
    return response


def _break(request: web.Request) -> None:
    """Break the connection without a word, as a crash does."""
    if request.transport is not None:
        request.transport.abort()


async def serve(settings: MockSettings) -> None:
    """Serve until SIGINT or SIGTERM; prints one line of JSON (name, url, pid) once requests are taken.

    Raises:
        SettingsError: the tokenizer or the template cannot be read.
        OSError: the address cannot be bound.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    replica = MockReplica(settings)
    runner = web.AppRunner(replica.app(), access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
        host, port = runner.addresses[0][:2]
        shown = f"[{host}]" if ":" in host else host
        ready = {"name": settings.name, "url": f"http://{shown}:{port}", "pid": os.getpid()}
        if replica.publisher is not None:
            ready["kv_events"] = {"endpoint": replica.publisher.endpoint, "replay": replica.publisher.replay_endpoint}
        print(json.dumps(ready), flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()
