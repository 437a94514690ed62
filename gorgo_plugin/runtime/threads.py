"""The threads that prepare long prompts, so that the event loop goes on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gorgo_plugin.decision import Prompt
from gorgo_plugin.prompt import Plan
from gorgo_plugin.router import Router

PAUSE_S = 0.0003  # a thread that gives the GIL up for less than it takes another to wake keeps it in fact
LATER_MOST = 16  # prompts that wait to be tokenized after they were routed; each holds its text


class LatePrompt(Prompt):
    """A prompt with an estimated length, whose tokens are on their way."""

    __slots__ = ("_whole",)
    _whole: Future[Prompt]

    def __init__(self, estimated: Prompt, whole: Future[Prompt]) -> None:
        super().__init__(
            estimated.tokens,
            estimated.model,
            estimated.stream,
            estimated.max_output_tokens,
            estimated.affinity_key,
            estimated.cache_key,
            estimated.exact,
            estimated.estimated_tokens,
            estimated.blocks,
        )
        object.__setattr__(self, "_whole", whole)

    def attach(self, router: Router, flight_id: int) -> None:
        """Give the flight its tokens as soon as they are there."""

        def done(whole: Future[Prompt]) -> None:
            if not whole.cancelled() and whole.exception() is None:
                router.attach(flight_id, whole.result().tokens, whole.result().exact)

        self._whole.add_done_callback(done)

    def latest(self) -> Prompt:
        """The whole prompt, if it is there by now."""
        whole = self._whole
        return whole.result() if whole.done() and not whole.cancelled() and whole.exception() is None else self


class PromptThreads:
    """Some threads that each tokenize a prompt, as many more for pieces of them, one that reads, and one without haste.

    They are several pools: a prompt that waits for its pieces must not hold the thread that they wait for, nor one that
    nobody waits for the thread of another. Reading holds the GIL, so a second thread for it would only keep the event
    loop waiting longer.
    """

    def __init__(self, threads: int) -> None:
        """The threads start with the first prompts."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="gorgo-read")
        self._prompts = ThreadPoolExecutor(threads, thread_name_prefix="gorgo-prepare")
        self._pieces = ThreadPoolExecutor(threads, thread_name_prefix="gorgo-tokenize")
        self._late = ThreadPoolExecutor(1, thread_name_prefix="gorgo-attach")
        self._places = threading.Semaphore(LATER_MOST)

    def read(self, plan: Callable[[Callable[[], None]], Plan]) -> Future[Plan]:
        """Start reading a body by `PromptBuilder.plan`, which gets its `pause`.

        Raises:
            RuntimeError: closed.
        """
        return self._reader.submit(plan, _pause)

    def finish(self, plan: Plan) -> Future[Prompt]:
        """Start tokenizing what is missing of a prompt.

        Raises:
            RuntimeError: closed.
        """
        return self._prompts.submit(plan.finish, self._pieces.map)

    def later(self, plan: Plan) -> Future[Prompt] | None:
        """Tokenize what is missing of a prompt that nobody waits for; None where it is too many of them, or closed."""
        if not self._places.acquire(blocking=False):
            return None
        try:
            future = self._late.submit(plan.finish)
        except RuntimeError:
            self._places.release()
            return None
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Finish the prompts under way and end the threads; those that nobody waits for are let go."""
        self._reader.shutdown(wait=True)
        self._prompts.shutdown(wait=True)
        self._late.shutdown(wait=True, cancel_futures=True)
        self._pieces.shutdown(wait=True)


def _pause() -> None:
    time.sleep(PAUSE_S)
