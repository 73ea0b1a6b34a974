"""How the router's input changes from layer to layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import OKABE_ITO, axes, by_layer, faint, line, marker

_UNITS = {
    "cosine_similarity": "cosine similarity",
    "cosine_distance": "cosine distance",
    "euclidean": "Euclidean distance",
    "l1": "L1 distance",
    "l2_normalized": "Euclidean distance / √D",
    "pearson_corr": "Pearson correlation",
    "max_abs_diff": "largest absolute difference",
    "mean_abs_diff": "mean absolute difference",
}


def gate_distances(
    summary: pd.DataFrame, metric: str = "cosine_similarity", *, ax: Axes | None = None
) -> Axes:
    """Draw one distance between consecutive MoE layers, with its 95 % interval over prompts.

    Parameters
    ----------
    summary
        Of :func:`moetrace.analysis.gate_summary`.
    metric
        Which. A cosine similarity stands beside that to another token's next layer, below which it means
        nothing.
    """
    ax = axes(ax)
    shown = {metric: (OKABE_ITO[0], "-", "same token")}
    if metric == "cosine_similarity":
        shown["cosine_unpaired"] = (faint(), "--", "another token (no relation)")
    for name, (color, dashes, label) in shown.items():
        t = summary[summary["metric"] == name]
        line(ax, t, "layer", "mean", color, linestyle=dashes, marker=marker(len(t)), label=label)
    what = f"{_UNITS.get(metric, metric)} of gate inputs"
    return by_layer(ax, summary["layer"], what, 2, xlabel="layer (to the next one)")
