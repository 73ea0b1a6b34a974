"""Experts that tell two sets of prompts apart: false alarms, coverage, and what is planted."""

from __future__ import annotations

import numpy as np
import pytest
from bounds import RUNS
from numpy.typing import NDArray
from scipy import stats

from moetrace.analysis.domains.difference import usage_difference

E, L, K = 12, 3, 2


def world(
    rng: np.random.Generator, sizes: tuple[int, int], shift: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Counts, tokens, and whose prompts are of the first set, whose expert 3 of layer 1 has ``shift`` more logits."""
    n = sum(sizes)
    first = rng.permutation(np.arange(n) < sizes[0])
    tokens = rng.integers(20, 200, n)
    logits = rng.normal(0, 0.7, (n, L, E)) + rng.normal(0, 0.5, (L, E))
    logits[first, 1, 3] += shift
    counts = np.zeros((n, L, E), np.int64)
    for p in range(n):
        noise = rng.gumbel(size=(tokens[p], L, E))
        used = np.argsort(-(logits[p] + noise), axis=2)[:, :, :K]
        for layer in range(L):
            counts[p, layer] = np.bincount(used[:, layer].ravel(), minlength=E)
    return counts, np.repeat(tokens[:, None], L, axis=1), first


def alarms(sizes: tuple[int, int], runs: int) -> tuple[int, float]:
    """In how many worlds without a difference an expert passes; and how often the interval holds 0."""
    hits, inside = 0, []
    for run in range(runs):
        counts, tokens, first = world(np.random.default_rng((run, *sizes)), sizes)
        table = usage_difference(counts, tokens, first, n_permutations=99, seed=run)
        hits += bool((table["p_family"] <= 0.05).any())
        inside.append(((table["low"] <= 0) & (table["high"] >= 0)).mean())
    return hits, float(np.mean(inside))


@pytest.mark.parametrize("sizes", [(12, 12), (5, 25)])
def test_sets_of_one_kind_are_not_told_apart(sizes: tuple[int, int]) -> None:
    hits, covered = alarms(sizes, RUNS)
    assert stats.binomtest(hits, RUNS, 0.05, alternative="greater").pvalue > 1e-3, hits
    assert 0.94 <= covered <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(12, 12), (5, 25), (3, 3), (40, 4)])
def test_in_full(sizes: tuple[int, int]) -> None:
    """1000 worlds each: 5 ± 1.5 % with a false expert, or fewer where the arrangements are few."""
    hits, covered = alarms(sizes, 1000)
    assert hits <= 65
    assert 0.94 <= covered <= 0.995


def test_what_is_planted_is_found_alone() -> None:
    counts, tokens, first = world(np.random.default_rng(5), (20, 20), shift=2.0)
    table = usage_difference(counts, tokens, first)
    sure = table[table["p_family"] <= 0.05]
    assert (1, 3) in set(zip(sure["layer"], sure["expert"], strict=True))
    assert set(sure["layer"]) == {1}
    row = sure.set_index("expert").loc[3]
    rate = counts[:, 1, 3] / tokens[:, 1]
    assert row["rate"] == pytest.approx(rate[first].mean())
    assert row["difference"] == pytest.approx(rate[first].mean() - rate[~first].mean())
    welch = stats.ttest_ind(rate[first], rate[~first], equal_var=False).confidence_interval()
    assert row["low"] <= welch.low + 1e-12
    assert row["high"] == pytest.approx(welch.high, rel=0.05)
