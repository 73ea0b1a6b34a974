"""How many different experts several tokens need together: of one text, as drafts do, or of several, as batches do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText, usage
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError

SIZES = (1, 2, 4, 8, 16, 32)


def distinct_experts(
    text: RoutedText, sizes: Sequence[int] = SIZES, *, expert_bytes: npt.ArrayLike | None = None
) -> pd.DataFrame:
    """Distinct experts of a layer that n tokens need.

    *Consecutive*: n tokens after each other in one text, as a draft that is verified at once; the mean over all places.
    *Batch*: one token of each of n texts, as slots that decode together; exact for texts drawn at random, from the
    rates of each, Σ_e 1 − (1 − mean of π_e over texts)^n. Beside them *even*: n tokens with even use,
    E(1 − (1 − k/E)^n); and *shuffled*: n tokens drawn from the text's own tokens in any order,
    Σ_e 1 − C(T − c_e, n)/C(T, n), which says what their order adds.

    Parameters
    ----------
    sizes
        The n.
    expert_bytes
        (L,) bytes of one expert of each layer.

    Returns
    -------
    pandas.DataFrame
        One row per (layer, n), and with ``layer`` −1 the sums over layers: ``consecutive`` with ``low`` and ``high``
        (jackknife over prompts; NaN for one prompt, or where no text has n tokens), ``places`` how many;
        ``shuffled``; ``batch``; ``even``; ``experts`` of the layer; with sizes ``bytes_consecutive`` and
        ``bytes_batch``, per token: distinct experts times bytes, over n.

    Raises UsageError for an n below 1.
    """
    wanted = sorted(set(sizes))
    if not wanted or wanted[0] < 1:
        raise UsageError(f"{wanted[:1]} tokens need nothing", fix="give 1 or more")
    text = text.by_name()
    e, n_layers = text.n_expert, text.experts.shape[1]
    each = None if expert_bytes is None else np.asarray(expert_bytes, dtype=np.float64)
    shape = (n_layers, len(wanted), text.n_requests)
    distinct, places, mixed = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    batch, even = np.zeros(shape[:2]), np.zeros(shape[:2])
    for layer in range(n_layers):
        known = np.flatnonzero(text.known(layer))
        ids = text.experts[known, layer].astype(np.int64)
        owner = text.owner[known]
        # stretches of rows that follow each other, and have routing here
        begins = np.append(
            True, (np.diff(known) > 1) | (np.diff(text.runs[known]) != 0) | (np.diff(owner) != 0)
        )
        begins = begins[: known.size]
        used = usage(ids, owner, text.n_requests, e)
        size = np.bincount(owner, minlength=text.n_requests)
        there = size > 0
        rate = used[there] / size[there][:, None]
        k = float((ids < e).sum()) / max(known.size, 1)
        windows = _Windows(ids, begins, owner, e, text.n_requests)
        for i, n in enumerate(wanted):
            distinct[layer, i], places[layer, i] = windows.distinct(n)
            mixed[layer, i] = places[layer, i] * _drawn(used, size, n)
            batch[layer, i] = (1 - (1 - rate.mean(axis=0)) ** n).sum() if there.any() else np.nan
            even[layer, i] = e * (1 - (1 - k / e) ** n)
    rows = []
    numbers = [*text.layers.tolist(), -1]
    for at, number in enumerate(numbers):
        mine = slice(at, at + 1) if number >= 0 else slice(None)
        for i, n in enumerate(wanted):
            top, bottom = distinct[mine, i], places[mine, i]
            with np.errstate(invalid="ignore", divide="ignore"):
                value = (top.sum(axis=1) / bottom.sum(axis=1)).sum()
                without = ((top.sum(axis=1)[:, None] - top) / (bottom.sum(axis=1)[:, None] - bottom)).sum(
                    axis=0
                )
                shuffled = (mixed[mine, i].sum(axis=1) / bottom.sum(axis=1)).sum()
            there = bottom.sum(axis=0) > 0
            interval = nulls.jackknife(value, without[there])
            row = {
                "layer": number,
                "n": n,
                "consecutive": value,
                "low": float(interval.low),
                "high": float(interval.high),
                "places": int(bottom.max(axis=0).sum()),
                "shuffled": shuffled,
                "batch": batch[mine, i].sum(),
                "even": even[mine, i].sum(),
                "experts": e * len(numbers[:-1]) if number < 0 else e,
            }
            if each is not None:
                weight = each[mine]
                with np.errstate(invalid="ignore", divide="ignore"):
                    row["bytes_consecutive"] = (top.sum(axis=1) / bottom.sum(axis=1) * weight).sum() / n
                row["bytes_batch"] = (batch[mine, i] * weight).sum() / n
            rows.append(row)
    return pd.DataFrame(rows)


class _Windows:
    """One layer's accesses, with the place of each and of the one before it of the same expert in the same stretch."""

    def __init__(
        self, ids: Ints, begins: npt.NDArray[np.bool_], owner: Ints, e: int, n_requests: int
    ) -> None:
        m, k = ids.shape
        stretch = np.cumsum(begins) - 1
        start = np.flatnonzero(begins)
        self._length = np.diff(np.append(start, m))
        self._owner_of_stretch, self._n_requests = owner[start], n_requests
        place = np.arange(m) - start[stretch] if m else np.arange(0)
        token = np.repeat(np.arange(m), k)
        flat = ids.reshape(-1)
        there = flat < e
        token, flat = token[there], flat[there]
        # tokens ascend already
        order = np.argsort(stretch[token] * e + flat, kind="stable")
        token, flat = token[order], flat[order]
        self._at = place[token]
        mine = stretch[token]
        same = np.append(False, (flat[1:] == flat[:-1]) & (mine[1:] == mine[:-1]))[: flat.size]
        self._before = np.where(same, np.append(-1, self._at[:-1])[: flat.size], -1)
        self._room = self._length[mine] if m else mine
        self._owner = owner[token]

    def distinct(self, n: int) -> tuple[Floats, Floats]:
        """(R,) distinct experts summed over all windows of n tokens, and how many windows, of each request."""
        windows = np.maximum(self._length - n + 1, 0)
        # an access is the first of its expert in the windows that begin after the one before, and reach it
        low = np.maximum(np.maximum(self._before + 1, self._at - n + 1), 0)
        high = np.minimum(self._at, self._room - n)
        counts = np.maximum(high - low + 1, 0)
        return (
            np.bincount(self._owner, weights=counts, minlength=self._n_requests).astype(np.float64),
            np.bincount(self._owner_of_stretch, weights=windows, minlength=self._n_requests).astype(
                np.float64
            ),
        )


def _drawn(used: Ints, size: Ints, n: int) -> Floats:
    """(R,) distinct experts that n tokens drawn from a request's, without order, need on average; 0 if it has fewer."""
    from scipy.special import gammaln

    total = size[:, None].astype(np.float64)
    rest = total - used
    with np.errstate(invalid="ignore"):
        missed = np.exp(
            gammaln(rest + 1)
            - gammaln(rest - n + 1)
            - gammaln(total + 1)
            + gammaln(np.maximum(total - n, 0) + 1)
        )
    missed = np.where(rest >= n, missed, 0.0)
    return np.asarray(np.where(size >= n, (1 - missed).sum(axis=1), 0.0))
