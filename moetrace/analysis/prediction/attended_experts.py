"""Which features of a token's attention go with which experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText, exchange, uses_expert
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats


def attended_experts(
    layers: Sequence[tuple[int, RoutedText, npt.NDArray[np.float32]]],
    names: Sequence[str],
    *,
    min_activity: int = 10,
    n_permutations: int = 99,
    alpha: float = 0.05,
    max_listed: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, int]:
    """Correlation of every head's features with the use of every expert of the same layer.

    Null: prompts exchanged, place by place (:func:`~moetrace.analysis.counts.routed.exchange`): attention depends on
    the place in the text, and so may routing; what is left is that both look at the same text. The largest standardised
    correlation over all features, heads, experts and layers (max-T). Published correlations are of head means of one
    layer, tested by nothing.

    Parameters
    ----------
    layers
        (layer index, text, features (M, H, F)) of each layer: of rows at which both are known.
    names
        (F,) of the features.
    min_activity
        Experts used by fewer tokens, or by all but so many, are left out.

    Returns
    -------
    (pandas.DataFrame, int)
        One row per listed combination, the strongest first: ``layer``, ``head``, ``feature``, ``expert``, ``tokens``
        that use the expert, ``correlation`` with ``low`` and ``high`` (jackknife over prompts), ``null``, its mean
        with prompts exchanged, ``z``, ``p_family``; and how many combinations were tested. Those with
        ``p_family`` ≤ alpha are all listed.
    """
    scores, plain, nulls_, where = [], [], [], []
    largest = np.zeros(n_permutations)
    for at, (index, text, features) in enumerate(layers):
        member = text.member(index)
        n = len(text)
        used = member.sum(axis=0)
        chosen = np.flatnonzero((used >= min_activity) & (used <= n - min_activity))
        x = features.reshape(n, -1).astype(np.float32)
        x = x - x.mean(axis=0)
        spread = x.std(axis=0)
        kept = np.flatnonzero(spread > 1e-6 * (np.abs(x).max(axis=0) + 1e-12))
        if text.n_requests < 2 or not chosen.size or not kept.size:
            continue
        x, y = x[:, kept] / spread[kept], member[:, chosen] - member[:, chosen].mean(axis=0)
        y = np.ascontiguousarray(y / y.std(axis=0) / n)
        rng = np.random.default_rng((seed, index))
        observed = x.T @ y
        drawn = np.empty((n_permutations, *observed.shape), dtype=np.float32)
        for b in range(n_permutations):
            other = x[exchange(text.starts, rng)]
            drawn[b] = (other.T @ y) / np.maximum(other.std(axis=0), 1e-6)[:, None]
        mean, sd = drawn.mean(axis=0), np.maximum(drawn.std(axis=0), 1e-6)
        largest = np.maximum(largest, np.abs((drawn - mean) / sd).max(axis=(1, 2)))
        scores.append(((observed - mean) / sd).ravel())
        plain.append(observed.ravel())
        nulls_.append(mean.ravel())
        f, e = np.divmod(np.arange(observed.size), observed.shape[1])
        where.append(np.stack([np.full(f.size, at), kept[f], chosen[e]], axis=1))
    columns = [
        "layer",
        "head",
        "feature",
        "expert",
        "tokens",
        "correlation",
        "low",
        "high",
        "null",
        "z",
        "p_family",
    ]
    if not scores:
        return pd.DataFrame(columns=columns), 0
    z, observed, expected, place = (np.concatenate(parts) for parts in (scores, plain, nulls_, where))
    ordered = np.sort(largest)
    above = n_permutations - np.searchsorted(ordered, np.abs(z) - 1e-9)
    p = (1 + above) / (n_permutations + 1)
    order = np.argsort(-np.abs(z), kind="stable")[: max(max_listed, int((p <= alpha).sum()))]
    rows = []
    for i in order.tolist():
        at, feature, expert = place[i].tolist()
        index, text, features = layers[at]
        value = features.reshape(len(text), -1)[:, feature].astype(np.float64)
        interval = _interval(value, uses_expert(text.experts[:, index], expert), text)
        head, kind = divmod(feature, len(names))
        used = int(uses_expert(text.experts[:, index], expert).sum())
        rows.append(
            (
                int(text.layers[index]), head, names[kind], expert, used, float(observed[i]),
                float(interval.low), float(interval.high), float(expected[i]), float(z[i]), float(p[i]),
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=columns), int(z.size)


def _interval(x: Floats, used: npt.NDArray[np.bool_], text: RoutedText) -> nulls.Interval:
    """Jackknife over prompts of Pearson's correlation."""
    y = used.astype(np.float64)
    x = x - x.mean()
    sums = np.stack(
        [
            np.bincount(text.owner, weights=w, minlength=text.n_requests)
            for w in (np.ones_like(x), x, y, x * x, y * y, x * y)
        ]
    )
    sums = sums[:, sums[0] > 0]
    whole = sums.sum(axis=1, keepdims=True)

    def correlation(n: Floats, a: Floats, b: Floats, aa: Floats, bb: Floats, ab: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n)))

    found = nulls.jackknife(correlation(*whole)[0], np.nan_to_num(correlation(*(whole - sums))))
    return nulls.Interval(
        found.estimate, found.error, np.maximum(found.low, -1.0), np.minimum(found.high, 1.0)
    )
