"""How evenly load falls on the experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from moetrace.analysis.statistics.shapes import Floats
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
    most = 0
    for values, color in _lines(ax, experts, column):
        total = values.sum()
        if total > 0:
            share = np.append(0, np.cumsum(values[::-1]) / total)
            ax.plot(np.arange(share.size), share, color=color, linewidth=1)
            most = max(most, values.size)
    ax.plot([0, most], [0, 1], color=faint(), linestyle="--", linewidth=0.9)
    ax.set(xlabel="experts, the most important first", ylabel="share that they carry", ylim=(0, 1.02))
    return ax


def tokens_of_experts(experts: pd.DataFrame, column: str, *, ax: Axes | None = None) -> Axes:
    """Draw how many tokens each layer's experts get, the least first, a line per layer; 0 below 1, on a log scale."""
    ax = axes(ax)
    for values, color in _lines(ax, experts, column):
        ax.plot(np.arange(1, values.size + 1), values, color=color, linewidth=1)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="experts, the least used first", ylabel="tokens", ylim=(0, None))
    return ax


def _lines(ax: Axes, table: pd.DataFrame, column: str) -> list[tuple[Floats, tuple[float, ...]]]:
    """Of each layer the column's values, ascending, and its colour; a colour bar says which is which."""
    layers = np.unique(table["layer"].to_numpy(np.int64))
    norm = Normalize(float(layers.min()), float(max(layers.max(), layers.min() + 1)))
    ax.figure.colorbar(ScalarMappable(norm, "viridis"), ax=ax, label="layer")
    return [
        (
            np.sort(table.loc[table["layer"] == layer, column].fillna(0.0).to_numpy(np.float64)),
            colormaps["viridis"](norm(layer)),
        )
        for layer in layers.tolist()
    ]
