"""How long a token's routing lasts."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moetrace.plot.style import OKABE_ITO, axes, band, by_layer, faint, legend_above, line, marker

Family = Literal["overlap", "top1"]
_NAMES = {"overlap": "experts shared, |A ∩ B|/k", "top1": "same first expert"}


def persistence(
    table: pd.DataFrame, layer: int | None = None, *, family: Family = "overlap", ax: Axes | None = None
) -> Axes:
    """Draw one layer's agreement of tokens that are d apart, with both baselines.

    Parameters
    ----------
    table
        Of :func:`moetrace.analysis.persistence`, one row per (layer, lag).
    layer
        Which; None: the one of largest excess at lag 1.
    family
        "overlap": sets; "top1": first experts.

    The band is the excess's 95 % interval over prompts, set upon the shuffle.
    """
    ax = axes(ax)
    layer = strongest_layer(table, family) if layer is None else layer
    t = table[table["layer"] == layer]
    if t.empty:
        raise ValueError(f"layer {layer} is not in the table")
    shuffle = t[f"{family}_shuffle"]
    ax.plot(
        t["lag"], t[family], color=OKABE_ITO[0], marker=marker(len(t)), label=f"layer {layer}, 95 % interval"
    )
    band(ax, t["lag"], shuffle + t[f"{family}_low"], shuffle + t[f"{family}_high"], OKABE_ITO[0])
    ax.plot(t["lag"], shuffle, color=OKABE_ITO[1], linestyle="--", label="same prompt, random order")
    ax.plot(t["lag"], t[f"{family}_marginal"], color=faint(), linestyle=":", label="any two tokens")
    ax.set(xlabel="lag (tokens)", ylabel=_NAMES[family], ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", linewidth=0.6)
    legend_above(ax, 3)
    return ax


def persistence_by_layer(
    table: pd.DataFrame, lag: int = 1, *, family: Family = "overlap", ax: Axes | None = None
) -> Axes:
    """Draw, by layer, how much more tokens ``lag`` apart agree than in random order, with 95 % intervals."""
    ax = axes(ax)
    t = table[table["lag"] == lag]
    ax.axhline(0.0, color=faint(), linewidth=0.9, linestyle="--", label="random order of the prompt's tokens")
    excess, low, high = (f"{family}_{part}" for part in ("excess", "low", "high"))
    how = {"marker": marker(len(t)), "label": "excess, 95 % interval"}
    line(ax, t, "layer", excess, OKABE_ITO[0], low, high, **how)
    return by_layer(ax, t["layer"], f"{_NAMES[family]},\nexcess at lag {lag}", 2)


def strongest_layer(table: pd.DataFrame, family: Family = "overlap") -> int:
    """The layer of largest excess at the shortest lag; the first layer where none is known."""
    first = table[table["lag"] == table["lag"].min()]
    excess = first[f"{family}_excess"]
    return int(first["layer"].loc[excess.idxmax()] if excess.notna().any() else first["layer"].iloc[0])
