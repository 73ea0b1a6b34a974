"""Which layers' experts to keep in fast memory: what each layer's experts are read for, and what the rest costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.placement.run_cache import run_accesses
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError


@dataclass(frozen=True)
class LayerTraffic:
    """What the layers' experts were read for in a run.

    Attributes
    ----------
    layers
        (L,) numbers.
    read
        (P, L) bytes of experts read on behalf of each prompt: of every ubatch and layer the distinct experts, shared
        out among its tokens.
    tokens
        (P,) tokens of each prompt.
    """

    layers: Ints
    read: Floats
    tokens: Floats

    def per_token(self, chosen: npt.ArrayLike, level: float = 0.95) -> nulls.Interval:
        """Bytes per token that the chosen layers (indices) are read for, with an interval over prompts (jackknife)."""
        mine = self.read[:, np.asarray(chosen, dtype=np.int64)].sum(axis=1)
        return nulls.ratio_interval(mine, self.tokens, level)


def layer_traffic(text: RoutedText, step: npt.ArrayLike, expert_bytes: npt.ArrayLike) -> LayerTraffic:
    """What each layer's experts were read for: distinct experts of every ubatch, times bytes.

    Parameters
    ----------
    step
        (M,) number of each row's ubatch: tokens of one share what they have in common.
    expert_bytes
        (L,) bytes of one expert of each layer.

    Raises UsageError if there is no routing.
    """
    number = np.asarray(step, dtype=np.int64)
    item, _, ubatch = run_accesses(text, number)
    if not item.size:
        raise UsageError("there is no routing to look at", fix="choose a phase that has rows")
    n_layers = text.layers.size
    _, row = np.unique(number, return_inverse=True)
    n_ubatches = int(row.max()) + 1
    distinct = np.bincount(ubatch * n_layers + item // text.n_expert, minlength=n_ubatches * n_layers)
    cost = distinct.reshape(n_ubatches, n_layers) * np.asarray(expert_bytes, dtype=np.float64)
    # each token of a ubatch bears as much of it
    share = cost / np.bincount(row, minlength=n_ubatches)[:, None]
    read = np.zeros((text.n_requests, n_layers))
    np.add.at(read, text.owner, share[row])
    tokens = np.bincount(text.owner, minlength=text.n_requests).astype(np.float64)
    there = tokens > 0
    return LayerTraffic(text.layers, read[there], tokens[there])


def choose_layers(worth: npt.ArrayLike, sizes: npt.ArrayLike, room: float) -> Ints:
    """Which layers (indices, ascending) to keep where there is room for so many bytes: the most worth per byte first.

    Parameters
    ----------
    worth, sizes
        (L,) bytes read per token, and bytes of all experts of the layer.
    """
    value, size = np.asarray(worth, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    kept, left = [], float(room)
    # of equal worth the later layer: it is what llama.cpp's own option keeps
    for layer in np.lexsort((-np.arange(value.size), -value / size)).tolist():
        if size[layer] <= left:
            kept.append(layer)
            left -= size[layer]
    return np.sort(np.array(kept, dtype=np.int64))


def compare_placements(
    traffic: LayerTraffic, sizes: npt.ArrayLike, room: float
) -> tuple[pd.DataFrame, dict[str, Ints]]:
    """What leaving layers' experts with the CPU costs, by which ones are kept.

    ``traffic`` keeps those that are read most for their size, ``last`` and ``first`` the last and first ones that fit
    (what llama.cpp's -ncmoe keeps, and the other end), ``no layer`` none.

    Returns one row per placement: ``placement``, ``kept`` (how many layers), ``layers`` (their numbers), ``bytes`` that
    they take, ``left`` (bytes per token of the experts that stay with the CPU) with ``low`` and ``high`` (jackknife
    over prompts), and ``more`` than with ``traffic``, paired, with ``more_low`` and ``more_high``; and the layers'
    indices.
    """
    size = np.asarray(sizes, dtype=np.float64)
    n = size.size
    every = np.arange(n)
    worth = traffic.read.sum(axis=0) / traffic.tokens.sum()

    def fitting(order: Ints) -> Ints:
        return np.sort(order[: int(np.searchsorted(np.cumsum(size[order]), room, side="right"))])

    kept = {
        "traffic": choose_layers(worth, size, room),
        "last": fitting(every[::-1]),
        "first": fitting(every),
        "no layer": np.array([], dtype=np.int64),
    }
    best = np.setdiff1d(every, kept["traffic"])
    rows = []
    for name, mine in kept.items():
        left = np.setdiff1d(every, mine)
        cost = traffic.per_token(left)
        more = nulls.ratio_interval(
            traffic.read[:, left].sum(axis=1) - traffic.read[:, best].sum(axis=1), traffic.tokens
        )
        rows.append(
            (
                name, mine.size, " ".join(map(str, traffic.layers[mine].tolist())), int(size[mine].sum()),
                worth[left].sum(), float(cost.low), float(cost.high), worth[left].sum() - worth[best].sum(),
                float(more.low), float(more.high),
            )
        )  # fmt: skip
    columns = ["placement", "kept", "layers", "bytes", "left", "low", "high", "more", "more_low", "more_high"]
    return pd.DataFrame(rows, columns=columns), kept
