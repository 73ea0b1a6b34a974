"""Sums that add, usage with intervals, what a table of counts allows, and what an overview counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moetrace.analysis import (
    MetricSums,
    cold_experts,
    domain_lift,
    expert_usage,
    load_balance,
    usage_difference,
)
from moetrace.analysis.counts import overview
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.findings import Subject
from moetrace.trace.importers import CountTable


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 30))
def test_sums_of_parts_add_up_to_the_whole(seed: int, cut: int) -> None:
    """Cut between prompts, to the last digit; means and spreads are pandas'."""
    rng = np.random.default_rng(seed)
    prompts = np.sort(rng.integers(0, 6, 30)).astype(str)
    metrics = {name: np.where(rng.random((30, 2)) < 0.2, np.nan, rng.normal(size=(30, 2))) for name in "ab"}
    border = int(np.searchsorted(prompts, prompts[cut])) if cut < 30 else 30

    def part(piece: slice) -> MetricSums:
        return MetricSums.of(prompts[piece], {n: v[piece] for n, v in metrics.items()})

    whole = part(slice(None))
    if 0 < border < 30:
        both = part(slice(border, None)) + part(slice(border))
        for name in ("prompts", "tokens", "sums", "squares"):
            assert np.array_equal(getattr(whole, name), getattr(both, name))
    table = whole.table().set_index(["place", "metric"])
    for (place, name), row in table.iterrows():
        values = pd.Series(metrics[name][:, place])
        assert row["tokens"] == values.notna().sum()
        assert row["mean"] == pytest.approx(values.mean())
        assert row["std"] == pytest.approx(values.std(ddof=0))
    together = whole.grouped([[0, 1]]).table().set_index("metric")
    assert together.loc["a", "mean"] == pytest.approx(np.nanmean(metrics["a"]))


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    table = MetricSums.of(["p", "p"], {"x": np.array([[1.0], [3.0]])}).table()
    assert table["mean"].tolist() == [2]
    assert table[["low", "high"]].isna().all(axis=None)


def usage_counts() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(30, 60, (6, 2))
    counts = np.stack([[rng.multinomial(2 * n, [0.4, 0.3, 0.2, 0.1, 0.0]) for n in row] for row in tokens])
    return counts, tokens


def test_usage_has_every_expert_with_its_interval() -> None:
    counts, tokens = usage_counts()
    table = expert_usage(counts, tokens, layers=[3, 7])
    assert len(table) == 10
    first = table[table["layer"] == 3]
    assert first["percent"].sum() == pytest.approx(100)
    total = tokens[:, 0].sum()
    assert first["percent_of_tokens"].tolist() == pytest.approx(100 * counts[:, 0].sum(axis=0) / total)
    used = first[first["count"] > 0]
    assert ((used["low"] < used["percent_of_tokens"]) & (used["percent_of_tokens"] < used["high"])).all()
    never = first[first["count"] == 0].iloc[0]
    # the exact bound of fewer tokens than there are: those of one prompt are alike
    cold = cold_experts(counts, tokens, n_expert_used=2, layers=[3, 7]).set_index(["layer", "expert"])
    theirs = cold.loc[(3, int(never["expert"]))]
    assert theirs["effective_tokens"] < total
    assert (never["low"], never["high"]) == (0, pytest.approx(100 * theirs["cluster_high"]))
    assert never["high"] == pytest.approx(100 * (1 - 0.025 ** (1 / theirs["effective_tokens"])))
    balance = load_balance(counts, tokens).set_index("layer")
    assert balance.loc[0, "unused_rate_bound"] == pytest.approx(never["high"] / 100)
    assert sorted(first["rank"]) == [1, 2, 3, 4, 5]
    assert first.set_index("rank").loc[1, "count"] == first["count"].max()
    smaller = expert_usage(counts, tokens, n_expert=[5, 4])
    assert smaller.groupby("layer").size().tolist() == [5, 4]
    unknown = expert_usage(counts, np.zeros_like(tokens))
    assert unknown[["percent_of_tokens", "low", "high"]].isna().all(axis=None)


def test_an_expert_that_one_domain_alone_chose_may_be_chosen_by_others() -> None:
    """Redrawing prompts cannot show it: the lift would be certain to be 2."""
    counts = np.zeros((8, 1, 3), dtype=int)
    counts[:, 0] = [50, 50, 0]
    counts[:4, 0, 2] = 5
    table = domain_lift(counts, list("aaaabbbb"), n_boot=200, n_permutations=19).set_index(
        ["domain", "expert"]
    )
    assert table.loc[("a", 2), "lift"] == 2
    # four prompts say little of how they differ: their 400 picks are worth 152 independent ones
    worth = 400 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 3)) ** 2
    may = (1 - 0.025 ** (1 / worth)) / (20 / 420)
    assert table.loc[("a", 2), "low"] == pytest.approx(2 / (1 + may))
    assert table.loc[("a", 2), "high"] == 2
    assert table.loc[("b", 2), "low"] == 0
    assert 0 < table.loc[("b", 2), "high"] < 1


