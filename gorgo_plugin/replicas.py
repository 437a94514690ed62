"""Which replica stands in which row of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from gorgo_plugin.settings import ReplicaSettings
from gorgo_plugin.signals.columns import SlotArray


class Rows(Protocol):
    """A table with one row per slot."""

    def grow(self, rows: int) -> None:
        """Lengthen to `rows` rows."""

    def reset(self, slot: int) -> None:
        """Put one row back to its defaults."""


class Replicas:
    """Names to slots. A replica keeps its slot, and with it what is known of it, as long as its name and url stay."""

    def __init__(self, tables: Iterable[Rows]) -> None:
        self._tables = list(tables)
        self._by_slot: dict[int, ReplicaSettings] = {}
        self._slot_of: dict[str, int] = {}
        self._rows = 0
        self._free: list[int] = []
        self._serving: dict[str, SlotArray] = {}

    @property
    def slots(self) -> Sequence[int]:
        """Slots in use, in the order of configuration."""
        return list(self._slot_of.values())

    def __getitem__(self, slot: int) -> ReplicaSettings:
        return self._by_slot[slot]

    def slot(self, name: str) -> int | None:
        """The slot of a replica, None for an unknown name."""
        return self._slot_of.get(name)

    def name(self, slot: int) -> str | None:
        """The name in a slot, None where the replica was removed."""
        found = self._by_slot.get(slot)
        return None if found is None else found.name

    def add_table(self, table: Rows) -> None:
        """Let one more table follow the rows."""
        self._tables.append(table)
        table.grow(self._rows)

    def drop_table(self, table: Rows) -> None:
        """Stop extending a table."""
        self._tables.remove(table)

    def replace(self, replicas: Sequence[ReplicaSettings], busy: set[int]) -> list[int]:
        """Make `replicas` the fleet; returns the slots removed. A slot in `busy` is not given away yet."""
        wanted = {replica.name: replica for replica in replicas}
        removed = [
            slot for slot, old in self._by_slot.items() if old.name not in wanted or wanted[old.name].url != old.url
        ]
        for slot in removed:
            del self._slot_of[self._by_slot.pop(slot).name]
            self._free.append(slot)
        slots = {}
        for name, replica in wanted.items():
            known = self._slot_of.get(name)
            slots[name] = self._take_slot(busy) if known is None else known
            self._by_slot[slots[name]] = replica
        self._slot_of = slots
        self._serving.clear()
        return removed

    def serving(self, model: str) -> SlotArray:
        """Slots of the replicas that serve `model`."""
        slots = self._serving.get(model)
        if slots is None:
            chosen = [
                slot
                for slot in self._slot_of.values()
                if (models := self._by_slot[slot].models) is None or not model or model in models
            ]
            slots = self._serving[model] = np.array(chosen, dtype=np.intp)
        return slots

    def _take_slot(self, busy: set[int]) -> int:
        slot = next((free for free in self._free if free not in busy), None)
        if slot is not None:
            self._free.remove(slot)
        else:
            slot, self._rows = self._rows, self._rows + 1
            for table in self._tables:
                table.grow(self._rows)
        for table in self._tables:
            table.reset(slot)
        return slot
