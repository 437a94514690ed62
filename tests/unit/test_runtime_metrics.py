"""Metrics as Prometheus sees them."""

from __future__ import annotations

import os
import timeit
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gorgo_plugin.decision import Decision, Prompt
from gorgo_plugin.router import Router
from gorgo_plugin.runtime.metrics import DERIVED, EVENTS, Metrics, Reading
from gorgo_plugin.settings import Settings

SETTINGS = Settings.model_validate(
    {"replicas": [{"name": "a", "region": "east", "url": "http://127.0.0.1:1", "models": ["m"]}]}
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def decision(replica: str = "a") -> Decision:
    taken = Router(SETTINGS).explain(Prompt([1], model="m"))
    return replace(taken, replica=replica, reason="cheapest")


def series(registry: CollectorRegistry, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Labels without `worker` -> value, for one sample name; fails on duplicate series."""
    found: dict[tuple[tuple[str, str], ...], float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name == name:
                assert sample.labels["worker"] == str(os.getpid())
                key = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "worker"))
                assert key not in found
                found[key] = sample.value
    return found


def test_a_decision_is_counted_under_its_replica_model_policy_and_reason(registry: CollectorRegistry) -> None:
    metrics = Metrics(SETTINGS, registry)
    metrics.decided(decision(), "m", 50e-6)
    labels = {"replica": "a", "region": "east", "model": "m", "policy": "gorgo", "reason": "cheapest"}
    assert series(registry, "gorgo_decisions_total") == {tuple(sorted(labels.items())): 1.0}
    assert series(registry, "gorgo_decision_seconds_count") == {(("policy", "gorgo"),): 1.0}


def test_replicas_and_models_that_no_setting_names_are_counted_as_other(registry: CollectorRegistry) -> None:
    metrics = Metrics(SETTINGS, registry)
    for i in range(3):
        metrics.decided(decision(f"ghost-{i}"), f"ghost-{i}", 50e-6)
    ((labels, value),) = series(registry, "gorgo_decisions_total").items()
    assert value == 3.0
    assert {name: label for name, label in labels if label == "other"} == {
        "replica": "other",
        "region": "other",
        "model": "other",
    }


def test_a_prediction_error_keeps_its_size_and_its_sign(registry: CollectorRegistry) -> None:
    metrics = Metrics(SETTINGS, registry)
    metrics.first_token("a", "m", 0.5, 0.2)
    metrics.first_token("a", "m", 0.1, 0.2)
    metrics.first_token("a", "m", 0.1, None)
    sums = {dict(labels)["sign"]: value for labels, value in series(registry, "gorgo_ttft_error_seconds_sum").items()}
    assert sums == {"late": pytest.approx(0.3), "early": pytest.approx(0.1)}
    assert sum(series(registry, "gorgo_ttft_seconds_count").values()) == 3


def test_estimated_cached_tokens_are_counted_only_where_the_engine_reports_its_own(registry: CollectorRegistry) -> None:
    metrics = Metrics(SETTINGS, registry)
    metrics.usage("a", "m", 100, 64, None)
    metrics.usage("a", "m", 100, 64, 48)
    assert sum(series(registry, "gorgo_prompt_tokens_total").values()) == 200
    assert sum(series(registry, "gorgo_estimated_cached_tokens_total").values()) == 64
    assert sum(series(registry, "gorgo_reported_cached_tokens_total").values()) == 48


def test_two_of_them_in_one_process_share_counters_and_make_no_duplicate_series(registry: CollectorRegistry) -> None:
    first, second = Metrics(SETTINGS, registry), Metrics(SETTINGS, registry)
    readings: list[Reading] = [("gorgo_flights_open", ("a", "east"), 2.0), ("gorgo_rtt_seconds", ("a", "east"), 0.1)]
    first.read_from(lambda: readings)
    second.read_from(lambda: readings)
    first.fell_back("no-prompt")
    second.fell_back("no-prompt")
    assert series(registry, "gorgo_fallbacks_total") == {(("reason", "no-prompt"),): 2.0}
    assert list(series(registry, "gorgo_flights_open").values()) == [4.0]
    assert list(series(registry, "gorgo_rtt_seconds").values()) == [0.1]


def test_derived_metrics_are_read_when_asked_and_end_with_close(registry: CollectorRegistry) -> None:
    metrics, open_flights = Metrics(SETTINGS, registry), 1.0
    metrics.read_from(lambda: [("gorgo_flights_open", ("a", "east"), open_flights)])
    assert list(series(registry, "gorgo_flights_open").values()) == [1.0]
    open_flights = 0.0
    assert list(series(registry, "gorgo_flights_open").values()) == [0.0]
    metrics.close()
    assert series(registry, "gorgo_flights_open") == {}


def test_names_follow_prometheus_conventions() -> None:
    families = (*EVENTS, *DERIVED)
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name.startswith("gorgo_")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert not family.name.endswith("_ms")
        assert (family.kind == "histogram") == bool(family.buckets)


def test_every_event_can_be_reported(registry: CollectorRegistry) -> None:
    metrics = Metrics(SETTINGS, registry)
    metrics.prepared(0.001, "inline")
    metrics.prompt_error("m")
    metrics.decided(decision(), "m", 1e-4)
    metrics.first_token("a", "m", 0.1, 0.2)
    metrics.usage("a", "m", 100, 64, 64)
    metrics.failed("a", "timeout")
    metrics.fell_back("error")
    metrics.probe_failed("a", "refused")
    metrics.scrape_failed("a", "refused")
    metrics.settings_refused()
    for family in EVENTS:
        name = f"{family.name}_count" if family.kind == "histogram" else family.name
        ((labels, value),) = series(registry, name).items()
        assert value > 0
        assert {label for label, _ in labels} == set(family.labels)


def test_an_event_costs_microseconds(registry: CollectorRegistry) -> None:
    metrics, routed = Metrics(SETTINGS, registry), decision()
    best_s = min(timeit.repeat(lambda: metrics.decided(routed, "m", 50e-6), number=500, repeat=5)) / 500
    assert best_s < 100e-6
