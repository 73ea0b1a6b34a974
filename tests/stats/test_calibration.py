"""Tests reject as often as they say, intervals cover as often as they say, planted effects are found.

The figures for the documentation come from ``python tests/stats/calibration.py``.
"""

from __future__ import annotations

import pytest
from bounds import RUNS, faulty, most
from calibration import FINDS, SMALL, SMALL_WORLD, UNSOUND, calibrate, planted


def test_sound_tests_reject_as_often_as_they_say_and_the_published_almost_always() -> None:
    quick = calibrate(RUNS, SMALL, n_permutations=39).set_index("test")
    assert faulty(quick.drop(index=[*UNSOUND, *FINDS])).empty, quick
    assert (quick.loc[[name for name in UNSOUND if "taken for" in name], "rejected"] > 0.3).all(), quick
    assert (quick.loc[list(FINDS), "rejected"] > 0.3).all(), quick
    assert quick.loc["published chi-square", "rejected"] > 0.95
    assert quick.loc["jsd at unequal words", "rejected"] > 0.5


def test_planted_effects_are_found_and_intervals_hold() -> None:
    found = planted(RUNS, 0.4, 19, SMALL_WORLD).set_index("figure")
    n, share = found["n"], found["share"]
    assert share["power: domain_test welch"] == 1
    assert share["power: domain_test jsd"] == 1
    assert share["power: domain_test pseudo_f"] == 1
    assert share["power: matched_separation"] == 1
    assert share["right sign: specialists"] > 0.98
    assert n["right sign: specialists"] > 100
    for name in share.index[share.index.str.startswith("coverage")]:
        assert (1 - share[name]) * RUNS <= most(), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_calibration_in_full() -> None:
    """1000 runs (500 of words and order), as documented: every sound test within 5 ± 1.5 %, as far as they tell."""
    table = calibrate(1000).set_index("test")
    assert table.loc["published chi-square", "rejected"] > 0.99
    sound = table.drop(index=[*UNSOUND, *FINDS])
    assert ((sound["low"] < 0.065) & (sound["high"] > 0.035)).all(), sound


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_planted_effects_in_full() -> None:
    for strength, power in ((0.15, 0.7), (0.4, 0.99)):
        share = planted(200, strength).set_index("figure")["share"]
        assert share["power: domain_test jsd"] > power
        assert share["right sign: specialists"] > 0.98
        coverage = share[share.index.str.startswith("coverage")]
        assert coverage.between(0.92, 1.0).all(), coverage
