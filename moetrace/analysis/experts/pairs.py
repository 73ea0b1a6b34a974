"""Which experts of a layer are chosen for the same token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtr, stdtrit

from moetrace.analysis.counts.routed import RoutedText, usage
from moetrace.analysis.statistics.nulls import benjamini_hochberg
from moetrace.analysis.statistics.shapes import Floats, Ints

_ROUNDS, _CLOSE = 200, 1e-10  # of the fit of odds
_ALIKE = 1e-5  # odds that differ by less than this share
_ALWAYS = 1 - 1e-9  # an expert that (almost) every token uses tells nothing about others


@dataclass(frozen=True)
class CoOccurrence:
    """What :func:`co_occurrence` gives.

    Attributes
    ----------
    layers
        One row per layer: ``layer``; ``tokens``; ``tested``, pairs expected often enough; ``more``, ``fewer``, those
        chosen together more and less often than the experts' rates give; ``text_more``, ``text_fewer``, more and less
        often than their rates in the same text give. By false discovery rate, over all pairs of all layers.
    pairs
        One row per listed pair (``expert`` < ``other``), the most surprising first: ``layer``; ``tokens`` with both;
        ``expected``, what their rates alone give; ``lift``, ``low``, ``high``, tokens over expected with a 95 %
        interval over prompts; ``share`` = N_ij/N_i and ``share_other`` = N_ij/N_j (OLMoE's co-activation); ``prompts``
        with both; ``q``, false discovery rate; ``text_expected``, ``text_lift``, ``text_low``, ``text_high``,
        ``text_q``: the same against their rates in the same texts.
    lifts
        The layer with most pairs beyond their rates, all pairs of it, both ways round: ``layer``, ``expert``,
        ``other``, ``lift``; NaN where the pair was not expected often enough.
    prompts
        P, the texts that were looked at.
    """

    layers: pd.DataFrame
    pairs: pd.DataFrame
    lifts: pd.DataFrame
    prompts: int


def pair_rates(rates: npt.ArrayLike, k: int) -> Floats:
    """How often two experts are chosen together if nothing but their own rates decides.

    Parameters
    ----------
    rates
        (E,) share of tokens that use each expert; they add up to ``k``.
    k
        Experts per token.

    Returns
    -------
    (E, E) float64, symmetric, with 0 on its diagonal: the pairwise inclusion probabilities of conditional Bernoulli
    sampling, the distribution over sets of k of largest entropy that has these rates (Chen, Dempster & Liu 1994,
    Biometrika 81:457). For even rates k(k − 1)/(E(E − 1)). Plain products of rates add up to too much, the more the
    less even they are, since one token does not choose an expert twice.
    """
    given = np.asarray(rates, dtype=np.float64)
    out = np.zeros((given.size, given.size))
    always, some = np.flatnonzero(given >= _ALWAYS), np.flatnonzero((given > 0) & (given < _ALWAYS))
    for i in always.tolist():
        out[i], out[:, i] = given, given
    left = k - always.size
    if left >= 1 and some.size > left:
        out[np.ix_(some, some)] = _pairs_of(_odds(given[some], left), left)
    elif left >= 1:
        out[np.ix_(some, some)] = np.outer(given[some], given[some])
    np.fill_diagonal(out, 0.0)
    return out


def _odds(rates: Floats, k: int) -> Floats:
    """(E,) odds whose conditional Bernoulli sample of k has these rates; rates are scaled to add up to k."""
    target = rates * (k / rates.sum())
    target = np.minimum(target, _ALWAYS)
    odds = target / (1 - target)
    for _ in range(_ROUNDS):
        odds = odds / np.exp(np.log(odds).mean())
        without = _symmetric_without(odds, k - 1)
        whole = (odds * without).sum() / k  # e_k = Σ odds_i e_{k-1}(without i) / k
        found = odds * without / whole
        if np.abs(found - target).max() < _CLOSE:
            break
        # their iteration, and half a step on the scale of odds, which needs a tenth of the rounds
        odds = odds * (target / found) * np.sqrt((1 - found) / (1 - target))
    return np.asarray(odds)


def _symmetric(odds: Floats, degree: int) -> Floats:
    """(E + 1, degree + 1) elementary symmetric polynomials of the first n odds."""
    out = np.zeros((odds.size + 1, degree + 1))
    out[:, 0] = 1.0
    for n, w in enumerate(odds.tolist()):
        out[n + 1, 1:] = out[n, 1:] + w * out[n, :-1]
    return out


def _symmetric_without(odds: Floats, degree: int) -> Floats:
    """(E,) elementary symmetric polynomial of this degree of all odds but one."""
    return _all_without(odds, degree)[:, degree]


def _all_without(odds: Floats, degree: int) -> Floats:
    """(E, degree + 1) elementary symmetric polynomials of all odds but one, of every degree up to this."""
    before, after = _symmetric(odds, degree)[:-1], _symmetric(odds[::-1], degree)[::-1][1:]
    out = np.zeros_like(before)
    for m in range(degree + 1):
        out[:, m] = (before[:, : m + 1] * after[:, m::-1]).sum(axis=1)
    return out


def _pairs_of(odds: Floats, k: int) -> Floats:
    """(E, E) chance that a conditional Bernoulli sample of k has both.

    π_ij = (π_i w_j − π_j w_i)/(w_j − w_i), exactly; for odds that are (almost) alike from the polynomial without both,
    e_m(−ij) = e_m(−i) − w_j e_{m−1}(−ij), or anew where that cancels.
    """
    e = odds.size
    if k < 2:
        return np.zeros((e, e))
    odds = odds / np.exp(np.log(odds).mean())
    without = _all_without(odds, k - 1)
    whole = (odds * without[:, k - 1]).sum() / k
    rates = odds * without[:, k - 1] / whole
    gap = odds - odds[:, None]
    near = np.abs(gap) < _ALIKE * np.maximum(odds, odds[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        out = (rates[:, None] * odds - rates * odds[:, None]) / gap
    first, second = np.nonzero(np.triu(near, 1))
    rest = np.ones(first.size)
    for m in range(1, k - 1):
        rest = without[first, m] - odds[second] * rest
    both = odds[first] * odds[second] * rest / whole
    for at in np.flatnonzero(rates[first] > 0.2).tolist():
        i, j = int(first[at]), int(second[at])
        left = np.delete(odds, [i, j])
        both[at] = odds[i] * odds[j] * _symmetric(left, k - 2)[-1, k - 2] / whole
    out[first, second] = out[second, first] = both
    np.fill_diagonal(out, 0.0)
    return np.asarray(out)


@dataclass(frozen=True)
class _Layer:
    """One layer's pairs: expert < other, (C,) each, of those with enough expected."""

    number: int
    tokens: int
    first: Ints
    second: Ints
    both: Floats
    used: Floats  # (E,)
    prompts: Ints
    expected: Floats
    error: Floats
    text_expected: Floats
    text_error: Floats
    lift: Floats  # (E, E)


def co_occurrence(
    text: RoutedText, *, min_expected: float = 5.0, alpha: float = 0.05, max_listed: int = 500
) -> CoOccurrence:
    """Which experts of a layer are chosen together, beyond what their rates and the texts give.

    Two nulls. *Rates alone*: :func:`pair_rates`. *The same texts*: two tokens of one text, drawn at random, of which
    one uses the one expert and the other the other, times what excluding each other takes away (rates alone over the
    product of rates). What exceeds the first and not the second only shares texts.

    Prompts are the units: a pair's excess is a sum over prompts, and its variance that of their shares of it
    (linearised jackknife), at least that of a table of two by two of independent experts. p-values are of t with
    P − 1 degrees of freedom, and corrected by false discovery rate over all pairs of all layers.

    Parameters
    ----------
    text
        Rows of independent prompts.
    min_expected
        Pairs that rates alone let expect fewer tokens are left out.
    alpha
        False discovery rate.
    max_listed
        Pairs to list, at most.
    """
    text = text.by_name()
    layers = [_layer(text, layer, min_expected) for layer in range(text.experts.shape[1])]
    dof = text.n_requests - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = [_all((x.both - x.expected) / x.error for x in layers)]
        scores.append(_all((x.both - x.text_expected) / x.text_error for x in layers))
    q, text_q = (
        benjamini_hochberg(2 * stdtr(dof, -np.abs(z)) if dof > 0 else np.full(z.size, np.nan)) for z in scores
    )
    number = np.repeat([x.number for x in layers], [x.first.size for x in layers])
    both, expected, text_expected = (
        _all(getattr(x, n) for x in layers) for n in ("both", "expected", "text_expected")
    )
    sure = {
        "more": (q <= alpha) & (both > expected),
        "fewer": (q <= alpha) & (both < expected),
        "text_more": (text_q <= alpha) & (both > text_expected),
        "text_fewer": (text_q <= alpha) & (both < text_expected),
    }
    summary = pd.DataFrame(
        {
            "layer": [x.number for x in layers],
            "tokens": [x.tokens for x in layers],
            "tested": [x.first.size for x in layers],
            **{
                name: np.bincount(
                    np.searchsorted([x.number for x in layers], number[flag]), minlength=len(layers)
                )
                for name, flag in sure.items()
            },
        }
    )
    order = np.argsort(-np.abs(np.nan_to_num(scores[0])), kind="stable")[:max_listed]
    reach = float(stdtrit(dof, 0.975)) if dof > 0 else np.nan

    def listed(values: Iterable[npt.ArrayLike]) -> Floats:
        return _all(values)[order]

    n, share = both[order], expected[order]
    error, text_error = (reach * listed(getattr(x, name) for x in layers) for name in ("error", "text_error"))
    text_share = text_expected[order]
    with np.errstate(invalid="ignore", divide="ignore"):
        table = pd.DataFrame(
            {
                "layer": number[order],
                "expert": listed(x.first for x in layers).astype(np.int64),
                "other": listed(x.second for x in layers).astype(np.int64),
                "tokens": n.astype(np.int64),
                "expected": share,
                "lift": n / share,
                "low": np.maximum(n - error, 0) / share,
                "high": (n + error) / share,
                "share": n / listed(x.used[x.first] for x in layers),
                "share_other": n / listed(x.used[x.second] for x in layers),
                "prompts": listed(x.prompts for x in layers).astype(np.int64),
                "q": q[order],
                "text_expected": text_share,
                "text_lift": n / text_share,
                "text_low": np.maximum(n - text_error, 0) / text_share,
                "text_high": (n + text_error) / text_share,
                "text_q": text_q[order],
            }
        )
    most = layers[int((summary["more"] + summary["fewer"]).to_numpy().argmax())] if layers else None
    return CoOccurrence(summary, table, _square(most), int(text.n_requests))


def _all(values: Iterable[npt.ArrayLike]) -> Floats:
    each = [np.asarray(v, dtype=np.float64) for v in values]
    return np.concatenate(each) if each else np.empty(0)


def _square(layer: _Layer | None) -> pd.DataFrame:
    if layer is None:
        return pd.DataFrame({"layer": [], "expert": [], "other": [], "lift": []})
    e = layer.lift.shape[0]
    first, second = np.divmod(np.arange(e * e), e)
    apart = first != second
    return pd.DataFrame(
        {
            "layer": layer.number,
            "expert": first[apart],
            "other": second[apart],
            "lift": layer.lift.ravel()[apart],
        }
    )


def _layer(text: RoutedText, layer: int, min_expected: float) -> _Layer:
    rows = np.flatnonzero(text.known(layer))
    e, p = text.n_expert, text.n_requests
    ids, owner = text.experts[rows, layer].astype(np.int64), text.owner[rows]
    used = usage(ids, owner, p, e).astype(np.float64)  # (P, E)
    n = np.bincount(owner, minlength=p).astype(np.float64)
    total, all_tokens = used.sum(axis=0), float(rows.size)
    k = round(float((ids < e).sum()) / rows.size) if rows.size else 0
    rates = pair_rates(total / all_tokens, k) if rows.size else np.zeros((e, e))
    expected = rates * all_tokens
    prompt, first, second, count = _cells(ids, owner, e)

    def summed(values: Floats) -> Floats:
        cells = np.bincount(first * e + second, weights=values, minlength=e * e)
        return np.asarray(cells, dtype=np.float64).reshape(e, e)

    both = summed(count)
    # a prompt's share of a pair's excess over rates alone: N_ij^p − E_ij · c^p, c^p = N_i^p/N_i + N_j^p/N_j − n^p/n
    with np.errstate(invalid="ignore", divide="ignore"):
        of = np.nan_to_num(used / total)
        part = n / all_tokens if rows.size else n
        gram, along = of.T @ of, of.T @ part
        squares = (
            np.diag(gram)[:, None] + np.diag(gram) + 2 * gram - 2 * (along[:, None] + along) + part @ part
        )
        c = of[prompt, first] + of[prompt, second] - part[prompt]
        square = summed(count**2 - 2 * count * c * expected[first, second]) + expected**2 * squares
        variance = _of_shares(square, both - expected, p)
        # the same against the same texts: N_ij^p − r_ij^p (N_i^p N_j^p − N_ij^p) / (n^p − 1)
        each = np.where(n > 1, 1 / np.maximum(n - 1, 1), 0.0)
        apart, spread = _exclusion(used, n)
        pooled, width = _exclusion(total[None], np.array([all_tokens]))
        near = total[:, None] * total / all_tokens**2 * (1 - np.outer(pooled[0], pooled[0]) / width[0])
        fit = np.where(near > 0, rates / near, 0.0)

        def gram_of(values: Floats, weight: Floats) -> Floats:
            product: Floats = (values * weight[:, None]).T @ values
            return product

        r = fit[first, second] * (1 - apart[prompt, first] * apart[prompt, second] / spread[prompt])
        alone = r * used[prompt, first] * used[prompt, second] * each[prompt]
        share = alone - r * count * each[prompt]
        mixed = fit * (gram_of(used, each) - gram_of(used * apart, each / spread)) - summed(alone - share)
        mixed = np.where(mixed > 0, mixed, np.nan)  # texts of one token each do not say
        squared = fit**2 * (
            gram_of(used**2, each**2)
            - 2 * gram_of(used**2 * apart, each**2 / spread)
            + gram_of((used * apart) ** 2, (each / spread) ** 2)
        )
        # sparse cells have N_ij^p > 0: there (count − share)², elsewhere the square of what is expected alone
        text_square = squared + summed((count - share) ** 2 - alone**2)
        text_variance = _of_shares(text_square, both - mixed, p)
        # what a table of two by two with these margins leaves to chance
        free = (1 - expected / total[:, None]) * (1 - expected / total)
        lift = np.where(expected >= min_expected, both / expected, np.nan)
    where = np.nonzero(np.triu(expected >= min_expected, 1))
    lift = np.where(np.tri(e, dtype=bool), lift.T, lift)
    return _Layer(
        number=int(text.layers[layer]),
        tokens=int(rows.size),
        first=where[0],
        second=where[1],
        both=both[where],
        used=total,
        prompts=summed(np.ones(count.size))[where].astype(np.int64),
        expected=expected[where],
        error=np.sqrt(np.maximum(variance, expected * free))[where],
        text_expected=mixed[where],
        text_error=np.sqrt(np.maximum(text_variance, mixed * free))[where],
        lift=lift,
    )


def _exclusion(used: Floats, n: Floats) -> tuple[Floats, Floats]:
    """(P, E) 1 − π and (P,) d = Σ π(1 − π) of each prompt: π_ij ≈ π_i π_j (1 − (1 − π_i)(1 − π_j)/d) (Hájek 1964)."""
    rest = 1 - used / np.maximum(n, 1)[:, None]
    spread = (rest * (1 - rest)).sum(axis=1)
    return np.where(spread[:, None] > 0, rest, 0.0), np.where(spread > 0, spread, 1.0)


def _of_shares(square: Floats, total: Floats, n: int) -> Floats:
    """Variance of a sum of n independent shares, from their sum of squares and their sum."""
    return (square - total**2 / n) * n / (n - 1) if n > 1 else np.full(square.shape, np.nan)


def _cells(ids: Ints, owner: Ints, e: int) -> tuple[Ints, Ints, Ints, Floats]:
    """(C,) prompt, expert, other, and how many of its tokens chose both: expert < other."""
    ids = np.sort(np.where(ids < e, ids, e), axis=1)
    i, j = np.triu_indices(ids.shape[1], 1)
    there = ids[:, j] < e
    key = ((owner[:, None] * e + ids[:, i]) * e + np.minimum(ids[:, j], e - 1))[there]
    cell, count = np.unique(key, return_counts=True)
    rest, second = np.divmod(cell, e)
    prompt, first = np.divmod(rest, e)
    return prompt, first, second, count.astype(np.float64)
