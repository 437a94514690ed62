"""The state of a live gateway as plain data, for its status page and its derived metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gorgo_plugin

if TYPE_CHECKING:
    from gorgo_plugin.runtime.metrics import Reading
    from gorgo_plugin.runtime.runtime import Runtime


def status(runtime: Runtime) -> dict[str, Any]:
    """What `/gorgo/status` answers. Its learned part is a state that `Router(settings, state=...)` takes over."""
    snapshot = runtime.router.snapshot()
    urls = {replica.name: without_userinfo(replica.url) for replica in runtime.settings.replicas}
    replicas = {
        name: {
            "url": urls.get(name),
            **replica,
            **{kind: asdict(watch) for kind, watch in runtime.watches(name)},
        }
        for name, replica in snapshot["replicas"].items()
    }
    return {
        **snapshot,
        "version": gorgo_plugin.__version__,
        "gateway": runtime.gateway,
        "worker": os.getpid(),
        "uptime_s": time.monotonic() - runtime.started_s,
        "mode": runtime.settings.mode,
        "active": runtime.active,
        "reason": runtime.active_reason,
        "settings_error": runtime.settings_error,
        "replicas": replicas,
        "prompts": runtime.router.builder.describe(),
        "state": runtime.kept(),
    }


def readings(runtime: Runtime) -> Iterator[Reading]:
    """The derived metrics, read off the router once."""
    snapshot = runtime.router.snapshot()
    yield "gorgo_active", (snapshot["policy"],), float(runtime.active)
    yield "gorgo_flights_swept_total", (), float(snapshot["counters"]["swept_flights"])
    yield from _tuning_readings(snapshot)
    for name, replica in snapshot["replicas"].items():
        labels = (name, replica["region"])
        latency, gauges = replica["latency"], replica["gauges"]
        yield "gorgo_flights_open", labels, float(snapshot["flights"].get(name, 0))
        yield "gorgo_queued_tokens", labels, replica["load"]["queued_tokens"]
        yield "gorgo_replica_available", labels, float(replica["health"]["available"])
        cache, estimated = replica["cache"], sum(model["index_tokens"] for model in replica["models"].values())
        exact = cache["source"] == "kv-events"
        yield "gorgo_index_tokens", labels, float(cache["events"]["tokens"] if exact else estimated)
        if cache["events"] is not None:
            yield "gorgo_kv_events_exact", labels, float(exact)
        if latency["rtt_ms"] is not None:
            yield "gorgo_rtt_seconds", labels, latency["rtt_ms"] / 1e3
            yield "gorgo_rtt_spread_seconds", labels, latency["spread_ms"] / 1e3
            yield "gorgo_rtt_age_seconds", labels, latency["age_s"]
        for model, learned in replica["models"].items():
            if not learned["samples"] and not runtime.metrics.names(model):
                continue  # clients may ask for any name
            yield "gorgo_prefill_seconds_per_token", (*labels, model), learned["ms_per_token"] / 1e3
            yield "gorgo_prefill_overhead_seconds", (*labels, model), learned["overhead_ms"] / 1e3
            if learned["itl_samples"]:
                yield "gorgo_itl_seconds", (*labels, model), learned["itl_ms"] / 1e3
                yield "gorgo_itl_seconds_per_request", (*labels, model), learned["itl_per_request_ms"] / 1e3
        if gauges is not None:
            yield "gorgo_engine_running", labels, gauges["running"]
            yield "gorgo_engine_waiting", labels, gauges["waiting"]
            yield "gorgo_engine_kv_usage_ratio", labels, gauges["kv_usage"]
            yield "gorgo_engine_age_seconds", labels, gauges["age_s"]


def step_line(step: Mapping[str, Any]) -> str:
    """One step of the tuner, as the log has it."""
    old, new, seen = step["incumbent"], step["candidate"], step["objective"]
    line = (
        f"step {step['number']}, {step['ending']}: W_rtt {old['rtt']:.3g} -> {new['rtt']:.3g}, "
        f"W_queue {old['queue']:.3g} -> {new['queue']:.3g}; {step['requests']} requests, {step['differing']} differing"
    )
    if seen is None or seen["incumbent_ms"] is None or seen["candidate_ms"] is None:
        return line
    return f"{line}; {seen['incumbent_ms']:.0f} -> {seen['candidate_ms']:.0f} ms (z {seen['z']:.1f})"


def _tuning_readings(snapshot: Mapping[str, Any]) -> Iterator[Reading]:
    for weight, value in snapshot["weights"].items():
        yield "gorgo_weight", (weight,), value
    tuning = snapshot["tuning"]
    if tuning is None:
        return
    yield "gorgo_tuning_sigma", (), tuning["sigma"]
    yield "gorgo_tuning_trial", (), float(tuning["candidate"] is not None)
    for weight, value in tuning["weights"].items():
        yield "gorgo_tuning_weight", (weight,), value
    for ending, count in tuning["endings"].items():
        yield "gorgo_tuning_trials_total", (ending,), float(count)


def without_userinfo(url: str) -> str:
    """The URL without what may be secret in it: user, password, query and fragment."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else str(parts.hostname)
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"
