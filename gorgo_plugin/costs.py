"""The costs of a decision and its failover order, worked out only when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator

from gorgo_plugin.decision import Cost, Costs, Decision, Expected, Prompt
from gorgo_plugin.policies import View
from gorgo_plugin.policies.base import total_ms
from gorgo_plugin.policies.pick import Choice
from gorgo_plugin.settings import ReplicaSettings

BY_ESTIMATE = "-by-estimate"  # ends the reason of a decision on a prompt whose length is partly estimated


def decision(
    request_id: str, flight_id: int, chosen: ReplicaSettings, view: View, choice: Choice, prompt: Prompt
) -> Decision:
    """What was decided, with its costs still to be worked out."""
    reason = f"{choice.reason}{BY_ESTIMATE}" if prompt.estimated_tokens else choice.reason
    return Decision(request_id, flight_id, chosen.name, chosen.region, reason, CostTable(view, choice))


class CostTable(Costs):
    """Replica name -> `Cost`, over the arrays a decision was made from."""

    __slots__ = ("_choice", "_view")

    def __init__(self, view: View, choice: Choice) -> None:
        self._view = view
        self._choice = choice

    def __getitem__(self, name: str) -> Cost:
        try:
            row = self._view.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        return self._at(row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.names)

    def __len__(self) -> int:
        return len(self._view.names)

    def expected(self) -> Expected:
        """Of the chosen one."""
        row = self._choice.row
        return Expected(self._view.ttft_ms(row), round(self._view.cached_tokens.item(row)))

    def ranked(self) -> list[str]:
        """Names, the chosen one first, then the cheapest."""
        return [self._view.names[row] for row in self._choice.ranked]

    def _at(self, row: int) -> Cost:
        view = self._view
        network_ms, doubt_ms = view.network_ms.item(row), view.doubt_ms.item(row)
        queue_ms, prefill_ms = view.queue_ms.item(row), view.prefill_ms.item(row)
        blocking_ms, next_turn_ms = view.blocking_ms.item(row), view.next_turn_ms.item(row)
        decode_ms = 0.0 if view.decode_ms is None else view.decode_ms.item(row)
        others_ms = blocking_ms + next_turn_ms + decode_ms
        return Cost(
            network_ms=network_ms,
            doubt_ms=doubt_ms,
            queue_ms=queue_ms,
            prefill_ms=prefill_ms,
            blocking_ms=blocking_ms,
            next_turn_ms=next_turn_ms,
            decode_ms=decode_ms,
            total_ms=total_ms(view.weights, network_ms, doubt_ms, queue_ms, prefill_ms, others_ms),
            score=self._choice.scores.item(row),
            cached_tokens=round(view.cached_tokens.item(row)),
            uncached_tokens=round(view.uncached_tokens.item(row)),
        )
