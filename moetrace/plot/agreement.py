"""How far two captures of the same text agree."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, by_layer, line, marker

_NAMES = {
    "overlap": "experts shared, |A ∩ B|/k",
    "exact": "same set",
    "top1": "same first expert",
    "kendall_tau": "Kendall's τ of shared experts",
}


def agreement(summary: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw agreement by layer, a line per metric with its 95 % interval over prompts, chance dotted.

    ``summary`` is that of :func:`moetrace.analysis.agreement_summary`; ``coverage_k``, which counts experts,
    is left out.
    """
    ax = axes(ax)
    for i, (metric, name) in enumerate(_NAMES.items()):
        t = summary[summary["metric"] == metric]
        if not t["mean"].notna().any():
            continue
        line(ax, t, "layer", "mean", OKABE_ITO[i], marker=marker(len(t)), label=name)
        if metric != "kendall_tau":
            ax.plot(t["layer"], t["chance"], color=OKABE_ITO[i], linestyle=":", linewidth=1)
    least = min(0.0, float(summary["low"].min(skipna=True) or 0.0))
    return by_layer(ax, summary["layer"], "agreement (chance dotted)", 2, ylim=(least, 1.03))
