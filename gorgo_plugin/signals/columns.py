"""Named arrays with one row per replica, so that 64 replicas cost a decision what three do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
SlotArray = NDArray[np.intp]


class Columns:
    """float64 arrays of one length, by name. A row is a replica's slot; a new or reset row holds the defaults."""

    def __init__(self, **defaults: float) -> None:
        self._defaults = defaults
        self.rows = 0
        self._arrays: dict[str, FloatArray] = {name: np.empty(0) for name in defaults}

    def __getitem__(self, name: str) -> FloatArray:
        return self._arrays[name]

    def grow(self, rows: int) -> None:
        """Lengthen to `rows` rows; never shortens."""
        if rows <= self.rows:
            return
        for name, array in self._arrays.items():
            added = np.full(rows - self.rows, self._defaults[name])
            self._arrays[name] = np.concatenate([array, added])
        self.rows = rows

    def reset(self, slot: int) -> None:
        """Put the defaults back into one row."""
        for name, array in self._arrays.items():
            array[slot] = self._defaults[name]


class Table:
    """Base of what keeps one row of numbers per replica."""

    def __init__(self, **defaults: float) -> None:
        self._columns = Columns(**defaults)

    def grow(self, rows: int) -> None:
        """Lengthen to `rows` rows."""
        self._columns.grow(rows)

    def reset(self, slot: int) -> None:
        """Put one row back to its defaults."""
        self._columns.reset(slot)
