"""How routing changes while a text is generated: handoffs, phases, prefill against decode, right against wrong.

Persistence by lag and layer is in :mod:`moetrace.analysis.dynamics.temporal`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace._native import split_divergence
from moetrace.analysis.counts.counting import RoutingCounts
from moetrace.analysis.counts.routed import RoutedText, usage
from moetrace.analysis.dynamics.changes import describe_change
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.information import entropy_bits, jsd_bits, shares
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError


def handoffs(counts: RoutingCounts, level: float = 0.95) -> pd.DataFrame:
    """How many layers change their first expert from one token to the next.

    Returns one row per layer and one for all together (``layer`` −1: the sum over layers, handoffs per token):
    ``pairs`` of neighbours; ``handoffs`` per token, ``shuffle`` (the exact mean over all orders of each prompt's
    tokens), ``fewer`` = shuffle − handoffs with ``low`` and ``high`` (jackknife over prompts): above 0, order
    makes experts stay.
    """
    if not counts.max_lag:
        raise UsageError("these counts were made without neighbours", fix="count with max_lag of 1 or more")
    n = counts.tokens.astype(np.float64)
    c = counts.top1.astype(np.float64)
    pairs = counts.lag_pairs[:, :, 0].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        same = np.where(pairs > 0, (c * (c - 1)).sum(axis=2) / (n * (n - 1)), 0.0)
        changed, expected = pairs - counts.lag_top1[:, :, 0], pairs * (1 - same)
        per_layer = nulls.ratio_interval(expected - changed, pairs, level)
        steps = pairs.max(axis=1, keepdims=True)
        together = nulls.ratio_interval((expected - changed).sum(axis=1, keepdims=True), steps, level)
        observed = np.append((changed.sum(axis=0) / pairs.sum(axis=0)), changed.sum() / steps.sum())
        shuffle = np.append((expected.sum(axis=0) / pairs.sum(axis=0)), expected.sum() / steps.sum())
    return pd.DataFrame(
        {
            "layer": np.append(counts.layers, -1),
            "pairs": np.append(counts.lag_pairs[:, :, 0].sum(axis=0), int(steps.sum())),
            "handoffs": observed,
            "shuffle": shuffle,
            "fewer": shuffle - observed,
            "low": np.append(per_layer.low, together.low),
            "high": np.append(per_layer.high, together.high),
        }
    )


@dataclass(frozen=True)
class Phases:
    """Early and late steps of the generation that are routed differently, in prompts taken together.

    Attributes
    ----------
    common
        One row per stretch of steps between changes: ``start``, ``end`` (steps from the first row, end not
        included), ``prompts`` that reach it, ``change`` (the step of the largest difference between before and after,
        or NA), ``jsd_bits`` of it (mean over layers), ``null_bits`` its 95 % quantile if order does not matter,
        ``p_value``, and the ``level`` that it is held to. A stretch with ``p_value`` ≤ ``level`` has ``low``,
        ``high``, ``fits``, ``share``, ``share_low`` and ``share_high``
        (:class:`~moetrace.analysis.dynamics.changes.Change`); if it is no drift, it is divided, and its parts follow,
        held to half its level.
    curve
        One row per step of the first stretch: ``step``, ``jsd_bits`` if the change were there, ``null_q95``.
    """

    common: pd.DataFrame
    curve: pd.DataFrame


def generation_phases(
    text: RoutedText,
    *,
    min_steps: int = 8,
    alpha: float = 0.05,
    n_permutations: int = 199,
    max_rows: int = 8000,
    seed: int = 0,
) -> Phases:
    """Look for early and late steps that are routed differently, against the same prompts, some read backwards.

    The divergence between the tokens before and after a step (Jensen-Shannon, weighted by their numbers, mean
    over layers, all prompts added up step by step) is largest at a change. Without phases a generation looks the
    same read forwards and backwards, so each prompt's rows are reversed or not, at random: that keeps how experts
    follow each other, how prompts differ, and how long they are. With n prompts p-values cannot fall below
    2^(1 − n): 6 prompts at least. Whatever makes early tokens unlike late ones rejects: a change at a step, a drift,
    a few first tokens; :func:`~moetrace.analysis.dynamics.changes.describe_change` tells them apart where it can.

    Parameters
    ----------
    min_steps
        Shortest phase.
    """
    used = text.some(max_rows, seed, "beginning")
    rng = np.random.default_rng(seed)
    experts = used.by_layer()
    step = np.arange(len(used)) - np.repeat(used.starts[:-1], np.diff(used.starts))
    longest = int(np.diff(used.starts).max(initial=0))
    rows: list[dict[str, object]] = []
    curve = pd.DataFrame({"step": [], "jsd_bits": [], "null_q95": []})
    waiting = [(0, longest, alpha)]
    while waiting:
        start, end, level = waiting.pop(0)
        inside = np.flatnonzero((step >= start) & (step < end))
        sizes = np.bincount(used.owner[inside], minlength=used.n_requests)
        mine = sizes[sizes > 0]
        width = end - start
        if width < 2 * min_steps or not inside.size:
            rows.append(_stretch(start, end, mine.size))
            continue
        first = np.repeat(np.cumsum(mine) - mine, mine)
        place = np.arange(inside.size) - first
        back = first + np.repeat(mine, mine) - 1 - place
        here = step[inside] - start
        by_step = np.argsort(here, kind="stable")
        begin = np.searchsorted(here[by_step], np.arange(width + 1))
        turned = np.repeat(rng.random((n_permutations + 1, mine.size)) < 0.5, mine, axis=1)
        turned[0] = False
        order = inside[np.where(turned, back, np.arange(inside.size))[:, by_step]].astype(np.int32)
        null = split_divergence(experts, order, begin, used.n_expert)
        null = null[:, min_steps - 1 : width - min_steps]
        largest = null.max(axis=1)
        p = float(nulls.permutation_p(largest))
        at = int(null[0].argmax()) + min_steps + start
        if not rows:
            curve = pd.DataFrame(
                {
                    "step": np.arange(min_steps, width - min_steps + 1),
                    "jsd_bits": null[0],
                    "null_q95": np.quantile(null[1:], 0.95, axis=0),
                }
            )
        rows.append(
            _stretch(start, end, mine.size)
            | {
                "change": at,
                "jsd_bits": largest[0],
                "null_bits": float(np.quantile(largest[1:], 0.95)),
                "p_value": p,
                "level": level,
            }
        )
        if p <= level:
            change = describe_change(used, inside, here, at - start, min_steps, rng)
            rows[-1] |= asdict(change) | {"low": start + change.low, "high": start + change.high}
            if change.fits != "drift":
                waiting += [(start, at, level / 2), (at, end, level / 2)]
    common = pd.DataFrame(rows)
    for name in ("change", "low", "high"):
        common[name] = common[name].astype("Int64")
    return Phases(common, curve)


def _stretch(start: int, end: int, prompts: int) -> dict[str, object]:
    nothing = dict.fromkeys(("jsd_bits", "null_bits", "p_value", "level"), float("nan"))
    unknown = dict.fromkeys(("share", "share_low", "share_high"), float("nan"))
    places = dict.fromkeys(("low", "high"), pd.NA)
    return {
        **{"start": start, "end": end, "prompts": prompts, "change": pd.NA},
        **nothing,
        **places,
        "fits": "",
        **unknown,
    }


def phase_comparison(
    prefill: RoutedText, decode: RoutedText, *, n_permutations: int = 999, seed: int = 0
) -> pd.DataFrame:
    """Compare prompt tokens with generated ones, prompt by prompt.

    Of each prompt as many tokens of either kind count, those nearest to where generation begins: then, if it makes no
    difference which is which, the two can be exchanged within a prompt, and so they are, at random.

    Returns one row per layer: ``prompts`` that have both, ``tokens`` of either kind; ``jsd_bits`` between the mean
    usages of both, ``jsd_null_bits`` (mean over exchanges); ``excess_bits``; ``hottest`` expert of each kind;
    ``p_value``, ``p_family`` over layers (max-T). NaN where fewer than two prompts have both.
    """
    where = {name: i for i, name in enumerate(decode.prompts)}
    both_have = [(i, where[name]) for i, name in enumerate(prefill.prompts) if name in where]
    n_layers = prefill.experts.shape[1]
    pairs = np.array(both_have, dtype=np.int64).reshape(-1, 2).T
    n_pairs = pairs.shape[1]
    tokens = np.zeros((n_pairs, n_layers), dtype=np.int64)
    rng = np.random.default_rng(seed)
    swap = np.vstack((np.zeros((1, n_pairs)), rng.integers(0, 2, (n_permutations, n_pairs)))).astype(np.int8)
    null = np.full((n_permutations + 1, n_layers), np.nan)
    hottest = np.zeros((2, n_layers), dtype=np.int64)
    enough = True
    for layer in range(n_layers):
        sides = [_Side(text, layer, which) for text, which in zip((prefill, decode), pairs, strict=True)]
        n = np.minimum(sides[0].sizes, sides[1].sizes)
        tokens[:, layer] = n
        a, b = (side.usage(n, last) for side, last in zip(sides, (True, False), strict=True))
        both = int((n > 0).sum())
        hottest[:, layer] = a.sum(axis=0).argmax(), b.sum(axis=0).argmax()
        enough &= both >= 2
        if both >= 2:
            moved = swap @ (b - a)
            means = np.stack((a.sum(axis=0) + moved, b.sum(axis=0) - moved), axis=1) / both
            null[:, layer] = jsd_bits(np.nan_to_num(means))
    mean = null[1:].mean(axis=0)
    return pd.DataFrame(
        {
            "layer": prefill.layers,
            "prompts": (tokens > 0).sum(axis=0),
            "tokens": tokens.sum(axis=0),
            "jsd_bits": null[0],
            "jsd_null_bits": mean,
            "excess_bits": null[0] - mean,
            "hottest_prefill": hottest[0],
            "hottest_decode": hottest[1],
            "p_value": nulls.permutation_p(null),
            "p_family": nulls.max_t(null) if enough else np.full(n_layers, np.nan),
        }
    )


class _Side:
    """Rows of some requests of a text at which a layer is known: ``sizes`` (P,) of each request."""

    def __init__(self, text: RoutedText, layer: int, requests: Ints) -> None:
        self._text, self._layer = text, layer
        known = np.flatnonzero(text.known(layer))
        number = np.full(text.n_requests, -1)
        number[requests] = np.arange(requests.size)
        mine = known[number[text.owner[known]] >= 0]
        self._rows, self._owner = mine, number[text.owner[mine]]
        self.sizes = np.bincount(self._owner, minlength=requests.size)

    def usage(self, n: Ints, last: bool) -> Floats:
        """(P, E) shares of the experts in the first, or last, ``n`` (P,) rows of each request; 0 where n is."""
        order = np.argsort(self._owner, kind="stable")
        owner, rows = self._owner[order], self._rows[order]
        place = np.arange(owner.size) - (np.cumsum(self.sizes) - self.sizes)[owner]
        taken = place >= (self.sizes - n)[owner] if last else place < n[owner]
        ids = self._text.experts[rows[taken], self._layer]
        return np.nan_to_num(shares(usage(ids, owner[taken], n.size, self._text.n_expert)))


def answers_match(generated: str, answer: object) -> bool:
    """Whether a generated text holds the expected answer: case and white space do not matter, and a number
    must stand by itself (12 is not in 312 or 12.5).
    """
    wanted = " ".join(str(answer).casefold().split())
    if not wanted:
        return False
    before, after = (
        r"(?<![\w.])" if wanted[0].isalnum() else "",
        r"(?!\w|\.\d)" if wanted[-1].isalnum() else "",
    )
    return re.search(before + re.escape(wanted) + after, " ".join(generated.casefold().split())) is not None


def correctness_features(
    counts: RoutingCounts,
    correct: Sequence[bool],
    *,
    strata: npt.ArrayLike | None = None,
    n_permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Do right and wrong outputs differ in how they are routed? ``counts`` of generated tokens, one per prompt.

    Returns one row per feature of a prompt (means over layers): ``persistence`` (same first expert as the token
    before), ``overlap`` (of the sets), ``entropy_bits`` (of the usage; fewer tokens give less) and
    ``tokens``. For each: the means of right and of wrong prompts, their difference, ``p_value`` (two-sided,
    right and wrong exchanged between prompts, within ``strata``), ``p_family`` over features (max-T).

    Raises UsageError if there are not two prompts of each kind.
    """
    right = np.asarray(correct, dtype=bool)
    if min(right.sum(), (~right).sum()) < 2:
        raise UsageError(
            f"{right.sum()} of {right.size} outputs are right: there are not two of each kind to compare",
            fix="ask more, or other, questions",
        )
    k = counts.n_expert_used.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = counts.lag_pairs[:, :, 0].astype(np.float64)
        values = {
            "persistence": np.nanmean(counts.lag_top1[:, :, 0] / pairs, axis=1),
            "overlap": np.nanmean(counts.lag_shared[:, :, 0] / pairs / k, axis=1),
            "entropy_bits": entropy_bits(np.nan_to_num(shares(counts.included))).mean(axis=1),
            "tokens": counts.tokens.max(axis=1).astype(np.float64),
        }
    domains = nulls.Domains.of(np.where(right, "right", "wrong"))
    rng = np.random.default_rng(seed)
    codes = nulls.permuted_codes(domains, n_permutations, rng, strata)
    x = np.nan_to_num(np.stack(list(values.values()), axis=1))
    is_right = (codes == 0).astype(np.float64)
    gap = is_right @ x / is_right.sum(axis=1, keepdims=True)
    gap -= (1 - is_right) @ x / (1 - is_right).sum(axis=1, keepdims=True)
    centred = np.abs(gap - gap.mean(axis=0))
    return pd.DataFrame(
        {
            "feature": list(values),
            "right": x[right].mean(axis=0),
            "wrong": x[~right].mean(axis=0),
            "difference": gap[0],
            "p_value": nulls.permutation_p(centred),
            "p_family": nulls.max_t(centred),
        }
    )
