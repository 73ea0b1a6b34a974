"""How often something happens per token, where the tokens of one prompt are alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

from moetrace.analysis.statistics.nulls import clopper_pearson
from moetrace.analysis.statistics.shapes import Floats


@dataclass(frozen=True)
class Rates:
    """Rates of experts, (L, E): ``rate``, NaN without tokens; ``effective`` tokens; ``low`` and ``high``."""

    rate: Floats
    effective: Floats
    low: Floats
    high: Floats
    _effect: Floats
    _tokens: Floats
    _prompts: int

    @classmethod
    def of(cls, counts: npt.ArrayLike, tokens: npt.ArrayLike, level: float = 0.95) -> Rates:
        """Rates from (P, L, E) tokens of each prompt that used the expert, and (P, L) tokens.

        Intervals are exact ones (Clopper & Pearson) for as many tokens as ours are worth (Korn & Graubard 1998): the
        design effect is the variance between prompts (a ratio estimate's) over the binomial one, at least 1. With fewer
        than 30 picks it is at least the mean of its layer's experts that have 5 or more. How much prompts differ is
        itself known from few prompts only (t for normal quantiles). A single prompt says nothing of it: then there
        are no intervals, but of tokens taken for independent.
        """
        c, n = np.asarray(counts, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        p_prompts = c.shape[0]
        used, total = c.sum(axis=0), n.sum(axis=0)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            rate = np.where(total > 0, used / total, np.nan)
            binomial = rate * (1 - rate) / total
            # sum of (c - rate n)², without a table as large as the counts
            squares = (
                np.einsum("ple,ple->le", c, c)
                - 2 * rate * np.einsum("ple,pl->le", c, n)
                + rate**2 * (n**2).sum(axis=0)[:, None]
            )
            between = squares * p_prompts / max(p_prompts - 1, 1) / total**2
            effect = np.where((used >= 5) & (binomial > 0), np.maximum(between / binomial, 1.0), np.nan)
        if p_prompts < 2:
            effect[:] = np.nan
        known = ~np.isnan(effect)
        sums = np.where(known, effect, 0.0).sum(axis=1, keepdims=True)
        mean = np.divide(sums, known.sum(axis=1, keepdims=True), out=np.ones_like(sums), where=sums > 0)
        # few picks say little about their own spread: then not less than that of the layer's others
        at_least = np.where(known, np.maximum(effect, mean), mean)
        every = np.broadcast_to(total, used.shape)
        effective = _worth(
            np.where(known & (used >= 30), effect, at_least), every, p_prompts, (1 - level) / 2
        )
        low, high = clopper_pearson(np.nan_to_num(rate) * effective, effective, level)
        unknown = every == 0
        low, high = np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)
        return cls(rate, effective, low, high, at_least, every, p_prompts)

    def bound(self, tail: float) -> Floats:
        """(L, E) upper bounds that a rate exceeds with probability ``tail``, careful with experts of few picks."""
        careful = _worth(self._effect, self._tokens, self._prompts, tail)
        return clopper_pearson(np.nan_to_num(self.rate) * careful, careful, 1 - 2 * tail)[1]


def _worth(effect: Floats, tokens: Floats, prompts: int, tail: float) -> Floats:
    """Independent tokens that ours are worth."""
    if prompts < 2:
        return tokens
    widen = stdtrit(prompts - 1, 1 - tail) / ndtri(1 - tail)
    return np.asarray(tokens / (effect * widen**2))
