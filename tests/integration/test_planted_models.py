"""Planted models route as planted, in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import capture

import moetrace
from moetrace.errors import UsageError
from moetrace.model.file import ModelFile
from moetrace.synthetic import Planted, digit_tokens, distinct_tokens, write_planted
from moetrace.trace.trace import Trace

pytestmark = pytest.mark.runtime

Make = Callable[..., tuple[Planted, Trace]]


@pytest.fixture
def planted(runtime: Any, tmp_path: Path) -> Make:
    """``planted(prompts, n_predict, **what)``: the model and a trace of these prompts."""

    def make(prompts: list[dict[str, Any]], n_predict: int = 8, **what: Any) -> tuple[Planted, Trace]:
        model = write_planted(tmp_path / "m.gguf", **what)
        capture(model.path, tmp_path / "t.moet", prompts, "--all-outputs", "-n", str(n_predict))
        return model, moetrace.open(tmp_path / "t.moet")

    return make


def used(trace: Trace, layer: int, expert: int) -> np.ndarray:
    return (np.asarray(trace.experts)[:, layer] == expert).any(axis=1)


def test_experts_fire_on_their_tokens_and_circuits_close(planted: Make) -> None:
    digits = digit_tokens()
    model, trace = planted(
        distinct_tokens(8, 60),
        fires_on={(1, 3): digits},
        circuit=[(0, 2), (1, 5), (3, 7)],
        dead=[(2, 4), (0, 1)],
    )
    tokens = np.asarray(trace.token_ids)
    assert np.isin(tokens, digits).sum() > 5
    np.testing.assert_array_equal(used(trace, 1, 3), np.isin(tokens, digits))
    first = used(trace, 0, 2)
    np.testing.assert_array_equal(first, np.isin(tokens, model.fires_on[0, 2]))
    assert 0.2 < first.mean() < 0.4
    for link in model.circuit[1:]:
        np.testing.assert_array_equal(used(trace, *link), first)
    for layer in range(4):
        counts = np.bincount(np.asarray(trace.experts)[:, layer].ravel(), minlength=16)
        dead = [expert for where, expert in model.dead if where == layer]
        assert sorted(np.flatnonzero(counts == 0)) == dead


def test_routing_by_position_alone(planted: Make) -> None:
    _, trace = planted(distinct_tokens(6, 60, begin=True), by_position=True)
    experts, position = np.asarray(trace.experts), np.asarray(trace.positions)
    for here in np.unique(position):
        assert len(np.unique(experts[position == here].reshape((position == here).sum(), -1), axis=0)) == 1
    assert len(np.unique(experts[:, 0, 0])) > 8


def test_a_change_at_a_position(planted: Make) -> None:
    _, trace = planted(distinct_tokens(6, 20, begin=True), 30, phase_at=30)
    experts, position = np.asarray(trace.experts), np.asarray(trace.positions)
    np.testing.assert_array_equal((experts < 8).all(axis=(1, 2)), position < 30)
    np.testing.assert_array_equal((experts >= 8).all(axis=(1, 2)), position >= 30)


def test_twins_compute_the_same(tmp_path: Path) -> None:
    model = write_planted(tmp_path / "m.gguf", twins=[(1, 0, 8)])
    x = np.random.default_rng(0).standard_normal(128)
    with ModelFile(model.path) as file:
        gate, up, down = (file.tensor(f"blk.1.ffn_{name}_exps.weight") for name in ("gate", "up", "down"))

    def output(expert: int) -> np.ndarray:
        z = gate[expert] @ x
        return down[expert] @ (z / (1 + np.exp(-z)) * (up[expert] @ x))

    np.testing.assert_allclose(output(0), output(8), rtol=1e-5, atol=1e-5)
    assert not np.allclose(gate[0], gate[8])
    assert not np.allclose(output(0), output(1))


@pytest.mark.parametrize(
    "what",
    [
        {"dead": [(4, 0)]},
        {"dead": [(0, 1)], "fires_on": {(0, 1): [3]}},
        {"circuit": [(1, 0), (1, 2)]},
        {"by_position": True, "dead": [(0, 1)]},
        {"fires_on": {(0, e): [e] for e in range(14)}},
    ],
)
def test_what_cannot_be_planted_is_refused(what: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be planted"):
        write_planted(tmp_path / "m.gguf", **what)
