"""Tokens of texts in reading order, with their routing: what the analyses of meaning, dynamics and prediction take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts.counting import breaks
from moetrace.analysis.statistics.shapes import Floats, Ints, Stretch, some_requests, spans
from moetrace.errors import UsageError

# A field that follows from the others unless it is given.
_FOLLOWS: Any = None
# The fields with an entry for every row, beside ``experts`` and ``weights``.
_CHUNK = 1 << 14  # rows looked at together
_PER_ROW = ("tokens", "positions", "runs", "sources", "rows")


@dataclass(frozen=True)
class RoutedText:
    """Rows (tokens) of requests in reading order, one request per prompt; arrays of these dtypes are not copied.

    Shapes: M rows, R requests, L layers, k experts per token.

    Attributes
    ----------
    experts
        (M, L, k) ids in the router's order; ``n_expert`` or more where there is none: the cell is absent, or the
        layer uses fewer experts.
    starts
        (R + 1,) where each request begins.
    n_expert
        E, experts of a layer (of the layer with most).
    weights
        (M, L, k) mixing weights, or None. With them the first expert is the one of the largest weight.
    tokens, positions
        (M,) int64 token ids and positions; by default unknown (−1) and counted from the request's first row.
    runs
        (M,) int64 number of the unbroken run of positions that the row is in; by default from
        :func:`~moetrace.analysis.counts.counting.breaks`.
    sources, rows
        (M,) int64: which trace each row is from, and its row there; by default row m of the first.
    prompts, labels
        (R,) names; by default numbers and "".
    layers
        (L,) int64, llama.cpp's layer numbers; by default 0..L−1.

    Raises UsageError if the lengths differ.
    """

    experts: npt.NDArray[np.unsignedinteger]
    starts: Ints
    n_expert: int
    weights: npt.NDArray[np.float32] | None = None
    tokens: Ints = _FOLLOWS
    positions: Ints = _FOLLOWS
    runs: Ints = _FOLLOWS
    sources: Ints = _FOLLOWS
    rows: Ints = _FOLLOWS
    prompts: Sequence[str] = _FOLLOWS
    labels: Sequence[str] = _FOLLOWS
    layers: Ints = _FOLLOWS

    def __post_init__(self) -> None:
        m, n_layers = self.experts.shape[:2]
        r = self.n_requests
        if self.starts[-1] != m:
            raise UsageError(f"requests have {self.starts[-1]} rows, not {m}")
        follows: dict[str, Callable[[], Any]] = {
            "tokens": lambda: np.full(m, -1),
            "positions": lambda: np.arange(m) - self.starts[self.owner],
            "runs": lambda: np.cumsum(np.append(0, breaks(self.owner, self.positions))[:m]),
            "sources": lambda: np.zeros(m),
            "rows": lambda: np.arange(m),
            "prompts": lambda: [str(i) for i in range(r)],
            "labels": lambda: [""] * r,
            "layers": lambda: np.arange(n_layers),
        }
        for name, default in follows.items():
            given = getattr(self, name)
            value = default() if given is None else given
            whole = tuple(value) if name in ("prompts", "labels") else np.asarray(value, dtype=np.int64)
            object.__setattr__(self, name, whole)
            expected = {"prompts": r, "labels": r, "layers": n_layers}.get(name, m)
            if len(whole) != expected:
                raise UsageError(f"{name} has {len(whole)} entries, not {expected}")

    def __len__(self) -> int:
        return int(self.experts.shape[0])

    def by_layer(self) -> npt.NDArray[np.uint16]:
        """(L, M, k) experts, each layer's in one piece; a copy."""
        return np.ascontiguousarray(self.experts.transpose(1, 0, 2), dtype=np.uint16)

    @property
    def n_requests(self) -> int:
        """R."""
        return len(self.starts) - 1

    @cached_property
    def owner(self) -> Ints:
        """(M,) index of each row's request."""
        return np.repeat(np.arange(self.n_requests), np.diff(self.starts))

    @cached_property
    def first(self) -> Ints:
        """(M, L) first expert: of the largest weight where weights are known, else the router's; −1 none."""
        out = np.empty(self.experts.shape[:2], dtype=np.int64)
        for start in range(0, len(self), _CHUNK):
            rows = slice(start, start + _CHUNK)
            ids = self.experts[rows].astype(np.int64)
            if self.weights is None:
                chosen = ids[:, :, 0]
            else:
                w = np.where(ids < self.n_expert, self.weights[rows], -np.inf)
                best = np.nan_to_num(w, nan=-np.inf).argmax(axis=2)
                chosen = np.take_along_axis(ids, best[:, :, None], axis=2)[:, :, 0]
            out[rows] = np.where(chosen < self.n_expert, chosen, -1)
        return out

    def known(self, layer: int) -> npt.NDArray[np.bool_]:
        """(M,) whether routing in this layer (an index) is known."""
        return np.asarray(self.experts[:, layer, 0] < self.n_expert)

    def member(self, layer: int, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """:func:`membership` of all rows, or of some (numbers), in this layer (an index): (M, E)."""
        ids = self.experts[:, layer] if rows is None else self.experts[np.asarray(rows), layer]
        return membership(ids, self.n_expert)

    def take(self, rows: npt.NDArray[Any]) -> RoutedText:
        """Only some rows, by a mask or ascending numbers; a copy.

        Requests stay numbered as they are, those without a row too; rows stay in their run.
        """
        sizes = np.bincount(self.owner[rows], minlength=self.n_requests)
        return self._at(rows, sizes)

    def of(self, requests: npt.ArrayLike) -> RoutedText:
        """Only some requests (indices over R), numbered anew; a copy."""
        chosen = np.asarray(requests, dtype=np.int64)
        return self._at(
            spans(self.starts[chosen], np.diff(self.starts)[chosen]),
            np.diff(self.starts)[chosen],
            **self._names(chosen),
        )

    def by_name(self) -> RoutedText:
        """Requests in the order of their names, itself if they are: sums are the same, whichever trace came first."""
        order = sorted(range(self.n_requests), key=lambda i: self.prompts[i])
        return self if order == list(range(self.n_requests)) else self.of(order)

    def some(
        self, max_rows: int, seed: int | Sequence[int], stretch: Stretch | None = "anywhere"
    ) -> RoutedText:
        """Requests, at least one, drawn at random until they hold ``max_rows`` rows; itself if all fit.

        Of long ones it is a stretch (:func:`~moetrace.analysis.statistics.shapes.some_requests`).
        """
        if len(self) <= max_rows:
            return self
        chosen, begin, held = some_requests(self.starts, max_rows, np.random.default_rng(seed), stretch)
        return self._at(spans(begin, held), held, **self._names(chosen))

    def _names(self, requests: Ints) -> dict[str, list[str]]:
        named = {"prompts": self.prompts, "labels": self.labels}
        return {name: [texts[i] for i in requests] for name, texts in named.items()}

    def _at(self, rows: npt.NDArray[Any], sizes: Ints, **more: Any) -> RoutedText:
        return replace(
            self,
            experts=self.experts[rows],
            weights=None if self.weights is None else self.weights[rows],
            starts=np.concatenate(([0], np.cumsum(sizes))),
            **{name: getattr(self, name)[rows] for name in _PER_ROW},
            **more,
        )


def membership(ids: npt.NDArray[Any], n_expert: int) -> npt.NDArray[np.float32]:
    """Which experts are used: ids (…, k) → a new (…, E) of 0 and 1; ids of E or more are none."""
    out = np.zeros((*ids.shape[:-1], n_expert + 1), dtype=np.float32)
    np.put_along_axis(out, np.minimum(ids.astype(np.int64), n_expert), 1.0, axis=-1)
    return out[..., :n_expert]


def uses_expert(ids: npt.NDArray[Any], expert: int) -> npt.NDArray[np.bool_]:
    """Which rows use an expert: ids (n, k) → a new (n,)."""
    out = np.zeros(len(ids), dtype=np.bool_)
    for column in ids.T:  # any() over the few of a row takes four times as long
        out |= column == expert
    return out


def usage(ids: npt.NDArray[Any], group: Ints, n_groups: int, n_expert: int) -> Ints:
    """How many rows of each group use each expert: ids (n, k), group (n,) → a new (G, E); ids of E or more are none."""
    cells = (group[:, None] * n_expert + ids)[ids < n_expert]
    return np.bincount(cells, minlength=n_groups * n_expert).reshape(n_groups, n_expert)


def rotation(starts: Ints, rng: np.random.Generator) -> Ints:
    """Row numbers (M,) with each request's rows turned round by a random number of places, 0 included.

    What has no fixed relation to the rows keeps its distribution, its order and its share in every request.
    """
    return np.asarray(turned(starts, rng.random((1, len(starts) - 1)))[0], dtype=np.int64)


def turned(starts: Ints, by: Floats) -> npt.NDArray[np.int32]:
    """Several rotations at once: by which share of their lengths, (n, P) in [0, 1) → row numbers (n, M)."""
    sizes = np.diff(starts).astype(np.int32)
    owner = np.repeat(np.arange(sizes.size), sizes)
    moved = np.take((by * sizes).astype(np.int32), owner, axis=1)
    moved += np.arange(owner.size, dtype=np.int32)
    moved -= np.where(moved >= starts[1:].astype(np.int32)[owner], sizes[owner], np.int32(0))
    return moved


def exchange(starts: Ints, rng: np.random.Generator, group: int = 8) -> Ints:
    """Row numbers (M,) in which each request has the rows of another.

    Requests are exchanged within groups of ``group`` or more of similar length. Row t of a request gets row t of the
    other; the rows that a longer request has more are counted from the end, so that what depends on the place in
    the text stays in its place, and what depends on the text goes.
    """
    sizes = np.diff(starts)
    n = sizes.size
    n_groups = max(1, n // group)
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(sizes, kind="stable")] = np.arange(n)
    which = np.minimum(rank // group, n_groups - 1)
    home = np.argsort(which, kind="stable")
    other = np.empty(n, dtype=np.int64)
    other[home] = np.argsort(which + rng.random(n))
    place = np.arange(int(starts[-1])) - np.repeat(starts[:-1], sizes)
    mine, theirs = np.repeat(sizes, sizes), np.repeat(sizes[other], sizes)
    return np.asarray(
        np.repeat(starts[:-1][other], sizes) + np.where(place < theirs, place, (place - mine) % theirs)
    )


def standardised(observed: npt.NDArray[Any], expected: Floats, variance: Floats) -> Floats:
    """(observed − expected)/√(variance + ½), a new array: the ½ keeps single coincidences of rare things small."""
    out, spread = np.asarray(observed - expected), np.asarray(variance + 0.5)
    out /= np.sqrt(spread, out=spread)
    return out
