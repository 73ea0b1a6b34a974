"""How routing moves on from token to token, and from layer to layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import axes, by_layer, faint, ink, legend_above


def phases(curve: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how far usage before each step differs from usage after it; ``curve`` of ``generation_phases``."""
    ax = axes(ax)
    ax.plot(curve["step"], curve["jsd_bits"], color=ink(), label="before against after the step")
    chance = "some prompts read backwards, 95 % quantile"
    ax.plot(curve["step"], curve["null_q95"], color=faint(), linestyle="--", label=chance)
    ax.set(xlabel="step", ylabel="divergence (bits)")
    legend_above(ax)
    return ax


def handoffs(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how often the first expert changes, by layer; ``table`` of :func:`moetrace.analysis.handoffs`."""
    ax = axes(ax)
    rows = table[table["layer"] >= 0]
    ax.plot(rows["layer"], rows["handoffs"], marker="o", color=ink(), label="observed")
    ax.plot(rows["layer"], rows["shuffle"], linestyle="--", color=faint(), label="random order")
    return by_layer(ax, rows["layer"], "handoffs per token", ylim=(0, 1))


def information(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what neighbouring layers' first experts tell of each other: ``layers`` of ``moetrace.analysis.Circuits``."""
    ax = axes(ax)
    near = table[table["to_layer"] == table.groupby("layer")["to_layer"].transform("min")]
    ax.plot(near["layer"], near["mi_bits"], marker="o", color=ink(), label="observed")
    ax.plot(near["layer"], near["mi_null_bits"], linestyle="--", color=faint(), label="out of step")
    return by_layer(ax, near["layer"], "mutual information with the next layer (bits)", ylim=(0, None))
