"""One layer's use by domain, once for each expert matrix."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.heatmap import heatmap
from moetrace.plot.style import faint, short


def components(
    percent: pd.DataFrame, consumers: Sequence[str] = ("gate", "up", "down"), *, ax: Axes | None = None
) -> Axes:
    """Draw the deep dive: domain × expert, a block of rows for each matrix that the ids went to.

    Parameters
    ----------
    percent
        Domains × experts, as :class:`moetrace.analysis.DeepDive` has it.
    consumers
        Names of the matrices. The blocks are alike, because one decision serves all; that they are is the
        point, and why nothing is counted three times.
    """
    blocks = tuple(consumers) or ("experts",)
    stacked = pd.concat([percent] * len(blocks))
    stacked.index = pd.Index([short(str(name), 14) for _ in blocks for name in percent.index])
    ax = heatmap(stacked, label="% of the domain's picks", ax=ax)
    n = len(percent)
    for i, name in enumerate(blocks):
        if i:
            ax.axhline(i * n - 0.5, color=ax.figure.get_facecolor(), linewidth=3)
        ax.text(
            1.005, (i + 0.5) * n - 0.5, name.removeprefix("ffn_"), transform=ax.get_yaxis_transform(),
            rotation=90, va="center", ha="left", color=faint(),
        )  # fmt: skip
    ax.set_xlabel("expert")
    return ax
