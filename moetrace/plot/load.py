"""How evenly load falls on the experts."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, by_layer, faint, line, marker


def load_balance(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw Jain's index by layer with its 95 % interval; ``table`` of :func:`moetrace.analysis.load_balance`.

    The jackknife estimate is drawn; where there is none, the plain value, without an interval.
    """
    ax = axes(ax)
    ax.axhline(1.0, color=faint(), linestyle="--", linewidth=0.9, label="even load")
    table = table.assign(shown=table["jain_jackknife"].fillna(table["jain"]))
    how = {"marker": marker(len(table)), "label": "Jain index, 95 % interval"}
    line(ax, table, "layer", "shown", OKABE_ITO[0], "jain_low", "jain_high", **how)
    return by_layer(ax, table["layer"], "Jain index (1: even)", 2, ylim=(0, 1.03))
