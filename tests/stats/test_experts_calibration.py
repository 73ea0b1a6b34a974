"""Tests of experts, pairs and searches reject as often as they say. The figures are in experts_calibration.py."""

from __future__ import annotations

import pytest
from bounds import RUNS, faulty
from experts_calibration import calibrate


def test_tests_of_experts_reject_as_often_as_they_say() -> None:
    table = calibrate(RUNS)
    assert faulty(table).empty, table


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_calibration_of_experts_in_full() -> None:
    """1000 runs: every test within 5 ± 1.5 %."""
    table = calibrate(1000).set_index("test")
    assert table["rejected"].between(0.035, 0.065).all(), table
