"""Prometheus metrics of a live gateway.

Events are noted as they happen and counted some hundred at a time, before Prometheus reads them; what can be read off
the router (open flights, round trips, gauges) is read when Prometheus asks. Every series carries the process id as
`worker`, so that the counters of several workers behind one port stay apart. In prometheus_client's multi-process mode
(PROMETHEUS_MULTIPROC_DIR) only the events are exported: that mode reads files, and there the derived gauges have none.

Several Runtimes of one process share the families of a registry: events add up, open flights too, and for the other
derived gauges one of them answers.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gorgo_plugin.decision import Decision, verdict_on
from gorgo_plugin.settings import Settings

NOTED_EVENTS = 512  # counted at once; each costs a third of what it would cost by itself, between other work
OTHER = "other"  # label of replicas and models that the settings do not name, so that clients cannot make series

# Seconds; a decision takes tens of microseconds, a cold long prompt a tenth of a second.
DECISION_BUCKETS = (25e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 0.02)
PREPARE_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
TTFT_BUCKETS = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 30.0, 60.0)
ERROR_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 15.0)


@dataclass(frozen=True)
class Family:
    """One metric of this package: its name as scraped, kind, own labels (`worker` comes on top) and meaning."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


_REPLICA = ("replica", "region")
_FLIGHT = ("replica", "region", "model")

EVENTS: tuple[Family, ...] = (
    Family("gorgo_decisions_total", "counter", (*_FLIGHT, "policy", "reason"), "Requests routed, by reason."),
    Family("gorgo_decision_seconds", "histogram", ("policy",), "Time to decide.", DECISION_BUCKETS),
    Family(
        "gorgo_prepare_seconds",
        "histogram",
        ("where",),
        "Time from request body to prompt, by where it was finished: inline or executor.",
        PREPARE_BUCKETS,
    ),
    Family("gorgo_ttft_seconds", "histogram", _FLIGHT, "Time from dispatch to the first token.", TTFT_BUCKETS),
    Family(
        "gorgo_ttft_error_seconds",
        "histogram",
        (*_FLIGHT, "sign"),
        "Distance of the first token from its prediction; sign says whether it came late or early.",
        ERROR_BUCKETS,
    ),
    Family("gorgo_prompt_tokens_total", "counter", _FLIGHT, "Prompt tokens of requests whose usage was reported."),
    Family(
        "gorgo_estimated_cached_tokens_total",
        "counter",
        _FLIGHT,
        "Prompt tokens believed cached, of requests whose cached tokens were reported.",
    ),
    Family("gorgo_reported_cached_tokens_total", "counter", _FLIGHT, "Prompt tokens that engines reported as cached."),
    Family(
        "gorgo_cached_estimates_total",
        "counter",
        (*_FLIGHT, "verdict"),
        "Requests whose cached tokens were reported, by how the estimate stood to that: within-block, over, under.",
    ),
    Family("gorgo_failures_total", "counter", (*_REPLICA, "kind"), "Attempts that failed, by kind."),
    Family("gorgo_fallbacks_total", "counter", ("reason",), "Choices left to the gateway's own strategy, by reason."),
    Family("gorgo_prompt_errors_total", "counter", ("model",), "Request bodies that could not be read as a prompt."),
    Family("gorgo_probe_failures_total", "counter", (*_REPLICA, "kind"), "Probes without an answer, by kind."),
    Family("gorgo_scrape_failures_total", "counter", (*_REPLICA, "kind"), "Engine metrics pages not read, by kind."),
    Family("gorgo_kv_events_total", "counter", _REPLICA, "KV-cache events of the engine taken in."),
    Family(
        "gorgo_kv_event_troubles_total",
        "counter",
        (*_REPLICA, "kind"),
        "Breaks in the KV-cache events of an engine, by kind: bad-frame, gap (a replay may have filled it), and those "
        "that dropped the engine's blocks: unfilled-gap, restart, lost, error.",
    ),
    Family("gorgo_settings_errors_total", "counter", (), "Settings refused by a reload; the last good ones stay."),
)

