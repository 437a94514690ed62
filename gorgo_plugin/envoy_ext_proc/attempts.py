"""One request behind Envoy, joined from its two streams: the one that routed it and the one that watches its answer."""

from __future__ import annotations

import asyncio

from gorgo_plugin.decision import Decision, Prompt
from gorgo_plugin.envoy_ext_proc.messages import Served
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.attempts import Attempt
from gorgo_plugin.runtime.outcomes import kind_of_status

_CLIENTS_FAULT = frozenset({401, 403, 404})  # clients bring their own keys and model names here
_UPSTREAM = "via_upstream"  # Envoy's word for an answer that came from a replica


class EnvoyAttempt(Attempt):
    """One request behind Envoy.

    Attributes:
        id: names it to the observing stream.
        endpoint: its path, as one of `prompt.endpoints`.
        reads_usage: its answer ends with a usage.
        over: what the stream that routed it waits for.
    """

    def __init__(
        self, runtime: Runtime, decision: Decision, prompt: Prompt, id: str, endpoint: str, reads_usage: bool
    ) -> None:
        super().__init__(runtime, decision, prompt)
        self.id = id
        self.endpoint = endpoint
        self.reads_usage = reads_usage
        self.over: asyncio.Future[None] | None = None
        self._served = False
        self._unsettled = False

    def served(self, served: Served) -> None:
        """The answer's headers have come."""
        self._served = True
        if served.attempts > 1 and served.replica in (None, self.replica):
            self.tried_again()
        elif served.replica is not None:
            self.moved(served.replica, failed=self._runtime.settings.mode == "on")
        if served.status >= 400:
            self.fail(failure_kind(served))

    def left(self, watched: bool) -> None:
        """The request is over. Envoy does not say whether it was answered or its client left.

        Args:
            watched: pieces of the answer are seen, so one that was complete has been or will be seen in a moment, and
                `settle` decides after it.
        """
        if self.closed is not None:
            return
        if not self._served:
            self.fail("disconnect")
        elif not watched or (self.began and not self.reads_usage):
            self.finish()
        else:
            self._unsettled = True

    def end_wait(self, error: Exception | None = None) -> None:
        """Let its stream go, with an error or without, unless a reset has."""
        if self.over is None or self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)

    def settle(self) -> None:
        """Nothing more will be seen of a request that left: decide how it ended."""
        if not self._unsettled or self.closed is not None:
            return
        if self.began:
            self.finish()
        else:
            self.fail("disconnect")


def failure_kind(served: Served) -> str:
    """The kind of failure, as `Router.fail` takes it, of an answer with an error's status."""
    if served.details in ("", _UPSTREAM):
        if served.status in _CLIENTS_FAULT:
            return "invalid"
        return kind_of_status(served.status)
    if "no_healthy_upstream" in served.details or "connection_failure" in served.details:
        return "unreached"
    if "timeout" in served.details:
        return "timeout"
    return "rejected" if served.details.startswith("upstream_reset") else "disconnect"
