"""The threads that prepare long prompts, so that the event loop goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from gorgo_plugin.decision import Prompt
from gorgo_plugin.prompt.vocabulary import Spread


class PromptThreads:
    """Some threads that each prepare a prompt, and as many more that tokenize pieces for them.

    They are two pools: a prompt that waits for its pieces must not hold the thread that they wait for.
    """

    def __init__(self, threads: int) -> None:
        """The threads start with the first prompts."""
        self._prompts = ThreadPoolExecutor(threads, thread_name_prefix="gorgo-prepare")
        self._pieces = ThreadPoolExecutor(threads, thread_name_prefix="gorgo-tokenize")

    def run(self, work: Callable[[Spread], Prompt]) -> Future[Prompt]:
        """Start `work`, which gets what spreads the tokenizing.

        Raises:
            RuntimeError: closed.
        """
        return self._prompts.submit(work, self._pieces.map)

    def close(self) -> None:
        """Finish the prompts under way and end the threads."""
        self._prompts.shutdown(wait=True)
        self._pieces.shutdown(wait=True)
