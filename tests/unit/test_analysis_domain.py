"""Domains: published numbers, other libraries, and the laws that statistics of domains obey."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import shared_data
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency, entropy
from scipy.stats.contingency import association

from moetrace.analysis import (
    chance,
    domain_lift,
    domain_separation,
    domain_test,
    expert_frequency,
    specialists,
)
from moetrace.analysis.domains import spread
from moetrace.analysis.domains.domain import jensen_shannon_distances, pseudo_f
from moetrace.analysis.statistics import information as info
from moetrace.analysis.statistics import nulls
from moetrace.errors import UsageError


def prompts(seed: int, n_prompts: int = 4, n_domains: int = 3, n_layers: int = 2, n_expert: int = 12) -> Any:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(n_expert), size=(n_prompts * n_domains, n_layers))
    counts = np.stack([[rng.multinomial(rng.integers(50, 200), row) for row in prompt] for prompt in p])
    return counts, np.repeat([f"d{i}" for i in range(n_domains)], n_prompts)


@pytest.mark.parametrize(
    ("layer", "jsd", "v", "arxiv", "github", "c4"),
    [
        (0, 0.167, 0.256, 97.7, 62.6, 37.7),
        (7, 0.401, 0.380, 78.5, 77.0, 33.2),
        (15, 0.501, 0.416, 93.7, 56.4, 31.2),
    ],
)
def test_olmoe_counts_give_the_published_numbers(
    layer: int, jsd: float, v: float, arxiv: float, github: float, c4: float
) -> None:
    """Three digits; layer 7's divergence is 0.400499, published as .401, so one unit of the third digit
    counts.
    """
    table = pd.read_csv(shared_data("olmoe_domain_expert_counts.csv")).query("layer_id == @layer")
    counts = table.pivot(index="domain", columns="expert_id", values="count")
    found = domain_separation(counts.to_numpy())
    assert found.jsd_bits == pytest.approx(jsd, abs=0.0006)
    assert found.cramers_v == pytest.approx(v, abs=0.0005)
    names = counts.index.to_list()
    frequency = expert_frequency(
        counts.to_numpy()[:, None, :], counts.sum(axis=1).to_numpy()[:, None] // 8, names
    )
    most = frequency.groupby("domain")["percent_of_tokens"].max()
    assert most[["arxiv", "github", "c4"]].round(1).tolist() == [arxiv, github, c4]
    assert frequency.groupby("domain")["percent"].sum().to_numpy() == pytest.approx(100)


def test_olmoe_divergence_agrees_with_scipy() -> None:
    """For two domains scipy has the divergence too, as its root."""
    table = pd.read_csv(shared_data("olmoe_domain_expert_counts.csv")).query("layer_id == 7")
    counts = table.pivot(index="domain", columns="expert_id", values="count").to_numpy()
    for a, b in combinations(range(5), 2):
        expected = jensenshannon(counts[a], counts[b], base=2) ** 2
        assert domain_separation(counts[[a, b]]).jsd_bits == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("e", "k", "top1", "jaccard", "any_shared", "coactivation"),
    [
        (32, 4, 0.031, 0.075, 0.431, 0.097),
        (64, 8, 0.016, 0.071, 0.679, 0.111),
        (128, 8, 0.008, 0.034, 0.412, 0.055),
        (160, 8, 0.006, 0.027, 0.343, 0.044),
        (256, 8, 0.004, 0.017, 0.227, 0.028),
    ],
)
def test_chance_constants(
    e: int, k: int, top1: float, jaccard: float, any_shared: float, coactivation: float
) -> None:
    """Three digits. (256, 8) is exactly 7/255 = .02745, listed as .028 from a simulation."""
    found = chance(e, k)
    values = [found.top1, found.jaccard, found.any_shared, found.coactivation]
    assert values == pytest.approx([top1, jaccard, any_shared, coactivation], abs=0.0006)


def test_chance_constants_agree_with_drawing() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.argsort(rng.random((20000, 32)), axis=1)[:, :4] for _ in range(2))
    shared = (a[:, :, None] == b[:, None, :]).any(axis=2).sum(axis=1)
    found = chance(32, 4)
    assert (shared / (8 - shared)).mean() == pytest.approx(found.jaccard, abs=0.003)
    assert (shared > 0).mean() == pytest.approx(found.any_shared, abs=0.015)
    assert (shared / 4).mean() == pytest.approx(found.overlap, abs=0.005)
    assert chance(8, 2).any_shared == pytest.approx(0.464, abs=0.0005)  # Mixtral's 46.4 %
    with pytest.raises(UsageError):
        chance(4, 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_separation_agrees_with_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, (4, 9)) + np.array([1, 0, 0, 0, 0, 0, 0, 0, 0])
    counts[:, 5] = 0
    found = domain_separation(counts)
    used = counts[:, counts.any(axis=0)]
    chi2, p, dof, _ = chi2_contingency(used, correction=False)
    assert found.chi2 == pytest.approx(chi2)
    assert found.dof == dof
    assert found.p_value == pytest.approx(p, rel=1e-9)
    assert found.cramers_v == pytest.approx(association(used, method="cramer", correction=False))
    share = counts / counts.sum(axis=1, keepdims=True)
    expected = entropy(share.mean(axis=0), base=2) - np.mean([entropy(row, base=2) for row in share])
    assert found.jsd_bits == pytest.approx(expected)


def test_corrected_v_is_near_zero_for_independent_picks() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(32))
    found = [domain_separation(rng.multinomial(400, p, size=5)) for _ in range(200)]
    assert np.mean([f.cramers_v for f in found]) > 0.11
    assert np.mean([f.cramers_v_corrected for f in found]) < 0.025


def test_miller_madow_removes_most_of_the_bias() -> None:
    """Uniform over 32: plug-in loses (m − 1)/(2N ln 2) = 0.055 bits at N = 404."""
    rng = np.random.default_rng(2)
    counts = rng.multinomial(404, np.full(32, 1 / 32), size=2000)
    plain = info.entropy_bits(info.shares(counts)).mean()
    assert 5 - plain == pytest.approx(0.055, abs=0.004)
    assert 5 - info.miller_madow_bits(counts).mean() == pytest.approx(0, abs=0.004)


def test_one_prompt_per_domain_gets_an_answer_and_no_p_value() -> None:
    counts, _ = prompts(0, n_prompts=1, n_domains=5)
    found = domain_test(counts, list("abcde"))
    assert not found.testable
    assert found.verdict == "cannot be tested: domain and prompt are the same thing"
    assert found.min_p == 1.0
    assert found.table[["p_value", "q_value", "p_family", "jsd_low", "jsd_high"]].isna().all(axis=None)
    assert found.table[["jsd_bits", "cramers_v", "chi2_p"]].notna().all(axis=None)
    lift = domain_lift(counts, list("abcde"), n_boot=10)
    assert lift[["low", "high", "p_family"]].isna().all(axis=None)
    assert set(specialists(lift)["kind"]) <= {"undecided", "unused"}
    assert domain_test(counts, ["a"] * 5).verdict == "cannot be tested: there is only one domain"


@pytest.mark.parametrize(("n_prompts", "expected"), [(1, 1.0), (2, 1 / 945), (3, 1 / 1401400)])
def test_smallest_p_value_of_five_domains(n_prompts: int, expected: float) -> None:
    domains = nulls.Domains.of(np.repeat(list("abcde"), n_prompts))
    assert nulls.feasibility(domains).min_p == pytest.approx(expected)


def test_smallest_p_value_within_strata() -> None:
    """Two strata of a, b, each with 2 + 2: 6² ways to label, halved because a and b are interchangeable."""
    labels, strata = list("aabbaabb"), list("xxxxyyyy")
    assert nulls.feasibility(nulls.Domains.of(labels), strata).min_p == pytest.approx(1 / 18)
    bound = nulls.feasibility(nulls.Domains.of(list("aabb")), list("xxyy"))
    assert not bound.testable
    codes = nulls.permuted_codes(nulls.Domains.of(labels), 50, np.random.default_rng(0), strata)
    assert (codes[:, :4].sum(axis=1) == 2).all()
    assert len(np.unique(codes, axis=0)) > 10


def test_thousands_of_prompts_are_no_trouble() -> None:
    labels = np.repeat(list("ab"), 2000)
    assert nulls.feasibility(nulls.Domains.of(labels)).min_p == 0
    counts = np.random.default_rng(0).integers(0, 9, (4000, 1, 6)) + 1
    assert domain_test(counts, labels, n_permutations=19).min_p == 1 / 20


def test_permutation_p_is_exact_for_few_prompts() -> None:
    """GIVEN 2 domains × 3 prompts, completely apart THEN p tends to 2/20, the two arrangements as extreme."""
    counts = np.array([[9, 1], [90, 10], [9, 1], [1, 9], [1, 9], [10, 90]])
    found = domain_test(counts, list("aaabbb"), n_permutations=4999)
    assert found.table["p_value"][0] == pytest.approx(0.1, abs=0.015)
    assert found.min_p == pytest.approx(1 / 10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_order_of_prompts_and_names_of_domains_do_not_matter(seed: int) -> None:
    counts, labels = prompts(seed)
    mix = np.random.default_rng(seed).permutation(len(labels))
    renamed = np.array([{"d0": "z", "d1": "a", "d2": "m"}[d] for d in labels])
    drop = ["p_value", "q_value", "p_family", "dispersion_p", "dispersion_q", "jsd_null_mean", "jsd_null_q95"]
    tables = [
        domain_test(c, d, n_permutations=9).table.drop(columns=drop)
        for c, d in ((counts, labels), (counts[mix], labels[mix]), (counts, renamed))
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_unused_experts_do_not_matter(seed: int) -> None:
    counts, labels = prompts(seed)
    wide = np.concatenate((counts, np.zeros((*counts.shape[:2], 7), dtype=int)), axis=2)
    for statistic in ("welch", "jsd", "pseudo_f", "entropy"):
        few, many = (domain_test(c, labels, n_permutations=19, statistic=statistic) for c in (counts, wide))
        pd.testing.assert_frame_equal(few.table, many.table)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_a_layer_is_tested_the_same_beside_others(seed: int) -> None:
    counts, labels = prompts(seed, n_layers=3)
    both = domain_test(counts, labels, n_permutations=49).table
    alone = domain_test(counts[:, 1:2], labels, n_permutations=49).table
    assert both["p_value"][1] == alone["p_value"][0]
    assert both["jsd_high"][1] == pytest.approx(alone["jsd_high"][0])


def test_pseudo_f_is_anderson_s() -> None:
    """On Euclidean distances of single numbers pseudo-F is the F of one-way analysis of variance."""
    from scipy.stats import f_oneway

    rng = np.random.default_rng(3)
    x = rng.normal(size=15) + np.repeat([0, 0.5, 1], 5)
    codes = np.repeat([0, 1, 2], 5)[None, :]
    expected = f_oneway(x[:5], x[5:10], x[10:]).statistic
    assert pseudo_f((x[:, None] - x[None, :]) ** 2, codes, 3)[0] == pytest.approx(expected)
    counts, _ = prompts(4)
    found = jensen_shannon_distances(counts[:, 0])
    assert found[2, 7] == pytest.approx(jensenshannon(counts[2, 0], counts[7, 0], base=2) ** 2)


def test_two_experts_and_two_domains_are_tested_as_single_numbers_are() -> None:
    """Shares of two experts are one number: Welch's t, Student's t, and Levene's test of its distances from means."""
    from scipy.stats import levene, ttest_ind

    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 200, 16)
    counts = np.stack((rng.binomial(tokens, rng.uniform(0.2, 0.6, 16)), tokens), axis=1)
    counts[:, 1] -= counts[:, 0]
    codes = np.repeat([0, 1], [6, 10])[None, :]
    share = counts[:, 0] / tokens
    a, b = share[:6], share[6:]
    assert spread.welch(counts, codes, 2)[0] == pytest.approx(ttest_ind(a, b, equal_var=False).statistic ** 2)
    found = spread.gaps(counts, codes, 2, slice(None))[0]
    assert found[:, 0] == pytest.approx(np.array([1, -1]) * ttest_ind(a, b).statistic)
    assert found[:, 1] == pytest.approx(-found[:, 0])
    even = np.repeat([0, 1], 8)[None, :]
    assert spread.dispersion(counts, even, 2)[0] == pytest.approx(
        levene(share[:8], share[8:], center="mean").statistic
    )


