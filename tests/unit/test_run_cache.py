"""A cache in a run as it was: against a plain simulation, against slots, and against published curves."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import shared_data

import moetrace
from moetrace import _native
from moetrace.__main__ import main
from moetrace.analysis import RoutedText, from_trace
from moetrace.analysis.placement.cache import cache_hits
from moetrace.analysis.placement.run_cache import _worths, hot_experts, run_accesses, run_cache

SIZES = [3, 1, 4, 2, 5, 2]


def simulate(groups: list[list[int]], budget: int, sizes: list[int]) -> list[bool]:
    """LRU by bytes with a list: of a group what is held is used first, the rest fetched then."""
    held: list[int] = []  # least recently used first
    out: dict[tuple[int, int], bool] = {}
    for g, items in enumerate(groups):
        hits = [i for i in items if i in held]
        for i in items:
            out[g, i] = i in hits
        for i in hits:
            held.remove(i)
            held.append(i)
        for i in items:
            if i in hits or sizes[i] > budget:
                continue
            while sum(sizes[j] for j in held) + sizes[i] > budget:
                held.pop(0)
            held.append(i)
    return [out[g, i] for g, items in enumerate(groups) for i in items]


@given(
    groups=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1, max_size=25
    ),
    budget=st.integers(1, 17),
)
@settings(deadline=None, max_examples=150)
def test_hits_are_those_of_a_plain_simulation(groups: list[list[int]], budget: int) -> None:
    items = np.array([i for g in groups for i in g], np.int64)
    number = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    hits = _native.budget_hits(
        items.astype(np.int32),
        _worths(items, number, "lru", 6),
        number,
        np.array(SIZES, np.int64),
        np.array([budget], np.int64),
    )
    assert hits[0].tolist() == simulate(groups, budget, SIZES)


@pytest.mark.parametrize("policy", ["lru", "lfu", "oracle"])
def test_groups_of_one_and_equal_sizes_are_a_cache_of_slots(policy: str) -> None:
    stream = np.random.default_rng(0).integers(0, 20, 3000) ** 2 // 20
    slots = [1, 5, 11, 19]
    ours = _native.budget_hits(
        stream.astype(np.int32),
        _worths(stream, np.arange(stream.size), policy, 20),  # type: ignore[arg-type]
        np.arange(stream.size),
        np.full(20, 7),
        np.array(slots) * 7,
    )
    np.testing.assert_array_equal(ours, cache_hits([stream], 20, policy, slots)[:, 0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"items": [9]}, {"items": [-1]}, {"worth": [[-1], [0]]}, {"worth": [[1, 2], [1, 2]]}, {"sizes": [0, 1]},
        {"items": [0, 1], "worth": [[0, 0], [1, 1]], "groups": [0, 0]},
    ],
)  # fmt: skip
def test_the_kernel_refuses_what_makes_no_sense(wrong: dict[str, object]) -> None:
    given_: dict[str, object] = {
        "items": [0],
        "worth": [[0], [0]],
        "groups": [0],
        "sizes": [1, 1],
        "budgets": [1],
    } | wrong
    arrays = {k: np.array(v, np.int32 if k == "items" else np.int64) for k, v in given_.items()}
    with pytest.raises(ValueError, match=r"."):
        _native.budget_hits(**arrays)


def text_of(experts: npt.NDArray[np.int64], starts: list[int], n_expert: int = 8) -> RoutedText:
    return RoutedText(experts.astype(np.uint8), np.array(starts), n_expert)


def test_what_is_computed_together_is_needed_once() -> None:
    """Two prompts whose tokens were computed in turns: the run's order, not theirs, and a ubatch's experts once."""
    experts = np.array([[[0, 1]], [[1, 2]], [[3, 255]], [[0, 1]], [[2, 0]]])
    item, group, ubatch = run_accesses(text_of(experts, [0, 3, 5]), [0, 0, 2, 1, 2])
    assert item.tolist() == [0, 1, 2, 0, 1, 3, 2, 0]
    assert ubatch.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert group.tolist() == ubatch.tolist()
    table = run_cache(text_of(experts, [0, 3, 5]), [0, 0, 2, 1, 2], [2, 8], policies=["lru"])
    assert table["needed"].tolist() == [8, 8]
    assert table["hit_rate"].tolist() == [
        2 / 8,
        4 / 8,
    ]  # with room for two expert 1 is still there, and then 0
    assert table["hit_rate_single"].tolist() == [0.5, 1.0]  # of ubatch 1 alone
    assert table["fetched"].tolist() == [6 / 5, 4 / 5]


@pytest.mark.parametrize(
    ("name", "budget", "published"), [("gptoss", 3000, 32.4), ("qwen", 4000, 74.9), ("gemma", 4000, 76.8)]
)
def test_the_published_hit_rates_are_met(name: str, budget: int, published: float, tmp_path: Path) -> None:
    """And the whole published curves of LRU, to a tenth of a percent; exactly 0 where a token does not fit."""
    path = shared_data(f"routing/bigmoeonedge/{name}.route.csv")
    with shared_data(f"routing/bigmoeonedge/{name}-curve.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["policy"] == "lru"]
    with moetrace.open(path) as trace:
        text = from_trace(trace, phase="all").text
        budgets = [int(float(row["budget_mib"]) * 2**20) for row in curve]
        table = run_cache(
            text, trace.step[text.rows], budgets, policies=["lru"], expert_bytes=trace.facts["expert_bytes"]
        ).set_index("budget")
    for row, size in zip(curve, budgets, strict=True):
        ours = table.loc[size]
        assert 100 * ours["hit_rate"] == pytest.approx(float(row["hit_pct_cum"]), abs=0.1)
        assert 100 * ours["hit_rate_single"] == pytest.approx(float(row["hit_pct_decode"]), abs=0.1)
        assert ours["fetched_bytes"] * len(text) / 2**20 == pytest.approx(float(row["read_mib"]), rel=0.002)
        assert (float(row["hit_pct_cum"]) == 0) == (ours["hit_rate"] == 0)
    assert round(100 * table.loc[budget << 20, "hit_rate"], 1) == published


def test_one_prompt_is_answered_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "one.npy", np.argsort(rng.random((50, 3, 8)), axis=2)[:, :, :2].astype(np.int32))
    path = str(tmp_path / "one.npy")
    assert main(["analyze", "expert-cache", path, "-o", str(tmp_path / "o"), "--budgets", "6,12"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "one budget for all layers of 6 experts (25% of all experts)" in out
    assert "There is one prompt" in out
    assert (tmp_path / "o" / "figures" / "expert-cache-run.png").is_file()


def test_the_hot_set_is_named() -> None:
    experts = np.array([[[0, 1]]] * 8 + [[[2, 3]]] * 2)
    (row,) = hot_experts(text_of(experts, [0, 10])).to_dict("records")
    assert (row["experts"], row["hottest"], row["served"], row["even"]) == (2, "0 1", 0.8, 7)
