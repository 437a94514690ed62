"""The Prometheus page of a mock replica, under the names vLLM or SGLang use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from gorgo_plugin.fleet.engine import EngineProfile, Gauges

MetricsStyle = Literal["vllm", "sglang"]
_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)


class _EngineCollector(Collector):
    """Reads the engine's gauges when the page is asked for; they are as old as the engine's last step."""

    def __init__(
        self,
        model: str,
        style: MetricsStyle,
        profile: EngineProfile,
        gauges: Callable[[], Gauges],
        started_s: Callable[[], float],
    ) -> None:
        self._labels = {"model_name": model, "engine": "0"} if style == "vllm" else {"model_name": model}
        self._style = style
        self._profile = profile
        self._gauges = gauges
        self._started_s = started_s

    def collect(self) -> Iterator[Metric]:
        """The page's metrics."""
        started = GaugeMetricFamily("process_start_time_seconds", "Start time of the process, Unix seconds.")
        started.add_metric([], self._started_s())
        yield started
        yield from self._vllm() if self._style == "vllm" else self._sglang()

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _vllm(self) -> Iterator[Metric]:
        gauges, profile = self._gauges(), self._profile
        yield self._gauge("vllm:num_requests_running", "Requests being computed.", gauges.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests not admitted yet.", gauges.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", gauges.kv_usage)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", gauges.prefix_queries_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found cached.", gauges.prefix_hits_tokens)
        # vLLM exposes it as a gauge of value 1, not as the `_info` type of OpenMetrics.
        config = {
            "block_size": str(profile.block_tokens),
            "num_gpu_blocks": str(profile.kv_tokens // profile.block_tokens),
            "kv_cache_size_tokens": str(profile.kv_tokens),
            "enable_prefix_caching": "True",
        }
        yield InfoMetricFamily("vllm:cache_config", "The KV cache.", value=config)

    def _sglang(self) -> Iterator[Metric]:
        gauges = self._gauges()
        queries = gauges.prefix_queries_tokens
        rate = gauges.prefix_hits_tokens / queries if queries else 0.0
        yield self._gauge("sglang:num_running_reqs", "Requests being computed.", gauges.running)
        yield self._gauge("sglang:num_queue_reqs", "Requests not admitted yet.", gauges.waiting)
        yield self._gauge("sglang:num_used_tokens", "Tokens held by requests.", gauges.used_tokens)
        yield self._gauge("sglang:token_usage", "Share of KV tokens in use, 0 to 1.", gauges.kv_usage)
        yield self._gauge("sglang:cache_hit_rate", "Share of prompt tokens found cached.", rate)


class EngineMetrics:
    """The page and the histogram that requests feed."""

    def __init__(
        self,
        model: str,
        style: MetricsStyle,
        profile: EngineProfile,
        gauges: Callable[[], Gauges],
        started_s: Callable[[], float],
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model, style, profile, gauges, started_s))
        ttft = Histogram(
            f"{style}:time_to_first_token_seconds",
            "Time to first token.",
            ["model_name"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._ttft = ttft.labels(model)

    def observe_ttft(self, seconds: float) -> None:
        """Count one request's time to first token, as the engine saw it."""
        self._ttft.observe(seconds)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)
