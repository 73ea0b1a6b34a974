"""Rows of several contexts as one table: one context's after the other's, without copying them together."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.trace.columns import Table

Index = slice | NDArray[np.intp]


class Chain:
    """Tables ``rows`` of contexts with one layout, one after the other.

    Attributes
    ----------
    tables
        One per context.
    starts
        (contexts + 1,) the row that each one's first row is; the last entry is :attr:`n_rows`.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tuple(tables)
        self.starts = np.concatenate(([0], np.cumsum([table.n_rows for table in tables], dtype=np.int64)))

    @property
    def n_rows(self) -> int:
        """Rows of all of them."""
        return int(self.starts[-1])

    @property
    def names(self) -> list[str]:
        """The columns that every one of them has."""
        return [name for name in self.tables[0] if name in self]

    def __contains__(self, name: object) -> bool:
        return all(name in table for table in self.tables)

    def split(self, rows: Index) -> list[Index]:
        """Give the rows' numbers within each table; those of a slice stay a slice."""
        if isinstance(rows, slice):
            numbers = range(*rows.indices(self.n_rows))
            if numbers.step > 0:
                out: list[Index] = []
                for start, stop in zip(self.starts.tolist(), self.starts.tolist()[1:], strict=False):
                    mine = numbers[bisect.bisect_left(numbers, start) : bisect.bisect_left(numbers, stop)]
                    out.append(
                        slice(mine.start - start, mine.stop - start, mine.step) if mine else slice(0, 0)
                    )
                return out
            rows = np.arange(numbers.start, numbers.stop, numbers.step)
        owner = self.owner(rows)
        return [rows[owner == i] - self.starts[i] for i in range(len(self.tables))]

    def owner(self, rows: Index) -> NDArray[np.intp]:
        """Give which table each of these rows is of, (n,)."""
        if isinstance(rows, slice):
            if (rows.step or 1) > 0:
                return np.repeat(np.arange(len(self.tables)), [_size(part) for part in self.split(rows)])
            rows = np.arange(*rows.indices(self.n_rows))
        return np.searchsorted(self.starts, rows, side="right") - 1

    def take(self, name: str, rows: Index = slice(None), layers: Index | None = None) -> NDArray[Any]:
        """Give some rows of a column, and of its second axis some entries.

        Returns
        -------
        array
            Read-only. A view of the mapped file where ``rows`` (and ``layers``) are slices whose rows are all of
            one table; else a copy of these rows, and of no others.
        """
        parts = self.split(rows)
        there = [i for i, part in enumerate(parts) if _size(part)] or [0]
        if len(there) == 1:
            taken = _index(self.tables[there[0]][name], parts[there[0]], layers)
        elif isinstance(rows, slice) and (rows.step or 1) > 0:
            taken = np.concatenate([_index(self.tables[i][name], parts[i], layers) for i in there])
        else:
            owner = self.owner(rows)
            first = _index(self.tables[there[0]][name], slice(0, 0), layers)
            taken = np.empty((len(owner), *first.shape[1:]), first.dtype)
            for i in there:
                taken[owner == i] = _index(self.tables[i][name], parts[i], layers)
        taken.flags.writeable = False
        return taken


def _size(part: Index) -> int:
    return len(range(part.start, part.stop, part.step or 1)) if isinstance(part, slice) else len(part)


def _index(column: NDArray[Any], rows: Index, layers: Index | None) -> NDArray[Any]:
    if layers is None:
        return column[rows]
    if isinstance(rows, slice) or isinstance(layers, slice):
        return column[rows, layers]
    return column[np.ix_(rows, layers)]
