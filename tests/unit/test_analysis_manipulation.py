"""Searching inputs, aligning edits, robustness; and what was published instead."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import moetrace.analysis as m
from moetrace.analysis.experts import manipulation
from moetrace.analysis.experts.manipulation import Edit
from moetrace.analysis.statistics import nulls
from moetrace.errors import UsageError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


# -- search


def test_the_margin_is_above_0_exactly_where_all_are_chosen(rng):
    scores = rng.standard_normal((400, 3, 8))
    scores[:, 2, :4] = -np.inf  # a masked group
    k = [2, 3, 1]
    top = [np.argsort(-scores[:, layer], axis=1)[:, : k[layer]] for layer in range(3)]
    for path in (((0, 3),), ((1, 0), (0, 7)), ((2, 5), (0, 1), (1, 6)), ((2, 2),)):
        chosen = np.all([(top[layer] == expert).any(axis=1) for layer, expert in path], axis=0)
        assert ((manipulation.path_margin(scores, path, k) > 0) == chosen).all()
    assert np.isfinite(manipulation.path_margin(scores, ((2, 2),), k)).all()
    assert (manipulation.path_margin(scores[:, :1], ((0, 3),), [8]) > 0).all()  # every expert is used


def toy(target: np.ndarray, calls: list[int] | None = None):
    """Reached when all tokens are right; each right one brings it nearer."""

    def score(tokens: np.ndarray) -> np.ndarray:
        if calls is not None:
            calls.append(len(tokens))
        return (tokens == target).sum(axis=1) - (len(target) - 0.5)

    return score


@pytest.mark.parametrize("method", manipulation.METHODS)
def test_a_search_keeps_to_its_budget_and_its_template(method):
    calls: list[int] = []
    target = np.array([9, 3, 4, 9])
    run = m.search_input(
        toy(target, calls), [7, -1, -1, 9], np.arange(50), method=method, budget=100, batch=30, seed=1
    )
    assert sum(calls) == run.evaluations == 100 == len(run.history)
    assert run.reached_at is None  # the template forbids the first token
    assert run.tokens[0] == 7
    assert run.tokens[3] == 9
    assert (np.diff(run.history) >= 0).all()
    assert run.score == run.history[-1] == toy(target)(run.tokens[None])[0]
    again = m.search_input(
        toy(target), [7, -1, -1, 9], np.arange(50), method=method, budget=100, batch=30, seed=1
    )
    assert np.array_equal(again.tokens, run.tokens)


def test_greedy_and_beam_climb_and_random_search_does_not(rng):
    target = rng.integers(0, 30, 5)
    options = {"budget": 3000, "batch": 30, "seed": 2}
    runs = {
        name: m.search_input(toy(target), [-1] * 5, np.arange(30), method=name, **options)
        for name in manipulation.METHODS
    }
    assert runs["random"].reached_at is None
    for name in ("greedy", "beam"):
        assert np.array_equal(runs[name].tokens, target)
        assert runs[name].reached_at == np.flatnonzero(runs[name].history > 0)[0] + 1
        assert runs[name].evaluations < 3000


def test_a_search_for_nothing_is_refused():
    for template, words, more in (
        ([1, 2], [3], {}),
        ([-1], [], {}),
        ([-1], [3], {"method": "x"}),
        ([-1], [3], {"budget": 0}),
    ):
        with pytest.raises(UsageError, match="nothing to search"):
            m.search_input(lambda t: np.zeros(len(t)), template, words, **more)


def test_success_rates_have_exact_intervals_and_are_paired():
    runs = pd.DataFrame(
        [(t, "random", np.nan if t < 6 else 50.0) for t in range(8)]
        + [(t, "greedy", 50.0 if t < 2 else np.nan) for t in range(8)]
        + [(t, "beam", 20.0 + t) for t in range(8)],
        columns=["target", "method", "reached_at"],
    )
    table = m.routing_manipulation(runs, budget=100).set_index("method")
    assert table.index.tolist() == ["random", "greedy", "beam"]
    assert table.loc["random", "reached"] == 2
    interval = stats.binomtest(2, 8).proportion_ci(method="exact")
    assert (table.loc["random", "low"], table.loc["random", "high"]) == pytest.approx(
        (interval.low, interval.high)
    )
    spent = np.array([100] * 6 + [50, 50]) - np.arange(20, 28)
    assert table.loc["beam", "saved"] == pytest.approx(spent.mean())
    assert table.loc["beam", "p_value"] < 0.02  # all eight differ in one direction: 2/256 at best
    assert (table["p_family"].dropna() >= table["p_value"].dropna()).all()  # two were tried
    assert table.loc["beam", "p_family"] < 0.05 < table.loc["greedy", "p_family"]
    assert table.loc["random", ["p_value", "p_family"]].isna().all()
    with pytest.raises(UsageError, match="random search"):
        m.routing_manipulation(runs[runs["method"] == "beam"], budget=100)


def test_sign_flips_agree_with_scipy(rng):
    d = rng.standard_normal(9) + 0.4
    reference = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    both = np.stack([d, np.zeros(9)], axis=1)
    p = nulls.permutation_p(manipulation.sign_flips(both, n_permutations=20000))
    assert p == pytest.approx([reference, 1], abs=0.02)


# -- edits


def test_tokens_are_aligned_and_those_before_the_edit_known():
    pairs, later = manipulation.align_tokens([1, 2, 3, 4, 5], [1, 2, 9, 3, 4, 5])
    assert pairs.tolist() == [[0, 0], [1, 1], [2, 3], [3, 4], [4, 5]]
    assert later.tolist() == [False, False, True, True, True]
    pairs, later = manipulation.align_tokens([1, 2, 3], [1, 2, 3, 4, 4])
    assert not later.any()
    assert len(pairs) == 3
    pairs, later = manipulation.align_tokens([1, 2, 3], [7, 8])
    assert pairs.shape == (0, 2)
    pairs, later = manipulation.align_tokens([1, 2, 3], [1, 9, 3])
    assert pairs.tolist() == [[0, 0], [2, 2]]
    assert later.tolist() == [False, True]


def test_edits_change_what_they_say():
    edits = manipulation.text_edits("Say It now")
    assert edits["case"] == "say it now"
    assert edits["spacing"] == "Say  It  now"
    assert set(manipulation.text_edits("now")) == {"suffix", "prefix", "case", "ellipsis"}


def edit(before, after, pairs, later, prompt="p", kind="k") -> Edit:
    return Edit(prompt, kind, np.array(before), np.array(after), np.array(pairs, np.int64), np.array(later))


def test_adding_a_token_changes_no_other_and_still_counts_as_changed_in_the_published_way():
    """One layer, k = 2. The suffix brings new experts into the union; every token keeps its own."""
    before = [[[0, 1]], [[2, 3]]]
    suffixed = edit(before, [*before, [[4, 5]]], [[0, 0], [1, 1]], [False, False])
    changed, experts = m.as_published_robustness([suffixed], 8)
    assert changed == 1.0
    effect = m.edit_effect([suffixed], 8)
    assert effect["region"].tolist() == ["before"]
    assert effect["jaccard"].tolist() == [1.0]
    assert experts["expert"].tolist() == [0, 1, 2, 3]
    assert (experts["verdict"] == "stable").all()


def test_the_published_robustness_throws_layers_together():
    """Expert 0 of layer 0 always stays, expert 0 of layer 1 never: "neither stable nor volatile"."""
    one = edit([[[0], [0]]], [[[0], [1]]], [[0, 0]], [True])
    table = m.as_published_robustness([one], 4)[1].set_index("expert")
    assert table.loc[0, "stability"] == 0.5
    sound = m.expert_robustness([one], 4, layers=[3, 7], min_tokens=1).set_index(["layer", "expert"])
    assert sound["kept"][3, 0] == 1
    assert sound["kept"][7, 0] == 0


def test_effects_are_of_aligned_tokens_by_layer_and_region():
    before = np.array([[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[4, 5], [4, 5]]])
    after = before.copy()
    after[1, 1] = [2, 7]
    after[2, 1] = [6, 7]
    edits = [edit(before, after, [[0, 0], [1, 1], [2, 2]], [False, True, True], prompt=p) for p in "ab"]
    table = m.edit_effect(edits, 8, layers=[2, 9]).set_index(["region", "layer"])
    assert table["jaccard"]["before", 9] == 1
    assert table["jaccard"]["after", 2] == 1
    assert table["jaccard"]["after", 9] == pytest.approx((1 / 3 + 0) / 2)
    assert table["top1"]["after", 9] == 0.5
    assert table["tokens"]["after", 9] == 4
    assert table["prompts"]["after", 9] == 2
    assert table["jaccard_other"]["after", 2] == 0
    robust = m.expert_robustness(edits, 8, layers=[2, 9], min_tokens=2).set_index(["layer", "expert"])
    assert robust["kept"][9, 2] == 1
    assert robust["kept"][9, 3] == 0
    assert robust["rate"][9, 2] == 0.5
    assert len(m.expert_robustness(edits, 8, min_tokens=100)) == 0


def test_ids_of_no_expert_count_for_nothing():
    gone = edit([[[255, 255]], [[0, 1]]], [[[255, 255]], [[0, 1]]], [[0, 0], [1, 1]], [True, True])
    table = m.expert_robustness([gone], 8, min_tokens=1)
    assert table["expert"].tolist() == [0, 1]


def test_published_triggers_and_control():
    chosen = np.zeros((2, 4, 5), bool)
    chosen[0, :3, 1] = True
    chosen[0, :, 2] = True
    table = m.as_published_triggers(chosen).set_index(["token", "expert"])
    assert table["score"][0, 1] == 0.75
    assert table["score"][0, 2] == 1
    assert table["specificity"][0, 1] == pytest.approx(1 / (1 + 1 / 5))
    assert table["specificity"][0, 2] == pytest.approx(1 / (1 + 0.75 / 5))
    ids, weights = np.array([[0, 1], [2, 3]]), np.array([[0.9, 0.1], [0.5, 0.5]])
    assert m.as_published_control(ids, weights, 2)
    assert not m.as_published_control(ids, weights, 1)


def test_halves_kept_counts_experts_of_every_other_token() -> None:
    before = np.array([[[0, 1]], [[2, 3]], [[0, 4]], [[1, 9]]])
    after = np.array([[[1, 0]], [[3, 5]], [[5, 6]], [[1, 9]]])
    assert manipulation.halves_kept(before, after, 8) == (0.5, 2 / 3)  # 9 is no expert
