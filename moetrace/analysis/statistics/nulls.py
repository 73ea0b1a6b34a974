"""What chance does when prompts, not picks, are the independent things.

Tokens of one prompt share its topic and style and follow each other, so they are not independent observations
of their domain; prompts are. Every test here therefore moves whole prompts, and every interval resamples or
deletes whole prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, gammaln, ndtr, stdtrit

from moetrace._native import group_sums
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError

SAME_THING = "cannot be tested: domain and prompt are the same thing"
ONE_DOMAIN = "cannot be tested: there is only one domain"
ONE_ARRANGEMENT = "cannot be tested: within the strata there is no other way to hand out the domains"


@dataclass(frozen=True)
class Domains:
    """Prompts and their domains: ``names`` (D) sorted, ``codes`` (P) into names, ``sizes`` (D) in prompts."""

    names: tuple[str, ...]
    codes: Ints
    sizes: Ints

    @classmethod
    def of(cls, labels: npt.ArrayLike) -> Domains:
        """Domains of labels (P), one per prompt. Raises UsageError if a label is empty: drop such prompts."""
        text = np.asarray(labels).astype(str)
        if text.ndim != 1 or text.size == 0:
            raise UsageError("labels must be one per prompt", fix="give labels of shape (prompts,)")
        if (text == "").any():
            raise UsageError(
                f"{int((text == '').sum())} of {text.size} prompts have no domain",
                fix="leave them out (counts.labelled()) or label them",
            )
        names, codes = np.unique(text, return_inverse=True)
        return cls(tuple(str(n) for n in names), codes.astype(np.int64), np.bincount(codes).astype(np.int64))

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Feasibility:
    """Whether permuting prompts between domains can tell anything.

    ``min_p`` is the smallest p-value that the number of prompts allows: one over the number of ways to split
    the prompts into the domains' sizes, domains of equal size being interchangeable (5 domains × 2 prompts:
    1/945). ``reason`` is empty if ``testable``.
    """

    testable: bool
    reason: str
    min_p: float


def feasibility(domains: Domains, strata: npt.ArrayLike | None = None) -> Feasibility:
    """Count the arrangements of whole prompts over domains, within strata (P) if given."""
    if len(domains) < 2:
        return Feasibility(False, ONE_DOMAIN, 1.0)
    if (domains.sizes == 1).all():
        return Feasibility(False, SAME_THING, 1.0)
    groups = _strata_codes(strata, domains.codes.size)
    table = np.zeros((int(groups.max()) + 1, len(domains)), dtype=np.int64)
    np.add.at(table, (groups, domains.codes), 1)
    ways = gammaln(table.sum(axis=1) + 1).sum() - gammaln(table + 1).sum()
    for alike in Counter(tuple(column) for column in table.T.tolist()).values():
        ways -= gammaln(alike + 1)
    if ways < 0.5:  # the logarithm of 1, where that of 2 is 0.69
        return Feasibility(False, ONE_ARRANGEMENT, 1.0)
    return Feasibility(True, "", float(np.exp(-ways)))


def permuted_codes(
    domains: Domains, n_permutations: int, rng: np.random.Generator, strata: npt.ArrayLike | None = None
) -> npt.NDArray[np.int64]:
    """Domain codes (1 + n_permutations, P): row 0 as observed, the others with prompts exchanged within
    strata.
    """
    p = domains.codes.size
    groups = _strata_codes(strata, p)
    home = np.argsort(groups, kind="stable")
    shuffled = np.argsort(groups + rng.random((n_permutations, p)), axis=1)
    out = np.empty((n_permutations + 1, p), dtype=np.int64)
    out[0] = domains.codes
    out[1:, home] = domains.codes[shuffled]
    return out


def pooled(
    counts: npt.ArrayLike, codes: npt.NDArray[np.int64], n_domains: int, max_bytes: int = 64 << 20
) -> Iterator[tuple[slice, Floats]]:
    """Counts of prompts (P, ...) summed by domain for many assignments of prompts to domains.

    ``codes`` is (B, P); yields (slice of B, sums (b, D, ...)) in batches of about ``max_bytes``.
    """
    c = np.asarray(counts, dtype=np.float64)
    flat = c.reshape(c.shape[0], -1)
    step = max(1, int(max_bytes // max(1, 8 * n_domains * flat.shape[1])))
    for start in range(0, codes.shape[0], step):
        part = codes[start : start + step]
        sums = group_sums(part.astype(np.int32), flat, n_domains)
        yield slice(start, start + part.shape[0]), sums.reshape(part.shape[0], n_domains, *c.shape[1:])


def permutation_p(null: npt.ArrayLike) -> Floats:
    """One-sided p-values from statistics (1 + B, ...), row 0 observed: (1 + #{null ≥ observed})/(B + 1).

    Phipson & Smyth (2010): never 0, and exact for exchangeable prompts. Equal arrangements must not count as
    smaller because of rounding, so 1e-9 of the statistic is forgiven. NaN where the observed one is NaN; an
    arrangement without a value (a domain left without tokens) counts as extreme.
    """
    t = np.asarray(null, dtype=np.float64)
    slack = 1e-9 * np.abs(t[0]) + 1e-15
    with np.errstate(invalid="ignore"):
        p = (1.0 + (~(t[1:] < t[0] - slack)).sum(axis=0)) / t.shape[0]
    return np.where(np.isnan(t[0]), np.nan, p)


def max_t(null: npt.ArrayLike) -> Floats:
    """Family-wise p-values over the last axis of statistics (1 + B, ..., M): Westfall & Young's single-step
    max-T.

    Row 0 is observed. Each of the M is divided by its own mean and spread over all 1 + B arrangements (the
    observed one included, which keeps the test exact), so that rare and frequent experts compete alike; a
    statistic without spread cannot reject and gets p = 1. NaN stays NaN.
    """
    return max_t_of_parts([null])[0]


def max_t_of_parts(parts: Iterable[npt.ArrayLike]) -> list[Floats]:
    """:func:`max_t` of a family that comes in parts (1 + B, ..., M_i), of which only one is held at a time."""
    observed: list[tuple[Floats, npt.NDArray[np.bool_]]] = []
    largest: Floats | None = None
    for part in parts:
        t = np.asarray(part, dtype=np.float64)
        known = ~np.isnan(t)
        n = np.maximum(known.sum(axis=0), 1)
        mean = np.where(known, t, 0.0).sum(axis=0) / n
        spread = np.sqrt((np.where(known, t - mean, 0.0) ** 2).sum(axis=0) / n)
        still = ~(spread > 1e-12 * (1e-300 + np.where(known, np.abs(t), 0.0).max(axis=0)))
        with np.errstate(invalid="ignore", divide="ignore"):
            z = np.where(still | ~known, -np.inf, (t - mean) / spread)
        of_part = z.max(axis=-1, keepdims=True)
        largest = of_part if largest is None else np.maximum(largest, of_part)
        observed.append((z[0], ~known[0]))
    if largest is None:
        return []
    return [
        np.where(missing, np.nan, (1.0 + (largest[1:] >= z - 1e-9).sum(axis=0)) / len(largest))
        for z, missing in observed
    ]


def benjamini_hochberg(p: npt.ArrayLike) -> Floats:
    """False-discovery q-values (Benjamini & Hochberg 1995) of p-values (M); NaN are left out and stay NaN."""
    values = np.asarray(p, dtype=np.float64)
    out = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    largest_first = known[np.argsort(-values[known])]
    of_rank = values[largest_first] * known.size / np.arange(known.size, 0, -1)
    out[largest_first] = np.minimum(np.minimum.accumulate(of_rank), 1.0)
    return out


@dataclass(frozen=True)
class Interval:
    """An estimate freed of its bias, its standard error, and an interval; arrays of one shape."""

    estimate: Floats
    error: Floats
    low: Floats
    high: Floats


def jackknife(
    full: npt.ArrayLike,
    without: npt.ArrayLike,
    strata: npt.NDArray[np.int64] | None = None,
    level: float = 0.95,
) -> Interval:
    """Delete-one-prompt jackknife (Tukey; stratified as in Rao & Wu 1985) with a t interval.

    Parameters
    ----------
    full
        The statistic (...) on all prompts.
    without
        The statistic (P, ...) with prompt i left out.
    strata
        (P) codes of the groups that prompts were drawn from (domains); all one group if not given.

    The estimate is corrected for bias of order 1/P. Degrees of freedom: prompts less groups. All NaN where a
    group has a single prompt: nothing can be said about the spread of its prompts.
    """
    theta = np.asarray(full, dtype=np.float64)
    rest = np.asarray(without, dtype=np.float64)
    groups = np.zeros(rest.shape[0], dtype=np.int64) if strata is None else strata
    sizes = np.bincount(groups)
    if rest.shape[0] == 0 or (sizes == 1).any():
        nothing = np.full(theta.shape, np.nan)
        return Interval(nothing, nothing, nothing, nothing)
    bias, variance = np.zeros(theta.shape), np.zeros(theta.shape)
    for group, n in enumerate(sizes):
        if n == 0:
            continue
        mine = rest[groups == group]
        mean = mine.mean(axis=0)
        bias += (n - 1) * (mean - theta)
        variance += (n - 1) / n * ((mine - mean) ** 2).sum(axis=0)
    dof = int(rest.shape[0] - (sizes > 0).sum())
    error = np.sqrt(variance)
    reach = _t_quantile(0.5 + level / 2, dof) * error
    return Interval(theta - bias, error, theta - bias - reach, theta - bias + reach)


@cache
def _t_quantile(q: float, dof: int) -> float:
    return float(stdtrit(dof, q))


def ratio_interval(numerator: npt.ArrayLike, denominator: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Σ numerator / Σ denominator over prompts (P, ...), with its :func:`jackknife` interval; NaN for one prompt."""
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    top, bottom = a.sum(axis=0), b.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return jackknife(top / bottom, (top - a) / (bottom - b), level=level)


def clopper_pearson(count: npt.ArrayLike, n: npt.ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Exact two-sided interval of a rate (Clopper & Pearson 1934); ``count`` and ``n`` need not be whole.

    [0, 1] where n is 0. With count 0 the upper bound is 1 − ((1 − level)/2)^(1/n).
    """
    c, total = np.broadcast_arrays(np.asarray(count, dtype=np.float64), np.asarray(n, dtype=np.float64))
    tail = (1 - level) / 2
    low, high = np.zeros(c.shape), np.ones(c.shape)
    some, below = (total > 0) & (c > 0), (total > 0) & (c < total)
    low[some] = betaincinv(c[some], total[some] - c[some] + 1, tail)
    high[below] = betaincinv(c[below] + 1, total[below] - c[below], 1 - tail)
    return low, high


def bootstrap_weights(domains: Domains, n_boot: int, rng: np.random.Generator) -> Floats:
    """How often each prompt is drawn when each domain's prompts are redrawn with replacement: (n_boot, P)."""
    weights = np.empty((n_boot, domains.codes.size))
    for d, size in enumerate(domains.sizes):
        weights[:, domains.codes == d] = rng.multinomial(int(size), np.full(int(size), 1 / size), size=n_boot)
    return weights


def expanded_tail(n: int, level: float = 0.95) -> float:
    """Tail share of the percentile bootstrap for ``n`` prompts that makes up for its narrowness.

    Φ(−√(n/(n−1)) · t_{n−1}) (Hesterberg 2015, "expanded percentile interval"). For n = 12 and 95 %: 0.0108
    instead of 0.025.
    """
    if n < 2:
        return float("nan")
    t = float(stdtrit(n - 1, 0.5 + level / 2))
    return float(ndtr(-np.sqrt(n / (n - 1)) * t))


def _strata_codes(strata: npt.ArrayLike | None, n: int) -> npt.NDArray[np.int64]:
    if strata is None:
        return np.zeros(n, dtype=np.int64)
    values = np.asarray(strata)
    if values.shape != (n,):
        raise UsageError(
            f"strata have shape {values.shape}, prompts are {n}", fix="give one stratum per prompt"
        )
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
