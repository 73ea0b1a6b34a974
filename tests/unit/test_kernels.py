"""The loops in C++ against what plain numpy gives."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace import _native
from moetrace.analysis.counts.counting import member_words
from moetrace.analysis.counts.routed import membership
from moetrace.analysis.statistics.information import entropy_bits, shares

ABSENT = np.uint16(np.iinfo(np.uint16).max)


def routing(rng: np.random.Generator, n: int, k: int, n_expert: int, absent: float = 0.1) -> Any:
    """(n, k) different experts, some of them absent."""
    ids = np.argsort(rng.random((n, n_expert)), axis=1)[:, :k].astype(np.uint16)
    ids[rng.random((n, k)) < absent] = ABSENT
    return ids


def orders(rng: np.random.Generator, n_draws: int, n: int) -> Any:
    """Orders of rows, some taken twice."""
    return np.concatenate(
        [
            np.arange(n)[None],
            rng.permuted(np.tile(np.arange(n), (n_draws, 1)), axis=1),
            rng.integers(0, n, (1, n)),
        ]
    ).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 60), n_kinds=st.integers(1, 5), threads=st.integers(1, 3))
def test_kinds(seed: int, n: int, n_kinds: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    ids, order = routing(rng, n, 3, 8), orders(rng, 4, n)
    member = rng.random((n_kinds, n)) < 0.4
    kind, row = (x.astype(np.int32) for x in np.nonzero(member))
    counts = _native.kind_counts(kind, row, ids, order, n_kinds, 8, threads)
    uses = membership(ids, 8)
    np.testing.assert_array_equal(counts, [member.astype(float) @ uses[one] for one in order])

    prompt = np.sort(rng.integers(0, 4, n))
    expected = rng.random((n_kinds, 4, 8))
    total, squares = _native.kind_moments(
        kind, row, prompt[row].astype(np.int32), ids, order, expected, threads
    )
    for draw, one in enumerate(order):
        met = np.stack([(member & (prompt == p)).astype(float) @ uses[one] for p in range(4)], axis=1)
        np.testing.assert_array_equal(total[draw], met.sum(axis=1))
        np.testing.assert_allclose(
            squares[draw] + (expected**2).sum(axis=1), ((met - expected) ** 2).sum(axis=1), atol=1e-9
        )

    groups, values = rng.integers(0, 3, (5, n)).astype(np.int32), rng.normal(size=(n, 6))
    sums = _native.group_sums(groups, values, 3, threads)
    want = [[values[one == g].sum(axis=0) for g in range(3)] for one in groups]
    np.testing.assert_allclose(sums, want, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 600),
    threads=st.integers(1, 3),
    e=st.sampled_from([6, 40, 70]),  # many experts are counted in another way
    twice=st.booleans(),
)
def test_pairs(seed: int, n: int, threads: int, e: int, twice: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b, order = routing(rng, n, 3, e), routing(rng, n, 2, e), orders(rng, 5, n)
    if twice:  # as no router does
        b[:, 1] = b[:, 0]
    first_a, first_b = rng.integers(0, e, (2, n))
    expected, score = rng.random((e, e)) * n / 8, rng.normal(size=(e, e))
    spread, eligible = 0.5 + rng.random((e, e)), rng.random((e, e)) < 0.7
    reached, largest, bits = _native.pair_draws(
        a, b, first_a, first_b, order, expected, spread, score, eligible, threads
    )
    uses_a, uses_b = ((ids[:, :, None] == np.arange(e)).sum(axis=1).astype(float) for ids in (a, b))
    z = np.array([(uses_a.T @ uses_b[one] - expected) / spread for one in order])
    z[:, ~eligible] = -np.inf
    np.testing.assert_array_equal(reached, ((z >= score - 1e-9) & eligible).sum(axis=0))
    np.testing.assert_allclose(largest, z.max(axis=(1, 2)))
    together = [np.bincount(first_a * e + first_b[one], minlength=e**2) for one in order]
    np.testing.assert_allclose(bits, [entropy_bits(shares(t.astype(float))) for t in together], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 60), width=st.integers(2, 12), threads=st.integers(1, 3))
def test_splits(seed: int, n: int, width: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    experts = np.stack([routing(rng, n, 3, 8) for _ in range(2)])
    step = np.sort(rng.integers(0, width, n))
    order = orders(rng, 3, n)
    begin = np.searchsorted(step, np.arange(width + 1))
    bits = _native.split_divergence(experts, order, begin, 8, threads)
    for draw, one in enumerate(order):
        for t in range(width - 1):
            each = []
            for layer in range(2):
                uses = membership(experts[layer, one], 8)
                parts = uses[step <= t].sum(axis=0), uses[step > t].sum(axis=0)
                sizes = [float(p.sum()) for p in parts]
                inner = sum(
                    s * float(entropy_bits(shares(p))) for s, p in zip(sizes, parts, strict=True) if s
                )
                whole = float(entropy_bits(shares(parts[0] + parts[1]))) if sum(sizes) else 0.0
                each.append(whole - inner / sum(sizes) if all(sizes) else 0.0)
            np.testing.assert_allclose(bits[draw, t], np.mean(each), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(4, 60), n_expert=st.sampled_from([5, 70]))
def test_lags(seed: int, n: int, n_expert: int) -> None:
    rng = np.random.default_rng(seed)
    experts = np.stack([routing(rng, n, 3, n_expert) for _ in range(2)], axis=1)
    lags, order = np.array([1, 3]), orders(rng, 3, n)
    together = rng.random((2, n)) < 0.8
    words = np.stack(member_words(experts, n_expert)).astype(np.uint64)
    first = np.ascontiguousarray(experts[:, :, 0].T)
    pairs, same, shared = _native.lag_agreement(words, first, lags, together, order, n_expert)
    for draw, one in enumerate(order):
        for layer in range(2):
            top, uses = experts[one, layer, 0], membership(experts[one, layer], n_expert)
            for g, lag in enumerate(lags):
                both = together[g, lag:] & (top[lag:] < n_expert) & (top[:-lag] < n_expert)
                assert pairs[draw, layer, g] == both.sum()
                assert same[draw, layer, g] == (both & (top[lag:] == top[:-lag])).sum()
                assert shared[draw, layer, g] == ((uses[lag:] * uses[:-lag]).sum(axis=1) * both).sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 300), n_expert=st.integers(1, 40), single=st.booleans())
def test_tops(seed: int, n: int, n_expert: int, single: bool) -> None:
    """Many scores are equal: then the lower id is better."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (n, n_expert)).astype(np.float32 if single else np.float64)
    picks = np.argsort(rng.random((n, n_expert + 2)), axis=1)[:, :3].astype(np.uint16)  # two of them are none
    used = membership(picks, n_expert)
    sizes = np.unique(rng.integers(1, n_expert + 1, 3))
    scores[rng.random(scores.shape) < 0.1] = np.nan
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")
    want = np.cumsum(np.take_along_axis(used, order, axis=1), axis=1)[:, sizes - 1]
    np.testing.assert_array_equal(_native.top_hits(scores, picks, sizes), want)
    # each size as a layer, and scores of which few are equal beside them
    apart = scores + rng.random(scores.shape).astype(scores.dtype) / 2
    layers = np.stack([scores.T] * sizes.size + [apart.T] * sizes.size).astype(np.float32)
    got = _native.layer_hits(layers, np.stack([picks] * len(layers)), np.tile(sizes, 2))
    np.testing.assert_array_equal(got[: sizes.size], want.sum(axis=0))
    few_equal = _native.top_hits(apart.astype(np.float32), picks, sizes).sum(axis=0)
    np.testing.assert_array_equal(got[sizes.size :], few_equal)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), n=st.integers(0, 200), n_expert=st.integers(1, 20), n_groups=st.integers(1, 4)
)
def test_pick_sums(seed: int, n: int, n_expert: int, n_groups: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.integers(-4, 5, (n, 11)).astype(np.float32)
    picks = rng.integers(0, n_expert + 2, (3, n, 2)).astype(np.uint16)
    picks[:, :, 1] = np.where(picks[:, :, 1] == picks[:, :, 0], n_expert + 9, picks[:, :, 1])
    group = rng.integers(0, n_groups, n).astype(np.int32)
    got = _native.pick_sums(features, picks, group, n_groups, n_expert)
    for g in range(n_groups):
        uses = membership(picks[:, group == g], n_expert)
        np.testing.assert_array_equal(got[g], np.einsum("lne,nf->lef", uses, features[group == g]))


i32 = np.int32


@pytest.mark.parametrize(
    "call",
    [
        lambda: _native.kind_counts(i32([3]), i32([0]), np.zeros((2, 1), "u2"), i32([[0, 1]]), 3, 4),
        lambda: _native.kind_counts(i32([0]), i32([2]), np.zeros((2, 1), "u2"), i32([[0, 1]]), 3, 4),
        lambda: _native.kind_counts(i32([0]), i32([0]), np.zeros((2, 1), "u2"), i32([[0, 2]]), 3, 4),
        lambda: _native.kind_counts(i32([0]), i32([0]), np.zeros((2, 1), "u2"), i32([[0]]), 3, 4),
        lambda: _native.kind_moments(
            i32([1, 0]), i32([0, 0]), i32([0, 0]), np.zeros((2, 1), "u2"), i32([[0, 1]]), np.zeros((2, 1, 4))
        ),
        lambda: _native.group_sums(i32([[0, 1]]), np.zeros((2, 2)), 1),
        lambda: _native.split_divergence(np.zeros((2, 1, 1), "u2"), i32([[0, 1]]), np.array([0, 1]), 4),
        lambda: _native.pair_draws(
            np.zeros((2, 1), "u2"),
            np.zeros((2, 1), "u2"),
            np.array([0, 4]),
            np.array([0, 0]),
            i32([[0, 1]]),
            np.zeros((4, 4)),
            np.ones((4, 4)),
            np.zeros((4, 4)),
            np.ones((4, 4), bool),
        ),
        lambda: _native.top_hits(np.zeros((1, 4)), np.zeros((2, 1), "u2"), np.array([1])),
        lambda: _native.layer_hits(np.zeros((1, 4, 3), "f4"), np.zeros((1, 4, 1), "u2"), np.array([1])),
        lambda: _native.layer_hits(np.zeros((1, 4, 3), "f4"), np.zeros((1, 3, 1), "u2"), np.array([1, 1])),
        lambda: _native.pick_sums(np.zeros((1, 4), "f4"), np.zeros((1, 1, 1), "u2"), i32([2]), 2, 4),
        lambda: _native.cache_hits(i32([[4]]), np.zeros((1, 1), "i8"), np.array([1]), 4),
        lambda: _native.cache_hits(i32([[0]]), np.zeros((1, 1), "i8"), np.array([0]), 4),
        lambda: _native.lag_agreement(
            np.zeros((1, 1, 2), "u8"),
            np.zeros((1, 2), "u2"),
            np.array([2]),
            np.ones((1, 2), bool),
            i32([[0, 1]]),
            4,
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any]) -> None:
    """Rather than read or written beyond the end of an array."""
    with pytest.raises(ValueError, match=r"."):
        call()


def test_forked_processes_share_how_many_threads_loops_take() -> None:
    """So the last of many questions gets the cores that the others have left."""
    before = _native.set_default_threads(1)
    try:
        process = multiprocessing.get_context("fork").Process(target=_native.set_default_threads, args=(3,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        process.join()
        assert _native.set_default_threads(before) == 3
    finally:
        _native.set_default_threads(before)
