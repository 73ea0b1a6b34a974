"""What describes an axis of an array, where it is given and where it is not: layers, experts of each, requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def layer_numbers(layers: npt.ArrayLike | None, n_layers: int) -> Ints:
    """(L,) int64 llama.cpp's numbers as given, by default 0..L−1."""
    return np.arange(n_layers) if layers is None else np.asarray(layers, dtype=np.int64)


def per_layer(given: npt.ArrayLike | None, n_layers: int, default: int) -> Ints:
    """(L,) int64 numbers of each layer (experts, experts used) as given, by default the same for all."""
    return np.full(n_layers, default) if given is None else np.asarray(given, dtype=np.int64)


def rows_of(starts: Ints, requests: npt.ArrayLike) -> Ints:
    """Row numbers of some requests, one after the other; ``starts`` (R + 1,) is where each request begins."""
    pieces = [np.arange(starts[i], starts[i + 1]) for i in np.asarray(requests, dtype=np.int64)]
    return np.concatenate([*pieces, np.empty(0, dtype=np.int64)]).astype(np.int64)


def some_requests(starts: Ints, max_rows: int, seed: int | Sequence[int] | np.random.Generator) -> Ints:
    """Whole requests, at least one, drawn at random until they hold ``max_rows`` rows; ascending."""
    sizes = np.diff(starts)
    draw = np.random.default_rng(seed).permutation(np.flatnonzero(sizes))
    fits = np.cumsum(sizes[draw]) <= max_rows
    fits[:1] = True
    return np.sort(draw[fits])
