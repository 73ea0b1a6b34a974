"""Agreement of two captures of the same text: one model at two precisions, say, or two collectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.chosen import CHUNK, PHASES, Chosen, present
from moetrace.analysis.statistics import information as info
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.chance import chance
from moetrace.analysis.statistics.shapes import Bools, Floats, Ints, layer_numbers, per_layer
from moetrace.analysis.statistics.sums import MetricSums
from moetrace.errors import UsageError


def agreement(
    a: npt.NDArray[np.unsignedinteger],
    b: npt.NDArray[np.unsignedinteger],
    *,
    n_expert: int,
    scores_b: npt.NDArray[np.float32] | None = None,
    n_expert_used: npt.ArrayLike | None = None,
) -> dict[str, Floats]:
    """Agreement of routings a and b, both (M, L, k), cell by cell: metrics of shape (M, L), float64.

    ``overlap`` = |A∩B|/k; ``exact``: the same set; ``top1``: the same first expert; ``kendall_tau``:
    Kendall's τ of the order of the common experts, NaN for fewer than two (the published script calls that 1
    or 0); ``coverage_k``: the least n such that B's n best by ``scores_b`` (M, L, E) contain all of A, NaN
    without them. Cells where either has an id of ``n_expert`` or more ("none") among its first k are NaN
    throughout. Both must be in rank order. ``n_expert_used`` (L,) is the k of each layer, where layers differ;
    what stands behind the first k is not looked at.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise UsageError(
            f"routings of shapes {a.shape} and {b.shape} cannot be compared",
            fix="align them first (align), and compare layers with the same k",
        )
    k = per_layer(n_expert_used, a.shape[1], a.shape[2])
    ranks = np.arange(a.shape[2])[None, :] < k[:, None]  # (L, k): what a layer has
    known = ((a < n_expert) | ~ranks).all(axis=2) & ((b < n_expert) | ~ranks).all(axis=2)
    same = (a[:, :, :, None] == b[:, :, None, :]) & ranks[:, :, None] & ranks[:, None, :]
    shared = same.any(axis=3).sum(axis=2)
    out = {
        "overlap": shared / k,
        "exact": (shared == k).astype(np.float64),
        "top1": (a[:, :, 0] == b[:, :, 0]).astype(np.float64),
        "kendall_tau": _kendall(same),
        "coverage_k": np.full(shared.shape, np.nan),
    }
    if scores_b is not None:
        score = np.asarray(scores_b, dtype=np.float64)
        mine = np.take_along_axis(score, np.minimum(a, n_expert - 1).astype(np.int64), axis=2)
        wanted = np.where(ranks, mine, np.inf).min(axis=2)
        out["coverage_k"] = (score >= wanted[:, :, None]).sum(axis=2).astype(np.float64)
    return {name: np.where(known, values, np.nan) for name, values in out.items()}


