"""Attention rows: ragged, one per (token, layer), put together from the ring's pieces.

Two tables hold them (docs/format.md): ``attention`` says where each row lies, ``attention_values`` holds the
values one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.trace.record import RecordKind
from moetrace.trace.rows import ATTENTION_FIELD, Columns, ColumnSpec

#: the table ``attention``
ATTENTION_TABLE: ColumnSpec = {
    "serial": ("<u8", ()),
    "layer": ("<i4", ()),
    "n_heads": ("<u2", ()),
    "n_keys": ("<u4", ()),
    "first_position": ("<i4", ()),
    "offset": ("<u8", ()),
}
#: the table ``attention_values``
VALUES_TABLE: ColumnSpec = {"value": ("<f4", ())}


class AttentionAssembler:
    """Puts the pieces of attention rows together; a row whose pieces are not all there is left out.

    Parameters
    ----------
    offset
        Values that are stored already.

    Attributes
    ----------
    held
        Records, counted from the end of what was fed, that a row is not complete without: they are needed again
        should whoever assembles it die.
    """

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.held = 0
        self._head: Any = None
        self._pieces: list[NDArray[np.float32]] = []

    def feed(self, records: NDArray[np.void]) -> tuple[Columns, Columns]:
        """Take ring records, in order; gives what to append to ``attention`` and to ``attention_values``."""
        rows: list[tuple[int, ...]] = []
        values: list[NDArray[np.float32]] = []
        begins = -self.held  # where the row being assembled begins
        where = np.flatnonzero(records["kind"] == RecordKind.ATTENTION)
        for at, record in zip(where.tolist(), records[where], strict=True):
            n = int(record["arg0"])
            if record["row"] == 0:
                self._head, self._pieces, begins = record.copy(), [], at
            elif self._head is None or not self._continues(record):
                self._head = None
                continue
            self._pieces.append(record[ATTENTION_FIELD][:n].copy())
            head = self._head
            n_heads, n_keys = int(head["n_sequences"]), int(head["sequence"])
            if sum(map(len, self._pieces)) == n_heads * n_keys:
                rows.append(
                    (
                        int(head["serial"]),
                        int(head["token"]),
                        n_heads,
                        n_keys,
                        int(head["position"]),
                        self.offset,
                    )
                )
                values += self._pieces
                self.offset += n_heads * n_keys
                self._head = None
        self.held = len(records) - begins if self._head is not None else 0
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(ATTENTION_TABLE)
        table = {
            name: np.array(column, dtype)
            for (name, (dtype, _)), column in zip(ATTENTION_TABLE.items(), columns, strict=True)
        }
        joined = np.concatenate(values) if values else np.empty(0, "<f4")
        return table, {"value": joined.astype("<f4", copy=False)}

    def _continues(self, record: Any) -> bool:
        done = sum(map(len, self._pieces))
        same = record["serial"] == self._head["serial"] and record["token"] == self._head["token"]
        return bool(same and record["row"] == done)


class Attention:
    """The attention rows of a context, by (serial of the token's row, layer).

    Of several contexts (:meth:`together`) each has its own serials: take one with :meth:`of`, or name it.

    Parameters
    ----------
    index, values
        The two tables' columns.
    context
        Its name.
    """

    def __init__(self, index: Columns, values: NDArray[np.float32], context: str = "") -> None:
        self._contexts: Mapping[str, Attention] = {context: self}
        self._index = index
        self._values = values
        key = index["serial"].astype(np.uint64) << np.uint64(16) | index["layer"].astype(np.uint64)
        self._order = np.argsort(key, kind="stable")
        self._keys = key[self._order]

    @classmethod
    def together(cls, contexts: Mapping[str, Attention]) -> Attention:
        """The attention rows of several contexts, by their names."""
        joined = cls.__new__(cls)
        joined._contexts = dict(contexts)
        return joined

    def of(self, context: str | None = None) -> Attention:
        """The rows of one context by its name; of the only one if None. Raises UsageError if it is not there."""
        if context is None and len(self._contexts) == 1:
            return self
        if context is None or context not in self._contexts:
            raise UsageError(
                "which context's attention?" if context is None else f"there is no attention of {context}",
                why="serials count within a context",
                fix=f"name one of: {', '.join(self._contexts)}",
            )
        return self._contexts[context]

    def __len__(self) -> int:
        """Give the number of rows."""
        return sum(len(each._keys) for each in self._contexts.values())

    @property
    def index(self) -> Columns:
        """Where each row lies: the columns of the table ``attention`` (docs/format.md), in order of capture.

        Raises UsageError for several contexts: take one with :meth:`of`.
        """
        return self.of()._index

    @property
    def values(self) -> NDArray[np.float32]:
        """The values of all rows one after the other, float32; a read-only view.

        Raises UsageError for several contexts: take one with :meth:`of`.
        """
        return self.of()._values

    def find(self, serials: NDArray[np.uint64], layer: int, context: str | None = None) -> NDArray[np.int64]:
        """Give where in :attr:`index` one layer's rows of many tokens stand: (n,) int64, -1 where there is none.

        ``context`` as in :meth:`of`; ``serials`` are of its rows.
        """
        mine = self.of(context)
        keys = serials.astype(np.uint64) << np.uint64(16) | np.uint64(layer)
        at = np.searchsorted(mine._keys, keys, side="right") - 1  # of several the last holds
        there = at >= 0
        there[there] = mine._keys[at[there]] == keys[there]
        order = mine._order[np.maximum(at, 0)] if len(mine._order) else -1
        return np.where(there, order, -1).astype(np.int64)

    def row(
        self, serial: int, layer: int, context: str | None = None
    ) -> tuple[NDArray[np.float32], int] | None:
        """Give one row, or None if it is not there. Raises UsageError if several contexts could be meant.

        Parameters
        ----------
        context
            As in :meth:`of`.

        Returns
        -------
        weights : float32 (heads, keys)
            After the soft-max; a read-only view. A row may sum to less than 1: the rest is an attention sink's.
        first_position : int
            Position of the first key; the others follow without a gap. -1: the keys are in the order of the KV
            cache's cells, their positions are not known.
        """
        mine = self.of(context)
        key = np.uint64(serial << 16 | layer)
        at = int(np.searchsorted(mine._keys, key, side="right")) - 1  # of several the last holds
        if at < 0 or mine._keys[at] != key:
            return None
        i = mine._order[at]
        n_heads, n_keys = int(mine._index["n_heads"][i]), int(mine._index["n_keys"][i])
        start = int(mine._index["offset"][i])
        weights = mine._values[start : start + n_heads * n_keys].reshape(n_heads, n_keys)
        return weights, int(mine._index["first_position"][i])
