"""One token in many contexts: similarities by hand, the test against scipy and on what is planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moetrace.analysis import context_attention_routing
from moetrace.analysis.prediction.context_attention_routing import (
    FEWEST,
    attention_similarity,
    routing_similarity,
)
from moetrace.errors import UsageError

FLAT = np.zeros(40, dtype=np.int64)


def alike(values: np.ndarray) -> np.ndarray:
    return -np.abs(values[:, None] - values[None, :])


def test_similarities() -> None:
    p, q = np.array([0.5, 0.5, 0]), np.array([0.5, 0, 0.5])
    windows = np.array([[p, p], [p, q], [q, q]])
    np.testing.assert_allclose(
        attention_similarity(windows), [[1, 0.75, 0.5], [0.75, 1, 0.75], [0.5, 0.75, 1]]
    )
    got = routing_similarity(np.array([[0, 1], [1, 2], [3, 255]]), 4)
    np.testing.assert_allclose(got, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0.5]])


def test_the_correlation_is_pearsons_over_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = alike(rng.normal(size=40)), alike(rng.normal(size=40))
    pairs = np.triu_indices(40, 1)
    found = context_attention_routing(x, y, FLAT, n_permutations=9)
    assert found.correlation == pytest.approx(stats.pearsonr(x[pairs], y[pairs]).statistic)
    assert found.attention == pytest.approx(x[pairs].mean())
    assert found.contexts == 40


def test_what_goes_together_is_found_with_its_interval() -> None:
    rng = np.random.default_rng(1)
    trait = rng.normal(size=40)
    found = context_attention_routing(
        alike(trait), alike(trait + rng.normal(0, 0.3, 40)), rng.integers(0, 100, 40), n_permutations=199
    )
    assert found.p_value == 0.005
    assert 0.4 < found.low < found.partial < found.high <= 1


def test_what_position_explains_is_not_counted() -> None:
    """Attention and routing both follow the position, closely, and nothing else connects them."""
    small = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        position = rng.permutation(200)[:40]
        x, y = (alike(position / 50 + rng.normal(0, 0.3, 40)) for _ in range(2))
        found = context_attention_routing(x, y, position, n_permutations=99, seed=seed)
        assert found.correlation > 0.4
        assert abs(found.partial) < 0.3
        small += found.p_value <= 0.05
    assert small <= 4


def test_nothing_varies_or_too_few() -> None:
    rng = np.random.default_rng(2)
    found = context_attention_routing(alike(rng.normal(size=40)), np.ones((40, 40)), FLAT)
    assert np.isnan(found.p_value)
    assert np.isnan(found.correlation)
    assert found.routing == 1
    few = FEWEST - 1
    with pytest.raises(UsageError, match="too few"):
        context_attention_routing(np.ones((few, few)), np.ones((few, few)), FLAT[:few])


def test_contexts_are_exchanged_at_equal_positions_only() -> None:
    """Routing that is a function of the position, however rough, stays as it is under every exchange: p = 1."""
    rng = np.random.default_rng(3)
    position = np.repeat(np.arange(13), 3)
    of_position = rng.normal(size=13)[position]
    attention = alike(of_position + rng.normal(0, 0.1, 39))
    assert context_attention_routing(attention, alike(of_position), position, n_permutations=49).p_value == 1
