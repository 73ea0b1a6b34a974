"""Counting: kernels against definitions, and the laws that counts obey."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import count_slowly, random_rows

from moetrace.analysis import (
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
    reading_order,
)
from moetrace.analysis.counts import counting
from moetrace.analysis.counts.counting import last_rows
from moetrace.errors import UsageError

SIZES = [(32, 4), (8, 2), (33, 3), (64, 8), (65, 5), (100, 1), (255, 4), (256, 8), (300, 6)]


def same(a: RoutingCounts, b: RoutingCounts) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(a.to_arrays().values(), b.to_arrays().values(), strict=True)
    )


def same_tokens(a: TokenCounts, b: TokenCounts) -> bool:
    for f in dataclasses.fields(a):
        if f.name in ("occurrences", "layer_class"):
            continue
        if not np.array_equal(getattr(a, f.name), getattr(b, f.name)):
            return False
    return all(
        (a.occurrences[x] != b.occurrences[y]).nnz == 0
        for x, y in zip(a.layer_class, b.layer_class, strict=True)
    )


def routing(rows: dict[str, Any], **more: Any) -> RoutingCounts:
    names = ("experts", "request", "position", "n_expert", "state")
    return count_routing(**{n: rows[n] for n in names}, **more)


@pytest.mark.parametrize(("n_expert", "k"), SIZES)
@pytest.mark.parametrize("absent", [False, True])
def test_counts_are_what_their_definitions_say(n_expert: int, k: int, absent: bool) -> None:
    rows = random_rows(n_expert, n_expert=n_expert, k=k)
    if not absent:
        rows["state"][:] = 1
    expected = count_slowly(
        rows["experts"], rows["request"], rows["position"], n_expert, rows["state"], max_lag=7
    )
    assert expected["lag_pairs"].sum() > 100
    found = routing(rows, max_lag=7)
    for name, value in expected.items():
        assert np.array_equal(getattr(found, name), value), name


def test_chunk_borders_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(1, n=900, n_requests=4)
    whole = routing(rows)
    original = counting._chunks

    def small(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "cells": 1})  # the least size: 64 rows

    monkeypatch.setattr(counting, "_chunks", small)
    assert same(whole, routing(rows))


@pytest.mark.parametrize("threads", [2, 3, 50])
def test_threads_do_not_show(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_PER_THREAD", 1)
    rows = random_rows(1, n=900, n_requests=9)
    done = []
    found = routing(rows, threads=threads, progress=lambda n, total: done.append((n, total)))
    assert same(found, routing(rows))
    assert done[-1] == ((rows["request"] >= 0).sum(),) * 2


def test_memory_mapped_columns_are_read_in_place(tmp_path: Path) -> None:
    rows = random_rows(2)
    np.save(tmp_path / "experts.npy", rows["experts"])
    np.save(tmp_path / "state.npy", rows["state"])
    mapped = {
        **rows,
        "experts": np.load(tmp_path / "experts.npy", mmap_mode="r"),
        "state": np.load(tmp_path / "state.npy", mmap_mode="r"),
    }
    assert same(routing(rows), routing(mapped))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_counts_of_parts_add_up_to_the_whole(seed: int, cut: int) -> None:
    """GIVEN requests handed out to two traces WHEN counts are added THEN nothing differs from one trace."""
    rows = random_rows(seed)
    first = rows["request"] < cut

    def part(mask: Any) -> dict[str, Any]:
        return {n: v[mask] if isinstance(v, np.ndarray) else v for n, v in rows.items()}

    assert same(routing(rows), routing(part(first)) + routing(part(~first)))
    given_names = ("experts", "token", "request", "position", "n_expert", "state")
    whole, a, b = (count_tokens(**{n: p[n] for n in given_names}) for p in (rows, part(first), part(~first)))
    assert same_tokens(whole, a + b)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_interleaving_of_requests_does_not_matter(seed: int) -> None:
    rows = random_rows(seed)
    by_request = np.argsort(rows["request"], kind="stable")
    sorted_rows = {n: v[by_request] if isinstance(v, np.ndarray) else v for n, v in rows.items()}
    assert same(routing(rows), routing(sorted_rows))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_unused_experts_add_empty_columns_only(seed: int, more: int) -> None:
    rows = random_rows(seed, n_expert=20)
    few, many = routing(rows), routing({**rows, "n_expert": 20 + more})
    assert np.array_equal(few.included, many.included[:, :, :20])
    assert not many.included[:, :, 20:].any()
    assert np.array_equal(few.transitions, many.transitions[:, :20, :20])
    for name in ("tokens", "lag_pairs", "lag_shared", "lag_top1"):
        assert np.array_equal(getattr(few, name), getattr(many, name))


def test_requests_of_one_name_are_one_prompt() -> None:
    rows = random_rows(3, n_requests=4)
    apart = routing(rows, labels=["a", "b", "a", "b"])
    together = routing(rows, prompts=["p", "q", "p", "q"], labels=["a", "b", "a", "b"])
    assert together.prompts.tolist() == ["p", "q"]
    assert np.array_equal(together.included[0], apart.included[0] + apart.included[2])
    assert np.array_equal(together.lag_pairs[1], apart.lag_pairs[1] + apart.lag_pairs[3])
    with pytest.raises(UsageError, match="two domains"):
        routing(rows, prompts=["p", "q", "p", "q"], labels=["a", "b", "b", "b"])


def test_weights_decide_the_first_expert() -> None:
    rows = random_rows(4)
    rows["state"][:] = 1
    weights = np.random.default_rng(0).random(rows["experts"].shape).astype(np.float32)
    order = np.argsort(-weights, axis=2)
    ranked = {**rows, "experts": np.take_along_axis(rows["experts"], order, axis=2)}
    assert same(routing(rows, weights=weights), routing(ranked))
    assert not same(routing(rows, weights=weights), routing(rows))


def test_drafts_that_were_rejected_are_not_text() -> None:
    """GIVEN positions 0 1 2 3 2 3 (two drafts thrown away) THEN the text is rows 0 1 4 5, unbroken."""
    order = reading_order(np.zeros(6, int), [0, 1, 2, 3, 2, 3])
    assert order.rows.tolist() == [0, 1, 4, 5]
    assert order.run_starts.tolist() == [0, 4]


def test_a_context_shift_rejects_nothing_and_breaks_the_run() -> None:
    order = reading_order(np.zeros(6, int), [0, 1, 2, 3, 2, 3], shifted=[0])
    assert order.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert order.run_starts.tolist() == [0, 4, 6]


def test_tokens_computed_again_are_text_once() -> None:
    """GIVEN a hybrid model's rows: 5 6 7 drafted, memory restored, 5 6 again, then 8 THEN each position stands once."""
    order = reading_order(np.zeros(7, int), [4, 5, 6, 7, 5, 6, 7])
    assert order.rows.tolist() == [0, 4, 5, 6]
    assert order.run_starts.tolist() == [0, 4]


