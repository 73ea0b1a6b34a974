"""Predictors on held-out prompts: plain cases by hand, nothing leaks, what is planted is found."""

from __future__ import annotations

import numpy as np
import pytest

from moetrace.analysis import attention_prediction, task_prediction
from moetrace.analysis.counts.routed import membership
from moetrace.analysis.prediction import predict
from moetrace.analysis.prediction.predict import Problem
from moetrace.errors import UsageError


def random_problem(
    seed: int, n_prompts: int = 20, length: int = 30, n_expert: int = 16, k: int = 2
) -> Problem:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((n_prompts * length, n_expert)), axis=1)[:, :k]
    prompt = np.repeat(np.arange(n_prompts), length)
    return Problem.of(
        ids,
        n_expert,
        prompt=prompt,
        token=rng.integers(0, 12, prompt.size),
        position=np.tile(np.arange(length), n_prompts),
        seed=seed,
    )


def recall(p: Problem, scores: predict.Scores) -> float:
    return float(predict.hits(p, scores, [p.k])[:, 0].sum() / p.used.sum())


def test_hits_count_how_many_of_a_tokens_experts_are_among_the_best() -> None:
    p = Problem.of(np.array([[0, 1], [2, 3]]), 4, prompt=[0, 1])
    scores = np.array([[9.0, 1, 8, 7], [0, 0, 0, 0]])
    assert predict.hits(p, scores, [1, 2, 3, 4]).tolist() == [[1, 1, 1, 2], [0, 0, 1, 2]]
    table = predict.score_table(p, {"x": scores}, [2, 4]).set_index("m")
    assert table.loc[2, "recall"] == 0.25
    assert table.loc[2, "precision"] == 0.25
    assert table.loc[4, ["recall", "precision", "chance"]].tolist() == [1, 0.5, 1]


def test_one_prompt_cannot_be_held_out() -> None:
    with pytest.raises(UsageError, match="hold out"):
        Problem.of(np.array([[0, 1], [2, 3]]), 4, prompt=[3, 3])


def test_prompts_are_held_out_whole() -> None:
    p = random_problem(0)
    for fit, held in p.folds:
        assert not set(p.prompt[fit]) & set(p.prompt[held])
        assert sorted([*fit, *held]) == list(range(p.prompt.size))


def test_nothing_is_learnt_from_the_prompt_that_is_predicted() -> None:
    """Every prompt uses experts of its own: what is learnt from other prompts is worth nothing, or worse."""
    prompt = np.repeat(np.arange(8), 25)
    ids = np.stack((2 * prompt, 2 * prompt + 1), axis=1)
    p = Problem.of(ids, 16, prompt=prompt, token=prompt, position=np.tile(np.arange(25), 8))
    own = np.eye(8)[prompt]
    for scores in (
        predict.popularity(p),
        predict.table(p, p.token),
        predict.ridge(p, own),
        predict.token_ridge(p, own),
        predict.transition(p, own),
    ):
        assert recall(p, scores) < 0.2
    run = Problem.of(ids, 16, prompt=prompt, run=prompt)
    assert recall(run, predict.previous(run)) == pytest.approx(24 / 25, abs=0.02)


def test_previous_does_not_reach_across_a_break() -> None:
    ids = np.array([[0, 1], [0, 1], [0, 1], [2, 3]])
    p = Problem.of(ids, 8, prompt=[0, 0, 0, 1], run=[0, 0, 1, 2])
    found = predict.hits(p, predict.previous(p), [2])[:, 0]
    assert found[1] == 2  # follows
    assert found[2] == found[0]  # begins a run: as popular as before


def test_tables_follow_their_key() -> None:
    p = random_problem(2)
    ids = np.stack((p.token, (p.token + 5) % 16), axis=1)
    by_token = Problem.of(ids, 16, prompt=p.prompt, token=p.token, position=p.position)
    assert recall(by_token, predict.table(by_token, by_token.token)) == 1
    assert recall(by_token, predict.table(by_token, by_token.position)) < 0.35


def test_ridge_equals_the_closed_form() -> None:
    p = random_problem(3)
    x = np.random.default_rng(0).normal(size=(p.prompt.size, 5))
    got = predict.ridge(p, x)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    fit, held = p.folds[0]
    a = np.hstack((np.ones((fit.size, 1)), z[fit]))
    penalty = np.diag([0.0, *[5.0] * 5])
    weight = np.linalg.solve(a.T @ a + penalty, a.T @ p.used[fit])
    np.testing.assert_allclose(got[held], np.hstack((np.ones((held.size, 1)), z[held])) @ weight, atol=1e-6)


def test_position_hats_hold_every_piecewise_line() -> None:
    position = np.arange(100)
    hats = predict.position_basis(position, 5)
    knots = np.quantile(np.log1p(position), np.linspace(0, 1, 5))
    line = np.interp(np.log1p(position), knots, [3.0, 1, 4, 1, 5])
    a = np.hstack((np.ones((100, 1)), hats))
    np.testing.assert_allclose(a @ np.linalg.lstsq(a, line, rcond=None)[0], line, atol=1e-9)
    assert predict.position_basis(np.full(7, 3)).shape == (7, 0)


