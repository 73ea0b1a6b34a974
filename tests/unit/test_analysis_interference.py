"""What other k cost, whether experts add up, which pairs pull the same way; what experts compute."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

import moetrace.analysis as m
from moetrace.analysis.experts import interference
from moetrace.analysis.experts.outputs import chosen_outputs, expert_output
from moetrace.errors import UsageError
from moetrace.model.experts import Expert


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def drawn(rng: np.random.Generator, gate: bool = True) -> Expert:
    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return Expert(
        some(6, 5), some(5, 6), some(6, 5) if gate else None, some(6), some(6) if gate else None, some(5)
    )


# -- what experts compute


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu_sqr", "swiglu_oai"])
def test_an_expert_is_its_formula(rng, activation):
    """Written down again, neuron by neuron, in float64."""
    act = {
        "silu": lambda g: g * expit(g),
        "gelu": lambda g: 0.5 * g * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g**3))),
        "relu": lambda g: max(g, 0.0),
        "relu_sqr": lambda g: max(g, 0.0) ** 2,
    }
    for gated in (True, False):
        if activation == "swiglu_oai" and not gated:
            continue
        e = drawn(rng, gated)
        x = 3 * rng.standard_normal((4, 5)).astype(np.float32)
        for row, got in zip(x.astype(float), expert_output(e, x, activation), strict=True):
            want = e.down_bias.astype(float).copy()
            for i in range(6):
                u = e.up[i].astype(float) @ row + e.up_bias[i]
                if not gated:
                    hidden = act[activation](u)
                else:
                    g = e.gate[i].astype(float) @ row + e.gate_bias[i]
                    if activation == "swiglu_oai":
                        g = min(g, 7)
                        hidden = g * expit(1.702 * g) * (np.clip(u, -7, 7) + 1)
                    else:
                        hidden = act[activation](g) * u
                want += hidden * e.down[:, i]
            assert np.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_contributions_are_weighted_outputs_of_the_chosen(rng):
    experts = [drawn(rng) for _ in range(4)]
    x = rng.standard_normal((3, 5)).astype(np.float32)
    ids = np.array([[0, 3], [2, 1], [3, 0]])
    weights = rng.random((3, 2)).astype(np.float32)
    after = chosen_outputs(experts, x, ids, weights)
    before = chosen_outputs(experts, x, ids, weights, weights_before=True)
    for t in range(3):
        for r in range(2):
            e = experts[ids[t, r]]
            assert np.allclose(after[t, r], weights[t, r] * expert_output(e, x[t : t + 1])[0], atol=1e-5)
            assert np.allclose(before[t, r], expert_output(e, weights[t, r] * x[t : t + 1])[0], atol=1e-5)
    with pytest.raises(UsageError, match="do not fit"):
        chosen_outputs(experts, x, ids[:2], weights)


# -- k


def test_changes_are_paired_and_rest_on_texts(rng):
    text = np.repeat(np.arange(8), 30)
    base = rng.random(240)
    nll = {1: base + 0.5 + 0.01 * rng.standard_normal(240), 4: base, 8: base - 0.1 * (text == 3)}
    table = m.expert_interference(nll, text, 4, same_top={k: np.full(240, k == 4) for k in nll}).set_index(
        "k"
    )
    assert table.loc[1, "change"] == pytest.approx(0.5, abs=0.01)
    assert table.loc[1, "change_low"] > 0.48
    assert table.loc[4, "change"] == 0
    assert np.isnan(table.loc[4, "better_tokens"])
    assert table.loc[8, "better_texts"] == 1 / 8
    assert table.loc[8, "better_tokens"] == 1 / 8
    assert table["kl"].isna().all()
    assert table.loc[4, "same_top"] == 1
    with pytest.raises(UsageError, match="own k, 2"):
        m.expert_interference(nll, text, 2)
    per_text = interference.better_with(nll, text, 4).set_index(["text", "k"])
    assert per_text.loc[(3, 8), "change"] == pytest.approx(-0.1)
    assert len(per_text) == 16


def test_the_published_measure_is_a_length():
    table = m.as_published_interference({1: [100, 40], 4: [50, 50], 2: [30, 500]}, 4).set_index("k")
    assert table["quality"].tolist() == [pytest.approx(1.4), pytest.approx(1.3), 1.0]
    assert table["interference"].tolist() == [0, 1, 1]  # 30 and 50 are below 0.8 of 100


# -- outputs


def test_linearity_is_the_relative_rest(rng):
    parts = rng.standard_normal((5, 2, 4))
    assert m.linearity(parts, parts.sum(axis=1)).max() < 1e-12
    off = parts.sum(axis=1) * 1.01
    assert m.linearity(parts, off) == pytest.approx(0.01 / 1.01)


def test_gain_says_whether_contributions_add_up():
    one = np.zeros((40, 2, 8))
    one[:, 0, 0] = one[:, 1, 0] = 1
    ids = np.tile([0, 1], (40, 1))
    prompts = np.repeat(np.arange(4), 10)
    assert m.combination(one, ids, prompts)["gain"] == pytest.approx(2)
    one[:, 1, 0] = -1
    assert m.combination(one, ids, prompts)["gain"] == pytest.approx(0)
    one[:, 1] = np.eye(8)[1]
    found = m.combination(one, ids, prompts)
    assert found["gain"] == pytest.approx(1)
    assert (found["low"], found["high"]) == pytest.approx((1, 1))
    assert np.isnan(m.combination(one[:, :1], ids[:, :1], prompts)["p_value"])  # k = 1
    assert np.isnan(m.combination(one, ids, np.zeros(40))["low"])  # one prompt


def routed(rng: np.random.Generator, n: int, k: int, n_expert: int) -> np.ndarray:
    return np.argsort(rng.random((n, n_expert)), axis=1)[:, :k]


def test_pairs_that_pull_the_same_way_are_found_and_others_not(rng):
    n, n_expert, width = 600, 6, 40
    own = rng.standard_normal((n_expert, width))
    own[4] = 0.8 * own[1] + 0.6 * own[4]  # 1 and 4 together
    own[3] = -0.8 * own[2] + 0.6 * own[3]  # 2 and 3 against each other
    ids = routed(rng, n, 3, n_expert)
    parts = (own[ids] + 0.3 * rng.standard_normal((n, 3, width))) * rng.uniform(0.1, 1, (n, 3, 1))
    prompts = np.repeat(np.arange(20), n // 20)
    table = m.pair_compatibility(parts, ids, prompts, n_null=199).set_index(["expert_a", "expert_b"])
    found = table[table["p_family"] <= 0.05]
    assert set(found.index) == {(1, 4), (2, 3)}
    assert table["cosine"][1, 4] > 0.5
    assert table["cosine"][2, 3] < -0.5
    for (a, b), row in table.iterrows():
        both = ((ids == a).any(axis=1)) & ((ids == b).any(axis=1))
        assert row["tokens"] == both.sum()
        cosines = []
        for t in np.flatnonzero(both):
            u, v = parts[t, ids[t] == a][0], parts[t, ids[t] == b][0]
            cosines.append(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
        assert row["cosine"] == pytest.approx(np.mean(cosines))
        assert row["low"] < row["cosine"] < row["high"]
        independent = n * (ids == a).any(axis=1).mean() * (ids == b).any(axis=1).mean()
        assert row["lift"] == pytest.approx(both.sum() / independent)


def test_rare_pairs_are_left_out_and_one_prompt_gives_no_interval(rng):
    ids = np.array([[0, 1]] * 30 + [[0, 2]] * 5)
    parts = rng.standard_normal((35, 2, 6))
    table = m.pair_compatibility(parts, ids, np.zeros(35), n_null=0)
    assert table[["expert_a", "expert_b"]].to_numpy().tolist() == [[0, 1]]
    assert table[["low", "high", "p_family"]].isna().all(axis=None)
    assert len(m.pair_compatibility(parts[:3], ids[:3], np.zeros(3))) == 0
