"""Pairs of experts: how often they are called surprising where nothing but rates, or texts, decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bounds import RUNS
from scipy import stats
from simulate import World

import moetrace.analysis as m

#: prompts that differ; tokens that remember
WORLD = World(n_domains=1, n_prompts=24, n_layers=2, n_expert=16, n_expert_used=3)


def false_discoveries(world: World, runs: int) -> dict[str, int]:
    """In how many recordings any pair passed, against rates alone and against the same texts."""
    found = {"": 0, "text_": 0}
    for run in range(runs):
        drawn = world.trace(seed=run)
        starts = np.append(0, np.cumsum(np.bincount(drawn.request)))
        table = m.co_occurrence(m.RoutedText(drawn.experts, starts, world.n_expert)).layers
        for which in found:
            found[which] += bool(table[[f"{which}more", f"{which}fewer"]].to_numpy().any())
    return found


def at_most(hits: int, runs: int, rate: float = 0.05) -> bool:
    """Whether so many hits are no surprise at this rate."""
    return bool(stats.binomtest(hits, runs, rate, alternative="greater").pvalue > 1e-3)


def test_no_pair_is_surprising_where_rates_decide() -> None:
    found = false_discoveries(replace(WORLD, prompt_sd=0.0), RUNS)
    assert at_most(found[""], RUNS), found
    assert at_most(found["text_"], RUNS), found


def test_no_pair_is_surprising_in_its_texts_where_texts_differ() -> None:
    found = false_discoveries(WORLD, RUNS)
    assert at_most(found["text_"], RUNS), found


@pytest.mark.slow
@pytest.mark.parametrize("prompt_sd", [0.0, 0.5])
@pytest.mark.parametrize("n_prompts", [6, 24, 80])
def test_in_full(prompt_sd: float, n_prompts: int) -> None:
    """1000 recordings each: at most 5 % with a false discovery."""
    found = false_discoveries(replace(WORLD, prompt_sd=prompt_sd, n_prompts=n_prompts), 1000)
    assert at_most(found["text_"], 1000), found
    assert prompt_sd or at_most(found[""], 1000), found
