"""The threads that prepare long prompts, so that the event loop goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from gorgo_plugin.decision import Prompt
from gorgo_plugin.prompt.vocabulary import Spread
from gorgo_plugin.router import Router

T = TypeVar("T")
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
    """Some threads that each prepare a prompt, as many more that tokenize pieces for them, and one without haste.

    They are several pools: a prompt that waits for its pieces must not hold the thread that they wait for, nor one that
    nobody waits for the thread of another.
    """

    def __init__(self, threads: int) -> None:
        """The threads start with the first prompts."""
        self._prompts = ThreadPoolExecutor(threads, thread_name_prefix="gorgo-prepare")
        self._pieces = ThreadPoolExecutor(threads, thread_name_prefix="gorgo-tokenize")
        self._late = ThreadPoolExecutor(1, thread_name_prefix="gorgo-attach")
        self._places = threading.Semaphore(LATER_MOST)

    def run(self, work: Callable[[Spread], T]) -> Future[T]:
        """Start `work`, which gets what spreads the tokenizing.

        Raises:
            RuntimeError: closed.
        """
        return self._prompts.submit(work, self._pieces.map)

    def later(self, work: Callable[[], Prompt]) -> Future[Prompt] | None:
        """Start `work` behind all that was started so; None where there is too much of it already, or it is closed."""
        if not self._places.acquire(blocking=False):
            return None
        try:
            future = self._late.submit(work)
        except RuntimeError:
            self._places.release()
            return None
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Finish the prompts under way and end the threads; those that nobody waits for are let go."""
        self._prompts.shutdown(wait=True)
        self._late.shutdown(wait=True, cancel_futures=True)
        self._pieces.shutdown(wait=True)
