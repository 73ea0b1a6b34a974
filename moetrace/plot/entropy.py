"""How many experts a domain spreads over."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.names import shortened
from moetrace.plot.style import OKABE_ITO, axes, by_layer, faint, line, marker


def entropy(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw entropy by layer, a line per domain with its 95 % interval over prompts.

    ``table`` is that of :func:`moetrace.analysis.domain_entropy`. The jackknife estimate is drawn; where a
    domain has one prompt only, Miller-Madow's, without an interval. Of more domains than there are colours those of
    highest and lowest mean over layers are named, and the others are faint.
    """
    ax = axes(ax)
    ax.axhline(table["max_bits"].max(), color=faint(), linestyle="--", linewidth=0.9, label="even use")
    table = table.assign(bits=table["entropy_jackknife_bits"].fillna(table["entropy_miller_madow_bits"]))
    mean = table.groupby("domain", sort=True)["bits"].mean()
    named = outermost(mean)
    rest = table[~table["domain"].isin(named)]
    n = len(mean) - len(named)
    for i, (_, t) in enumerate(rest.groupby("domain", sort=True)):
        others = f"{n} other domain{'s' if n > 1 else ''}" if i == 0 else None
        ax.plot(t["layer"], t["bits"], color=faint(), linewidth=0.6, alpha=0.5, label=others)
    names = shortened(named)
    for color, domain in zip(OKABE_ITO, named, strict=False):
        t = table[table["domain"] == domain]
        label = names[str(domain)]
        line(ax, t, "layer", "bits", color, marker=marker(len(t)), markersize=2.5, label=label)
    return by_layer(ax, table["layer"], "entropy of expert use (bits)", 6, names)


def outermost(values: pd.Series[float], at_most: int = len(OKABE_ITO)) -> list[str]:
    """Give the labels of so many values: all in their order, or else the highest ones and then the lowest ones."""
    if len(values) <= at_most:
        return [str(name) for name in values.index]
    order = values.sort_values(ascending=False, kind="stable").index
    low = at_most // 2
    return [str(name) for name in (*order[: at_most - low], *order[-low:])]
