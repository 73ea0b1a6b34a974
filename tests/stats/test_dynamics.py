"""Patterns, circuits, dynamics: tests reject as often as they say; published definitions find what is not there."""

from __future__ import annotations

import numpy as np
import pytest
from bounds import ALPHA, RUNS, faulty
from calibration_dynamics import SMALL, calibrate, random_routing, side_by_side, text_of, typed
from scipy import stats
from simulate import World

import moetrace.analysis as m
from moetrace.analysis.placement.cold_experts import cold_experts
from moetrace.analysis.statistics.nulls import clopper_pearson
from moetrace.analysis.text.token_patterns import counts_of


def test_tests_reject_as_often_as_they_say() -> None:
    table = calibrate(RUNS, 19, SMALL)
    assert faulty(table).empty, table


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_calibration_in_full() -> None:
    """1000 runs, as documented: every test within 5 ± 1.5 %, as far as they tell."""
    table = calibrate(1000).set_index("test")
    assert ((table["low"] < 0.065) & (table["high"] > 0.035)).all(), table


@pytest.mark.parametrize("n_tokens", [5, 1000])
def test_random_routing_has_no_circuits_and_published_pipelines_at_five_tokens(n_tokens: int) -> None:
    text = random_routing(1 if n_tokens == 5 else 20, min(n_tokens, 50), 24, 32, 4, seed=3)
    found = m.expert_circuits(text, n_permutations=99, min_support=1)
    assert not (found.edges["p_family"] <= ALPHA).any()
    assert not (found.layers["p_family"] <= ALPHA).any()
    assert found.paths.empty
    assert text.weights is not None
    old = m.as_published_circuits(text.experts, text.weights, 32)
    if n_tokens == 5:
        assert 10 <= len(old.pipelines) <= 20
        assert old.pipelines["consistency"].max() > 0.99
        assert 0.85 < old.global_consistency < 0.95
    else:
        assert old.pipelines.empty
        assert old.global_consistency < 0.05


def test_published_concentration_is_high_at_small_counts_and_falls_with_more() -> None:
    tops = []
    for n_prompts in (1, 4, 40):
        text = random_routing(n_prompts, 30, 16, 64, 8, seed=1, zipf=True)
        pieces = [piece.words[w] for piece in [typed(text)] for w in piece.word]
        tops.append(m.as_published_pattern_summary(text, pieces)["concentration"].iloc[0])
    assert tops[0] > 0.4
    assert tops[2] < 0.35
    assert tops[0] > tops[1] > tops[2]


def test_the_table_of_the_documentation_shows_the_difference() -> None:
    table = side_by_side(seed=1, n_permutations=39).set_index("question")
    assert set(table.index) == {"expert-circuits", "token-patterns", "cold-experts", "generation-dynamics"}
    assert table.loc["token-patterns", "sound"].str.startswith("0 specialists").all()
    assert table.loc["cold-experts", "sound"].str.startswith("0 cold").all()


def test_cold_bounds_cover_the_true_rates() -> None:
    """Rates of prompts that differ: the exact interval of single tokens covers too little, the cluster's enough."""
    world = World(
        n_domains=1, n_prompts=20, n_layers=2, n_expert=16, n_expert_used=2, prompt_sd=1.0, memory=0.0
    )
    included, tokens = counts_of(text_of(world.trace(10**6, n_prompts=2000)))
    truth = included.sum(axis=0) / tokens.sum(axis=0)[:, None]
    plain, cluster, family = [], [], []
    for seed in range(30):
        table = cold_experts(*counts_of(text_of(world.trace(seed))), n_expert_used=2)
        rate = truth[table["layer"], table["expert"]]
        plain.append(((table["low"] <= rate) & (rate <= table["high"])).mean())
        cluster.append(((table["cluster_low"] <= rate) & (rate <= table["cluster_high"])).mean())
        family.append((rate <= table["bound"]).all())
    assert np.mean(plain) < 0.8
    assert np.mean(cluster) > 0.93
    assert np.mean(family) > 0.9


def test_exact_intervals_are_scipys() -> None:
    low, high = clopper_pearson([0, 3, 10], [10, 10, 10])
    for i, count in enumerate((0, 3, 10)):
        expected = stats.binomtest(count, 10).proportion_ci(0.95, method="exact")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high))


def test_planted_dependence_between_layers_is_found_beyond_what_prompts_share() -> None:
    world = World(n_domains=1, n_prompts=16, n_layers=3, n_expert=12, n_expert_used=2, length=(40, 60))
    text = text_of(world.trace(0))
    experts = text.experts.copy()
    uses = (experts[:, 0] == 4).any(axis=1)
    mine = (experts[:, 1] == 7).any(axis=1)
    experts[uses & ~mine, 1, 0] = 7
    found = m.expert_circuits(
        m.RoutedText(experts, text.starts, 12, tokens=text.tokens, prompts=text.prompts), n_permutations=99
    )
    sure = found.edges[found.edges["p_family"] <= ALPHA]
    top = sure.iloc[0]
    assert (top["layer"], top["expert"], top["to_layer"], top["to_expert"]) == (0, 4, 1, 7)
    assert top["tokens"] == uses.sum()
    assert top["low"] > 1
    assert found.layers["p_family"].iloc[0] <= ALPHA
    assert "L0-E4 → L1-E7" in found.paths.loc[found.paths["replicated"], "path"].tolist()


def test_right_and_wrong_outputs_differ_where_that_is_planted() -> None:
    stays = World(n_domains=1, n_prompts=10, n_layers=2, n_expert=12, n_expert_used=2, memory=0.97)
    moves = World(n_domains=1, n_prompts=10, n_layers=2, n_expert=12, n_expert_used=2, memory=0.0)
    one, two = stays.trace(0), moves.trace(1)
    counts = m.count_routing(
        np.concatenate((one.experts, two.experts)),
        np.concatenate((one.request, two.request + 10)),
        np.concatenate((one.position, two.position)),
        n_expert=12,
        max_lag=1,
    )
    right = [int(name) < 10 for name in counts.prompts]
    table = m.correctness_features(counts, right).set_index("feature")
    assert table.loc["persistence", "p_family"] <= ALPHA
    assert table.loc["persistence", "right"] > table.loc["persistence", "wrong"] + 0.1
    assert table.loc["tokens", "p_family"] > ALPHA