def agreement_summary(
    sums: MetricSums,
    *,
    n_expert: npt.ArrayLike,
    n_expert_used: npt.ArrayLike,
    layers: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Means of :func:`agreement` per layer, with intervals over prompts.

    Parameters
    ----------
    sums
        Of the metrics, per prompt: ``MetricSums.of(prompts, agreement(...))``; parts of a capture add.
    n_expert, n_expert_used
        Of each layer (L,), or one number for all.

    Returns one row per (layer, metric): ``tokens``, ``mean``, ``low``, ``high`` (jackknife over prompts; NaN
    for fewer than two), and ``chance``: the value for two routings that are uniform and independent. For
    ``exact`` that is 1/C(E, k); for ``coverage_k`` k(E + 1)/(k + 1), the mean of the largest of k ranks.
    """
    n_layers = sums.tokens.shape[1]
    by_layer = [
        _chance_levels(int(e), int(k))
        for e, k in zip(
            np.broadcast_to(n_expert, n_layers), np.broadcast_to(n_expert_used, n_layers), strict=True
        )
    ]
    table = sums.table(level).drop(columns="std")
    place = table.pop("place").to_numpy()
    numbers = layer_numbers(layers, n_layers)
    table.insert(0, "layer", numbers[place])
    named = zip(place.tolist(), table["metric"], strict=True)
    table["chance"] = [by_layer[i].get(metric, np.nan) for i, metric in named]
    return _bounded(table)


def agreement_by_depth(
    sums: MetricSums,
    *,
    n_expert: npt.ArrayLike,
    n_expert_used: npt.ArrayLike,
    layers: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """:func:`agreement_summary` of groups of layers: ``depth`` is ``early`` (the first quarter), ``middle``,
    ``late`` (the last quarter; these three only from four layers on) and ``all``; ``layers`` their numbers, as
    text. Every (token, layer) counts alike; ``chance`` is the mean over layers.
    """
    n = sums.tokens.shape[1]
    numbers = layer_numbers(layers, n)
    quarter = n // 4
    groups = {"all": list(range(n))}
    if quarter:
        groups |= {
            "early": list(range(quarter)),
            "middle": list(range(quarter, n - quarter)),
            "late": list(range(n - quarter, n)),
        }
    table = sums.grouped(list(groups.values())).table(level).drop(columns="std")
    place = table.pop("place").to_numpy()
    names = list(groups)
    table.insert(0, "depth", [names[i] for i in place])
    table.insert(1, "layers", [",".join(str(numbers[j]) for j in groups[names[i]]) for i in place])
    by_layer = agreement_summary(sums, n_expert=n_expert, n_expert_used=n_expert_used, level=level)
    level_of = by_layer.pivot(index="layer", columns="metric", values="chance")
    table["chance"] = [
        float(level_of.loc[groups[names[i]], metric].mean())
        for i, metric in zip(place.tolist(), table["metric"], strict=True)
    ]
    return _bounded(table)


def _bounded(table: pd.DataFrame) -> pd.DataFrame:
    """Intervals of shares within 0 and 1, those of τ within −1 and 1."""
    share = table["metric"].isin(["overlap", "exact", "top1"])
    least = np.where(share, 0.0, np.where(table["metric"] == "kendall_tau", -1.0, -np.inf))
    most = np.where(share | (table["metric"] == "kendall_tau"), 1.0, np.inf)
    return table.assign(low=np.maximum(table["low"], least), high=np.minimum(table["high"], most))


def _chance_levels(e: int, k: int) -> dict[str, float]:
    constants = chance(e, k)
    return {
        "overlap": constants.overlap,
        "exact": 1 / comb(e, k),
        "top1": constants.top1,
        "kendall_tau": 0.0,
        "coverage_k": k * (e + 1) / (k + 1),
    }


def usage_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """How the routing of the same prompts differs in sum: counts a and b, both (P, L, E), prompts alike.

    Returns one row per layer: ``jsd_bits``, the Jensen-Shannon divergence of the two overall usages, with
    ``jsd_jackknife``, ``jsd_low`` and ``jsd_high``; then for each of ``entropy_bits`` (Miller-Madow) and ``jain``
    its value in a (``_a``) and in b (``_b``), and b − a (``_difference``) with ``_low`` and ``_high``. Jackknife
    over prompts, both captures without the same prompt. ``n_expert`` (L,) as for
    :func:`moetrace.analysis.domains.domain.expert_usage`.
    """
    one, two = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 3:
        raise UsageError(
            f"counts of shapes {one.shape} and {two.shape} cannot be compared",
            fix="give the same prompts and layers of both",
        )
    own = per_layer(n_expert, one.shape[1], one.shape[2])

    def both(x: Floats, y: Floats) -> Floats:
        p = info.shares(np.stack((x, y), axis=1))  # (L, 2, E)
        with np.errstate(invalid="ignore", divide="ignore"):
            jain = 1 / (own[:, None] * (p**2).sum(axis=2))
        entropy = info.miller_madow_bits(np.stack((x, y), axis=1))
        gaps = [values[:, 1] - values[:, 0] for values in (entropy, jain)]
        return np.stack([info.jsd_bits(p), *entropy.T, gaps[0], *jain.T, gaps[1]])

    total = (one.sum(axis=0), two.sum(axis=0))
    full = both(*total)
    rest = np.stack([both(total[0] - x, total[1] - y) for x, y in zip(one, two, strict=True)])
    knife = nulls.jackknife(full, rest, level=level)
    out: dict[str, npt.NDArray[np.generic]] = {
        "layer": layer_numbers(layers, one.shape[1]),
        "jsd_bits": full[0],
        "jsd_jackknife": np.maximum(knife.estimate[0], 0.0),
        "jsd_low": np.maximum(knife.low[0], 0.0),
        "jsd_high": np.maximum(knife.high[0], 0.0),
    }
    for i, name in ((1, "entropy_bits"), (4, "jain")):
        out |= {f"{name}_a": full[i], f"{name}_b": full[i + 1], f"{name}_difference": full[i + 2]}
        out |= {f"{name}_low": knife.low[i + 2], f"{name}_high": knife.high[i + 2]}
    return pd.DataFrame(out)


def align(
    keys_a: pd.DataFrame, keys_b: pd.DataFrame
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], pd.DataFrame]:
    """Rows of two captures that are the same token of the same text.

    Both frames have ``prompt``, ``position``, ``token`` and one row per row of the capture. Returns row
    numbers in a and in b, and a table per prompt of both: ``matched`` rows and ``stopped_at``, the first
    position where the texts differ (−1 if nowhere). From there on the contexts differ, so nothing is
    compared, even where a token happens to agree.

    Raises
    ------
    UsageError
        If a capture has two rows for one position of a prompt, or no prompt is in both.
    """
    for name, keys in (("first", keys_a), ("second", keys_b)):
        twice = keys.duplicated(["prompt", "position"])
        if twice.any():
            worst = keys.loc[twice, "prompt"].iloc[0]
            raise UsageError(
                f"the {name} capture has several rows for one position of prompt {worst!r}",
                fix="compare captures that ran each prompt once",
            )
    left = keys_a.assign(row_a=np.arange(len(keys_a)))
    right = keys_b.assign(row_b=np.arange(len(keys_b)))
    both = left.merge(right, on=["prompt", "position"], suffixes=("_a", "_b")).sort_values(
        ["prompt", "position"]
    )
    if both.empty:
        raise UsageError("the captures have no prompt in common", fix="label requests alike (drive --id-key)")
    differs = both["token_a"] != both["token_b"]
    both["fine"] = ~differs.groupby(both["prompt"]).cummax()
    kept = both[both["fine"]]
    report = both.groupby("prompt").agg(matched=("fine", "sum"))
    first = both[differs].groupby("prompt")["position"].min()
    report["stopped_at"] = first.reindex(report.index).fillna(-1).astype(np.int64)
    return (
        kept["row_a"].to_numpy(dtype=np.int64),
        kept["row_b"].to_numpy(dtype=np.int64),
        report.reset_index(),
    )


def _kendall(same: Bools) -> Floats:
    """τ of common experts from equality (M, L, k, k) of ranks in a and in b: (M, L)."""
    k = same.shape[2]
    score = np.zeros(same.shape[:2])
    common: Bools = np.asarray(same.any(axis=3))
    rank_b = np.where(common, same.argmax(axis=3), -1)
    pairs = np.zeros(same.shape[:2])
    for i in range(k):
        for j in range(i + 1, k):
            both = common[:, :, i] & common[:, :, j]
            pairs += both
            score += np.where(both, np.sign(rank_b[:, :, j] - rank_b[:, :, i]), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(score / pairs)


@dataclass(frozen=True)
class Agreement:
    """How two captures A and B of the same text agree.

    Attributes
    ----------
    sums
        :func:`agreement` summed per prompt.
    phases
        The same by phase of A's token: prefill, decode, unknown, those that there are.
    included
        (2, P, L, E) int64: tokens that used the expert, in A and in B, over the compared cells; prompts as in
        ``sums``.
    texts
        :func:`align`'s table: which texts were compared how far.
    rows
        (n,) and (n,): row numbers in A and in B of the tokens compared.
    only_in
        Prompts that only A has, and only B.
    layers, n_expert, n_expert_used
        (L,) of the model.
    """

    sums: MetricSums
    phases: dict[str, MetricSums]
    included: npt.NDArray[np.int64]
    texts: pd.DataFrame
    rows: tuple[Ints, Ints]
    only_in: tuple[int, int]
    layers: npt.NDArray[np.int64]
    n_expert: npt.NDArray[np.int64]
    n_expert_used: npt.NDArray[np.int64]

    def by_layer(self) -> pd.DataFrame:
        """:func:`agreement_summary`."""
        return agreement_summary(
            self.sums, n_expert=self.n_expert, n_expert_used=self.n_expert_used, layers=self.layers
        )

    def by_phase(self) -> pd.DataFrame:
        """All layers together, by phase: ``phase``, then as :meth:`by_depth`."""
        parts = []
        for phase, sums in self.phases.items():
            table = agreement_by_depth(
                sums, n_expert=self.n_expert, n_expert_used=self.n_expert_used, layers=self.layers
            )
            table = table[table["depth"] == "all"].drop(columns=["depth", "layers"])
            parts.append(table.assign(phase=phase)[["phase", *table.columns]])
        return pd.concat(parts, ignore_index=True)

    def by_depth(self) -> pd.DataFrame:
        """:func:`agreement_by_depth`."""
        return agreement_by_depth(
            self.sums, n_expert=self.n_expert, n_expert_used=self.n_expert_used, layers=self.layers
        )

    def usage(self) -> pd.DataFrame:
        """:func:`usage_difference`."""
        return usage_difference(*self.included, layers=self.layers, n_expert=self.n_expert)


def compare_captures(one: Chosen, two: Chosen) -> Agreement:
    """Hold two captures of the same text against each other, token by token.

    ``coverage_k`` needs the other capture's ``scores`` or ``logits``. Raises UsageError if the captures
    differ in layers or experts, or have no prompt in common.
    """
    mine, theirs = one.trace, two.trace
    for name in ("layers", "n_expert", "n_expert_used"):
        a, b = getattr(mine, name), getattr(theirs, name)
        if not np.array_equal(a, b):
            raise UsageError(
                f"these captures cannot be compared: {name} differ ({a.tolist()} and {b.tolist()})",
                fix="compare captures of models of the same shape",
            )
    every = np.unique(np.array([*one.prompts, *two.prompts], dtype=np.str_))
    rows, keys = [], []
    for side in (one, two):
        r = side.order.rows
        rows.append(r)
        key = {
            "prompt": np.searchsorted(every, np.array(side.prompts, dtype=np.str_))[side.trace.request[r]],
            "position": side.trace.positions[r],
            "token": side.trace.token_ids[r],
        }
        keys.append(pd.DataFrame(key))
    a, b, texts = align(keys[0], keys[1])
    texts["prompt"] = every[texts["prompt"].to_numpy()]
    scores = two.channel("scores")
    scores = two.channel("logits") if scores is None else scores
    who = every[keys[0]["prompt"].to_numpy()[a]]
    a, b = rows[0][a], rows[1][b]
    prompts = np.unique(who)
    e, n_layers = int(max(mine.n_expert)), len(mine.layers)
    included = np.zeros((2, prompts.size, n_layers, e), dtype=np.int64)
    total: MetricSums | None = None
    by_phase: dict[str, MetricSums] = {}
    phase = np.asarray(mine.phase)[a]
    # asked for once: of a trace with several contexts they are copied together
    columns = [(trace.experts, trace.state) for trace in (mine, theirs)]
    for start in range(0, a.size, CHUNK):
        piece = slice(start, start + CHUNK)
        ids = [present(*columns[0], a[piece]), present(*columns[1], b[piece])]
        metrics = agreement(
            ids[0],
            ids[1],
            n_expert=e,
            scores_b=None if scores is None else np.asarray(scores[b[piece]]),
            n_expert_used=mine.n_expert_used,
        )
        part = MetricSums.of(who[piece], metrics)
        total = part if total is None else total + part
        for name, code in PHASES.items():
            here = phase[piece] == code
            if here.any():
                some = MetricSums.of(who[piece][here], {m: v[here] for m, v in metrics.items()})
                by_phase[name] = by_phase[name] + some if name in by_phase else some
        both = ~np.isnan(metrics["overlap"])
        at = np.searchsorted(prompts, who[piece])
        for side_counts, x in zip(included, ids, strict=True):
            token, layer, rank = np.nonzero((x < e) & both[:, :, None])
            np.add.at(side_counts, (at[token], layer, x[token, layer, rank]), 1)
    if total is None:
        raise UsageError("the captures have no token in common", fix="capture the same prompts with both")
    with_rows = [set(keys_of["prompt"].unique()) for keys_of in keys]
    return Agreement(
        total,
        by_phase,
        included,
        texts,
        (a, b),
        (len(with_rows[0] - with_rows[1]), len(with_rows[1] - with_rows[0])),
        mine.layers,
        mine.n_expert,
        mine.n_expert_used,
    )
