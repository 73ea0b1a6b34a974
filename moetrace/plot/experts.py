"""Single experts: how cold, how alike, how they add up, which inputs reach them, which tokens they prefer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.style import axes, faint, layer_axis, legend_above, zero_line


def rates(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw experts' rates in order, the cold ones marked; ``table`` of :func:`moetrace.analysis.cold_experts`.

    Of more experts than can be told apart some stand for their neighbours, evenly.
    """
    ax = axes(ax)
    table = table.assign(rank=np.arange(1, len(table) + 1))
    shown, cold = (_evenly(part, 1500) for part in (table, table[table["cold"].astype(bool)]))
    ax.fill_between(shown["rank"], shown["cluster_low"], shown["cluster_high"], alpha=0.3, linewidth=0)
    ax.plot(shown["rank"], shown["rate"], marker=".", linestyle="", label="rate, with its interval")
    ax.plot(cold["rank"], cold["rate"], marker="x", linestyle="", color="C4", label="cold")
    ax.axhline(table["threshold"].max(), color=faint(), linestyle="--", label="cold below")
    ax.set(xlabel="experts of all layers, the coldest first", ylabel="share of tokens", ylim=(0, None))
    legend_above(ax)
    return ax


def _evenly(table: pd.DataFrame, at_most: int) -> pd.DataFrame:
    step = max(1, -(-len(table) // at_most))
    return table.iloc[::step]


def change_by_k(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what other numbers of experts per token cost; ``table`` of :func:`moetrace.analysis.expert_interference`."""
    ax = axes(ax)
    ax.errorbar(table["k"], table["change"], yerr=_reach(table), marker="o", capsize=2)
    zero_line(ax)
    ax.set_xscale("log", base=2)
    ax.set_xticks(table["k"], [str(n) for n in table["k"]])
    ax.set(xlabel="experts per token", ylabel="change in NLL (nats per token)")
    return ax


def gain(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw by layer whether a token's experts add up or cancel; rows of :func:`moetrace.analysis.combination`."""
    ax = axes(ax)
    ax.fill_between(table["layer"], table["low"], table["high"], alpha=0.25, linewidth=0)
    ax.plot(table["layer"], table["gain"], marker="o", markersize=3)
    zero_line(ax, 1)
    ax.set(xlabel="layer", ylabel="‖sum‖² / sum of ‖·‖²")
    return ax


def file_curve(curve: pd.DataFrame, title: str, *, ax: Axes | None = None) -> Axes:
    """Draw quality against size of files with fewer experts, a line per criterion, and the frontier as steps."""
    ax = axes(ax)
    best = curve[curve["frontier"]].sort_values("size")
    if len(best):
        ax.step(
            best["size"],
            best["change"],
            where="post",
            color=faint(),
            linewidth=4,
            alpha=0.5,
            label="frontier",
        )
    for criterion, part in curve.groupby("criterion", sort=False):
        part = part.sort_values("size")
        ax.errorbar(
            part["size"], part["change"], yerr=_reach(part), marker="o", capsize=2, label=str(criterion)
        )
    zero_line(ax)
    ax.set(xlabel="size of the file, of the original's", ylabel="change in NLL (nats per token)")
    ax.legend(title=title)
    return ax


def alike(pairs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw every pair of experts: distance of outputs against cosine of weights."""
    ax = axes(ax)
    layers = ax.scatter(pairs["cosine_aligned"], pairs["output_distance"], s=4, c=pairs["layer"])
    ax.figure.colorbar(layers, ax=ax, label="layer")
    ax.set(xlabel="cosine of weights, neurons matched", ylabel="output distance (1: right angles)")
    return ax


def success(searches: pd.DataFrame, budget: int, *, ax: Axes | None = None) -> Axes:
    """Draw the share of targets that each search reached, by inputs tried."""
    ax = axes(ax)
    for method, part in searches.groupby("method", sort=False):
        reached = np.sort(part["reached_at"].dropna().to_numpy(np.float64))
        share = np.arange(len(reached) + 1) / len(part)
        ax.step([0, *reached, budget], [*share, share[-1]], where="post", label=str(method))
    ax.set(xlabel="inputs tried", ylabel="targets reached", ylim=(0, 1.02))
    ax.legend()
    return ax


def kept(after: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw by layer how much of its routing a token keeps after an edit, a line per kind of edit."""
    ax = axes(ax)
    for kind, part in after.groupby("kind"):
        ax.fill_between(part["layer"], part["low"], part["high"], alpha=0.2, linewidth=0)
        ax.plot(part["layer"], part["jaccard"], marker="o", markersize=3, label=str(kind))
    ax.set(xlabel="layer", ylabel="Jaccard of a token's experts", ylim=(0, 1.02))
    ax.legend()
    return ax


def sweep(rows: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what each strength of an intervention gains, a line per choice of experts."""
    ax = axes(ax)
    for name, part in rows.groupby("experts", sort=False):
        reach = [part["gain"] - part["gain_low"], part["gain_high"] - part["gain"]]
        ax.errorbar(part["strength"], part["gain"], yerr=reach, marker="o", capsize=2, label=str(name))
    zero_line(ax)
    ax.set(xlabel="bias (score units)", ylabel="change of NLL beside the others (nats)", xscale="log")
    ax.legend(title="experts")
    return ax


def patterns(
    rows: pd.DataFrame, names: Sequence[str], layers: npt.NDArray[np.int64], *, ax: Axes | None = None
) -> Axes:
    """Draw how many experts of each layer are specialists of each type of token."""
    ax = axes(ax)
    below = np.zeros(len(layers))
    for name in [each for each in names if (rows["pattern"] == each).any()]:
        count = np.array([((rows["layer"] == n) & (rows["pattern"] == name)).sum() for n in layers])
        ax.bar(layers, count, bottom=below, label=name)
        below += count
    if not below.any():
        ax.text(0.5, 0.5, "no specialists", transform=ax.transAxes, ha="center", color=faint())
    ax.set_ylabel("specialists of a type")
    layer_axis(ax, layers)
    legend_above(ax, 6)
    return ax


def _reach(table: pd.DataFrame) -> list[pd.Series[float]]:
    return [table["change"] - table["change_low"], table["change_high"] - table["change"]]
