"""Agreement of two captures of the same text: one model at two precisions, say, or two collectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis import nulls
from moetrace.analysis.chance import chance
from moetrace.errors import UsageError

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def agreement(
    a: npt.NDArray[np.unsignedinteger],
    b: npt.NDArray[np.unsignedinteger],
    *,
    n_expert: int,
    scores_b: npt.NDArray[np.float32] | None = None,
) -> dict[str, Floats]:
    """Agreement of routings a and b, both (M, L, k), cell by cell: metrics of shape (M, L), float64.

    ``overlap`` = |A∩B|/k; ``exact``: the same set; ``top1``: the same first expert; ``kendall_tau``:
    Kendall's τ of the order of the common experts, NaN for fewer than two (the published script calls that 1
    or 0); ``coverage_k``: the least n such that B's n best by ``scores_b`` (M, L, E) contain all of A, NaN
    without them. Cells where either has an id of ``n_expert`` or more ("none") are NaN throughout. Both must
    be in rank order.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise UsageError(
            f"routings of shapes {a.shape} and {b.shape} cannot be compared",
            fix="align them first (align), and compare layers with the same k",
        )
    k = a.shape[2]
    known = (a < n_expert).all(axis=2) & (b < n_expert).all(axis=2)
    same = a[:, :, :, None] == b[:, :, None, :]
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
        wanted = np.take_along_axis(score, np.minimum(a, n_expert - 1).astype(np.int64), axis=2).min(axis=2)
        out["coverage_k"] = (score >= wanted[:, :, None]).sum(axis=2).astype(np.float64)
    return {name: np.where(known, values, np.nan) for name, values in out.items()}


def agreement_summary(
    metrics: dict[str, Floats],
    prompts: npt.ArrayLike,
    *,
    n_expert: int,
    n_expert_used: int,
    layers: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Means of :func:`agreement` per layer, with intervals over prompts.

    ``prompts`` (M,) names each token's prompt. Returns one row per (layer, metric): ``tokens``, ``mean``,
    ``low``, ``high`` (jackknife over prompts; NaN for fewer than two), and ``chance``: the value for two
    routings that are uniform and independent (NaN where the metric has none).
    """
    who = pd.factorize(np.asarray(prompts))[0]
    constants = chance(n_expert, n_expert_used)
    by_chance = {
        "overlap": constants.overlap,
        "top1": constants.top1,
        "kendall_tau": 0.0,
    }
    parts = []
    for name, values in metrics.items():
        known = ~np.isnan(values)
        sums, sizes = np.zeros((2, int(who.max(initial=-1)) + 1, values.shape[1]))
        np.add.at(sums, who, np.where(known, values, 0.0))
        np.add.at(sizes, who, known)
        interval = nulls.ratio_interval(sums, sizes, level)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums.sum(axis=0) / sizes.sum(axis=0)
        parts.append(
            pd.DataFrame(
                {
                    "layer": np.arange(values.shape[1]) if layers is None else np.asarray(layers),
                    "metric": name,
                    "tokens": sizes.sum(axis=0).astype(np.int64),
                    "mean": mean,
                    "low": interval.low,
                    "high": interval.high,
                    "chance": by_chance.get(name, np.nan),
                }
            )
        )
    return pd.concat(parts).sort_values("layer", kind="stable").reset_index(drop=True)


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
