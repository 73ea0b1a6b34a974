"""How evenly load falls on the experts."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, band, faint, layer_axis, legend_above, marker


def load_balance(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw Jain's index by layer with its 95 % interval; ``table`` of :func:`moetrace.analysis.load_balance`."""
    ax = axes(ax)
    ax.axhline(1.0, color=faint(), linestyle="--", linewidth=0.9, label="even load")
    ax.plot(
        table["layer"],
        table["jain"],
        color=OKABE_ITO[0],
        marker=marker(len(table)),
        label="Jain index, 95 % interval",
    )
    band(ax, table["layer"], table["jain_low"], table["jain_high"], OKABE_ITO[0])
    layer_axis(ax, table["layer"].to_numpy())
    ax.set(ylabel="Jain index (1: even)", ylim=(0, 1.03))
    legend_above(ax, 2)
    return ax
