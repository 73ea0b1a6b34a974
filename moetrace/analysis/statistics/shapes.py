"""What describes an axis of an array, where it is given and where it is not: layers, experts of each, requests."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
#: which rows of a request that is too long to be taken whole
Stretch = Literal["anywhere", "beginning"]


def layer_numbers(layers: npt.ArrayLike | None, n_layers: int) -> Ints:
    """(L,) int64 llama.cpp's numbers as given, by default 0..L−1."""
    return np.arange(n_layers) if layers is None else np.asarray(layers, dtype=np.int64)


def per_layer(given: npt.ArrayLike | None, n_layers: int, default: int) -> Ints:
    """(L,) int64 numbers of each layer (experts, experts used) as given, by default the same for all."""
    return np.full(n_layers, default) if given is None else np.asarray(given, dtype=np.int64)


def spans(begin: Ints, sizes: Ints) -> Ints:
    """Numbers of several unbroken rows of places, one after the other: from ``begin`` (R,), ``sizes`` (R,) of each."""
    ends = np.cumsum(sizes)
    return np.repeat(begin - (ends - sizes), sizes) + np.arange(int(ends[-1]) if ends.size else 0)


def some_requests(
    starts: Ints, max_rows: int, rng: np.random.Generator, stretch: Stretch | None = "anywhere"
) -> tuple[Ints, Ints, Ints]:
    """Draw requests at random, at least one, until they hold ``max_rows`` rows.

    A request holds an eighth of these at most, or its even share if there are fewer requests: of a longer one it is a
    stretch, anywhere in it or its beginning. Without ``stretch`` requests are whole, and few long ones leave one.

    Returns the requests (indices, ascending), where each one's rows begin, and how many they are: (S,) each.
    """
    sizes = np.diff(starts)
    there = np.flatnonzero(sizes)
    held = sizes if stretch is None else np.minimum(sizes, max(1, max_rows // min(8, max(1, there.size))))
    draw = rng.permutation(there)
    fits = np.cumsum(held[draw]) <= max_rows
    fits[:1] = True
    chosen = np.sort(draw[fits])
    begin, spare = starts[chosen], sizes[chosen] - held[chosen]
    if stretch == "anywhere" and spare.any():
        begin = begin + rng.integers(0, spare + 1)
    return chosen, begin, held[chosen]
