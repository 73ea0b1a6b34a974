"""Means over tokens with intervals over prompts, from sums that add: what gate distances and agreement share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints


@dataclass(frozen=True)
class MetricSums:
    """Sums of metrics over tokens, per prompt; P prompts, L places (layers, or pairs of layers), M metrics.

    Two objects add, exactly as long as no prompt is in both.

    Attributes
    ----------
    prompts
        (P,) names, sorted, unique.
    metrics
        M names.
    tokens
        (P, L, M) int64: tokens that have a value.
    sums, squares
        (P, L, M) float64: of the values and of their squares.
    """

    prompts: npt.NDArray[np.str_]
    metrics: tuple[str, ...]
    tokens: Ints
    sums: Floats
    squares: Floats

    @classmethod
    def of(cls, prompts: npt.ArrayLike, metrics: dict[str, Floats]) -> MetricSums:
        """Sum metrics of shape (N, L), by the prompt of each token, (N,). NaN is no value."""
        names = np.asarray(prompts).astype(np.str_)
        who, code = np.unique(names, return_inverse=True)
        values = np.stack([np.asarray(v, dtype=np.float64) for v in metrics.values()], axis=-1)
        known = ~np.isnan(values)
        values = np.where(known, values, 0.0)
        shape = (who.size, *values.shape[1:])
        tokens = np.zeros(shape, dtype=np.int64)
        sums, squares = np.zeros(shape), np.zeros(shape)
        for table, part in ((tokens, known), (sums, values), (squares, values**2)):
            np.add.at(table, code, part)
        return cls(who, tuple(metrics), tokens, sums, squares)

    def __add__(self, other: MetricSums) -> MetricSums:
        prompts = np.union1d(self.prompts, other.prompts)
        where = [np.searchsorted(prompts, part.prompts) for part in (self, other)]

        def both(name: str) -> npt.NDArray[np.generic]:
            out = np.zeros((prompts.size, *self.tokens.shape[1:]), dtype=getattr(self, name).dtype)
            for part, rows in zip((self, other), where, strict=True):
                out[rows] += getattr(part, name)
            return out

        return MetricSums(prompts, self.metrics, both("tokens"), both("sums"), both("squares"))  # type: ignore[arg-type]

    def grouped(self, groups: Sequence[Sequence[int]]) -> MetricSums:
        """Places taken together: one place per group of their indices."""
        return MetricSums(
            self.prompts,
            self.metrics,
            np.stack([self.tokens[:, list(g)].sum(axis=1) for g in groups], axis=1),
            np.stack([self.sums[:, list(g)].sum(axis=1) for g in groups], axis=1),
            np.stack([self.squares[:, list(g)].sum(axis=1) for g in groups], axis=1),
        )

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row per (place, metric): ``place`` (0..L−1), ``metric``, ``tokens``, ``mean``, ``std`` (ddof 0),
        ``low`` and ``high`` of the mean (jackknife over prompts; NaN for fewer than two).
        """
        tokens = self.tokens.sum(axis=0)
        known = self.tokens.any(axis=(1, 2))
        interval = nulls.ratio_interval(self.sums[known], self.tokens[known], level)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.sums.sum(axis=0) / tokens
            std = np.sqrt(np.maximum(self.squares.sum(axis=0) / tokens - mean**2, 0.0))
        n_places, n_metrics = tokens.shape
        return pd.DataFrame(
            {
                "place": np.repeat(np.arange(n_places), n_metrics),
                "metric": list(self.metrics) * n_places,
                "tokens": tokens.reshape(-1),
                "mean": mean.reshape(-1),
                "std": std.reshape(-1),
                "low": interval.low.reshape(-1),
                "high": interval.high.reshape(-1),
            }
        )
