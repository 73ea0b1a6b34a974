"""Which texts bring every expert enough tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.statistics.shapes import Floats, Ints


@dataclass(frozen=True)
class Cover:
    """What :func:`greedy_cover` gives.

    Attributes
    ----------
    chosen
        (S,) requests (indices), in the order in which they were chosen.
    gained
        (S,) tokens that each brought to experts that still needed them.
    added
        (L, E) tokens that the chosen ones bring.
    lacking
        (L, E) tokens that are needed still; 0 where there are enough.
    """

    chosen: Ints
    gained: Floats
    added: Floats
    lacking: Floats


def greedy_cover(text: RoutedText, need: npt.ArrayLike) -> Cover:
    """Choose requests until every expert has the tokens that it needs, or no other request brings any.

    Each time the request is taken that brings most needed tokens for its length (the greedy algorithm for covering
    integer programs, Dobson 1982: at most a logarithm of the largest sum worse than the best choice).

    Parameters
    ----------
    need
        (L, E) how many tokens each expert needs.
    """
    wanted = np.array(need, dtype=np.float64)
    n_layers, e = wanted.shape
    rows, columns = [], []
    for layer in range(n_layers):
        ids = text.experts[:, layer].astype(np.int64)
        used = (ids < e) & np.append(wanted[layer] > 0, False)[np.minimum(ids, e)]
        rows.append(np.broadcast_to(text.owner[:, None], ids.shape)[used])
        columns.append(layer * e + ids[used])
    cell, place = np.unique(np.concatenate(columns), return_inverse=True)
    shape = (text.n_requests, cell.size)
    brings = sparse.csr_array((np.ones(place.size), (np.concatenate(rows), place)), shape=shape)
    left = wanted.ravel()[cell]
    length = np.maximum(np.bincount(text.owner, minlength=text.n_requests), 1)
    free = np.ones(text.n_requests, dtype=bool)
    chosen: list[int] = []
    gained: list[float] = []
    while left.any():
        useful = brings.copy()
        useful.data = np.minimum(useful.data, left[useful.indices])
        gain: Floats = np.asarray(useful.sum(axis=1)).ravel() * free
        best = int((gain / length).argmax())
        if gain[best] <= 0:
            break
        chosen.append(best)
        gained.append(float(gain[best]))
        free[best] = False
        mine = slice(brings.indptr[best], brings.indptr[best + 1])
        left[brings.indices[mine]] = np.maximum(left[brings.indices[mine]] - brings.data[mine], 0)
    added = np.zeros((n_layers, e))
    for layer in range(n_layers):
        ids = text.experts[np.isin(text.owner, chosen), layer].astype(np.int64)
        added[layer] = np.bincount(ids[ids < e], minlength=e)
    lacking = np.maximum(wanted - added, 0)
    return Cover(np.array(chosen, dtype=np.int64), np.array(gained), added, lacking)
