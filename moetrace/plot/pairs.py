"""Pairs of experts of a layer, and of contexts of a token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from moetrace.plot.heatmap import LIFT, heatmap


def pairs(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw one layer's lifts, expert × expert, with experts that go together side by side.

    ``table`` is ``lifts`` of :class:`moetrace.analysis.CoOccurrence`. Experts without any pair to speak of are left
    out; the others are in the order of the leaves of their average linkage, by the logarithm of the lift.
    """
    matrix = table.pivot_table(index="expert", columns="other", values="lift", dropna=False)
    known = matrix.index[matrix.notna().any(axis=1)]
    matrix = matrix.loc[known, known]
    if len(matrix) > 2:
        near = np.log(np.clip(matrix.to_numpy(dtype=np.float64), 1 / LIFT, LIFT))
        distance = np.log(LIFT) - np.nan_to_num(near, nan=0.0)
        np.fill_diagonal(distance, 0.0)
        order = _side_by_side(distance)
        matrix = matrix.iloc[order, order]
    ax = heatmap(
        matrix.rename_axis(index="expert", columns="expert"),
        label="lift over rates alone",
        scale="lift",
        ax=ax,
    )
    ax.set_title(f"layer {table['layer'].iloc[0]}")
    return ax


def similarity(table: pd.DataFrame, what: str = "attention", *, ax: Axes | None = None) -> Axes:
    """Draw one similarity matrix of contexts, those that are alike in attention side by side.

    ``what`` is "attention" or "routing"; ``table`` is the second of
    :func:`moetrace.analysis.prediction.by_layer.contexts_by_layer`.
    """
    names = list(dict.fromkeys([*table["context"], *table["other"]]))
    place = {name: i for i, name in enumerate(names)}
    a, b = (table[column].map(place).to_numpy() for column in ("context", "other"))

    def square(column: str) -> npt.NDArray[np.float64]:
        out = np.ones((len(names), len(names)))
        out[a, b] = out[b, a] = table[column]
        return out

    order = _side_by_side(1 - square("attention"))
    matrix = pd.DataFrame(
        square(what)[np.ix_(order, order)], [names[i] for i in order], [names[i] for i in order]
    )
    ax = heatmap(matrix, label=f"similarity of {what}", high=1.0, ax=ax)
    ax.set(xlabel="context", ylabel="context", title=f"layer {table['layer'].iloc[0]}")
    return ax


def _side_by_side(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """(n,) the order in which near ones are neighbours: leaves of the average linkage of (n, n) distances."""
    if len(distance) < 3:
        return np.arange(len(distance))
    apart = np.maximum((distance + distance.T) / 2, 0.0)
    return np.asarray(leaves_list(linkage(squareform(apart, checks=False), "average")), dtype=np.int64)
