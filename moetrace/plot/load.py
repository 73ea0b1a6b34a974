"""How evenly load falls on the experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

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


def carried(experts: pd.DataFrame, column: str, *, ax: Axes | None = None) -> Axes:
    """Draw what the most important experts of each layer carry together, a line per layer.

    ``experts`` as :attr:`moetrace.analysis.ExpertImportance.experts`; ``column`` its share that is summed.
    """
    ax = axes(ax)
    layers = experts["layer"].unique()
    most = 0
    for i, layer in enumerate(layers):
        values = np.sort(experts.loc[experts["layer"] == layer, column].fillna(0.0).to_numpy(np.float64))[
            ::-1
        ]
        total = values.sum()
        if total > 0:
            color = colormaps["viridis"](i / max(len(layers) - 1, 1))
            ax.plot(
                np.arange(values.size + 1), np.append(0, np.cumsum(values) / total), color=color, linewidth=1
            )
            most = max(most, values.size)
    ax.plot([0, most], [0, 1], color=faint(), linestyle="--", linewidth=0.9)
    norm = Normalize(float(layers.min()), float(max(layers.max(), layers.min() + 1)))
    ax.figure.colorbar(ScalarMappable(norm, "viridis"), ax=ax, label="layer")
    ax.set(xlabel="experts, the most important first", ylabel="share that they carry", ylim=(0, 1.02))
    return ax
