"""How many experts a domain spreads over."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, band, by_layer, faint, marker, short


def entropy(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw entropy by layer, a line per domain with its 95 % interval over prompts.

    ``table`` is that of :func:`moetrace.analysis.domain_entropy`. The jackknife estimate is drawn; where a
    domain has one prompt only, Miller-Madow's, without an interval.
    """
    ax = axes(ax)
    ax.axhline(table["max_bits"].max(), color=faint(), linestyle="--", linewidth=0.9, label="even use")
    for i, (domain, t) in enumerate(table.groupby("domain", sort=True)):
        color = OKABE_ITO[i % len(OKABE_ITO)]
        bits = t["entropy_jackknife_bits"].fillna(t["entropy_miller_madow_bits"])
        ax.plot(
            t["layer"], bits, color=color, marker=marker(len(t)), markersize=2.5, label=short(str(domain))
        )
        band(ax, t["layer"], t["low"], t["high"], color)
    return by_layer(ax, table["layer"], "entropy of expert use (bits)", 6)