DERIVED: tuple[Family, ...] = (
    Family("gorgo_active", "gauge", ("policy",), "1 while the plugin is in effect, 0 while only the gateway serves."),
    Family("gorgo_flights_open", "gauge", _REPLICA, "Attempts dispatched and not ended."),
    Family("gorgo_queued_tokens", "gauge", _REPLICA, "Uncached prompt tokens dispatched, still without a first token."),
    Family("gorgo_rtt_seconds", "gauge", _REPLICA, "Round trip, moving average."),
    Family("gorgo_rtt_spread_seconds", "gauge", _REPLICA, "Mean deviation of the round trip."),
    Family("gorgo_rtt_age_seconds", "gauge", _REPLICA, "Time since the round trip was last measured."),
    Family("gorgo_replica_available", "gauge", _REPLICA, "1 while the replica may be chosen."),
    Family(
        "gorgo_kv_events_exact", "gauge", _REPLICA, "1 while the engine's own KV-cache events say what it has cached."
    ),
    Family("gorgo_index_tokens", "gauge", _REPLICA, "Tokens believed cached."),
    Family("gorgo_prefill_seconds_per_token", "gauge", _FLIGHT, "Learned time of an uncached prompt token."),
    Family("gorgo_prefill_overhead_seconds", "gauge", _FLIGHT, "Learned time of a first token whatever the prompt."),
    Family("gorgo_itl_seconds", "gauge", _FLIGHT, "Learned time between tokens, but for those that decode beside."),
    Family("gorgo_itl_seconds_per_request", "gauge", _FLIGHT, "What each request that decodes adds to it, learned."),
    Family("gorgo_engine_running", "gauge", _REPLICA, "Requests running, as the engine says."),
    Family("gorgo_engine_waiting", "gauge", _REPLICA, "Requests waiting, as the engine says."),
    Family("gorgo_engine_kv_usage_ratio", "gauge", _REPLICA, "Share of the KV cache in use, as the engine says."),
    Family("gorgo_engine_age_seconds", "gauge", _REPLICA, "Time since the engine's gauges were last read."),
    Family("gorgo_weight", "gauge", ("weight",), "Weight in force, by name: rtt, queue."),
    Family("gorgo_tuning_weight", "gauge", ("weight",), "Weight that tuning has learned; with propose: would apply."),
    Family("gorgo_tuning_sigma", "gauge", (), "Step of the search for weights, in log space."),
    Family("gorgo_tuning_trial", "gauge", (), "1 while a candidate is under test."),
    Family(
        "gorgo_tuning_trials_total",
        "counter",
        ("ending",),
        "Trials of candidates, by how they ended: accepted, worse, guarded, undecided, foreseen (as worse: not tried), "
        "same (as the incumbent in all decisions).",
    ),
    Family("gorgo_flights_swept_total", "counter", (), "Flights released by the sweep because nothing ended them."),
)

Count: TypeAlias = Callable[[float], None]
"""Adds an amount to one series: a counter's `inc` or a histogram's `observe`."""
Reading: TypeAlias = tuple[str, tuple[str, ...], float]
"""Name of a derived family, the values of its labels, its value."""
_ADDED_UP = frozenset({"gorgo_flights_open", "gorgo_queued_tokens", "gorgo_flights_swept_total"})


