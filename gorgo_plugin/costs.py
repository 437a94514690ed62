"""The costs of a decision, built only when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gorgo_plugin.decision import Cost
from gorgo_plugin.policies import View
from gorgo_plugin.signals.columns import FloatArray


class CostTable(Mapping[str, Cost]):
    """Replica name -> `Cost`, over the arrays a decision was made from."""

    __slots__ = ("_rows", "_scores", "_view")

    def __init__(self, view: View, scores: FloatArray) -> None:
        self._view = view
        self._scores = scores
        self._rows: dict[str, int] | None = None

    def __getitem__(self, name: str) -> Cost:
        if self._rows is None:
            self._rows = {known: row for row, known in enumerate(self._view.names)}
        return self._at(self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.names)

    def __len__(self) -> int:
        return len(self._view.names)

    def _at(self, row: int) -> Cost:
        view = self._view
        return Cost(
            network_ms=float(view.network_ms[row]),
            doubt_ms=float(view.doubt_ms[row]),
            queue_ms=float(view.queue_ms[row]),
            prefill_ms=float(view.prefill_ms[row]),
            total_ms=float(view.total_ms[row]),
            score=float(self._scores[row]),
            cached_tokens=round(float(view.cached_tokens[row])),
            uncached_tokens=round(float(view.uncached_tokens[row])),
        )