def test_many_domains_are_compared_as_welch_s_analysis_of_variance_does() -> None:
    """W* of single numbers is Welch's F (1951), computed here from its textbook formula."""
    rng = np.random.default_rng(6)
    sizes = np.array([4, 7, 9])
    codes = np.repeat([0, 1, 2], sizes)
    share = rng.uniform(0.1, 0.9, 20) ** (codes + 1)
    counts = np.round(np.stack((share, 1 - share), axis=1) * 10**6).astype(int)
    x = counts[:, 0] / counts.sum(axis=1)
    mean, variance = (
        np.array([f(x[codes == d]) for d in range(3)]) for f in (np.mean, lambda v: v.var(ddof=1))
    )
    w = sizes / variance
    between = (w * (mean - (w * mean).sum() / w.sum()) ** 2).sum() / 2
    expected = between / (1 + 2 * 1 / 8 * ((1 - w / w.sum()) ** 2 / (sizes - 1)).sum())
    assert spread.welch(counts, codes[None, :], 3)[0] == pytest.approx(expected)


def test_benjamini_hochberg_leaves_unknown_p_values_out() -> None:
    q = nulls.benjamini_hochberg([0.01, np.nan, 0.04, 0.03])
    assert q[[0, 2, 3]] == pytest.approx([0.03, 0.04, 0.04])
    assert np.isnan(q[1])