def test_the_last_rows_of_some_requests() -> None:
    request = [3, 5, 3, 5, 5, -1, 3, 7]
    found = last_rows(request, [3, 5, 7, 9], [3, 3, 2, 1], [2, 0, 1, 1])
    assert np.flatnonzero(found).tolist() == [2, 6]  # of 7 only one of two rows is here
    assert not last_rows([], [3], [1], [1]).any()


def test_unrecorded_positions_follow_each_other() -> None:
    order = reading_order([1, 0, 1, 0], [-1, -1, -1, -1])
    assert order.rows.tolist() == [1, 3, 0, 2]
    assert order.run_starts.tolist() == [0, 2, 4]


def test_rejection_is_judged_before_rows_are_chosen() -> None:
    keep = np.array([True, True, True, False])
    assert reading_order(np.zeros(4, int), [0, 1, 2, 1], keep).rows.tolist() == [0]


def test_no_row_gives_empty_counts() -> None:
    rows = random_rows(5)
    empty = routing(rows, keep=np.zeros(150, bool))
    assert empty.prompts.size == 0
    assert empty.included.shape == (0, 3, 32)
    assert same(routing(rows) + empty, routing(rows))


def test_counts_survive_a_file(tmp_path: Path) -> None:
    found = routing(random_rows(6), labels=["x"] * 6)
    np.savez(tmp_path / "counts.npz", **found.to_arrays())
    with np.load(tmp_path / "counts.npz") as arrays:
        assert same(found, RoutingCounts.from_arrays(arrays))
    with pytest.raises(UsageError, match="missing"):
        RoutingCounts.from_arrays({"prompts": found.prompts})


def test_counts_of_different_models_do_not_add() -> None:
    with pytest.raises(UsageError, match="do not add"):
        routing(random_rows(0)) + routing(random_rows(0, n_expert=16))
    with pytest.raises(UsageError, match="do not add"):
        routing(random_rows(0)) + routing(random_rows(0, n_layers=2))


def test_token_counts_are_what_their_definitions_say() -> None:
    rows = random_rows(7)
    rows["state"][:, :2] = 1  # two classes of layers
    found = count_tokens(
        rows["experts"],
        rows["token"],
        rows["request"],
        rows["position"],
        n_expert=32,
        state=rows["state"],
    )
    assert len(found.occurrences) == 2
    used = rows["request"] >= 0
    for x, token in enumerate(found.tokens):
        for layer in range(3):
            there = used & (rows["token"] == token) & (rows["state"][:, layer] == 1)
            expected = np.bincount(rows["experts"][there, layer].reshape(-1), minlength=32)
            assert np.array_equal(found.token_included[x, layer], expected)
            n = found.occurrences[found.layer_class[layer]].toarray()[:, x]
            expected_n = [(there & (rows["request"] == int(p))).sum() for p in found.prompts]
            assert n.tolist() == expected_n
    assert np.array_equal(found.prompt_included, routing(rows).included)


def test_frequent_tokens_need_two_requests() -> None:
    token = np.array([5, 5, 5, 7, 7, 9, 9])
    request = np.array([0, 0, 0, 0, 1, 1, 0])
    assert frequent_tokens(token, request, 5).tolist() == [7, 9]
    assert frequent_tokens(token, request, 1).tolist() == [7]
