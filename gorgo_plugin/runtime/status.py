"""The state of a live gateway as plain data, for its status page and its derived metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gorgo_plugin
from gorgo_plugin.runtime.metrics import Reading

if TYPE_CHECKING:
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
    }


def readings(runtime: Runtime) -> Iterator[Reading]:
    """The derived metrics, read off the router once."""
    snapshot = runtime.router.snapshot()
    yield "gorgo_active", (snapshot["policy"],), float(runtime.active)
    yield "gorgo_flights_swept_total", (), float(snapshot["counters"]["swept_flights"])
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
        if gauges is not None:
            yield "gorgo_engine_running", labels, gauges["running"]
            yield "gorgo_engine_waiting", labels, gauges["waiting"]
            yield "gorgo_engine_kv_usage_ratio", labels, gauges["kv_usage"]
            yield "gorgo_engine_age_seconds", labels, gauges["age_s"]


def without_userinfo(url: str) -> str:
    """The URL without what may be secret in it: user, password, query and fragment."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else str(parts.hostname)
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"
