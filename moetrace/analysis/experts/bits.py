"""How many bits the experts of each layer shall have."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError


def expert_energy(
    text: RoutedText,
    outputs: Sequence[npt.NDArray[np.float32]],
    *,
    weighed: bool = False,
    level: float = 0.95,
) -> pd.DataFrame:
    """How much the experts of each layer add: the sum over a token's experts of (weight × norm of the output)².

    An error of relative size ε in an expert's matrices puts an error of about ε × weight × norm into what the layer
    adds; errors of different experts are not alike, so that their squares add.

    Parameters
    ----------
    text, outputs, weighed
        As for :func:`~moetrace.analysis.experts.importance.expert_importance`.

    Returns
    -------
    DataFrame
        A row per layer: ``layer``; ``energy``, the mean over tokens, with ``energy_low`` and ``energy_high`` by the
        delete-one-prompt jackknife; ``tokens``; ``by_expert``, a list of each expert's part, which sums to 1.

    Raises UsageError if a layer has no token whose outputs are known.
    """
    rows = []
    for i, layer in enumerate(text.layers.tolist()):
        made = outputs[i].astype(np.float64)
        if not weighed:
            if text.weights is None:
                raise UsageError("mixing weights are not known", fix="capture experts,weights,outputs")
            made = made * text.weights[:, i]
        energy = np.where(text.experts[:, i] < text.n_expert, made**2, 0.0)
        known = np.isfinite(energy).all(axis=1) & (text.experts[:, i] < text.n_expert).any(axis=1)
        if not known.any():
            raise UsageError(f"what the experts of layer {layer} made is not known", fix="record the layer")
        owner, n = text.owner[known], text.n_requests
        top = np.bincount(owner, energy[known].sum(axis=1), minlength=n).astype(np.float64)
        bottom = np.bincount(owner, minlength=n).astype(np.float64)
        found = nulls.ratio_interval(top[:, None], bottom[:, None], level)
        ids = np.minimum(text.experts[known, i].astype(np.int64), text.n_expert)
        of = np.bincount(ids.ravel(), energy[known].ravel(), minlength=text.n_expert + 1)[:-1]
        rows.append(
            {
                "layer": layer,
                "energy": float(top.sum() / bottom.sum()),
                "energy_low": max(float(found.low[0]), 0.0),
                "energy_high": float(found.high[0]),
                "tokens": int(bottom.sum()),
                "by_expert": (of / of.sum()).tolist() if of.sum() > 0 else [1 / of.size] * of.size,
            }
        )
    return pd.DataFrame(rows)


def allocate(n_bytes: npt.ArrayLike, cost: npt.ArrayLike, budget: float) -> Ints:
    """Choose one option of each unit so that the summed cost is small and the bytes are at most ``budget``.

    Every unit begins with its smallest option. Then the step that saves most cost for its bytes is taken, of those on
    the lower convex hull of each unit's options, as long as steps fit (the greedy solution of the linear relaxation;
    Shoham and Gersho 1988, doi:10.1109/29.90373): what it misses of the best choice is less than one step.

    Parameters
    ----------
    n_bytes, cost
        (U, B): bytes and cost of each unit's options, in any order.

    Returns
    -------
    (U,) int64, which option each unit has.

    Raises UsageError if not even the smallest options fit.
    """
    size, loss = np.asarray(n_bytes, np.float64), np.asarray(cost, np.float64)
    hulls = [_hull(size[u], loss[u]) for u in range(len(size))]
    at = [0] * len(size)
    left = budget - sum(size[u, hull[0]] for u, hull in enumerate(hulls))
    if left < 0:
        raise UsageError("not even the smallest types fit", fix="allow more bytes, or name smaller types")

    def step(u: int) -> tuple[float, int] | None:
        hull = hulls[u]
        if at[u] + 1 == len(hull):
            return None
        a, b = hull[at[u]], hull[at[u] + 1]
        return -(loss[u, a] - loss[u, b]) / (size[u, b] - size[u, a]), u

    steps = [found for u in range(len(size)) if (found := step(u)) is not None]
    heapq.heapify(steps)
    while steps:
        _, u = heapq.heappop(steps)
        more = size[u, hulls[u][at[u] + 1]] - size[u, hulls[u][at[u]]]
        if more > left:
            continue  # a smaller step of another unit may fit
        left -= more
        at[u] += 1
        if (found := step(u)) is not None:
            heapq.heappush(steps, found)
    return np.array([hull[i] for hull, i in zip(hulls, at, strict=True)], np.int64)


def _hull(size: Floats, loss: Floats) -> list[int]:
    """Options on the lower convex hull, smallest first: each next one costs less, for ever more bytes per cost."""
    order = np.lexsort((loss, size)).tolist()
    hull: list[int] = []
    for i in order:
        if hull and (loss[i] >= loss[hull[-1]] or size[i] == size[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[a] - loss[b]) * (size[i] - size[b]) > (loss[b] - loss[i]) * (size[b] - size[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
