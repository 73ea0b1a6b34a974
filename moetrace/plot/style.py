"""Colours, light and dark, and what every drawing shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from moetrace.plot.names import stand_for

Theme = Literal["light", "dark"]

#: Colours of categories that people of any colour vision tell apart (Okabe & Ito 2008), strongest first;
#: yellow is left out (too faint on white), and black is the theme's ink.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F7F7F")

#: Ink, faint ink (baselines, ticks), lines of a grid, and the ground on which missing cells are hatched.
LIGHT = {"ink": "#1B1F24", "faint": "#59636E", "grid": "#DFE3E8", "missing": "#E9ECEF", "ground": "#FFFFFF"}
DARK = {"ink": "#E6EDF3", "faint": "#9AA4AF", "grid": "#31373E", "missing": "#2A3037", "ground": "#14181D"}


def style(theme: Theme = "light") -> AbstractContextManager[None]:
    """Give a context within which figures are drawn in our style, on a light or a dark ground."""
    c = DARK if theme == "dark" else LIGHT
    return mpl.rc_context(
        {
            "figure.facecolor": c["ground"],
            "savefig.facecolor": c["ground"],
            "axes.facecolor": c["ground"],
            "axes.edgecolor": c["faint"],
            "axes.labelcolor": c["ink"],
            "axes.titlecolor": c["ink"],
            "text.color": c["ink"],
            "xtick.color": c["faint"],
            "ytick.color": c["faint"],
            "xtick.labelcolor": c["ink"],
            "ytick.labelcolor": c["ink"],
            "grid.color": c["grid"],
            "hatch.color": c["faint"],
            "hatch.linewidth": 0.4,
            "lines.color": c["ink"],
            "patch.edgecolor": c["ink"],
            "axes.prop_cycle": cycler(color=OKABE_ITO),
            "image.cmap": "cividis",
            "image.interpolation": "nearest",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "figure.autolayout": False,
            "figure.constrained_layout.use": False,
            "axes.titlesize": "medium",
            "font.size": 9.0,
            "legend.frameon": False,
            "legend.fontsize": 8.0,
            "legend.handlelength": 1.6,
            "lines.linewidth": 1.5,
            "lines.markersize": 4.0,
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
            "svg.hashsalt": "moetrace",
        }
    )


def axes(ax: Axes | None, size: tuple[float, float] = (7.0, 4.0)) -> Axes:
    """Give ``ax``, or the Axes of a new figure."""
    return plt.figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def canvas(ax: Axes) -> Figure:
    """The figure that the axes stand in."""
    found = ax.get_figure(root=True)
    assert found is not None
    return found


def ink() -> str:
    """The colour of lines that carry the data, in the style in force."""
    return str(mpl.rcParams["text.color"])


def faint() -> str:
    """The colour of baselines and other company, in the style in force."""
    return str(mpl.rcParams["axes.edgecolor"])


def legend_above(ax: Axes, columns: int = 4, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Put the legend above the axes, where it hides nothing, in as many columns as fit the figure.

    ``names`` are whole names and what stands for them, as :func:`moetrace.plot.names.shortened` gives them.
    """
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    font = FontProperties(size=mpl.rcParams["legend.fontsize"])
    widest = max(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] for text in labels)
    # beside the text a handle, its gap, and what lies between columns, in font sizes
    column = widest + font.get_size_in_points() * (mpl.rcParams["legend.handlelength"] + 0.8 + 1.4)
    room = 0.88 * 72 * canvas(ax).get_figwidth()
    legend = ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=max(1, min(columns, len(handles), int(room / column))),
        borderaxespad=0.2,
        columnspacing=1.4,
    )
    whole = {form: name for name, form in names.items()}
    for text in legend.get_texts():
        stand_for(text, whole.get(text.get_text(), text.get_text()))


def layer_axis(ax: Axes, layers: Sequence[int] | npt.NDArray[Any]) -> None:
    """Let x be the layer: whole numbers, a little room at both ends."""
    numbers = np.asarray(layers)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=12))
    ax.set_xlim(numbers.min() - 0.5, numbers.max() + 0.5)
    ax.grid(axis="y", linewidth=0.6)


def marker(n: int) -> str:
    """The marker of a line of n points: none where they would run into each other."""
    return "o" if n <= 48 else ""


def line(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    color: str,
    low: str = "low",
    high: str = "high",
    **options: Any,
) -> None:
    """Draw a column against another, and its interval (``low``, ``high``)."""
    ax.plot(table[x], table[y], color=color, **options)
    band(ax, table[x], table[low], table[high], color)


def by_layer(
    ax: Axes,
    layers: pd.Series[int],
    ylabel: str,
    columns: int = 4,
    names: Mapping[str, str] = MappingProxyType({}),
    **more: Any,
) -> Axes:
    """Finish a drawing whose x is the layer: the axis, its label, what else :meth:`Axes.set` takes, the legend."""
    layer_axis(ax, layers.to_numpy())
    ax.set(ylabel=ylabel, **more)
    legend_above(ax, columns, names)
    return ax


def zero_line(ax: Axes, at: float = 0.0) -> None:
    """Draw a faint line that others are read against."""
    ax.axhline(at, color=faint(), linewidth=0.9)


def band(
    ax: Axes, x: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, color: str, **options: Any
) -> None:
    """Shade an interval; nothing where it is not known. A lone point gets a bar."""
    a, b, at = (np.asarray(v, dtype=np.float64) for v in (low, high, x))
    ax.fill_between(at, a, b, color=color, alpha=0.18, linewidth=0, **options)
    known = ~(np.isnan(a) | np.isnan(b))
    alone = known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])
    ax.vlines(at[alone], a[alone], b[alone], color=color, alpha=0.5, linewidth=3)
