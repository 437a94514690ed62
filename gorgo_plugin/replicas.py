"""Which replica stands in which row of the tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gorgo_plugin.errors import NoCandidates
from gorgo_plugin.policies.pick import TRIED, UNHEALTHY
from gorgo_plugin.settings import ReplicaSettings
from gorgo_plugin.signals.columns import Rows

MAX_CANDIDATES = 256  # lists of candidates kept; a gateway asks with the same few, until a replica goes or comes


@dataclass(frozen=True, slots=True)
class Candidates:
    """Replicas that may serve a request.

    Attributes:
        names, slots: of each.
        rows: where the tables hold them.
    """

    names: list[str]
    slots: list[int]
    rows: Rows


class Follower(Protocol):
    """A table with one row per slot."""

    def grow(self, rows: int) -> None:
        """Lengthen to `rows` rows."""

    def reset(self, slot: int) -> None:
        """Put one row back to its defaults."""


class Replicas:
    """Names to slots. A replica keeps its slot, and with it what is known of it, as long as its name and url stay.

    Attributes:
        rows: how many rows the tables have; slots are below.
    """

    def __init__(self, tables: Iterable[Follower]) -> None:
        self._tables = list(tables)
        self._by_slot: dict[int, ReplicaSettings] = {}
        self._slot_of: dict[str, int] = {}
        self.rows = 0
        self._free: list[int] = []
        self._candidates: dict[str | tuple[str, ...], Candidates] = {}

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

    def add_table(self, table: Follower) -> None:
        """Let one more table follow the rows."""
        self._tables.append(table)
        table.grow(self.rows)

    def drop_table(self, table: Follower) -> None:
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
        self._candidates.clear()
        return removed

    def candidates(self, model: str, names: Sequence[str] | None, exclude: Iterable[str]) -> Candidates:
        """The replicas of these names, or that serve `model`, without the excluded ones.

        Raises:
            NoCandidates: nobody is left.
        """
        among = self.serving(model) if names is None else self.among(names)
        if exclude:
            excluded = {self._slot_of.get(name) for name in exclude}
            among = self.at([slot for slot in among.slots if slot not in excluded])
        if not among.slots:
            raise NoCandidates(f"no replica may serve model '{model}': none is configured, or all are excluded")
        return among

    def serving(self, model: str) -> Candidates:
        """The replicas that serve `model`, in the order of configuration."""
        known = self._candidates.get(model)
        if known is None:
            slots = [slot for slot in self._slot_of.values() if _serves(self._by_slot[slot], model)]
            known = self._keep(model, self.at(slots))
        return known

    def among(self, names: Sequence[str]) -> Candidates:
        """The replicas of these names, without those that are unknown."""
        key = tuple(names)
        known = self._candidates.get(key)
        if known is None:
            slots = {slot: None for name in key if (slot := self._slot_of.get(name)) is not None}
            known = self._keep(key, self.at(list(slots)))
        return known

    def _keep(self, key: str | tuple[str, ...], candidates: Candidates) -> Candidates:
        if len(self._candidates) >= MAX_CANDIDATES:
            self._candidates.clear()
        self._candidates[key] = candidates
        return candidates

    def at(self, slots: list[int]) -> Candidates:
        """The replicas in these slots."""
        follow = slots == list(range(slots[0], slots[0] + len(slots))) if slots else False
        rows: Rows = slice(slots[0], slots[-1] + 1) if follow else np.array(slots, dtype=np.intp)
        return Candidates([self._by_slot[slot].name for slot in slots], slots, rows)

    def _take_slot(self, busy: set[int]) -> int:
        slot = next((free for free in self._free if free not in busy), None)
        if slot is not None:
            self._free.remove(slot)
        else:
            slot, self.rows = self.rows, self.rows + 1
            for table in self._tables:
                table.grow(self.rows)
        for table in self._tables:
            table.reset(slot)
        return slot


def tiers_of(among: Candidates, attempts: Sequence[tuple[int, int]], unhealthy: Collection[int]) -> list[int] | None:
    """Per candidate, as `pick` takes them: from (flight id, slot) of a request's attempts, and slots to be avoided."""
    if not attempts and not unhealthy:
        return None
    tried = {slot for _, slot in attempts}
    return [TRIED * (slot in tried) + UNHEALTHY * (slot in unhealthy) for slot in among.slots]


def _serves(replica: ReplicaSettings, model: str) -> bool:
    return replica.models is None or not model or model in replica.models
