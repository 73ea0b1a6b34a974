"""Pairs of experts of a layer."""

from __future__ import annotations

import numpy as np
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
        order = leaves_list(linkage(squareform((distance + distance.T) / 2, checks=False), "average"))
        matrix = matrix.iloc[order, order]
    ax = heatmap(
        matrix.rename_axis(index="expert", columns="expert"),
        label="lift over rates alone",
        scale="lift",
        ax=ax,
    )
    ax.set_title(f"layer {table['layer'].iloc[0]}")
    return ax
