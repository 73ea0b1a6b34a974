"""Which expert follows which."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes

from moetrace.analysis.dynamics.temporal import Transitions
from moetrace.plot.heatmap import heatmap


def transitions(
    found: Transitions | pd.DataFrame,
    *,
    measure: Literal["probability", "lift"] = "probability",
    min_expected: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw one layer's transition matrix, from (downwards) × to.

    Parameters
    ----------
    found
        Of :func:`moetrace.analysis.transitions`, or a frame of experts × experts with that measure.
    measure
        "probability": of the next token's first expert, rows add to 1; "lift": over the same prompt in random
        order.
    min_expected
        Of :class:`~moetrace.analysis.Transitions`, lifts over a smaller expected count are left out: they say
        nothing.
    """
    matrix = found if isinstance(found, pd.DataFrame) else getattr(found, measure)
    if not isinstance(found, pd.DataFrame) and measure == "lift":
        matrix = matrix.where(found.expected >= min_expected)
    label = "probability" if measure == "probability" else "lift over random order"
    ax = heatmap(matrix, label=label, scale="lift" if measure == "lift" else "linear", ax=ax)
    ax.set(xlabel="next token's first expert", ylabel="token's first expert")
    if not isinstance(found, pd.DataFrame):
        ax.set_title(f"layer {found.layer}")
    return ax
