"""What attention looks like in a few numbers: per head, per token, in one layer.

Attention rows are ragged (as many keys as the token sees), so they are given as docs/format.md stores them: all
values one after the other, and where each row lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrace.analysis.statistics.shapes import Ints
from moetrace.errors import UsageError

#: keys before the token that count as recent
RECENT = 8
#: features of one head, in the order of :func:`attention_features`
FEATURES = ("entropy", "self", "first", "recent", "distance", "top", "sink")
# Values looked at together: 64 MiB of temporaries.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class AttentionRows:
    """Attention of n tokens in one layer, one row of heads × keys each.

    Attributes
    ----------
    values
        (V,) f4, may be memory-mapped: the rows' values, keys innermost, after the soft-max. Several such, if the rows
        are of several recordings.
    offset, n_keys, first_position
        (n,) where each row begins in its ``values``, how many keys it has, and the first one's position (-1 not
        known). ``offset`` -1: there is no row for this token.
    n_heads
        Heads of every row.
    position
        (n,) the tokens' own positions.
    source
        (n,) in which of several ``values`` each row is; by default in the first.
    """

    values: npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]]
    offset: Ints
    n_keys: Ints
    first_position: Ints
    n_heads: int
    position: Ints
    source: Ints | None = None

    def __len__(self) -> int:
        return self.offset.size

    def _values(self, source: int) -> npt.NDArray[np.float32]:
        return self.values if isinstance(self.values, np.ndarray) else self.values[source]

    def _source(self, rows: Ints) -> Ints:
        return np.zeros(rows.size, dtype=np.int64) if self.source is None else self.source[rows]

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """(n,) where there is a row and its keys' positions are known."""
        return (self.offset >= 0) & (self.first_position >= 0) & (self.n_keys > 0)

    def row(self, i: int) -> npt.NDArray[np.float32]:
        """One token's row, (heads, keys); a view. Raises UsageError if there is none."""
        if self.offset[i] < 0:
            raise UsageError(f"token {i} has no attention row")
        start, n = int(self.offset[i]), int(self.n_keys[i])
        values = self._values(0 if self.source is None else int(self.source[i]))
        return values[start : start + self.n_heads * n].reshape(self.n_heads, n)

    def pieces(self) -> Iterator[_Piece]:
        """Rows that are known, as many together as make up a chunk."""
        rows = np.flatnonzero(self.known)
        edges = np.cumsum(self.n_keys[rows] * self.n_heads) // _CHUNK
        for part in np.split(rows, np.flatnonzero(np.diff(edges)) + 1):
            if part.size:
                yield _Piece.of(self, part)


@dataclass(frozen=True)
class _Piece:
    """Some rows laid flat: ``p`` (v,), each value's key position and its distance before the token, and where each
    of the heads' rows begins (tokens × heads).
    """

    rows: Ints
    p: npt.NDArray[np.float64]
    key: Ints
    distance: Ints
    starts: Ints

    @classmethod
    def of(cls, a: AttentionRows, rows: Ints) -> _Piece:
        keys = np.repeat(a.n_keys[rows], a.n_heads)
        ends = np.cumsum(keys)
        starts = ends - keys
        within = np.arange(int(ends[-1])) - np.repeat(starts, keys)
        size = a.n_keys[rows] * a.n_heads
        first = np.cumsum(size) - size
        flat = np.arange(int(size.sum())) + np.repeat(a.offset[rows] - first, size)
        key = within + np.repeat(a.first_position[rows], size)
        distance = np.repeat(a.position[rows], size) - key
        source = np.repeat(a._source(rows), size)
        p = np.empty(flat.size, dtype=np.float64)
        for i in np.unique(source).tolist():
            p[source == i] = a._values(i)[flat[source == i]]
        return cls(rows, p, key, distance, starts)

    def total(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Values summed over the keys of each head's row: (tokens × heads,)."""
        return np.add.reduceat(values, self.starts).astype(np.float64)


def attention_features(rows: AttentionRows) -> npt.NDArray[np.float32]:
    """Numbers that describe each head's attention: (n, heads, 7) f4 in the order of :data:`FEATURES`.

    ``entropy``: of the weights over the keys, scaled to sum to 1, in nats. ``self``, ``first``, ``recent``: weight
    on the token itself, on position 0, and on the 8 keys before the token. ``distance``: mean of log(1 + distance)
    to the keys, under the scaled weights. ``top``: the largest weight. ``sink``: 1 less the sum of the weights,
    what an attention sink takes. Under a sliding window ``first`` is 0 once position 0 has left it. NaN where a
    token has no row, or its keys' positions are not known.
    """
    out = np.full((len(rows), rows.n_heads, len(FEATURES)), np.nan, dtype=np.float32)
    for piece in rows.pieces():
        p, total = piece.p, np.maximum(piece.total(piece.p), 1e-30)
        with np.errstate(divide="ignore", invalid="ignore"):
            plogp = np.where(p > 0, p * np.log(p), 0.0)
        near = (piece.distance >= 1) & (piece.distance <= RECENT)
        columns = (
            np.log(total) - piece.total(plogp) / total,
            piece.total(p * (piece.distance == 0)),
            piece.total(p * (piece.key == 0)),
            piece.total(p * near),
            piece.total(p * np.log1p(np.maximum(piece.distance, 0))) / total,
            np.maximum.reduceat(p, piece.starts),
            1 - total,
        )
        stacked = np.stack(columns, axis=1).reshape(piece.rows.size, rows.n_heads, len(FEATURES))
        out[piece.rows] = stacked
    return out


def attention_windows(rows: AttentionRows, length: int) -> npt.NDArray[np.float32]:
    """Attention on the ``length`` latest keys, the token itself first: (n, heads, length + 2) f4.

    The last two entries are the weight on all earlier keys and what is missing to 1 (an attention sink's), so that
    every head's vector sums to 1 and vectors of tokens with different pasts are comparable. NaN where a token sees
    fewer than ``length`` keys, or has no row.
    """
    if length < 1:
        raise UsageError(f"no window of {length} keys", fix="give a length of 1 or more")
    out = np.full((len(rows), rows.n_heads, length + 2), np.nan, dtype=np.float32)
    for piece in rows.pieces():
        place = np.minimum(np.maximum(piece.distance, 0), length)
        head = np.repeat(np.arange(piece.starts.size), np.diff(np.append(piece.starts, piece.p.size)))
        flat = np.bincount(head * (length + 2) + place, piece.p, minlength=piece.starts.size * (length + 2))
        window = flat.reshape(piece.rows.size, rows.n_heads, length + 2)
        window[:, :, -1] = np.maximum(1 - window.sum(axis=2), 0)
        enough = rows.n_keys[piece.rows] >= length
        out[piece.rows[enough]] = window[enough]
    return out
