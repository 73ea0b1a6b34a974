"""Features of attention and experts: what is planted is found, what follows the place in the text is not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.prediction.attended_experts import attended_experts

Floats = npt.NDArray[np.float64]
N, LENGTH, E = 24, 40, 8


def text_of(wish: Floats, seed: int = 0) -> RoutedText:
    """Top-2 of noise and a wish (tokens, experts)."""
    noise = np.random.default_rng(seed).gumbel(size=(N * LENGTH, E))
    ids = np.argsort(-(noise + wish), axis=1)[:, None, :2]
    return RoutedText(ids.astype(np.uint8), np.arange(0, N * LENGTH + 1, LENGTH), E)


def test_a_feature_that_decides_is_the_surest() -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((N * LENGTH, 3, 2)).astype(np.float32)
    wish = np.zeros((N * LENGTH, E))
    wish[:, 5] = 1.5 * features[:, 2, 1]
    table, tested = attended_experts([(0, text_of(wish), features)], ("entropy", "self"))
    top = table.iloc[0]
    assert (top["head"], top["feature"], top["expert"]) == (2, "self", 5)
    assert top["p_family"] == 0.01
    used = (text_of(wish).experts[:, 0] == 5).any(axis=1)
    assert np.isclose(top["correlation"], np.corrcoef(used, features[:, 2, 1])[0, 1], atol=1e-5)
    assert top["low"] < top["correlation"] < top["high"]
    assert tested == 3 * 2 * E


def test_what_both_owe_to_the_place_in_the_text_is_no_finding() -> None:
    place = np.tile(np.linspace(-1, 1, LENGTH), N)
    rng = np.random.default_rng(2)
    features = (place[:, None, None] + 0.3 * rng.standard_normal((N * LENGTH, 2, 1))).astype(np.float32)
    wish = np.zeros((N * LENGTH, E))
    wish[:, 3] = 2 * place
    table, _ = attended_experts([(0, text_of(wish, 3), features)], ("distance",))
    mine = table[table["expert"] == 3]
    assert (mine["correlation"] > 0.3).all()
    assert (mine["null"] > 0.3).all()
    assert (table["p_family"] > 0.05).all()


def test_nothing_to_test() -> None:
    still = np.ones((N * LENGTH, 2, 1), dtype=np.float32)
    table, tested = attended_experts([(0, text_of(np.zeros((1, E))), still)], ("self",))
    assert len(table) == tested == 0
