"""How far apart the domains lie, layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, band, faint, ink, layer_axis, legend_above


def separation(table: pd.DataFrame, *, ax: Axes | None = None, alpha: float = 0.05) -> Axes:
    """Draw separation by depth.

    Parameters
    ----------
    table
        Of :class:`moetrace.analysis.DomainTest`, one row per layer: ``jsd_bits`` is drawn as points, full
        where ``q_value`` ≤ alpha and empty elsewhere, before the band in which 95 % of the permutations lie
        (``jsd_null_q95``); ``jsd_jackknife`` as a line with its interval. What is NaN is left out: a layer
        that cannot be tested has neither band nor full point.
    """
    ax = axes(ax)
    x = table["layer"].to_numpy()
    ax.fill_between(
        x, 0, table["jsd_null_q95"], step="mid" if len(x) > 1 else None, color=faint(), alpha=0.22, linewidth=0,
        label="prompts alone (95 % of permutations)",
    )  # fmt: skip
    ax.plot(x, table["jsd_jackknife"], color=OKABE_ITO[0], label="corrected for bias, 95 % interval")
    band(ax, x, table["jsd_low"], table["jsd_high"], OKABE_ITO[0])
    found = (table["q_value"] <= alpha).to_numpy()
    tested = table["q_value"].notna().to_numpy()
    for which, fill, label in (
        (found, ink(), f"measured, q ≤ {alpha:g}"),
        (tested & ~found, "none", f"measured, q > {alpha:g}"),
        (~tested, "none", "measured, cannot be tested"),
    ):
        if which.any():
            y = table["jsd_bits"].to_numpy()[which]
            ax.scatter(
                x[which], y, s=16, facecolor=fill, edgecolor=ink(), linewidth=0.9, zorder=3, label=label
            )
    layer_axis(ax, x)
    ax.set(ylabel="Jensen-Shannon divergence (bits)", ylim=(0, None))
    if not np.isfinite(table["jsd_bits"]).any():
        ax.set_ylim(0, 1)
    legend_above(ax, 2)
    return ax


def matched_separation(table: pd.DataFrame, *, ax: Axes | None = None, alpha: float = 0.05) -> Axes:
    """Draw separation with the words taken out, beside the whole.

    ``table`` is that of :class:`moetrace.analysis.MatchedSeparation`. Points mark ``q_value`` ≤ alpha.
    """
    ax = axes(ax)
    x = table["layer"].to_numpy()
    ax.plot(x, table["jsd_bits"], color=OKABE_ITO[1], linestyle="--", label="words and all")
    ax.plot(
        x, table["jsd_matched_bits"], color=OKABE_ITO[0], linewidth=0.9, label="words taken out, uncorrected"
    )
    ax.plot(x, table["jsd_matched_jackknife"], color=OKABE_ITO[0], label="corrected for bias, 95 % interval")
    band(ax, x, table["jsd_matched_low"], table["jsd_matched_high"], OKABE_ITO[0])
    ax.plot(
        x,
        table["jsd_matched_null_mean"],
        color=faint(),
        linestyle=":",
        label="prompts alone, words taken out",
    )
    found = (table["q_value"] <= alpha).to_numpy()
    if found.any():
        y = table["jsd_matched_jackknife"].to_numpy()[found]
        ax.scatter(x[found], y, s=18, color=OKABE_ITO[0], zorder=3, label=f"q ≤ {alpha:g}")
    layer_axis(ax, x)
    ax.set(ylabel="Jensen-Shannon divergence (bits)", ylim=(0, None))
    legend_above(ax, 3)
    return ax
