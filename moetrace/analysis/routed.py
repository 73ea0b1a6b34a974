"""Whole texts with their routing, in reading order: what the analyses of meaning and dynamics take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrace.analysis.nulls import Floats, Ints
from moetrace.errors import UsageError


@dataclass(frozen=True)
class RoutedText:
    """Rows of whole requests in reading order, one request per prompt; arrays are not copied.

    Shapes: M rows, R requests, L layers, k experts per token.

    Attributes
    ----------
    experts
        (M, L, k) ids in the router's order; ``n_expert`` or more where there is none.
    starts
        (R + 1,) where each request begins.
    n_expert
        E, experts of a layer.
    weights
        (M, L, k) mixing weights, or None. With them the first expert is the one of the largest weight.
    tokens, positions
        (M,) token ids and positions; by default unknown (−1) and counted from the request's first row.
    prompts, labels
        (R,) names; by default numbers and "".
    layers
        (L,) llama.cpp's layer numbers; by default 0..L−1.
    """

    experts: npt.NDArray[np.unsignedinteger]
    starts: Ints
    n_expert: int
    weights: npt.NDArray[np.float32] | None = None
    tokens: npt.ArrayLike | None = None
    positions: npt.ArrayLike | None = None
    prompts: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    layers: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        m, n_layers = self.experts.shape[:2]
        r = len(self.starts) - 1
        fill: dict[str, Any] = {
            "tokens": np.full(m, -1, dtype=np.int32),
            "positions": np.arange(m) - np.repeat(self.starts[:-1], np.diff(self.starts)),
            "prompts": [str(i) for i in range(r)],
            "labels": [""] * r,
            "layers": np.arange(n_layers),
        }
        for name, default in fill.items():
            given = getattr(self, name)
            value = default if given is None else given
            whole = np.asarray(value) if name in ("tokens", "positions", "layers") else tuple(value)
            object.__setattr__(self, name, whole)
            expected = {"prompts": r, "labels": r, "layers": n_layers}.get(name, m)
            if len(whole) != expected:
                raise UsageError(f"{name} has {len(whole)} entries, not {expected}")

    def __len__(self) -> int:
        return int(self.experts.shape[0])

    @property
    def numbers(self) -> Ints:
        """(L,) layer numbers."""
        return np.asarray(self.layers, dtype=np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """(R,) prompts."""
        return tuple(self.prompts or ())

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
        ids = self.experts.astype(np.int64)
        if self.weights is None:
            chosen = ids[:, :, 0]
        else:
            w = np.where(ids < self.n_expert, self.weights, -np.inf)
            best = np.nan_to_num(w, nan=-np.inf).argmax(axis=2)
            chosen = np.take_along_axis(ids, best[:, :, None], axis=2)[:, :, 0]
        return np.where(chosen < self.n_expert, chosen, -1)

    def known(self, layer: int) -> npt.NDArray[np.bool_]:
        """(M,) whether routing in this layer (an index) is known."""
        return np.asarray(self.experts[:, layer, 0] < self.n_expert)

    def member(self, layer: int, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """(M, E) 1 where a row uses an expert in this layer (an index), else 0; a new array."""
        ids = self.experts[:, layer] if rows is None else self.experts[np.asarray(rows), layer]
        out = np.zeros((ids.shape[0], self.n_expert + 1), dtype=np.float32)
        np.put_along_axis(out, np.minimum(ids, self.n_expert).astype(np.int64), 1.0, axis=1)
        return out[:, :-1]

    def of(self, requests: npt.ArrayLike) -> RoutedText:
        """Only some requests (indices over R); a copy."""
        chosen = np.asarray(requests, dtype=np.int64)
        rows = rows_of(self.starts, chosen)
        return replace(
            self,
            experts=self.experts[rows],
            starts=np.concatenate(([0], np.cumsum(np.diff(self.starts)[chosen]))),
            weights=None if self.weights is None else self.weights[rows],
            tokens=np.asarray(self.tokens)[rows],
            positions=np.asarray(self.positions)[rows],
            prompts=[self.names[i] for i in chosen],
            labels=[list(self.labels or ())[i] for i in chosen],
        )

    def some(self, max_rows: int, seed: int) -> RoutedText:
        """Whole requests, drawn at random until they hold ``max_rows`` rows; itself if all fit."""
        if len(self) <= max_rows:
            return self
        draw = np.random.default_rng(seed).permutation(self.n_requests)
        fits = np.cumsum(np.diff(self.starts)[draw]) <= max_rows
        fits[0] = True
        return self.of(np.sort(draw[fits]))


def rows_of(starts: Ints, requests: Ints) -> Ints:
    """Row numbers of some requests, in order."""
    pieces = [np.arange(starts[i], starts[i + 1]) for i in requests]
    return np.concatenate([*pieces, np.empty(0, dtype=np.int64)]).astype(np.int64)


def rotation(starts: Ints, rng: np.random.Generator) -> Ints:
    """Row numbers (M,) with each request's rows turned round by a random number of places, 0 included.

    What has no fixed relation to the rows keeps its distribution, its order and its share in every request.
    """
    sizes = np.diff(starts)
    turn = np.floor(rng.random(sizes.size) * sizes).astype(np.int64)
    first = np.repeat(starts[:-1], sizes)
    place = np.arange(int(starts[-1])) - first
    return np.asarray(first + (place + np.repeat(turn, sizes)) % np.repeat(sizes, sizes))


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


def standardised(observed: Floats, expected: Floats, variance: Floats) -> Floats:
    """(observed − expected)/√(variance + ½): the ½ keeps single coincidences of rare things small."""
    return np.asarray((observed - expected) / np.sqrt(variance + 0.5))