class Metrics:
    """Counts events, thread-safely. A request takes a handful of them, so each is but put on a list."""

    def __init__(self, settings: Settings, registry: CollectorRegistry = REGISTRY) -> None:
        self._families, self._derived = _registered(registry)
        self._source: Source | None = None
        self._counts: dict[tuple[str, ...], Count] = {}
        self._noted: deque[tuple[Count, float]] = deque()
        self._worker = str(os.getpid())
        self._derived.noting.add(self)
        self.set_settings(settings)

    def set_settings(self, settings: Settings) -> None:
        """Take over the names that may become labels."""
        self._regions = {replica.name: replica.region for replica in settings.replicas}
        served = {model for replica in settings.replicas for model in replica.models or ()}
        self._models = frozenset({"", *settings.models, *served})
        self._policy = settings.policy
        self._flights = {
            (name, model): (name, region, model) for name, region in self._regions.items() for model in self._models
        }
        own = {name: model.block_tokens for name, model in settings.models.items() if model.block_tokens is not None}
        self._block_tokens, self._own_block_tokens = settings.block_tokens, own

    def read_from(self, readings: Callable[[], Iterable[Reading]]) -> None:
        """Have the derived metrics read there whenever Prometheus asks, until `close`."""
        self.close()
        self._source = Source(readings, self._worker)
        self._derived.sources.add(self._source)

    def close(self) -> None:
        """Stop the derived metrics. What was counted stays: it belongs to the process."""
        self.flush()
        if self._source is not None:
            self._derived.sources.discard(self._source)
            self._source = None

    def flush(self) -> None:
        """Count what was noted."""
        noted, totals = self._noted, dict[Count, float]()
        with contextlib.suppress(IndexError):  # empty, or another thread is at it as well
            while True:
                count, amount = noted.popleft()
                if count.__name__ == "inc":
                    totals[count] = totals.get(count, 0.0) + amount
                else:
                    count(amount)
        for count, total in totals.items():
            count(total)

    def prepared(self, seconds: float, where: Literal["inline", "executor"]) -> None:
        """A prompt was prepared."""
        self._note(seconds, "gorgo_prepare_seconds", where)

    def prompt_error(self, model: str) -> None:
        """A request body could not be read."""
        self._note(1.0, "gorgo_prompt_errors_total", self._model(model))

    def decided(self, decision: Decision, model: str, seconds: float) -> None:
        """A request was routed in `seconds`."""
        labels = (*self._flight(decision.replica, model), self._policy, decision.reason)
        self._note(1.0, "gorgo_decisions_total", *labels)
        self._note(seconds, "gorgo_decision_seconds", self._policy)

    def first_token(self, replica: str, model: str, ttft_s: float, predicted_s: float | None) -> None:
        """A streamed answer began `ttft_s` after its dispatch; `predicted_s` is None when it was unpriced."""
        labels = self._flight(replica, model)
        self._note(ttft_s, "gorgo_ttft_seconds", *labels)
        if predicted_s is not None:
            error_s = ttft_s - predicted_s
            sign = "late" if error_s >= 0 else "early"
            self._note(abs(error_s), "gorgo_ttft_error_seconds", *labels, sign)

    def usage(
        self, replica: str, model: str, prompt_tokens: int, estimated_cached: int, reported_cached: int | None
    ) -> None:
        """An engine reported its usage; `reported_cached` is None when it does not tell cached tokens."""
        labels = self._flight(replica, model)
        self._note(max(prompt_tokens, 0), "gorgo_prompt_tokens_total", *labels)
        if reported_cached is not None:
            self._note(max(estimated_cached, 0), "gorgo_estimated_cached_tokens_total", *labels)
            self._note(max(reported_cached, 0), "gorgo_reported_cached_tokens_total", *labels)
            verdict = verdict_on(
                estimated_cached, reported_cached, self._own_block_tokens.get(model, self._block_tokens)
            )
            self._note(1.0, "gorgo_cached_estimates_total", *labels, verdict)

    def failed(self, replica: str, kind: str) -> None:
        """An attempt failed; kinds as in `Router.fail`."""
        self._note(1.0, "gorgo_failures_total", *self._replica(replica), kind)

    def fell_back(self, reason: str) -> None:
        """The gateway's own strategy made a choice; `reason` is one of a fixed set of kebab-case words."""
        self._note(1.0, "gorgo_fallbacks_total", reason)

    def probe_failed(self, replica: str, kind: str) -> None:
        """A probe got no answer."""
        self._note(1.0, "gorgo_probe_failures_total", *self._replica(replica), kind)

    def scrape_failed(self, replica: str, kind: str) -> None:
        """An engine's metrics page could not be read."""
        self._note(1.0, "gorgo_scrape_failures_total", *self._replica(replica), kind)

    def kv_events(self, replica: str, events: int) -> None:
        """Events of an engine's KV cache were taken in."""
        self._note(float(events), "gorgo_kv_events_total", *self._replica(replica))

    def kv_trouble(self, replica: str, kind: str) -> None:
        """The events of an engine's KV cache were broken."""
        self._note(1.0, "gorgo_kv_event_troubles_total", *self._replica(replica), kind)

    def settings_refused(self) -> None:
        """A reload was refused."""
        self._note(1.0, "gorgo_settings_errors_total")

    def _note(self, amount: float, *key: str) -> None:
        """Note an event; `key` is the family's name and the values of its own labels."""
        count = self._counts.get(key)
        if count is None:
            name, *labels = key
            series = self._families[name].labels(*labels, self._worker)
            count = self._counts[key] = series.inc if isinstance(self._families[name], Counter) else series.observe
        self._noted.append((count, amount))
        if len(self._noted) >= NOTED_EVENTS:
            self.flush()

    def names(self, model: str) -> bool:
        """Whether the settings name a model; one of no name is meant, too."""
        return model in self._models

    def _model(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _replica(self, replica: str) -> tuple[str, str]:
        region = self._regions.get(replica)
        return (OTHER, OTHER) if region is None else (replica, region)

    def _flight(self, replica: str, model: str) -> tuple[str, str, str]:
        known = self._flights.get((replica, model))
        return (*self._replica(replica), self._model(model)) if known is None else known


@dataclass(frozen=True, eq=False)
class Source:
    """Where the derived metrics of one Runtime are read."""

    readings: Callable[[], Iterable[Reading]]
    worker: str


class DerivedMetrics(Collector):
    """Reads the derived metrics of all Runtimes of the process when Prometheus asks."""

    def __init__(self) -> None:
        self.sources: weakref.WeakSet[Source] = weakref.WeakSet()
        self.noting: weakref.WeakSet[Metrics] = weakref.WeakSet()

    def describe(self) -> Sequence[Metric]:
        """Nothing: a registry that knows no names beforehand does not have to collect when this is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family each, without duplicate series even when two Runtimes serve the same replica."""
        for metrics in tuple(self.noting):  # this is registered first, so it is asked before the counts are read
            metrics.flush()
        values: dict[str, dict[tuple[str, ...], float]] = {}
        for source in tuple(self.sources):
            for name, labels, value in source.readings():
                series, key = values.setdefault(name, {}), (*labels, source.worker)
                series[key] = series.get(key, 0.0) + value if name in _ADDED_UP else value
        for family in DERIVED:
            type_ = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = type_(family.name, family.help, labels=[*family.labels, "worker"])
            for key, value in values.get(family.name, {}).items():
                metric.add_metric(list(key), value)
            yield metric


_lock = threading.Lock()
_by_registry: weakref.WeakKeyDictionary[CollectorRegistry, tuple[dict[str, Any], DerivedMetrics]] = (
    weakref.WeakKeyDictionary()
)


def _registered(registry: CollectorRegistry) -> tuple[dict[str, Any], DerivedMetrics]:
    """The families of a registry, registered once however many Runtimes there are."""
    with _lock:
        if registry not in _by_registry:
            derived = DerivedMetrics()
            registry.register(derived)
            _by_registry[registry] = ({family.name: _create(family, registry) for family in EVENTS}, derived)
        return _by_registry[registry]


def _create(family: Family, registry: CollectorRegistry) -> Counter | Histogram:
    labels = [*family.labels, "worker"]
    if family.kind == "counter":
        return Counter(family.name, family.help, labels, registry=registry)
    return Histogram(family.name, family.help, labels, registry=registry, buckets=family.buckets)
