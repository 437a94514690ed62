"""The service's two kinds of streams: one routes a request, the other watches its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

import grpc

from gorgo_plugin.decision import Decision, Prompt
from gorgo_plugin.envoy_ext_proc import messages
from gorgo_plugin.envoy_ext_proc.answers import Tail, shows_first_token
from gorgo_plugin.envoy_ext_proc.attempts import EnvoyAttempt
from gorgo_plugin.envoy_ext_proc.bodies import asking_for_usage, stream_reports_usage, unpacked
from gorgo_plugin.envoy_ext_proc.envoy_yaml import address_of
from gorgo_plugin.envoy_ext_proc.messages import UNCHANGED, Head, Received, Served, attempt_of_piece, is_last_piece
from gorgo_plugin.envoy_ext_proc.names import PICK_DESTINATIONS, PICK_KEY
from gorgo_plugin.errors import NoCandidates, PromptError
from gorgo_plugin.runtime import Runtime

# Envoy ends a stream and resets it at once. To send a status into that, as returning does, fails, and gRPC never frees
# what a failed operation took, nor one whose awaiter was cancelled (its issue 43360): 80 bytes each, which no trim can
# get round. So a stream that Envoy has ended does not return before the reset, if one comes, and what follows a
# decision, where most streams are that are reset, is a task of its own, which no reset cancels.
RESET_WITHIN_S = 0.05
# How long an attempt is open to its observing stream when its request is over, and its own stream to its reset; they
# are milliseconds apart.
KEPT_S = 0.5
TIDY_S = 0.1  # one timer for all requests: one each would cost a twentieth of the service's work
ASK_AFTER = 0.6  # share of the message timeout after which the service asks for more
LOGGED_EVERY_S = 10.0
ID_DIGITS = 12  # so many requests are years

_log = logging.getLogger("gorgo_plugin")
Context = Any  # grpc.aio.ServicerContext, generic in what it carries


class Processor:
    """Answers Envoy. No request fails for what happens in here: without a decision Envoy serves it as it would anyway.

    Attributes:
        streams: streams that Envoy has open now, or ended a moment ago without a reset.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.streams = 0
        self._attempts: dict[str, EnvoyAttempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds none
        self._left: deque[tuple[float, EnvoyAttempt]] = deque()  # when its request was over; the first ones first
        # How ids begin: a stream that outlives a restart must not meet another request's attempt.
        self._boot = secrets.token_hex(4) + "-"
        self._begins, self._id_length = self._boot.encode(), len(self._boot) + ID_DIGITS
        self._count = 0
        self._watched = False  # whether Envoy sends answers to watch; without, their headers are all that is seen
        self._logged_s = -LOGGED_EVERY_S

    async def process(self, _requests: object, context: Context) -> None:
        """One stream, from its first message to its end."""
        self.streams += 1
        try:
            ended = await self._serve(context)
        finally:
            self.streams -= 1
        if ended:
            await asyncio.sleep(RESET_WITHIN_S)

    async def _serve(self, context: Context) -> bool:
        """True when it was Envoy who ended the stream."""
        raw = await context.read()
        if raw is grpc.aio.EOF:
            return True
        observed = attempt_of_piece(raw, self._begins, self._id_length)
        if observed is None:
            first = messages.read(raw)
            if first.attempt is None:
                return await _Routing(self, context).run(first)
        self._watched = True
        attempt = self._attempts.get(observed or "")
        return attempt is not None and await _watch(raw, attempt, context)

    def remember(self, decision: Decision, prompt: Prompt, head: Head, reads_usage: bool) -> EnvoyAttempt:
        """Open an attempt that the observing stream can find."""
        self._count += 1
        attempt = EnvoyAttempt(
            self.runtime, decision, prompt, f"{self._boot}{self._count:0{ID_DIGITS}}", head.endpoint, reads_usage
        )
        self._attempts[attempt.id] = attempt
        return attempt

    async def follow(self, attempt: EnvoyAttempt, steps: Coroutine[Any, Any, None]) -> None:
        """Take the steps up to `left`, whatever becomes of the stream that waits here: until a moment after."""
        loop = asyncio.get_running_loop()
        attempt.over = loop.create_future()
        task = loop.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await attempt.over

    def left(self, attempt: EnvoyAttempt) -> None:
        """The request of an attempt is over; what its observing stream may still bring is taken for a moment."""
        loop = asyncio.get_running_loop()
        self._left.append((loop.time(), attempt))
        if len(self._left) == 1:
            loop.call_later(TIDY_S, self._tidy)
        attempt.left(self._watched)

    def _tidy(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._left and self._left[0][0] <= loop.time() - KEPT_S:
                _, attempt = self._left.popleft()
                del self._attempts[attempt.id]
                attempt.end_wait()
                attempt.settle()
        finally:
            if self._left:
                loop.call_later(TIDY_S, self._tidy)

    def unrouted(self, reason: str, error: Exception | None = None) -> None:
        """A request is left to Envoy."""
        self.runtime.metrics.fell_back(reason)
        now_s = time.monotonic()
        if error is not None and now_s - self._logged_s >= LOGGED_EVERY_S:
            self._logged_s = now_s
            _log.error("gorgo: a request was left to Envoy", exc_info=error)


async def _watch(raw: bytes, attempt: EnvoyAttempt, context: Context) -> bool:
    """The stream of one answer's pieces, from the message with the first of them; true when Envoy ended it."""
    read, endpoint, reads_usage = context.read, attempt.endpoint, attempt.reads_usage
    tail, awaits_token = Tail(endpoint), attempt.streamed and not attempt.began
    while attempt.closed in (None, "finished"):
        if awaits_token and shows_first_token(raw, endpoint):
            attempt.first_token()
            awaits_token = False
        if reads_usage:
            tail.add(raw)
        elif attempt.began:
            return False
        if is_last_piece(raw):
            if reads_usage:
                attempt.usage(tail.usage())
            attempt.finish()
            return False
        raw = await read()
        if raw is grpc.aio.EOF:
            return True
    return False


class _Routing:
    """The stream of one request: its headers, its body, its answer's headers, its end."""

    def __init__(self, processor: Processor, context: Context) -> None:
        self._processor = processor
        self._runtime = processor.runtime
        self._context = context
        self._asking: asyncio.TimerHandle | None = None
        self._asked: asyncio.Future[None] | None = None
        self._attempt: EnvoyAttempt | None = None

    async def run(self, message: Received) -> bool:
        """Up to a decision, and beyond it; true when Envoy ended the stream."""
        write, head = self._context.write, None
        while True:
            kind, content, _ = message
            if kind == "request_headers":
                if not isinstance(content, Head) or self._runtime.settings.mode == "off":
                    await write(messages.NOT_OURS)
                    return False
                head = content
                await write(UNCHANGED[kind])
            elif isinstance(content, bytes) and head is not None:
                answer = await self._route(content, head)
                if self._attempt is not None:
                    await self._processor.follow(self._attempt, self._follow(answer, self._attempt))
                    return False
                await write(answer)
            elif kind in UNCHANGED:
                await write(UNCHANGED[kind])
            raw = await self._context.read()
            if raw is grpc.aio.EOF:
                return True
            message = messages.read(raw)

    async def _follow(self, answer: bytes, attempt: EnvoyAttempt) -> None:
        """The rest of a stream, from the answer with the decision until Envoy ends it."""
        write, read = self._context.write, self._context.read
        try:
            # A write into a stream that is gone fails, and there may be nobody left who awaits this and could be told.
            with contextlib.suppress(grpc.aio.BaseError):
                await write(answer)
                while (raw := await read()) is not grpc.aio.EOF:
                    kind, content, _ = messages.read(raw)
                    if isinstance(content, Served):
                        attempt.served(content)
                        await write(messages.answer_headers(attempt.headers()))
                    elif kind in UNCHANGED:
                        await write(UNCHANGED[kind])
        except Exception as error:  # noqa: BLE001 (the stream fails with it, if it is still there)
            attempt.end_wait(error)
        finally:
            self._processor.left(attempt)

    async def _route(self, body: bytes, head: Head) -> bytes:
        """The answer to a request's body."""
        try:
            return await self._decided(body, head)
        except asyncio.CancelledError:  # Envoy has waited long enough, or the client has left meanwhile
            self._processor.unrouted("abandoned")
            raise
        except (PromptError, NoCandidates) as error:
            self._processor.unrouted("prompt-error" if isinstance(error, PromptError) else "no-candidates")
        except Exception as error:  # noqa: BLE001 (counted and logged; a client must not meet an error of ours)
            self._processor.unrouted("error", error)
        return UNCHANGED["request_body"]

    async def _decided(self, body: bytes, head: Head) -> bytes:
        runtime, settings = self._runtime, self._runtime.settings
        text, prompt = await self._prepared(body, head)
        started = time.perf_counter()
        decision = runtime.router.route(prompt)
        runtime.metrics.decided(decision, prompt.model, time.perf_counter() - started)
        reports = not prompt.stream or stream_reports_usage(text, head.endpoint)
        changed = None
        if not reports and settings.envoy.request_stream_usage and settings.mode == "on" and not head.encoding:
            changed = asking_for_usage(body, head.endpoint)
        reads_usage = reports or changed is not None
        self._attempt = attempt = self._processor.remember(decision, prompt, head, reads_usage)
        if settings.mode == "shadow":
            return messages.observed(attempt.id)
        return messages.routed(decision.replica, self._destinations(decision), attempt.id, changed)

    async def _prepared(self, body: bytes, head: Head) -> tuple[bytes, Prompt]:
        """The body unpacked, and its prompt. Envoy is asked to wait longer where that takes long."""
        try:
            if head.encoding:
                self._waiting()
                limit_bytes = self._runtime.settings.envoy.max_body_bytes
                body = await asyncio.to_thread(unpacked, body, head.encoding, limit_bytes)
            return body, await self._runtime.prepare(body, head.endpoint, waiting=self._waiting)
        finally:
            if self._asking is not None:
                self._asking.cancel()
            if self._asked is not None:
                await asyncio.wait([self._asked])  # gRPC takes one message at a time

    def _waiting(self) -> None:
        if self._asking is None:
            after_s = ASK_AFTER * self._runtime.settings.envoy.message_timeout_s
            self._asking = asyncio.get_running_loop().call_later(after_s, self._ask_for_time)

    def _ask_for_time(self) -> None:
        asking = self._context.write(messages.more_time(self._runtime.settings.envoy.max_message_timeout_s))
        self._asked = asyncio.ensure_future(asking)
        self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # the stream may be gone

    def _destinations(self, decision: Decision) -> str:
        if (PICK_KEY, PICK_DESTINATIONS) not in self._context.invocation_metadata():
            return ""
        urls = {replica.name: urlsplit(replica.url) for replica in self._runtime.settings.replicas}
        return ",".join(address_of(urls[name]) for name in decision.ranked if name in urls)
