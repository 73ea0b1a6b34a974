"""Changes of predictive quality between two runs on the same texts, with intervals that rest on texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moetrace.analysis.statistics.nulls import Interval, ratio_interval
from moetrace.errors import InputError


@dataclass(frozen=True)
class LikelihoodChange:
    """How much worse (or better) the other run predicts than the base; per token, pooled over texts.

    Every interval is the delete-one-text jackknife of Σ over tokens / number of tokens: tokens of one text are
    not independent, so texts are the units. Where there is a single text all but the estimates is NaN.

    Attributes
    ----------
    n_tokens, n_texts
        What it rests on.
    base, other
        Mean negative log-likelihood of each run, nats per token.
    change
        Their difference, other less base; paired, so that what makes a text hard cancels.
    kl
        Mean KL(base ‖ other), nats per token; None if it was not measured.
    same_top
        Share of tokens at which both hold the same token most likely.
    """

    n_tokens: int
    n_texts: int
    base: Interval
    other: Interval
    change: Interval
    kl: Interval | None
    same_top: Interval | None

    @property
    def columns(self) -> dict[str, float]:
        """``change``, ``kl`` and ``same_top``, each with ``…_low`` and ``…_high``; NaN where not measured."""
        out = {}
        for name in ("change", "kl", "same_top"):
            interval = getattr(self, name)
            for end, field in (("", "estimate"), ("_low", "low"), ("_high", "high")):
                out[name + end] = np.nan if interval is None else float(getattr(interval, field))
        return out


def likelihood_change(
    base: npt.ArrayLike,
    other: npt.ArrayLike,
    text: npt.ArrayLike,
    *,
    kl: npt.ArrayLike | None = None,
    same_top: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> LikelihoodChange:
    """Compare two runs' negative log-likelihoods of the same tokens.

    Parameters
    ----------
    base, other
        (n,) nats.
    text
        (n,) which text each token belongs to; any integers.
    kl, same_top
        (n,) per token, if measured.

    Raises
    ------
    InputError
        If there is no token, or the lengths differ.
    """
    a, b = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if not a.shape == b.shape == np.shape(text) or a.ndim != 1 or len(a) == 0:
        raise InputError(
            f"{a.shape}, {b.shape} and {np.shape(text)} are not the same tokens of two runs",
            fix="give one value per token, at least one",
        )
    unit, n_of_text = np.unique(np.asarray(text), return_inverse=True, return_counts=True)[1:]

    def mean(values: npt.ArrayLike) -> Interval:
        sums = np.bincount(unit, np.asarray(values, np.float64), minlength=len(n_of_text))
        found = ratio_interval(sums, n_of_text, level)
        if len(n_of_text) > 1:
            return found
        return Interval(sums[0] / n_of_text[0], found.error, found.low, found.high)

    return LikelihoodChange(
        n_tokens=len(a),
        n_texts=len(n_of_text),
        base=mean(a),
        other=mean(b),
        change=mean(b - a),
        kl=None if kl is None else mean(kl),
        same_top=None if same_top is None else _share(mean(same_top)),
    )


def _share(found: Interval) -> Interval:
    """A share's interval ends at 0 and 1."""
    return Interval(found.estimate, found.error, np.clip(found.low, 0, 1), np.clip(found.high, 0, 1))
