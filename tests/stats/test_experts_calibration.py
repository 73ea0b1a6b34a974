"""Tests of experts, pairs and searches reject as often as they say. The figures are in experts_calibration.py."""

from __future__ import annotations

import pandas as pd
import pytest
from experts_calibration import TESTS, calibrate
from scipy import stats


@pytest.fixture(scope="module")
def quick() -> pd.DataFrame:
    return calibrate(100).set_index("test")


@pytest.mark.parametrize("name", TESTS)
def test_tests_of_experts_reject_in_five_percent_of_null_runs(quick: pd.DataFrame, name: str) -> None:
    """100 runs: as many rejections as 5 % gives in 99.9 % of such tables."""
    low, high = stats.binom.interval(0.999, 100, 0.05)
    assert low <= round(quick.loc[name, "rejected"] * 100) <= high


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_calibration_of_experts_in_full() -> None:
    """1000 runs: every test within 5 ± 1.5 %."""
    table = calibrate(1000).set_index("test")
    assert table["rejected"].between(0.035, 0.065).all(), table
