"""Matrices as heatmaps: layers × experts above all."""

from __future__ import annotations

from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moetrace.plot.names import short, shortened, stand_for
from moetrace.plot.style import DARK, LIGHT, axes, canvas, faint

Measure = Literal["percent_of_tokens", "percent", "lift"]

#: Lift is shown from 1/LIFT to LIFT; what lies beyond takes the outermost colour.
LIFT = 4.0


def heatmap(
    values: pd.DataFrame,
    *,
    label: str,
    scale: Literal["linear", "lift"] = "linear",
    high: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a matrix: rows downwards, columns to the right, a colour bar with ``label``.

    Parameters
    ----------
    values
        Float, (rows × columns), labelled by index and columns, whose names become the axes'; NaN is hatched.
    label
        What a value is, with its unit.
    scale
        "linear": cividis from 0 to ``high`` (the largest value if None). "lift": ratios on a logarithmic
        diverging scale around 1, cut at 1/4 and 4.
    """
    ax = axes(ax, size_of(len(values)))
    data = np.ma.masked_invalid(values.to_numpy(dtype=np.float64))
    norm: Normalize
    if scale == "lift":
        norm, cmap = LogNorm(1 / LIFT, LIFT), mpl.colormaps["PuOr_r"]
        data = np.ma.clip(data, 1 / LIFT, LIFT)
        extend = "both"
    else:
        top = high if high is not None else float(data.max()) if data.count() else 1.0
        norm, cmap = Normalize(0.0, top or 1.0), mpl.colormaps["cividis"]
        extend = "max" if data.count() and float(data.max()) > (top or 1.0) * (1 + 1e-9) else "neither"
    hatch_missing(ax)
    clear = cmap.with_extremes(bad=(0, 0, 0, 0))
    image = ax.imshow(data, aspect="auto", cmap=clear, norm=norm, interpolation="nearest")
    for spine in ax.spines.values():
        spine.set_visible(False)
    _ticks(ax, "x", values.columns)
    _ticks(ax, "y", values.index)
    ax.set(xlabel=values.columns.name or "", ylabel=values.index.name or "")
    bar = ax.figure.colorbar(image, ax=ax, label=label, extend=extend, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    if scale == "lift":
        bar.ax.yaxis.set_major_locator(FixedLocator([1 / 4, 1 / 2, 1, 2, 4]))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"1/{1 / v:.0f}" if v < 0.9 else f"{v:.0f}")
        )
    return ax


def size_of(n_rows: int) -> tuple[float, float]:
    """Inches of a figure that shows a matrix of so many rows: room for a name beside each, and for the colour bar's."""
    return 7.0, 1.5 + min(6.0, max(1.1, 0.17 * n_rows))


def usage(
    frequency: pd.DataFrame,
    domain: str | None = None,
    *,
    measure: Measure = "percent_of_tokens",
    high: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Layer × expert heatmap of one domain.

    Parameters
    ----------
    frequency
        Of :func:`moetrace.analysis.expert_frequency` (for "lift": of :func:`moetrace.analysis.domain_lift`),
        one row per (layer, domain, expert); or of :func:`moetrace.analysis.expert_usage`, one per (layer,
        expert).
    domain
        Which; None: all prompts where the table has no domains, else the mean over domains.
    high
        Top of the colour scale; if None, that of all domains, so that they compare: all but the highest 0.1 % of
        values lie below it.
    """
    chosen = frequency if domain is None else frequency[frequency["domain"] == domain]
    matrix = chosen.groupby(["layer", "expert"])[measure].mean().unstack("expert")
    labels = {
        "percent_of_tokens": "% of tokens that use the expert",
        "percent": "% of the layer's picks",
        "lift": "lift over the mean of domains",
    }
    if measure != "lift" and high is None:
        high = float(frequency[measure].quantile(0.999))
    ax = heatmap(
        matrix, label=labels[measure], scale="lift" if measure == "lift" else "linear", high=high, ax=ax
    )
    ax.set_title("all prompts" if domain is None else short(domain, 60), parse_math=False)
    return ax


def hatch_missing(ax: Axes) -> None:
    """Hatch the axes' ground: it shows where a cell is missing."""
    dark = mpl.colors.to_rgb(mpl.rcParams["axes.facecolor"])[0] < 0.5
    ax.set_facecolor((DARK if dark else LIGHT)["missing"])
    ax.patch.set(hatch="////", edgecolor=faint(), linewidth=0)


def _ticks(ax: Axes, which: Literal["x", "y"], labels: pd.Index[Any]) -> None:
    """Label as many of the cells as are readable: all if there are few, else round numbers."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    n = len(labels)
    width, height = canvas(ax).get_size_inches()
    room = 2.5 * width if which == "x" else max(24, 5.5 * (height - 1))
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if n <= room * s)
    places: npt.NDArray[Any] = np.arange(0, n, step) if n else np.arange(0)
    names = shortened(labels)
    axis.set_major_locator(FixedLocator(places.tolist()))
    axis.set_ticklabels([names[str(labels[i])] for i in places])
    axis.set_tick_params(length=2 if step > 1 else 0)
    for text, i in zip(axis.get_ticklabels(), places, strict=False):
        stand_for(text, str(labels[i]))
