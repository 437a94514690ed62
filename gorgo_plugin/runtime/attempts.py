"""One request at one replica, as an adapter follows it: what it sees goes to the router and to the metrics."""

from __future__ import annotations

import time

from gorgo_plugin.decision import Decision, Expected, Prompt
from gorgo_plugin.runtime.outcomes import Usage
from gorgo_plugin.runtime.runtime import Runtime
from gorgo_plugin.runtime.threads import LatePrompt


class Attempt:
    """One request at one replica. Every ending is taken once; what comes after it is ignored.

    Attributes:
        flight_id: its flight in the router.
        replica, region: where it is.
        expected: of its replica; None once it was moved, as that was not predicted.
        streamed: the first token of its answer will be seen.
        closed: how it ended: `finished` or a kind of failure; None while it has not.
    """

    def __init__(self, runtime: Runtime, decision: Decision, prompt: Prompt) -> None:
        # Not the decision itself: it holds on to the prompt, and records outlive their requests.
        self.flight_id, self.replica, self.region = decision.flight_id, decision.replica, decision.region
        self.expected: Expected | None = decision.costs.expected()
        self.streamed = prompt.stream
        self.closed: str | None = None
        self._runtime = runtime
        self._router = runtime.router
        self._model = prompt.model
        self._started_s = time.monotonic()
        self._began = False
        self._usage_seen = False
        if isinstance(prompt, LatePrompt):
            prompt.attach(self._router, self.flight_id)

    @property
    def runtime(self) -> Runtime:
        """The runtime that routed it."""
        return self._runtime

    @property
    def began(self) -> bool:
        """Whether its first token was seen."""
        return self._began

    def first_token(self) -> None:
        """The first token of a streamed answer has been seen."""
        if self._began or self.closed is not None:
            return
        self._began = True
        self._router.first_token(self.flight_id)
        ttft_s = time.monotonic() - self._started_s
        predicted_s = None if self.expected is None else self.expected.ttft_ms / 1000.0
        self._runtime.metrics.first_token(self.replica, self._model, ttft_s, predicted_s)

    def usage(self, usage: Usage) -> None:
        """What the engine counted. Nothing is believed of an attempt that failed or of a count of zero."""
        if self._usage_seen or not usage.prompt_tokens or self.closed not in (None, "finished"):
            return
        self._usage_seen = True
        self._router.usage(
            self.flight_id,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
        )
        expected = self.expected
        estimated, reported = (0, None) if expected is None else (expected.cached_tokens, usage.cached_tokens)
        self._runtime.metrics.usage(self.replica, self._model, usage.prompt_tokens, estimated, reported)

    def moved(self, replica: str, failed: bool) -> None:
        """The gateway sent it elsewhere; `failed` as in `Router.moved`."""
        if self.closed is None and replica != self.replica:
            self._router.moved(self.flight_id, replica, failed)
            if failed:
                self._runtime.metrics.failed(self.replica, "moved")
            regions = {known.name: known.region for known in self._runtime.settings.replicas}
            self.replica, self.region, self.expected = replica, regions.get(replica, self.region), None

    def tried_again(self) -> None:
        """The gateway tried the same replica anew: how long that takes was not predicted and says nothing of it."""
        if self.closed is None:
            self._router.moved(self.flight_id, self.replica)
            self.expected = None

    def headers(self) -> dict[str, str]:
        """Headers of the answer, by `response_headers`."""
        shown = self._runtime.settings.response_headers
        if shown == "none":
            return {}
        headers = {"x-gorgo-region": self.region}
        if shown == "debug":
            headers["x-gorgo-replica"] = self.replica
            if self.expected is not None:
                headers["x-gorgo-predicted-ttft-ms"] = f"{self.expected.ttft_ms:.1f}"
                headers["x-gorgo-cached-tokens"] = str(self.expected.cached_tokens)
        return headers

    def finish(self) -> None:
        """The answer is complete."""
        if self.closed is None:
            self.closed = "finished"
            self._router.finish(self.flight_id)

    def fail(self, kind: str) -> None:
        """The attempt ended without a complete answer; `kind` as in `Router.fail`."""
        if self.closed is None:
            self.closed = kind
            self._router.fail(self.flight_id, kind)
            self._runtime.metrics.failed(self.replica, kind)
