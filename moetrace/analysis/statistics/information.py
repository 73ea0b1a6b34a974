"""Entropy and divergence of expert usage, in bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, xlogy

from moetrace.analysis.statistics.shapes import Floats

_LN2 = float(np.log(2.0))


def shares(counts: npt.ArrayLike, of: npt.ArrayLike | None = None) -> Floats:
    """Counts (..., E) divided by their sum over the last axis, or by ``of`` (...); NaN where that is 0. A copy."""
    c = np.asarray(counts, dtype=np.float64)
    total = c.sum(axis=-1, keepdims=True) if of is None else np.asarray(of, dtype=np.float64)[..., None]
    return np.asarray(np.divide(c, total, out=np.full_like(c, np.nan), where=total > 0))


def entropy_bits(p: npt.ArrayLike) -> Floats:
    """Shannon entropy of distributions (..., E) along the last axis, in bits (plug-in)."""
    q = np.asarray(p, dtype=np.float64)
    return np.asarray(-xlogy(q, q).sum(axis=-1) / _LN2)


def miller_madow_bits(counts: npt.ArrayLike) -> Floats:
    """Entropy of counts (..., E) in bits, with the correction (m − 1)/(2N ln 2) of Miller (1955).

    m is the number of experts seen and N the number of picks. The correction is for independent picks; picks
    of one prompt are not, so :func:`moetrace.analysis.domains.layers.domain_entropy` gives the jackknife beside it.
    """
    c = np.asarray(counts, dtype=np.float64)
    n = c.sum(axis=-1)
    seen = (c > 0).sum(axis=-1)
    bias = np.divide(seen - 1, 2 * n * _LN2, out=np.full(n.shape, np.nan), where=n > 0)
    return np.asarray(entropy_bits(shares(c)) + bias)


def jsd_bits(p: npt.ArrayLike) -> Floats:
    """Jensen-Shannon divergence of D distributions (..., D, E), equally weighted, in bits (...).

    H(mean of p) − mean of H(p) (Lin 1991); between 0 and log2 D. This is the divergence itself, not its root.
    """
    q = np.asarray(p, dtype=np.float64)
    return np.asarray(np.maximum(entropy_bits(q.mean(axis=-2)) - entropy_bits(q).mean(axis=-1), 0.0))


def chi_square(counts: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64], Floats, Floats]:
    """Pearson's chi-square of tables (..., D, E): statistic, degrees of freedom, p-value, total; each (...).

    Experts that nobody used and domains without a pick carry no expectation and are left out of the degrees
    of freedom. The p-value takes every pick for an independent observation, which routing is not.
    """
    c = np.asarray(counts, dtype=np.float64)
    rows, cols = c.sum(axis=-1, keepdims=True), c.sum(axis=-2, keepdims=True)
    total = rows.sum(axis=-2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = rows * cols / total
        terms = np.where(expected > 0, (c - expected) ** 2 / expected, 0.0)
    chi2 = terms.sum(axis=(-2, -1))
    used_rows = (rows[..., 0] > 0).sum(axis=-1)
    used_cols = (cols[..., 0, :] > 0).sum(axis=-1)
    dof = np.maximum(used_rows - 1, 0) * np.maximum(used_cols - 1, 0)
    p = np.where(dof > 0, chdtrc(np.maximum(dof, 1), chi2), 1.0)
    return np.asarray(chi2), np.asarray(dof, dtype=np.int64), np.asarray(p), total[..., 0, 0]


def cramers_v(counts: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Cramér's V of tables (..., D, E), and V corrected for bias; each (...), NaN for an empty table.

    The correction is Bergsma's (2013): φ² − (r−1)(c−1)/(n−1), not below 0, over min(r̃−1, c̃−1) with
    r̃ = r − (r−1)²/(n−1). It removes the bias of independent picks, not that of prompts.
    """
    c = np.asarray(counts, dtype=np.float64)
    chi2, _, _, n = chi_square(c)
    r = (c.sum(axis=-1) > 0).sum(axis=-1).astype(np.float64)
    m = (c.sum(axis=-2) > 0).sum(axis=-1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi2 = chi2 / n
        plain = np.sqrt(phi2 / np.minimum(r - 1, m - 1))
        r_, m_ = r - (r - 1) ** 2 / (n - 1), m - (m - 1) ** 2 / (n - 1)
        corrected = np.sqrt(np.maximum(0.0, phi2 - (r - 1) * (m - 1) / (n - 1)) / np.minimum(r_ - 1, m_ - 1))
    return np.asarray(plain), np.asarray(corrected)
