"""Which experts are chosen together: expected pairs against enumeration, sums, and what is found."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

import moetrace.analysis as m

Floats = npt.NDArray[np.float64]


def enumerated(odds: Floats, k: int) -> tuple[Floats, Floats]:
    """Rates of experts and of pairs where every set of k is as likely as the product of its odds."""
    e = odds.size
    single, pair, total = np.zeros(e), np.zeros((e, e)), 0.0
    for chosen in combinations(range(e), k):
        weight = float(np.prod(odds[list(chosen)]))
        total += weight
        single[list(chosen)] += weight
        for i, j in combinations(chosen, 2):
            pair[i, j] += weight
    return single / total, (pair + pair.T) / total


@pytest.mark.parametrize(("e", "k"), [(6, 2), (8, 3), (9, 4), (5, 4), (5, 1), (7, 6)])
def test_pair_rates_are_those_of_all_sets_with_these_rates(e: int, k: int) -> None:
    odds = np.exp(1.5 * np.random.default_rng(e).standard_normal(e))
    rates, pairs = enumerated(odds, k)
    np.testing.assert_allclose(m.pair_rates(rates, k), pairs, atol=1e-8)


@pytest.mark.parametrize(
    "odds",
    [
        [1.0] * 7,
        [100.0, 100.0, 1.0, 1.0, 1.0, 0.5],
        [9.0, 9.0 + 1e-7, 3.0, 3.0, 0.1, 0.1],
        [50.0] * 3 + [1e-3] * 4,
    ],
)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_pair_rates_of_experts_that_are_used_alike(odds: list[float], k: int) -> None:
    rates, pairs = enumerated(np.array(odds), k)
    np.testing.assert_allclose(m.pair_rates(rates, k), pairs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("e", "k"), [(512, 10), (128, 8), (32, 4)])
def test_pairs_of_an_expert_add_up(e: int, k: int) -> None:
    """Each token that has an expert has k - 1 others: also where a few experts take nearly all tokens."""
    rates = np.random.default_rng(0).dirichlet(np.full(e, 0.3)) * k
    while (rates > 1).any():
        over = (rates - 1).clip(0).sum()
        rates = rates.clip(max=0.999)
        rates[rates < 0.5] += over / (rates < 0.5).sum()
    rates[:2] = 0.0
    rates *= k / rates.sum()
    pairs = m.pair_rates(np.minimum(rates, 1.0), k)
    np.testing.assert_allclose(pairs.sum(axis=1), (k - 1) * rates, rtol=1e-3, atol=1e-4)
    assert (pairs[:2] == 0).all()
    assert m.pair_rates(np.full(e, k / e), k)[0, 1] == pytest.approx(k * (k - 1) / e / (e - 1))


def test_experts_that_all_tokens_use_tell_nothing() -> None:
    rates = np.array([1.0, 0.5, 0.3, 0.2])
    pairs = m.pair_rates(rates, 2)
    np.testing.assert_allclose(pairs[0, 1:], rates[1:])
    assert (pairs[1:, 1:] == 0).all()


def drawn(
    n_prompts: int, n: int, e: int, k: int, seed: int, wish: Floats | float = 0.0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Experts of largest noise, for each token anew; ``wish`` (tokens, experts) is added to it."""
    noise = np.random.default_rng(seed).gumbel(size=(n_prompts * n, e)) + np.linspace(0, 1, e)
    return np.argsort(-(noise + wish), axis=1)[:, :k], np.arange(0, n_prompts * n + 1, n)


def test_a_planted_pair_is_the_surest_and_its_interval_holds_the_truth() -> None:
    ids, starts = drawn(20, 100, 16, 3, 0)
    together = np.random.default_rng(1).random(len(ids)) < 0.15
    ids[together, :2] = (4, 9)
    ids[together, 2] = np.where(np.isin(ids[together, 2], (4, 9)), 0, ids[together, 2])
    text = m.RoutedText(ids[:, None].astype(np.uint8), starts, 16)
    found = m.co_occurrence(text)
    top = found.pairs.iloc[0]
    assert (top["expert"], top["other"]) == (4, 9)
    both = (ids == 4).any(axis=1) & (ids == 9).any(axis=1)
    assert top["tokens"] == both.sum()
    assert top["share"] == pytest.approx(both.sum() / (ids == 4).sum())
    assert top["low"] < top["lift"] < top["high"]
    assert top["q"] < 1e-3
    assert top["text_q"] < 1e-3
    (row,) = found.layers.to_dict("records")
    assert row["tokens"] == 2000
    assert row["more"] >= 1
    square = found.lifts.pivot_table(index="expert", columns="other", values="lift")
    np.testing.assert_allclose(square, square.T)


def test_experts_that_only_share_texts_do_not_go_together_in_them() -> None:
    """GIVEN two experts of one half of the texts WHEN chosen for different tokens there THEN that is said apart."""
    wish = np.zeros((40 * 200, 24))
    wish[: 20 * 200, 22:] = 1.0
    wish[20 * 200 :, 22:] = -4.0
    ids, starts = drawn(40, 200, 24, 4, 2, wish)
    text = m.RoutedText(ids[:, None].astype(np.uint8), starts, 24)
    pairs = m.co_occurrence(text, max_listed=10_000).pairs.set_index(["expert", "other"])
    row = pairs.loc[(22, 23)]
    assert row["lift"] == pytest.approx(2, rel=0.2)
    assert row["q"] < 0.05
    assert row["text_lift"] == pytest.approx(1, abs=0.1)
    assert row["text_q"] > 0.05


def test_one_prompt_says_nothing() -> None:
    ids, _ = drawn(1, 400, 8, 2, 4)
    found = m.co_occurrence(m.RoutedText(ids[:, None].astype(np.uint8), np.array([0, 400]), 8))
    assert found.pairs["q"].isna().all()
    assert found.pairs["low"].isna().all()
    assert (found.layers[["more", "fewer"]] == 0).all(axis=None)


def test_cells_that_are_missing_are_no_tokens() -> None:
    ids, starts = drawn(10, 50, 8, 2, 5)
    ids[::2] = 255
    whole = m.RoutedText(ids[:, None].astype(np.uint8), starts, 8)
    some = m.RoutedText(ids[1::2, None].astype(np.uint8), starts // 2, 8)
    a, b = m.co_occurrence(whole), m.co_occurrence(some)
    assert a.layers["tokens"].tolist() == [250]
    np.testing.assert_allclose(a.pairs.to_numpy(), b.pairs.to_numpy())
