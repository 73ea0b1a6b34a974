"""Experts that prefer a domain, with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from moetrace.plot.names import shortened, stand_for
from moetrace.plot.style import LIGHT, OKABE_ITO, axes, faint, layer_axis, legend_above


def specialists(table: pd.DataFrame, *, at_most: int = 24, ax: Axes | None = None) -> Axes:
    """Draw a forest plot: the experts that most surely prefer a domain, their lift and its 95 % interval.

    Parameters
    ----------
    table
        Of :func:`moetrace.analysis.specialists`, one row per (layer, expert).
    at_most
        How many to draw, those of largest lower bound; how many there are is said below the axis. Where they are
        of more domains than there are colours, the domain stands beside each.
    """
    found = table[(table["kind"] == "specialist") & table["low"].notna()]
    shown = found.sort_values(["low", "lift"], ascending=False).head(at_most)
    ax = axes(ax, (7.0, 1.4 + 0.2 * max(3, len(shown))))
    domains = sorted(set(table["domain"]))
    colored = domains if len(domains) <= len(OKABE_ITO) else sorted(set(shown["domain"]))
    by_color = len(colored) <= len(OKABE_ITO)
    names = shortened(set(shown["domain"]))
    place = np.arange(len(shown))
    for domain in sorted(set(shown["domain"])):
        mine = (shown["domain"] == domain).to_numpy()
        rows = shown[mine]
        color = OKABE_ITO[colored.index(domain) if by_color else 0]
        ax.hlines(place[mine], rows["low"], rows["high"], color=color, linewidth=2, alpha=0.55)
        label = names[domain] if by_color else None
        ax.scatter(rows["lift"], place[mine], color=color, s=18, zorder=3, label=label)
        for y in () if by_color else place[mine]:
            beside = ax.text(1.01, y, names[domain], color=faint(), va="center", size="small")
            beside.set_transform(ax.get_yaxis_transform())
            stand_for(beside, domain)
    ax.axvline(1.0, color=faint(), linewidth=0.9, linestyle="--")
    experts = [f"layer {a}, expert {b}" for a, b in zip(shown["layer"], shown["expert"], strict=True)]
    ax.set_yticks(place, experts)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    ax.set_xscale("log", base=2)
    plain = FuncFormatter(lambda v, _: f"{v:g}")
    ax.xaxis.set_major_formatter(plain)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(min(0.8, *shown["low"].clip(lower=0.05), 1) if len(shown) else 0.5, None if len(shown) else 2)
    ax.grid(axis="x", linewidth=0.6)
    left_out = f"; {len(shown)} of {len(found)} specialists" if len(found) > len(shown) else ""
    ax.set_xlabel(f"lift over the mean of domains, 95 % interval{left_out}")
    if not len(shown):
        ax.text(0.5, 0.5, "no expert is a specialist", transform=ax.transAxes, ha="center", color=faint())
    legend_above(ax, 5, names)
    return ax


def kinds(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many experts of each layer are specialists, generalists, undecided and unused.

    ``table`` is that of :func:`moetrace.analysis.specialists`.
    """
    ax = axes(ax, (7.0, 3.0))
    names = ("specialist", "generalist", "undecided", "unused")
    count = table.groupby("layer")["kind"].value_counts().unstack(fill_value=0)
    count = count.reindex(columns=list(names), fill_value=0)
    below = np.zeros(len(count))
    for name, color in zip(names, (OKABE_ITO[0], OKABE_ITO[2], LIGHT["grid"], OKABE_ITO[6]), strict=True):
        ax.bar(count.index, count[name], bottom=below, width=0.85, color=color, label=name)
        below += count[name].to_numpy()
    layer_axis(ax, count.index.to_numpy())
    ax.set_ylabel("experts")
    legend_above(ax, 4)
    return ax
