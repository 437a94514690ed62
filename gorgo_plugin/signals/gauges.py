"""What the engines say of themselves, each value with its age. Gauges lag by a step or more: never a substitute for
counting one's own dispatches, but what the papers' baselines read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from gorgo_plugin.signals.columns import FloatArray, Rows, Table


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """One reading of an engine's metrics page (vLLM or SGLang).

    Attributes:
        running: requests in the running batch.
        waiting: requests queued in the engine.
        kv_usage: share of the KV cache in use, 0 to 1.
        used_tokens: KV tokens in use where the engine says so (SGLang), or None.
    """

    running: float
    waiting: float
    kv_usage: float
    used_tokens: float | None = None


class GaugeTable(Table):
    """The last reading per replica."""

    def __init__(self) -> None:
        super().__init__(running=math.nan, waiting=math.nan, used_tokens=math.nan)
        self._last: dict[int, tuple[float, EngineGauges]] = {}

    def reset(self, slot: int) -> None:
        """Forget the reading of one replica."""
        super().reset(slot)
        self._last.pop(slot, None)

    def observe(self, slot: int, gauges: EngineGauges, kv_tokens: int, now_s: float) -> None:
        """Take in a reading; used tokens are derived from `kv_usage` where the engine gives only that."""
        self._last[slot] = (now_s, gauges)
        used = gauges.used_tokens if gauges.used_tokens is not None else gauges.kv_usage * kv_tokens
        cells = self._columns.cells
        cells["running"][slot], cells["waiting"][slot] = gauges.running, gauges.waiting
        cells["used_tokens"][slot] = used

    def column(self, name: str, rows: Rows) -> FloatArray:
        """`running`, `waiting` or `used_tokens`; NaN where the replica was never read."""
        return self._columns[name][rows]

    def describe(self, slot: int, now_s: float) -> dict[str, float | None] | None:
        """One replica's reading with its age, None where there is none."""
        last = self._last.get(slot)
        return None if last is None else {**asdict(last[1]), "age_s": max(now_s - last[0], 0.0)}