def test_usage_of_two_captures_is_compared_prompt_by_prompt() -> None:
    counts, _ = usage_counts()
    same = usage_difference(counts, counts, layers=[3, 7])
    assert same["jsd_bits"].tolist() == pytest.approx([0, 0], abs=1e-12)
    assert same["jain_difference"].tolist() == [0, 0]
    other = counts.copy()
    other[:, 1] = 0
    other[:, 1, 0] = counts[:, 1].sum(axis=1)
    found = usage_difference(counts, other).set_index("layer")
    back = usage_difference(other, counts).set_index("layer")
    assert found.loc[1, "jain_b"] == pytest.approx(1 / 5)
    assert found.loc[1, "jain_high"] < 0
    assert found["jsd_bits"].tolist() == pytest.approx(back["jsd_bits"].tolist())
    assert found["entropy_bits_difference"].tolist() == pytest.approx(
        (-back["entropy_bits_difference"]).tolist()
    )
    with pytest.raises(UsageError, match="cannot be compared"):
        usage_difference(counts, counts[1:])


def test_counts_alone_give_values_without_intervals() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 90, (3, 2, 6))
    subject = Subject([CountTable(("c", "a", "b"), np.array([4, 9]), counts)])
    test = subject.domain_test()
    assert "do not tell the prompts" in test.verdict
    assert test.table["layer"].tolist() == [4, 9]
    assert test.table[["p_value", "jsd_low", "jsd_jackknife"]].isna().all(axis=None)
    own = subject.labelled
    lift = domain_lift(own.included, own.labels, layers=own.layers, n_boot=10)
    lift = lift.query("layer == 4 and domain == 'c'")
    assert lift["count"].tolist() == counts[0, 0].tolist()
    assert lift[["low", "high", "p_family"]].isna().all(axis=None)
    balance = load_balance(own.included, None, layers=own.layers)
    assert balance[["tokens", "hottest_rate", "jain_low"]].isna().all(axis=None)
    assert balance["jain"].between(1 / 6, 1).all()
    with pytest.raises(UsageError, match="which token chose what"):
        _ = subject.routing
    once = subject.activations
    assert published.overview(once).activations == 3 * counts.sum()
    with pytest.raises(UsageError, match="no order of tokens"):
        published.lag1(once, "a", 4)


def test_activations_of_parts_add() -> None:
    rng = np.random.default_rng(2)
    experts = rng.permuted(np.tile(np.arange(9), (40, 2, 1)), axis=2)[:, :, :3].astype(np.uint8)
    domain, token = np.array(list("ab") * 20), np.repeat(np.arange(20), 2)

    def part(rows: Any) -> published.Activations:
        return published.Activations.from_rows(experts[rows], domain[rows], token[rows], n_expert=9)

    whole = part(np.arange(40))
    both = part(np.arange(17, 40)) + part(np.arange(17))
    assert np.array_equal(whole.table, both.table)
    assert np.array_equal(whole.tokens_per_domain, both.tokens_per_domain)
    one, two = (published.lag1(a, "b", 1, n_expert=9) for a in (whole, both))
    assert one.sequence.tolist() == two.sequence.tolist()
    only_a = part(np.arange(0, 40, 2)) + part(np.arange(40))
    assert only_a.table.sum() == 1.5 * whole.table.sum()
    with pytest.raises(UsageError, match="different models"):
        _ = whole + published.Activations.from_counts(np.ones((2, 1, 9)), ["a", "b"])


def test_overview_counts_phases_layers_and_domains() -> None:
    phase = np.array([0, 0, 1, 2, 0, 9], dtype=np.uint8)
    state = np.array([[1, 1], [1, 2], [1, 0], [1, 1], [1, 1], [1, 1]], dtype=np.uint8)
    table = overview.phases(phase, state, [0, 0, 0, 1, -1, 1]).set_index("phase")
    assert table["tokens"].to_dict() == {"prefill": 2, "decode": 1, "unknown": 2, "no request": 1}
    assert table.loc["prefill", "entries"] == 3
    layers = overview.layers(state, layers=[2, 5], n_expert=[8, 4], n_expert_used=[2, 1])
    assert layers[["present", "not_computed", "lost"]].values.tolist() == [[6, 0, 0], [4, 1, 1]]
    requests = pd.DataFrame(
        {
            "id": ["p", None, "p"], "label": ["x", None, "x"],
            "n_prefill": [3, 2, 3], "n_decode": [1, 0, 1], "n_lost": [0, 0, 2],
        }
    )  # fmt: skip
    domains = overview.domains([requests, requests.iloc[:2]]).set_index("domain")
    assert domains.loc["x", ["prompts", "requests", "prefill", "decode", "lost"]].tolist() == [1, 3, 9, 3, 2]
    assert domains.loc["", ["prompts", "requests"]].tolist() == [2, 2]
