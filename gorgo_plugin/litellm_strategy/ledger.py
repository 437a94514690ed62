"""One record per attempt, ended exactly once by whichever of LiteLLM's hooks comes first.

LiteLLM tells of a request's end in many places and in some not at all. Records are found by the request's logging
object, which LiteLLM makes for each request of the proxy and which no client can forge; without one (the SDK,
pass-through) by the context the selection ran in. Events that carry neither join by the call id. When the logging
object itself is gone, or the context, so is the request: what is then still open ends with it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from cachetools import LRUCache

from gorgo_plugin.decision import Decision, Prompt
from gorgo_plugin.litellm_strategy.outcomes import failure_kind
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.attempts import Attempt
from gorgo_plugin.runtime.outcomes import Usage

CALL_IDS = 16_384  # calls that wait for their log event, more than a process can have under way; 1 kB each
LATE_EVENT_S = 5.0  # log events of the SDK come from a worker or thread, when the request's own context may be gone


class LiteLLMAttempt(Attempt):
    """An attempt of LiteLLM's, of which nothing holds until it was dispatched.

    Attributes:
        opened_s: wall clock of the dispatch, which LiteLLM's events are stamped with.
        dispatched: LiteLLM did call the deployment; a limit or a cached answer can keep it from that.
    """

    def __init__(self, runtime: Runtime, decision: Decision, prompt: Prompt, unseen: bool = False) -> None:
        super().__init__(runtime, decision, prompt)
        self.opened_s = time.time()
        self.dispatched = False
        self._unseen = unseen

    def first_token(self) -> None:
        """The first token of a streamed answer has been seen."""
        if self.dispatched:
            super().first_token()

    def usage(self, usage: Usage) -> None:
        """What the engine counted."""
        if self.dispatched:
            super().usage(usage)

    def finish(self) -> None:
        """The answer is complete; one that was never dispatched came from LiteLLM's own cache."""
        if self.dispatched:
            super().finish()
        else:
            self.fail("disconnect")

    def fail(self, kind: str) -> None:
        """The attempt ended without a complete answer; before its dispatch, nothing was learned of the replica."""
        super().fail(kind if self.dispatched else "disconnect")

    def lose(self) -> None:
        """The request is gone and nothing told how it ended; where nothing ever tells, it was most likely answered."""
        if self._unseen:
            self.finish()
        else:
            self.fail("disconnect")


class Request:
    """One request over its attempts.

    Attributes:
        request_id: ours, never one that a client can choose.
        trace_id: LiteLLM's id of an SDK call over its retries; None where a logging object tells requests apart.
        call_id: LiteLLM's id of the current attempt, None before it is known.
        attempt: the current one, None when the choice was left to LiteLLM.
        answering: its stream has begun, and is still without a first token.
        tried: ids of the deployments that had an attempt.
        prompts: prepared prompts by (endpoint, model), so that a retry does not prepare again.
    """

    _ids = itertools.count(1)

    def __init__(self, trace_id: object = None, dropped: Callable[[LiteLLMAttempt], None] | None = None) -> None:
        self._dropped = dropped
        self.request_id = f"litellm-{next(Request._ids)}"
        self.trace_id = trace_id
        self.call_id: str | None = None
        self.logging_key: int | None = None  # of the logging object that stands for it now
        self.attempt: LiteLLMAttempt | None = None
        self.answering = False
        self.tried: set[str] = set()
        self.prompts: dict[tuple[str, str], Prompt] = {}

    def __del__(self) -> None:
        # As in `Ledger._gone`, this may run inside the router's lock.
        if self._dropped is not None and self.attempt is not None and self.attempt.closed is None:
            self._dropped(self.attempt)

    @property
    def answered(self) -> bool:
        """Whether its current attempt was answered to the end."""
        return self.attempt is not None and self.attempt.closed == "finished"

    def fail(self, kind: str) -> None:
        """The current attempt has failed; there may be another."""
        if self.attempt is not None:
            self.attempt.fail(kind)

    def finish(self, usage: Usage) -> None:
        """The answer is complete."""
        if self.attempt is not None:
            self.attempt.usage(usage)
            self.attempt.finish()
        self.prompts.clear()

    def give_up(self, error: BaseException) -> None:
        """There will be no answer, and no other attempt."""
        self.fail(failure_kind(error))
        self.prompts.clear()


class _Lost(NamedTuple):
    """A request that is gone: its attempt, the call id that is free again, and from when on it counts as ended."""

    attempt: LiteLLMAttempt | None
    call_id: str | None
    due_s: float


