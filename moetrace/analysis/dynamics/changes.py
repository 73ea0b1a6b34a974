"""A change of routing along texts: where it may lie, whether it is a change or a drift, and in how many prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moetrace._native import split_divergence
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.statistics.nulls import clopper_pearson, ratio_interval
from moetrace.analysis.statistics.shapes import Floats, Ints

Fit = Literal["change", "drift", "either"]

_DRAWS = 49
_FOLDS = 5


@dataclass(frozen=True)
class Change:
    """What else can be said where early and late tokens of a stretch of steps are routed differently.

    Attributes
    ----------
    low, high
        95 % of redrawn sets of prompts have their largest difference at a step from ``low`` to ``high``.
    fits
        Which predicts held-out prompts better: usage that is one before a step and another from it on ("change"), or
        usage that changes by as much from each step to the next ("drift"); "either" where the 95 % interval over
        prompts of the difference holds 0.
    share, share_low, share_high
        Of the prompts, how many change as the others do. By chance alone half of them would.
    """

    low: int
    high: int
    fits: Fit
    share: float
    share_low: float
    share_high: float


def describe_change(
    text: RoutedText, rows: Ints, step: Ints, at: int, min_steps: int, rng: np.random.Generator
) -> Change:
    """Describe a change at step ``at`` of the rows of a text, of which ``step`` (n,) counts from 0 on."""
    owner = np.unique(text.owner[rows], return_inverse=True)[1]
    n_prompts, width = int(owner.max()) + 1, int(step.max()) + 1
    experts = text.by_layer()
    places = [
        _largest(experts, rows, step, weight[owner], width, min_steps, text.n_expert)
        for weight in rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), _DRAWS)
    ]
    low, high = np.quantile(places, (0.025, 0.975), method="nearest").astype(int).tolist()
    share = _share(text, rows, owner, step >= at, n_prompts)
    return Change(low, high, _fit(text, rows, owner, step, min_steps, rng), *share)


def _largest(
    experts: npt.NDArray[np.uint16],
    rows: Ints,
    step: Ints,
    weight: Ints,
    width: int,
    min_steps: int,
    n_expert: int,
) -> int:
    """The step at which rows, each taken ``weight`` times, differ most before and after."""
    by_step = np.argsort(step, kind="stable")
    times = weight[by_step]
    order = np.repeat(rows[by_step], times).astype(np.int32)
    begin = np.searchsorted(np.repeat(step[by_step], times), np.arange(width + 1))
    apart = split_divergence(experts, order[None], begin, n_expert)[0, min_steps - 1 : width - min_steps]
    return int(apart.argmax()) + min_steps


def _picks(text: RoutedText, rows: Ints) -> tuple[Ints, Ints]:
    """Which rows (by place) picked which cell (layer, expert): two arrays, one entry per pick that is there."""
    ids = text.experts[rows].astype(np.int64)
    there = ids < text.n_expert
    cell = ids + (np.arange(ids.shape[1]) * text.n_expert)[None, :, None]
    place = np.broadcast_to(np.arange(rows.size)[:, None, None], ids.shape)
    return place[there], cell[there]


def _share(
    text: RoutedText,
    rows: Ints,
    owner: Ints,
    late: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    n_prompts: int,
) -> tuple[float, float, float]:
    n_cells = text.experts.shape[1] * text.n_expert
    place, cell = _picks(text, rows)
    own, side = owner[place], late[place].astype(np.int64)
    counts = np.bincount((side * n_prompts + own) * n_cells + cell, minlength=2 * n_prompts * n_cells)
    usage = counts.reshape(2, n_prompts, n_cells).astype(np.float32)
    tokens = np.bincount(late * n_prompts + owner, minlength=2 * n_prompts).reshape(2, n_prompts, 1)
    both = np.asarray((tokens > 0).all(axis=0)).reshape(-1)
    if both.sum() < 2:
        return (float("nan"),) * 3
    moved = usage[1, both] / tokens[1, both] - usage[0, both] / tokens[0, both]
    along = (moved * (moved.sum(axis=0) - moved)).sum(axis=1) > 0
    low, high = clopper_pearson(along.sum(), along.size)
    # by chance alone half of the others would move along
    share = [float(np.clip(2 * float(x) - 1, 0.0, 1.0)) for x in (along.mean(), low, high)]
    return share[0], share[1], share[2]


def _fit(
    text: RoutedText, rows: Ints, owner: Ints, step: Ints, min_steps: int, rng: np.random.Generator
) -> Fit:
    n_prompts, width = int(owner.max()) + 1, int(step.max()) + 1
    if n_prompts < 2 * _FOLDS:
        return "either"
    n_cells = text.experts.shape[1] * text.n_expert
    experts = text.by_layer()
    place, cell = _picks(text, rows)
    fold = rng.permutation(n_prompts) % _FOLDS
    gain, n = np.zeros((2, n_prompts))
    t = step - (width - 1) / 2
    for which in range(_FOLDS):
        train = fold[owner] != which
        test = ~train
        at = _largest(experts, rows, step, train.astype(np.int64), width, min_steps, text.n_expert)
        late = step >= at
        mine = train[place]

        def usage(weight: Floats, mine: Ints = mine) -> Floats:
            return np.asarray(
                np.bincount(cell[mine], weights=weight[place[mine]], minlength=n_cells), np.float64
            )

        # by least squares: one mean before and one after, or a straight line
        n_late = late[train].sum()
        sides = usage((~late).astype(float)) / (train.sum() - n_late), usage(late.astype(float)) / n_late
        centre = t[train].mean()
        slope = usage(t - centre) / ((t[train] - centre) ** 2).sum()
        middle = usage(np.ones(rows.size)) / train.sum()
        out = test[place]
        p, c = place[out], cell[out]
        told_change = np.where(late[p], sides[1][c], sides[0][c])
        told_drift = middle[c] + slope[c] * (t[p] - centre)
        squared = np.array([(side**2).sum() for side in sides])[late[test].astype(int)]
        moved = t[test] - centre
        squared_drift = (middle**2).sum() + 2 * (middle @ slope) * moved + (slope @ slope) * moved**2
        better = np.bincount(owner[p], weights=2 * (told_change - told_drift), minlength=n_prompts)
        better -= np.bincount(owner[test], weights=squared - squared_drift, minlength=n_prompts)
        gain += better
        n += np.bincount(owner[test], minlength=n_prompts)
    found = ratio_interval(gain, n)
    return "change" if found.low > 0 else "drift" if found.high < 0 else "either"
