"""How many rejections a test at 5 % may show, and how many runs it takes to tell one that rejects too often.

The quick calibrations draw :data:`RUNS` null worlds. A sound test passes :func:`most` in all but one of 1000 such
tables; one that rejects 15 % fails in nine of ten.
"""

from __future__ import annotations

import pandas as pd
from scipy import stats

ALPHA = 0.05
FAULTY = 0.15
RUNS = 170


def most(runs: int = RUNS) -> int:
    """Rejections that a test at 5 % exceeds in one of 1000 tables of as many independent runs."""
    return int(stats.binom.ppf(0.999, runs, ALPHA))


def power(runs: int = RUNS, rate: float = FAULTY) -> float:
    """Probability that a test that rejects at ``rate`` is told from a sound one."""
    return float(stats.binom.sf(most(runs), runs, rate))


def faulty(table: pd.DataFrame, runs: int = RUNS) -> pd.DataFrame:
    """Rows of a calibration (``test``, ``rejected``) that reject too often, or never, as no sound test does.

    P-values of one run go together: however many there are, each run counts once.
    """
    rejections = table["rejected"] * runs
    return table[(rejections > most(runs)) | (rejections == 0)]