class Ledger:
    """Finds the request that a hook speaks of."""

    def __init__(self) -> None:
        self._by_logging: dict[int, tuple[weakref.ref[Any], Request]] = {}
        self._by_call: LRUCache[str, LiteLLMAttempt | None] = LRUCache(CALL_IDS)
        self._calls_lock = threading.Lock()
        self._lost: deque[_Lost] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._current: ContextVar[Request | None] = ContextVar("gorgo_request", default=None)

    def __len__(self) -> int:
        """Requests whose logging object is still there."""
        return len(self._by_logging)

    def begin(self, kwargs: Mapping[str, Any]) -> Request:
        """The request that a selection is for. An attempt of it that is still open must have failed."""
        self.collect()
        logging_obj = kwargs.get("litellm_logging_obj")
        if logging_obj is not None:
            request = self._of_logging(logging_obj) or self.bind(Request(dropped=self._drop), logging_obj)
        else:
            trace_id = kwargs.get("litellm_trace_id")
            known = self._current.get()
            # A caller may give one trace id to a whole conversation: what was answered is not tried again.
            same = known is not None and trace_id is not None and known.trace_id == trace_id and not known.answered
            request = known if known is not None and same else Request(trace_id, self._drop)
            request.call_id = request.logging_key = None  # the SDK makes a new logging object for every attempt
        request.fail("rejected")
        self._current.set(request)
        self._loop = _running_loop()
        return request

    def bind(self, request: Request, logging_obj: Any) -> Request:
        """Find the request by this logging object from now on, and end it at the latest when that is gone."""
        request.logging_key = key = id(logging_obj)
        request.call_id = getattr(logging_obj, "litellm_call_id", None)
        self._by_logging[key] = weakref.ref(logging_obj, functools.partial(self._gone, key)), request
        return request

    def find(self, data: Mapping[str, Any] | None) -> Request | None:
        """The request that a hook's data belong to: by their logging object, without one by the context."""
        logging_obj = data.get("litellm_logging_obj") if data is not None else None
        return self._current.get() if logging_obj is None else self._of_logging(logging_obj) or self.adopt(logging_obj)

    def adopt(self, logging_obj: Any) -> Request | None:
        """The request of this context, when this is the logging object that the SDK made for it after the choice."""
        request = self._current.get()
        if logging_obj is None or self._of_logging(logging_obj) is not None:
            return None
        if request is None or request.attempt is None or request.attempt.closed is not None:
            return None
        if request.call_id not in (None, getattr(logging_obj, "litellm_call_id", None)):
            return None
        return self.bind(request, logging_obj)

    def dispatch(self, call_id: object) -> None:
        """LiteLLM sends the request of this context now; log events of `call_id` belong to its attempt.

        A client can choose the id. When two calls under way have the same, their events belong to neither.
        """
        request = self._current.get()
        attempt = request.attempt if request is not None else None
        if request is None or attempt is None or attempt.closed is not None or not isinstance(call_id, str):
            return
        if request.call_id not in (None, call_id):
            return  # a call that another callback makes on the way
        request.call_id, attempt.dispatched = call_id, True
        with self._calls_lock:
            known = self._by_call.get(call_id, attempt)
            clash = known is None or (known is not attempt and known.closed is None)
            self._by_call[call_id] = None if clash else attempt

    def of_call(self, call_id: object) -> LiteLLMAttempt | None:
        """The attempt that a log event of `call_id` belongs to."""
        if not isinstance(call_id, str):
            return None
        with self._calls_lock:
            return self._by_call.get(call_id)

    def collect(self) -> None:
        """Let go of requests that are gone; what one left open ends."""
        now = time.monotonic()
        for _ in range(len(self._lost)):
            lost = self._lost.popleft()
            if lost.due_s > now:
                self._lost.append(lost)
                continue
            if lost.call_id is not None:
                with self._calls_lock:
                    self._by_call.pop(lost.call_id, None)
            if lost.attempt is not None:
                lost.attempt.lose()

    def _gone(self, key: int, _: weakref.ref[Any]) -> None:
        # Runs wherever the garbage collector does, so perhaps inside the router's lock: only note it here.
        entry = self._by_logging.pop(key, None)
        request = None if entry is None else entry[1]
        if request is None or request.logging_key != key:
            return  # of an earlier attempt
        self._lost.append(_Lost(request.attempt, request.call_id, 0.0))
        if request.attempt is not None and request.attempt.closed is None:
            self._collect_later(0.0)

    def _drop(self, attempt: LiteLLMAttempt) -> None:
        self._lost.append(_Lost(attempt, None, time.monotonic() + LATE_EVENT_S))
        self._collect_later(LATE_EVENT_S)

    def _collect_later(self, pause_s: float) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(loop.call_later, pause_s, self.collect)

    def _of_logging(self, logging_obj: Any) -> Request | None:
        entry = self._by_logging.get(id(logging_obj))
        if entry is None or entry[0]() is not logging_obj:
            return None
        return entry[1]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
