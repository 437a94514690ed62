"""Named columns with one row per replica, so that 64 replicas cost a decision what three do."""

from __future__ import annotations

from array import array
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Number = TypeVar("Number", float, FloatArray)
"""One replica's figure, or those of all: what a formula takes that serves both."""
SlotArray = NDArray[np.intp]
Rows: TypeAlias = SlotArray | slice
"""What picks rows out of a column: a slice where they follow each other, which costs no copy."""


class Columns(dict[str, FloatArray]):
    """float64 columns of one length, by name: arrays of shape (rows,).

    A row is a replica's slot; a new or reset row holds the defaults.

    Attributes:
        cells: the same memory as `array`s: reading and writing one number takes a third of what it takes in NumPy.
        rows: their length.
    """

    def __init__(self, **defaults: float) -> None:
        super().__init__({name: np.empty(0) for name in defaults})
        self._defaults = defaults
        self.rows = 0
        self.cells: dict[str, array[float]] = {name: array("d") for name in defaults}

    def grow(self, rows: int) -> None:
        """Lengthen to `rows` rows; never shortens."""
        if rows <= self.rows:
            return
        for name, cells in self.cells.items():
            self.cells[name] = array("d", [*cells, *[self._defaults[name]] * (rows - self.rows)])
            self[name] = np.frombuffer(self.cells[name], dtype=np.float64)
        self.rows = rows

    def reset(self, slot: int) -> None:
        """Put the defaults back into one row."""
        for name, cells in self.cells.items():
            cells[slot] = self._defaults[name]


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
