"""Which layers' experts get more bits: the choice against all choices, energies against a slow sum."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moetrace import data
from moetrace.__main__ import main
from moetrace.analysis import RoutedText
from moetrace.analysis.experts.bits import allocate, expert_energy
from moetrace.commands.demo import unpack
from moetrace.errors import UsageError
from moetrace.host.quantize import block_of, type_lines

Floats = NDArray[np.float64]


def total(values: Floats, plan: NDArray[np.int64]) -> float:
    return float(values[np.arange(len(plan)), plan].sum())


@pytest.mark.parametrize("seed", range(20))
def test_what_is_missed_of_the_best_choice_is_less_than_a_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_bytes = np.sort(rng.integers(10, 100, (6, 4)), axis=1).astype(np.float64)
    cost = -np.sort(-rng.random((6, 4)), axis=1) * rng.lognormal(0, 1.5, (6, 1))
    budget = float(rng.uniform(n_bytes[:, 0].sum(), n_bytes[:, -1].sum()))
    plan = allocate(n_bytes, cost, budget)
    assert total(n_bytes, plan) <= budget
    every = [np.array(choice) for choice in itertools.product(range(4), repeat=6)]
    best = min(total(cost, choice) for choice in every if total(n_bytes, choice) <= budget)
    step = float((cost[:, :1] - cost[:, -1:]).max())
    assert best - 1e-12 <= total(cost, plan) <= best + step
    # with all the bytes that it could use, it is the best
    np.testing.assert_allclose(total(cost, allocate(n_bytes, cost, 1e9)), cost.min(axis=1).sum())


def test_what_costs_more_for_more_bytes_is_never_chosen() -> None:
    n_bytes, cost = np.array([[1.0, 2.0, 3.0]] * 2), np.array([[3.0, 5.0, 1.0]] * 2)
    assert allocate(n_bytes, cost, 6).tolist() == [2, 2]
    assert allocate(n_bytes, cost, 4).tolist() in ([2, 0], [0, 2])
    assert allocate(n_bytes[:, ::-1], cost[:, ::-1], 6).tolist() == [0, 0]
    with pytest.raises(UsageError, match="not even the smallest"):
        allocate(n_bytes, cost, 1.5)


def test_more_important_layers_get_more() -> None:
    n_bytes = np.tile([1.0, 2.0, 4.0], (5, 1))
    weight = np.array([1.0, 30.0, 1.0, 300.0, 1.0])
    plan = allocate(n_bytes, weight[:, None] * np.array([1.0, 0.25, 0.01]), 12)
    assert plan[3] == plan.max() > plan[0]
    assert plan[1] >= plan[0]


def test_energy_is_what_a_slow_sum_gives() -> None:
    rng = np.random.default_rng(0)
    m, n_layer, n_expert, k = 60, 3, 8, 2
    experts = np.argsort(rng.random((m, n_layer, n_expert)), axis=2)[:, :, :k].astype(np.uint8)
    weights = rng.random((m, n_layer, k)).astype(np.float32)
    norms = [rng.lognormal(0, 1, (m, k)).astype(np.float32) for _ in range(n_layer)]
    norms[1][7] = np.nan  # not known: has no part
    text = RoutedText(experts, np.arange(0, m + 1, 10), n_expert, weights)
    found = expert_energy(text, norms)
    for i in range(n_layer):
        per_token, of = [], dict.fromkeys(range(n_expert), 0.0)
        for t in range(m):
            made = [(float(weights[t, i, j]) * float(norms[i][t, j])) ** 2 for j in range(k)]
            if made[0] == made[0]:
                per_token.append(sum(made))
                for j in range(k):
                    of[int(experts[t, i, j])] += made[j]
        assert found["energy"][i] == pytest.approx(np.mean(per_token))
        assert found["tokens"][i] == len(per_token) == m - (i == 1)
        assert found["energy_low"][i] < found["energy"][i] < found["energy_high"][i]
        np.testing.assert_allclose(found["by_expert"][i], np.array(list(of.values())) / sum(of.values()))
    within = [norm * weights[:, i] for i, norm in enumerate(norms)]
    np.testing.assert_allclose(
        expert_energy(text, within, weighed=True)["energy"], found["energy"], rtol=1e-6
    )
    with pytest.raises(UsageError, match="layer 0"):
        expert_energy(text, [np.full((m, k), np.nan, np.float32)] * n_layer)


def test_lines_match_their_tensor_alone() -> None:
    names = ["blk.1.ffn_up_exps.weight", "blk.11.ffn_up_exps.weight"]
    patterns = [line.split("=")[0] for line in type_lines(dict.fromkeys(names, "q4_k")).splitlines()]
    assert [[bool(re.search(p, name)) for name in names] for p in patterns] == [[True, False], [False, True]]
    assert block_of("q4_k") == (256, 144)
    with pytest.raises(UsageError, match="q9"):
        block_of("q9")


def test_it_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(unpack(data.recorded_demo(), tmp_path))
    line = ["bits", trace, "-m", str(data.demo_model())]
    assert main(line) == 2
    assert "--capture experts,weights,outputs" in capsys.readouterr().err
    assert main([*line, "--by", "magic"]) == 2
    assert "choose among: share, kl, random" in capsys.readouterr().err
