"""The quick calibrations can fail: a test that rejects 15 % does not pass them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from bounds import ALPHA, FAULTY, RUNS, faulty, most, power
from scipy import stats


def test_a_test_that_rejects_too_often_is_caught() -> None:
    assert power() >= 0.9
    assert stats.binom.sf(most(), RUNS, ALPHA) <= 0.001
    assert power(12) < 0.4  # so few tell nothing
    assert (1 - ALPHA) ** RUNS < 0.001  # nor does a sound test never reject


@pytest.mark.parametrize(("rate", "passes"), [(0.0, 0.0), (ALPHA, 1.0), (FAULTY, 0.05), (0.25, 0.0)])
def test_the_bound_does_what_the_binomial_says(rate: float, passes: float) -> None:
    """Drawn, not computed: tables of tests of which the rate is known."""
    hits = np.random.default_rng(0).binomial(RUNS, rate, 2000)
    table = pd.DataFrame({"test": range(2000), "rejected": hits / RUNS})
    assert 1 - len(faulty(table)) / 2000 == pytest.approx(passes, abs=0.02)
