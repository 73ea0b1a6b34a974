"""What tells a token's experts, and what a cache of them would hit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from moetrace.plot.names import short
from moetrace.plot.style import OKABE_ITO, axes, by_layer, faint, layer_axis, legend_above, line, zero_line


def recall(
    table: pd.DataFrame, names: Sequence[str] = (), *, x: str = "layer", ax: Axes | None = None
) -> Axes:
    """Draw recall by layer, or by how many experts are predicted (``x`` "m"), a line per predictor, and chance.

    ``table`` has ``predictor``, ``recall``, ``low``, ``high``, ``chance``; ``names`` are the predictors, default all.
    """
    ax = axes(ax)
    names = names or list(dict.fromkeys(table["predictor"]))
    alone = table[table["predictor"] == names[0]]
    ax.plot(alone[x], alone["chance"], color=faint(), linestyle="--", label="chance")
    for color, name in zip(OKABE_ITO, names, strict=False):
        mine = table[table["predictor"] == name]
        if len(mine):
            line(ax, mine, x, "recall", color, marker="o", label=name)
    ax.set(ylim=(0, 1))
    if x == "layer":
        return by_layer(ax, table["layer"], "recall of k experts among k predicted")
    ax.set(xlabel="experts fetched ahead (m)", ylabel="recall@m")
    legend_above(ax)
    return ax


def gains(table: pd.DataFrame, over: Mapping[str, str], *, ax: Axes | None = None) -> Axes:
    """Draw by layer what a predictor (a key of ``over``) gains over others (its value)."""
    ax = axes(ax)
    zero_line(ax)
    for color, (better, than) in zip(OKABE_ITO, over.items(), strict=False):
        line(ax, table[table["better"] == better], "layer", "gain", color, marker="o", label=f"over {than}")
    return by_layer(ax, table["layer"], "recall gained by attention")


def correlation(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw by layer whether contexts that are alike in attention are routed alike, token by token."""
    ax = axes(ax)
    zero_line(ax)
    ids = table["token"].drop_duplicates().tolist()[: len(OKABE_ITO)]
    for i, (color, token) in enumerate(zip(OKABE_ITO, ids, strict=False)):
        mine = table[table["token"] == token]
        x = mine["layer"] + 0.08 * (i - (len(ids) - 1) / 2)
        ax.vlines(x, mine["low"], mine["high"], color=color, alpha=0.5)
        name = short(repr(mine["text"].iloc[0]))
        ax.plot(x, mine["partial"], color=color, marker="o", linewidth=0.7, label=name)
    return by_layer(ax, table["layer"], "attention alike ~ routing alike")


def hit_rates(curve: pd.DataFrame, policies: Iterable[str], *, ax: Axes | None = None) -> Axes:
    """Draw a cache's hit rate against its size, a line per policy."""
    ax = axes(ax)
    even = "pinned, if usage were even"
    ax.plot([0, 1], [0, 1], color=faint(), linestyle="--", linewidth=0.9, label=even)
    for color, name in zip(OKABE_ITO, policies, strict=False):
        mine = curve[curve["policy"] == name]
        if len(mine):
            line(ax, mine, "memory", "hit_rate", color, marker="o", label=name)
    ax.set(xlabel="share of all experts in memory", ylabel="hit rate", xlim=(0, 1), ylim=(0, 1.02))
    legend_above(ax, 3)
    return ax


def distinct(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many different experts of a layer n tokens need together, mean over layers.

    ``table`` is of :func:`moetrace.analysis.placement.unions.distinct_experts`.
    """
    ax = axes(ax)
    layers = max(1, table.loc[table["layer"] >= 0, "layer"].nunique())
    whole = table[table["layer"] < 0].set_index("n")
    whole = whole[["consecutive", "low", "high", "shuffled", "batch", "even"]] / layers
    for color, (name, label) in zip(
        OKABE_ITO,
        {"consecutive": "consecutive tokens of a text", "batch": "one token of each of n texts"}.items(),
        strict=False,
    ):
        ax.plot(whole.index, whole[name], color=color, marker="o", label=label)
    ax.fill_between(whole.index, whole["low"], whole["high"], color=OKABE_ITO[0], alpha=0.2, linewidth=0)
    ax.plot(
        whole.index, whole["shuffled"], color=OKABE_ITO[0], linestyle=":", label="the same text in any order"
    )
    ax.plot(whole.index, whole["even"], color=faint(), linestyle="--", label="even use")
    ax.set_xscale("log", base=2)
    ax.set_xticks(whole.index.tolist(), [str(n) for n in whole.index])
    ax.set(xlabel="tokens", ylabel="different experts per layer", ylim=(0, None))
    legend_above(ax, 2)
    return ax


def traffic(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw bytes of experts read per token by layer, those of layers kept on the GPU in another colour.

    ``table`` is ``by_layer`` of the question ``placement``.
    """
    ax = axes(ax)
    for color, kept, label in ((OKABE_ITO[0], True, "on the GPU"), (OKABE_ITO[1], False, "with the CPU")):
        mine = table[table["kept"].astype(bool) == kept]
        if len(mine):
            ax.bar(mine["layer"], mine["read_per_token"] / 2**20, color=color, label=label)
    ax.set(ylabel="MiB read per token")
    layer_axis(ax, table["layer"].to_numpy())
    legend_above(ax, 2)
    return ax