def test_max_t_ignores_what_never_varies() -> None:
    null = np.random.default_rng(0).normal(size=(200, 3))
    null[0, 0] = 9
    null[:, 2] = 5.0
    p = nulls.max_t(null)
    assert p[0] == pytest.approx(1 / 200)
    assert p[2] == 1.0


def test_jackknife_of_a_mean_is_its_t_interval() -> None:
    from scipy.stats import t

    x = np.random.default_rng(1).normal(size=12)
    found = nulls.jackknife(x.mean(), (x.sum() - x) / 11)
    assert float(found.error) == pytest.approx(x.std(ddof=1) / np.sqrt(12))
    assert float(found.estimate) == pytest.approx(x.mean())
    assert float(found.high) == pytest.approx(x.mean() + t.ppf(0.975, 11) * x.std(ddof=1) / np.sqrt(12))


def test_lift_averages_one_over_domains_and_keeps_all_experts() -> None:
    counts, labels = prompts(5)
    counts[:, :, 3] = 0
    lift = domain_lift(counts, labels, n_boot=50, n_permutations=19)
    assert len(lift) == 2 * 3 * 12
    used = lift[lift["expert"] != 3]
    assert used.groupby(["layer", "expert"])["lift"].mean().to_numpy() == pytest.approx(1)
    assert lift.loc[lift["expert"] == 3, "lift"].isna().all()
    assert (used["low"] <= used["high"]).all()
    kinds = specialists(lift).set_index(["layer", "expert"])["kind"]
    assert (kinds.xs(3, level="expert") == "unused").all()


def test_misuse_is_explained() -> None:
    counts, labels = prompts(6)
    with pytest.raises(UsageError, match="no domain"):
        domain_test(counts, ["", *labels[1:]])
    with pytest.raises(UsageError, match="labels"):
        domain_test(counts, labels[:-1])
    with pytest.raises(UsageError, match="at least one pick"):
        domain_separation([[1, 2], [0, 0]])
