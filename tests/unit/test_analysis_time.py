"""Persistence, transitions, gate inputs, agreement of captures, depth, entropy and load."""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any

import notebook
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import random_rows
from scipy import stats
from scipy.stats import kendalltau

from moetrace.analysis import (
    MetricSums,
    RoutingCounts,
    agreement,
    agreement_summary,
    align,
    count_routing,
    deep_dive,
    depth_contrast,
    domain_entropy,
    gate_distances,
    gate_summary,
    gate_sums,
    load_balance,
    persistence,
    shuffle_test,
    transitions,
)
from moetrace.analysis.domains import layers as depth
from moetrace.errors import UsageError


def whole(seed: int, n: int = 240, **sizes: Any) -> dict[str, Any]:
    """Unbroken requests, everything present."""
    rows = random_rows(seed, n=n, n_requests=4, **sizes)
    rows["request"] = np.arange(n) // (n // 4)
    rows["position"] = (np.arange(n) % (n // 4)).astype(np.int32)
    rows["state"][:] = 1
    return rows


def counted(rows: dict[str, Any], **more: Any) -> RoutingCounts:
    names = ("experts", "request", "position", "n_expert", "state")
    return count_routing(**{n: rows[n] for n in names}, **more)


def test_shuffle_baseline_is_the_mean_over_all_orders() -> None:
    """GIVEN a request of five tokens THEN Σ c(c−1)/(n(n−1)) is the mean over all 120 orders."""
    experts = np.array([[1, 2], [1, 3], [2, 1], [4, 5], [1, 2]], dtype=np.uint8)[:, None, :]
    top1, overlap = [], []
    for order in permutations(range(5)):
        e = experts[list(order), 0]
        top1.append(np.mean(e[:-1, 0] == e[1:, 0]))
        overlap.append(np.mean([len(set(a) & set(b)) / 2 for a, b in pairwise(e)]))
    found = persistence(count_routing(experts, np.zeros(5, int), np.arange(5), n_expert=8, max_lag=3))
    for lag in range(3):
        assert found["top1_shuffle"][lag] == pytest.approx(np.mean(top1))
        assert found["overlap_shuffle"][lag] == pytest.approx(np.mean(overlap))
    assert found["top1"][0] == 1 / 4
    assert found["overlap"][0] == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)
    assert found["top1_marginal"][0] == pytest.approx((9 + 1 + 1) / 25)
    assert found["overlap_marginal"][0] == pytest.approx((16 + 9 + 1 + 1 + 1) / 25 / 2)


def test_persistence_of_a_constant_router_is_one_and_its_excess_zero() -> None:
    rows = whole(0)
    rows["experts"][:] = np.arange(4)
    found = persistence(counted(rows))
    assert len(found) == 3 * 32
    for name in ("top1", "top1_marginal", "top1_shuffle", "overlap", "overlap_marginal", "overlap_shuffle"):
        assert found[name].to_numpy() == pytest.approx(1), name
    assert found["overlap_excess"].to_numpy() == pytest.approx(0)


def test_an_alternating_router_is_seen_at_even_lags_only() -> None:
    rows = whole(1)
    rows["experts"][::2], rows["experts"][1::2] = np.arange(4), np.arange(4, 8)
    found = persistence(counted(rows)).query("layer == 0").set_index("lag")
    assert found.loc[[1, 3, 31], "overlap"].tolist() == [0, 0, 0]
    assert found.loc[[2, 4, 32], "overlap"].tolist() == [1, 1, 1]
    assert (found.loc[[2, 4, 32], "overlap_low"] > 0.4).all()
    tested = shuffle_test(
        **{n: rows[n] for n in ("experts", "request", "position", "n_expert", "state")}, n_permutations=99
    ).set_index(["layer", "lag"])
    assert (tested.loc[(0, slice(1, 31, 2)), "overlap_p"] == 1).all()
    assert (tested.loc[(0, slice(2, 32, 2)), "overlap_p_family"] == 0.01).all()
    assert tested.attrs == {"rows": 240, "requests": 4, "n_permutations": 99}


def test_shuffle_test_observes_what_counting_counts() -> None:
    rows = random_rows(2, n=300)
    names = ("experts", "request", "position", "n_expert", "state")
    tested = shuffle_test(**{n: rows[n] for n in names}, n_permutations=9, max_lag=9)
    told = persistence(counted(rows, max_lag=9))
    assert tested["overlap"].to_numpy() == pytest.approx(told["overlap"].to_numpy(), nan_ok=True)
    assert tested["top1"].to_numpy() == pytest.approx(told["top1"].to_numpy(), nan_ok=True)


def test_shuffle_test_takes_even_stretches_of_requests_up_to_the_limit() -> None:
    rows = whole(3)
    names = ("experts", "request", "position", "n_expert", "state")
    tested = shuffle_test(**{n: rows[n] for n in names}, n_permutations=3, max_lag=2, max_rows=130)
    assert (tested.attrs["rows"], tested.attrs["requests"]) == (128, 4)  # 32 of each one's 60
    with pytest.raises(UsageError, match="no rows"):
        shuffle_test(**{n: rows[n] for n in names}, keep=np.zeros(240, bool))


def test_transitions_are_pandas_crosstab_and_expected_is_a_shuffle_s_mean() -> None:
    rows = whole(4, n_expert=6, k=2)
    found = transitions(counted(rows), 1)
    frames = [
        pd.crosstab(
            rows["experts"][rows["request"] == r, 1, 0][:-1], rows["experts"][rows["request"] == r, 1, 0][1:]
        )
        for r in range(4)
    ]
    told = sum(f.reindex(index=range(6), columns=range(6), fill_value=0) for f in frames)
    assert found.counts.to_numpy().tolist() == told.to_numpy().tolist()
    assert found.probability.sum(axis=1).to_numpy() == pytest.approx(1)
    assert found.expected.to_numpy().sum() == pytest.approx(4 * 59)
    rng = np.random.default_rng(0)
    total = np.zeros((6, 6))
    for _ in range(400):
        for r in range(4):
            first = rng.permutation(rows["experts"][rows["request"] == r, 1, 0])
            np.add.at(total, (first[:-1], first[1:]), 1 / 400)
    assert found.expected.to_numpy() == pytest.approx(total, abs=0.6)
    with pytest.raises(UsageError, match="not in the counts"):
        transitions(counted(rows), 9)
    with pytest.raises(UsageError, match="no transitions"):
        transitions(counted(rows).of([0]), 1)


def test_gate_distances_are_scipy_s_and_leave_absent_layers_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 4, 32)).astype(np.float32)
    state = np.ones((7, 4), dtype=np.uint8)
    state[3, 2] = 2
    found = gate_distances(x, [0, 2, 3, 5], state=state, layers=[3, 4, 5, 6], chunk=2)
    assert len(found) == 4 * 3 - 2
    for row in found.itertuples():
        a, b = x[row.row, row.layer - 3].astype(float), x[row.row, row.next_layer - 3].astype(float)
        for metric, value in notebook.distance_script(a, b).items():
            assert getattr(row, metric) == pytest.approx(value, rel=1e-6), metric
    one = found.query("row == 0 and layer == 3").iloc[0]
    told = notebook.distance_script(x[0, 0].astype(float), x[2, 1].astype(float))["cosine_similarity"]
    assert one["cosine_unpaired"] == pytest.approx(told, rel=1e-6)
    sums = gate_sums(x, [0, 2, 3, 5], ["p", "p", "q", "q"], state=state, chunk=3)
    summary = gate_summary(sums, [3, 4, 5, 6]).set_index(["layer", "metric"])
    values = found.query("layer == 4")["euclidean"]
    assert summary.loc[(4, "euclidean"), "mean"] == pytest.approx(values.mean())
    assert summary.loc[(4, "euclidean"), "std"] == pytest.approx(values.std(ddof=0))
    assert summary.loc[(4, "euclidean"), "tokens"] == 3
    assert gate_distances(x, []).empty
    with pytest.raises(UsageError, match="no rows"):
        gate_sums(x, [], [])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_agreement_of_two_rankings(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [rng.normal(size=(9, 2, 12)).astype(np.float32) for _ in range(2)]
    scores[1] += scores[0]
    a, b = (np.argsort(-s, axis=2)[:, :, :k].astype(np.uint8) for s in scores)
    found = agreement(a, b, n_expert=12, scores_b=scores[1])
    for i, j in np.ndindex(9, 2):
        one, two = a[i, j].tolist(), b[i, j].tolist()
        common = sorted(set(one) & set(two))
        assert found["overlap"][i, j] == len(common) / k
        assert found["exact"][i, j] == (set(one) == set(two))
        assert found["top1"][i, j] == (one[0] == two[0])
        if len(common) > 1:
            told = kendalltau([one.index(e) for e in common], [two.index(e) for e in common]).statistic
            assert found["kendall_tau"][i, j] == pytest.approx(told)
        else:
            assert np.isnan(found["kendall_tau"][i, j])
        order = np.argsort(-scores[1][i, j])
        told_k = next(n for n in range(1, 13) if set(one) <= set(order[:n].tolist()))
        assert found["coverage_k"][i, j] == told_k


def test_agreement_marks_missing_cells_and_sums_up_per_prompt() -> None:
    a = np.array([[[1, 2]], [[3, 4]], [[255, 255]]], dtype=np.uint8)
    b = np.array([[[2, 1]], [[3, 5]], [[1, 2]]], dtype=np.uint8)
    found = agreement(a, b, n_expert=8)
    assert np.isnan(found["overlap"][2, 0])
    assert found["kendall_tau"][0, 0] == -1
    sums = MetricSums.of(["p", "q", "q"], found)
    table = agreement_summary(sums, n_expert=8, n_expert_used=2).set_index("metric")
    assert table.loc["overlap", "mean"] == 0.75
    assert table.loc["overlap", "tokens"] == 2
    assert table.loc["overlap", "chance"] == 0.25
    with pytest.raises(UsageError, match="cannot be compared"):
        agreement(a, b[:, :, :1], n_expert=8)


def test_alignment_stops_where_texts_part() -> None:
    a = pd.DataFrame({"prompt": list("ppppq"), "position": [0, 1, 2, 3, 0], "token": [5, 6, 7, 8, 9]})
    b = pd.DataFrame({"prompt": list("qpppp"), "position": [0, 0, 1, 2, 3], "token": [9, 5, 6, 1, 8]})
    rows_a, rows_b, report = align(a, b)
    assert list(zip(rows_a.tolist(), rows_b.tolist(), strict=True)) == [(0, 1), (1, 2), (4, 0)]
    assert report.values.tolist() == [["p", 2, 2], ["q", 1, -1]]
    with pytest.raises(UsageError, match="several rows"):
        align(pd.concat((a, a)), b)
    with pytest.raises(UsageError, match="no prompt in common"):
        align(a, b.assign(prompt="z" + b["prompt"]))


def domains(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(10), size=(3, 8))
    p[:, :2] = p[0, :2]  # the first quarter of the layers does not tell domains apart
    counts = np.stack([[rng.multinomial(300, row) for row in p[d]] for d in np.repeat(range(3), 6)])
    return counts, np.repeat(list("abc"), 6)


def test_depth_contrast_compares_first_and_last_quarter() -> None:
    counts, labels = domains()
    found = depth_contrast(counts, labels, layers=np.arange(3, 11))
    assert (found.early_layers, found.late_layers) == ((3, 4), (9, 10))
    assert found.early == pytest.approx(0, abs=0.005)
    assert found.low < found.difference < found.high
    assert found.low > 0.05
    swapped = depth_contrast(counts, labels, early=[6, 7], late=[0, 1])
    assert swapped.difference == pytest.approx(-found.difference)
    with pytest.raises(UsageError, match="empty"):
        depth_contrast(counts, labels, early=[99])


def test_early_and_late_of_24_layers_are_the_readme_s() -> None:
    counts = np.ones((6, 24, 4))
    found = depth_contrast(counts, list("aabbcc"))
    assert (found.early_layers, found.late_layers) == (tuple(range(6)), tuple(range(18, 24)))


def test_deep_dive_shows_one_table_for_all_consumers() -> None:
    counts, labels = domains()
    found = deep_dive(counts, labels, consumers=["ffn_gate", "ffn_up", "ffn_down"])
    assert found.layer >= 2
    assert found.percent.sum(axis=1).to_numpy() == pytest.approx(100)
    assert found.lift.mean(axis=0).to_numpy() == pytest.approx(1)
    assert deep_dive(counts, labels, layer=1).layer == 1


def test_entropy_table() -> None:
    counts, labels = domains()
    counts[:, 0, :] = 7  # even
    found = domain_entropy(counts, labels).set_index(["layer", "domain"])
    assert found.loc[(0, "a"), "entropy_bits"] == pytest.approx(np.log2(10))
    assert found.loc[(0, "a"), "picks"] == 7 * 10 * 6
    bias = 9 / (2 * 420 * np.log(2))
    assert found.loc[(0, "a"), "entropy_miller_madow_bits"] == pytest.approx(np.log2(10) + bias)
    assert (found["low"] <= found["entropy_jackknife_bits"]).all()
    alone = depth.domain_entropy(counts[:1], labels[:1])
    assert alone[["low", "high"]].isna().all(axis=None)


def test_load_balance_table() -> None:
    counts = np.zeros((2, 2, 4), dtype=int)
    counts[:, 0] = 5
    counts[:, 1, 2] = 10
    found = load_balance(counts, np.full((2, 2), 10))
    assert found["peak"].tolist() == [1, 4]
    assert found["jain"].tolist() == [1, 0.25]
    assert found["cv"].tolist() == pytest.approx([0, np.sqrt(3)])
    assert found["unused"].tolist() == [0, 3]
    assert found["hottest_rate"].tolist() == [0.5, 1.0]
    assert np.isnan(found["unused_rate_bound"][0])
    worth = (
        20 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 1)) ** 2
    )  # two prompts say little of how they differ
    assert found["unused_rate_bound"][1] == pytest.approx(1 - 0.025 ** (1 / worth))
