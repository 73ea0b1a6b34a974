"""Prompts as points: how far apart domains' middles lie, and how widely their prompts scatter.

A prompt's point is its share of picks for each expert, each divided by the square root of the experts' mean share over
prompts (the chi-square metric). Prompts weigh equally, however long they are, and the mean of a short prompt's point is
what a long one's is. That is not so of pooled counts, nor of distances between distributions: few tokens look like
other routing there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moetrace._native import group_sums
from moetrace.analysis.statistics import information as info
from moetrace.analysis.statistics.shapes import Floats, Ints

_BATCH = 64 << 20
#: variance that a domain has at least, as a share of that of all prompts: copies would be infinitely sure
_LEAST = 1e-6
#: of more prompts, products of each with each take long, and middles hardly move
_MANY = 100
#: of fewer prompts of a domain, distances from their middle say little
_FEWEST = 4


@dataclass(frozen=True)
class Points:
    """Prompts as points: ``values`` (P, E), 0 where a prompt has no token, and ``known`` (P,) 1.0 or 0.0."""

    values: Floats
    known: Floats

    @classmethod
    def of(cls, counts: npt.ArrayLike, *, scaled: bool = True) -> Points:
        """Points of the counts of one layer (P, E); with ``scaled=False`` plain shares."""
        share = info.shares(counts)
        known: npt.NDArray[np.bool_] = np.asarray(~np.isnan(share).any(axis=1))
        values = np.where(known[:, None], share, 0.0)
        if scaled:
            mean = values.sum(axis=0) / max(known.sum(), 1)
            values = values / np.sqrt(np.where(mean > 0, mean, 1.0))
        return cls(np.ascontiguousarray(values), known.astype(np.float64))

    def grouped(self, values: Floats, codes: Ints, n_domains: int) -> Floats:
        """Sums of values (P, M) by domain for assignments (b, P): (b, D, M)."""
        return group_sums(codes.astype(np.int32), np.ascontiguousarray(values), n_domains)


def welch(counts: npt.ArrayLike, codes: Ints, n_domains: int) -> Floats:
    """How far apart domains' middles lie for the scatter of each, for assignments ``codes`` (B, P): (B,).

    W*_d of Hamidi et al. (2019): Welch's test of means, in distances. Counts are (P, E), of one layer. Domains of
    unequal size may scatter unequally; permuted pseudo-F rejects for that alone.

    NaN where a domain has no prompt with tokens, or all prompts are alike.
    """
    points = Points.of(counts)
    x, known = points.values, points.known
    squares = (x**2).sum(axis=1, keepdims=True)
    n_all = known.sum()
    total = squares.sum() - (x.sum(axis=0) ** 2).sum() / max(n_all, 1)
    out = np.full(codes.shape[0], np.nan)
    if n_all <= n_domains or total <= 0:
        return out
    d = n_domains
    step = max(1, _BATCH // (8 * d * x.shape[1]))
    for start in range(0, codes.shape[0], step):
        part = codes[start : start + step]
        n = points.grouped(known[:, None], part, d)[:, :, 0]
        sums = points.grouped(x, part, d)
        with np.errstate(invalid="ignore", divide="ignore"):
            middle = sums / n[:, :, None]
            scatter = points.grouped(squares, part, d)[:, :, 0] - n * (middle**2).sum(axis=2)
            pooled = scatter.sum(axis=1, keepdims=True) / (n_all - d)
            variance = np.where(n > 1, scatter / (n - 1), pooled)
            weight = n / np.maximum(variance, _LEAST * total / (n_all - 1))
            every = weight.sum(axis=1, keepdims=True)
            common = np.einsum("bd,bde->be", weight, middle) / every
            apart = (weight * ((middle - common[:, None]) ** 2).sum(axis=2)).sum(axis=1) / (d - 1)
            # a domain of one prompt says nothing about how sure it is
            unsure = ((1 - weight / every) ** 2 / np.maximum(n - 1, 1)).sum(axis=1)
            out[start : start + step] = apart / (1 + 2 * (d - 2) / (d * d - 1) * unsure)
    return out


def dispersion(counts: npt.ArrayLike, codes: Ints, n_domains: int) -> Floats:
    """How unequally domains' prompts scatter, for assignments ``codes`` (B, P) of which the first is the real: (B,).

    PERMDISP (Anderson 2006): F of the prompts' distances from the middle of their own domain, blown up by √(n/(n − 1)),
    as a middle lies nearer to few. Exchanged are the prompts' places around their middles, and middles are found anew;
    of more than :data:`_MANY` prompts the distances themselves, which is as good then. Of fewer than 8 prompts of each
    domain it rejects a little too often (7 to 9 % of nulls at 5 %). NaN where a domain has fewer than :data:`_FEWEST`.
    """
    points = Points.of(counts)
    x, known = points.values, points.known
    own = codes[0]
    out = np.full(codes.shape[0], np.nan)
    n_own = np.bincount(own, weights=known, minlength=n_domains)
    free = known.sum() - n_domains
    if (n_own < _FEWEST).any() or free <= 0:
        return out
    middle = points.grouped(x, codes[:1], n_domains)[0] / n_own[:, None]
    wider = np.sqrt(n_own / (n_own - 1))[own]
    around = (x - middle[own]) * (known * wider)[:, None]
    squares = (around**2).sum(axis=1)
    inner = around @ around.T if len(x) <= _MANY else None
    step = max(1, _BATCH // (8 * len(x) * n_domains))
    for start in range(0, len(codes), step):
        some = codes[start : start + step]  # (b, P)
        member = (some[:, :, None] == np.arange(n_domains)) * known[:, None]
        n = member.sum(axis=1)  # (b, D)
        away = np.broadcast_to(np.sqrt(squares), some.shape)
        if inner is not None:
            share = member / np.maximum(n, 1)[:, None]
            along = inner @ share  # (b, P, D) each place times the middle of each domain's
            of_middle = np.einsum("bpd,bpd->bd", share, along)
            of_own = np.take_along_axis(along, some[:, :, None], axis=2)[:, :, 0]
            squared = squares - 2 * of_own + np.take_along_axis(of_middle, some, axis=1)
            fewer = np.take_along_axis(n / np.maximum(n - 1, 1), some, axis=1)
            moved = np.sqrt(np.maximum(squared * fewer, 0.0))
            away = np.where(np.arange(start, start + len(some))[:, None] > 0, moved, away)
        away = away * known
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = np.einsum("bpd,bp->bd", member, away)
            mean = away.sum(axis=1) ** 2 / known.sum()
            between = (sums**2 / n).sum(axis=1) - mean
            within = (away**2).sum(axis=1) - mean - between
            f = between / (n_domains - 1) / (within / free)
        out[start : start + step] = np.where(np.isfinite(f), f, np.nan)
    return out


def gaps(counts: npt.ArrayLike, codes: Ints, n_domains: int, block: slice) -> Floats:
    """How far each domain's mean share lies from the mean over domains, in standard errors: (B, D, block).

    Means of the prompts' shares of a block of experts, ``counts`` (P, E) being one layer's; the error is that of the
    prompts' scatter within all domains together. 0 where an expert's share is the same in all prompts; NaN where
    a domain has no prompt with tokens.
    """
    points = Points.of(counts, scaled=False)
    x, known = np.ascontiguousarray(points.values[:, block]), points.known
    n = points.grouped(known[:, None], codes, n_domains)  # (B, D, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = points.grouped(x, codes, n_domains) / n
        free = max(known.sum() - n_domains, 1)
        within = np.maximum((x**2).sum(axis=0) - (n * mean**2).sum(axis=1), 0.0) / free  # (B, block)
        each = 1.0 / n
        factor = (1 - 2 / n_domains) * each + each.sum(axis=1, keepdims=True) / n_domains**2
        error = np.sqrt(within[:, None, :] * factor)
        gap = mean - mean.mean(axis=1, keepdims=True)
        return np.asarray(np.where(error > 1e-12, gap / error, np.where(np.isnan(gap), np.nan, 0.0)))
