"""What a router knows as plain data: written for status pages and metrics, and taken over by another router."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gorgo_plugin.engine_caches import EngineCaches
from gorgo_plugin.models import ModelState
from gorgo_plugin.replicas import Replicas
from gorgo_plugin.signals import Flights, GaugeTable, HealthTable, LatencyTable


@dataclass(frozen=True, slots=True)
class State:
    """The tables of a router, which holds its lock while they are read here.

    Attributes:
        models: those in use, by name.
        model: the model of a name, made when it is new.
    """

    replicas: Replicas
    latency: LatencyTable
    flights: Flights
    gauges: GaugeTable
    health: HealthTable
    models: Mapping[str, ModelState]
    model: Callable[[str], ModelState]
    engine_caches: EngineCaches

    def describe(self, now: float) -> dict[str, Any]:
        """Replicas, models and open flights, by name."""
        return {
            "replicas": {self.replicas[slot].name: self._replica(slot, now) for slot in self.replicas.slots},
            "models": {name: {"token_scale": model.scale} for name, model in self.models.items()},
            "flights": self._flights(),
        }

    def restore(self, state: Mapping[str, Any], now: float) -> None:
        """Take over round trips, rates and token scales of a `Router.snapshot()`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        _check(state)
        for name, known in state.get("models", {}).items():
            self.model(name).restore_scale(float(known["token_scale"]))
        for name, known in state.get("replicas", {}).items():
            slot = self.replicas.slot(name)
            if slot is None:
                continue
            latency = known["latency"]
            if latency["rtt_ms"] is not None:
                self.latency.restore(slot, latency["rtt_ms"], latency["spread_ms"], now - latency["age_s"])
            for model, rates in known["models"].items():
                self.model(model).rates.restore(slot, rates, now)
                self.model(model).decodes.restore(slot, rates, now)

    def _flights(self) -> dict[str, int]:
        counts = {self.replicas[slot].name: 0 for slot in self.replicas.slots}
        for slot, count in self.flights.open_per_slot().items():
            name = self.replicas.name(slot)
            if name is not None:
                counts[name] += count
        return counts

    def _replica(self, slot: int, now: float) -> dict[str, Any]:
        replica, one = self.replicas[slot], np.array([slot])
        return {
            "region": replica.region,
            "kv_tokens": self.engine_caches.kv_tokens(slot),
            "cache": self.engine_caches.describe(slot),
            "latency": self.latency.describe(slot, now),
            "health": self.health.describe(slot, now),
            "load": {
                "waiting": int(self.flights.column("waiting", one)[0]),
                "decoding": int(self.flights.column("decoding", one)[0]),
                "queued_tokens": float(self.flights.column("queued_tokens", one)[0]),
            },
            "gauges": self.gauges.describe(slot, now),
            "models": {
                name: {
                    **model.rates.describe(slot),
                    **model.decodes.describe(slot),
                    "index_tokens": round(model.index.held_blocks(slot) * model.block_tokens * model.scale),
                }
                for name, model in self.models.items()
            },
        }


_ABOVE_0 = ("ms_per_token", "token_scale")
_AT_LEAST_0 = ("rtt_ms", "spread_ms", "age_s", "overhead_ms", "tokens_per_pair", "itl_ms", "itl_per_request_ms")


def _check(state: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a number that would spoil every price."""
    models = state.get("models", {}).values()
    replicas = state.get("replicas", {}).values()
    rates = [known for replica in replicas for known in replica["models"].values()]
    for known in (*models, *(replica["latency"] for replica in replicas), *rates):
        for name, value in known.items():
            if value is None or name not in (*_ABOVE_0, *_AT_LEAST_0):
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and name in _ABOVE_0):
                raise ValueError(f"{name}: {value}")
