"""Which replicas to leave out for now: failed probes, and attempts that failed before an answer began."""

from __future__ import annotations

from dataclasses import dataclass

from gorgo_plugin.settings import HealthSettings


@dataclass(slots=True)
class _Health:
    probe_ok: bool = True
    failures: int = 0
    closed_until_s: float = 0.0
    failed_at_s: float = 0.0
    trial: int | None = None
    trial_until_s: float = 0.0


class HealthTable:
    """A circuit breaker per replica. After a failure it pauses, each time twice as long; then one trial decides."""

    def __init__(self, settings: HealthSettings) -> None:
        self.settings = settings
        self._rows: dict[int, _Health] = {}
        self._troubled: set[int] = set()  # rows that are not in perfect health; usually none, and then all is fast

    def grow(self, rows: int) -> None:
        """Let there be a row for each slot below `rows`."""
        for slot in range(rows):
            self._rows.setdefault(slot, _Health())

    def reset(self, slot: int) -> None:
        """Put one replica back into perfect health."""
        self._rows[slot] = _Health()
        self._troubled.discard(slot)

    def probed(self, slot: int, ok: bool) -> None:
        """A probe's verdict. A good one does not end a pause: the port may be open while requests fail."""
        row = self._rows[slot]
        row.probe_ok = ok
        self._note(slot, row)

    def failed(self, slot: int, dispatched_s: float, now_s: float) -> None:
        """An attempt failed. Attempts under way when the last failure was seen count with that one."""
        row = self._rows[slot]
        if row.failures and dispatched_s <= row.failed_at_s:
            return
        row.trial = None
        row.failures += 1
        pause = self.settings.backoff_s * 2.0 ** min(row.failures - 1, 30)
        row.closed_until_s = now_s + min(pause, self.settings.backoff_max_s)
        row.failed_at_s = now_s
        self._note(slot, row)

    def answered(self, slot: int) -> None:
        """A request was answered: whatever was wrong is over."""
        if slot in self._troubled:
            row = self._rows[slot]
            row.failures, row.trial, row.probe_ok = 0, None, True
            self._note(slot, row)

    def dispatched(self, slot: int, flight_id: int, now_s: float) -> None:
        """A request goes to a replica in trouble: it is the trial, and others wait for its outcome."""
        if slot in self._troubled:
            row = self._rows[slot]
            row.trial, row.trial_until_s = flight_id, now_s + self.settings.backoff_max_s

    def ended(self, slot: int, flight_id: int) -> None:
        """A flight ended without a verdict on the replica: the next request may try."""
        if slot in self._troubled and self._rows[slot].trial == flight_id:
            self._rows[slot].trial = None

    def unavailable(self, now_s: float) -> list[int]:
        """Slots to leave out now."""
        if not self._troubled:
            return []
        return [slot for slot in self._troubled if not self._available(self._rows[slot], now_s)]

    def describe(self, slot: int, now_s: float) -> dict[str, float | bool | int]:
        """One replica's health as plain data."""
        row = self._rows[slot]
        pause = max(row.closed_until_s - now_s, 0.0) if row.failures else 0.0
        return {
            "available": self._available(row, now_s),
            "probe_ok": row.probe_ok,
            "failures_in_a_row": row.failures,
            "paused_s": pause,
        }

    def _available(self, row: _Health, now_s: float) -> bool:
        if not row.probe_ok:
            return False
        if not row.failures:
            return True
        # A clock that jumped back must not close a replica for longer than the longest pause.
        paused = row.closed_until_s - self.settings.backoff_max_s <= now_s < row.closed_until_s
        return not paused and (row.trial is None or now_s >= row.trial_until_s)

    def _note(self, slot: int, row: _Health) -> None:
        if row.probe_ok and not row.failures:
            self._troubled.discard(slot)
        else:
            self._troubled.add(slot)
