"""How evenly load falls on the experts."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, by_layer, faint, line, marker


def load_balance(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw Jain's index by layer with its 95 % interval; ``table`` of :func:`moetrace.analysis.load_balance`."""
    ax = axes(ax)
    ax.axhline(1.0, color=faint(), linestyle="--", linewidth=0.9, label="even load")
    label = "Jain index, 95 % interval"
    line(
        ax,
        table,
        "layer",
        "jain",
        OKABE_ITO[0],
        "jain_low",
        "jain_high",
        marker=marker(len(table)),
        label=label,
    )
    return by_layer(ax, table["layer"], "Jain index (1: even)", 2, ylim=(0, 1.03))
