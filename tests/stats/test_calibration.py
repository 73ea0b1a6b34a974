"""Tests reject as often as they say, intervals cover as often as they say, planted effects are found.

The figures for the documentation come from ``python tests/stats/calibration.py``.
"""

from __future__ import annotations

import pandas as pd
import pytest
from calibration import SMALL, UNSOUND, calibrate, planted
from scipy import stats


@pytest.fixture(scope="module")
def quick() -> pd.DataFrame:
    return calibrate(100, SMALL, n_permutations=99).set_index("test")


def test_published_chi_square_rejects_almost_always(quick: pd.DataFrame) -> None:
    assert quick.loc["published chi-square", "rejected"] > 0.95
    assert quick.loc["jsd at unequal words", "rejected"] > 0.5


@pytest.mark.parametrize("name", [n for n in calibrate.__globals__["TESTS"] if n not in UNSOUND])
def test_sound_tests_reject_in_five_percent_of_null_runs(quick: pd.DataFrame, name: str) -> None:
    """100 runs: as many rejections as 5 % gives in 99.9 % of such tables."""
    n, share = int(quick.loc[name, "n"]), quick.loc[name, "rejected"]
    low, high = stats.binom.interval(0.999, n, 0.05)
    assert low <= round(share * n) <= high


def test_planted_effects_are_found_and_intervals_hold() -> None:
    found = planted(12, 0.4, n_permutations=99).set_index("figure")
    n, share = found["n"], found["share"]
    assert share["power: domain_test jsd"] == 1
    assert share["power: domain_test pseudo_f"] == 1
    assert share["power: matched_separation"] == 1
    assert share["right sign: specialists"] > 0.98
    assert n["right sign: specialists"] > 100
    for name in share.index[share.index.str.startswith("coverage")]:
        assert share[name] > 0.85, name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_calibration_in_full() -> None:
    """500 runs: every sound test within 5 ± 1.5 %."""
    table = calibrate(500).set_index("test")
    assert table.loc["published chi-square", "rejected"] > 0.99
    sound = table.drop(index=list(UNSOUND))
    assert sound["rejected"].between(0.035, 0.065).all(), sound


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_planted_effects_in_full() -> None:
    for strength, power in ((0.15, 0.7), (0.4, 0.99)):
        share = planted(100, strength).set_index("figure")["share"]
        assert share["power: domain_test jsd"] > power
        assert share["right sign: specialists"] > 0.98
        coverage = share[share.index.str.startswith("coverage")]
        assert coverage.between(0.92, 1.0).all(), coverage