def test_the_test_finds_what_is_planted_and_not_what_position_explains() -> None:
    p = random_problem(4)
    rng = np.random.default_rng(4)
    telling = p.used[:, :3] + rng.normal(0, 0.5, (p.prompt.size, 3))
    found = predict.gain_test(p, telling, predict.position_basis(p.position), n_permutations=99)
    assert found.p_value == 0.01
    assert found.gain > 0.1 > abs(found.null_mean)
    # routing that is a rough function of the position, and features that are another one
    ids = rng.permuted(np.tile(np.arange(16), (30, 1)), axis=1)[:, :2][p.position]
    by_place = Problem.of(ids, 16, prompt=p.prompt, position=p.position)
    rough = rng.normal(size=(30, 4))[p.position] + rng.normal(0, 0.3, (p.prompt.size, 4))
    explained = predict.gain_test(by_place, rough, predict.position_basis(p.position), n_permutations=99)
    assert explained.p_value > 0.05
    assert explained.null_mean == pytest.approx(explained.gain, abs=0.05)


def test_too_few_prompts_give_no_p_value() -> None:
    p = random_problem(5, n_prompts=3)
    assert np.isnan(predict.gain_test(p, p.used, n_permutations=9).p_value)
    assert np.isnan(predict.gain_test(random_problem(5), p.used, n_permutations=0).p_value)


def test_bootstrap_interval_agrees_with_the_textbook() -> None:
    rng = np.random.default_rng(6)
    a = rng.normal(2, 1, 400)
    found = predict.bootstrap_share(a, np.ones(400))
    half = 1.96 * a.std(ddof=1) / 20
    assert found.low == pytest.approx(a.mean() - half, abs=0.015)
    assert found.high == pytest.approx(a.mean() + half, abs=0.015)
    assert np.isnan(predict.bootstrap_share([1.0, 2.0], [1.0, 1.0]).low)


def test_an_early_layer_that_decides_is_found() -> None:
    """Expert e early means expert π(e) later, in three of four cases."""
    p = random_problem(7)
    rng = np.random.default_rng(7)
    later = rng.permutation(16)[np.argsort(-p.used, axis=1, kind="stable")[:, :2]]
    lost = rng.random(len(later)) < 0.25
    later[lost] = np.argsort(rng.random((lost.sum(), 16)), axis=1)[:, :2]
    q = Problem.of(later, 16, prompt=p.prompt, token=p.token, position=p.position)
    found = task_prediction(q, p.used, n_permutations=99)
    scores = found.recall[found.recall["m"] == 2].set_index("predictor")["recall"]
    assert scores["experts"] > 0.7
    assert scores["transition"] > 0.7
    assert scores[["popularity", "previous", "token"]].max() < 0.25
    gains = found.gains.set_index(["better", "than"])
    assert gains.loc[("experts", "popularity"), "p_value"] == 0.01
    assert (gains.loc[[("experts", "popularity"), ("experts", "token")], "low"] > 0.4).all()


def test_attention_that_decides_is_found_and_words_that_decide_are_told_apart() -> None:
    p = random_problem(8)
    rng = np.random.default_rng(8)
    attention = rng.normal(size=(p.prompt.size, 2, 7)).astype(np.float32)
    ids = np.argsort(-(attention.reshape(-1, 14) @ rng.normal(size=(14, 16))), axis=1)[:, :2]
    decides = Problem.of(ids, 16, prompt=p.prompt, token=p.token, position=p.position)
    kinds = ("a", "b", "c", "d", "e", "f", "g")
    found = attention_prediction(decides, attention, kinds=kinds, n_permutations=99)
    gains = found.gains.set_index("better")
    assert gains.loc["attention", "p_value"] == 0.01
    assert gains.loc["attention", "low"] > 0.3
    assert gains.loc["token and attention", "low"] > 0.3
    assert set(gains.index) == {"attention", "token and attention", *(f"attention: {kind}" for kind in kinds)}
    # now the word decides, and attention follows the word
    ids = np.stack((p.token, (p.token + 5) % 16), axis=1)
    words = Problem.of(ids, 16, prompt=p.prompt, token=p.token, position=p.position)
    follows = rng.normal(size=(12, 2, 7))[p.token].astype(np.float32)
    found = attention_prediction(words, follows, n_permutations=99)
    gains = found.gains.set_index("better")
    assert gains.loc["attention", "p_value"] == 0.01
    assert gains.loc["token and attention", "gain"] == 0


def test_membership_counts_no_absent_expert() -> None:
    used = membership(np.array([[0, 2], [3, 255]]), 4)
    assert used.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]


def test_sums_of_pairs_of_prompts_are_those_of_each_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    p = random_problem(2, n_prompts=13)
    features = np.eye(12)[p.token] + np.random.default_rng(0).random((p.token.size, 12))
    of_pairs = predict.gain_test(p, features, n_permutations=30)
    monkeypatch.setattr(predict, "_PAIR_BYTES", 0)
    of_each = predict.gain_test(p, features, n_permutations=30)
    assert of_pairs.gain == pytest.approx(of_each.gain, abs=0.01)
    assert of_pairs.null_mean == pytest.approx(of_each.null_mean, abs=0.002)
    assert of_pairs.null_mean != 0
