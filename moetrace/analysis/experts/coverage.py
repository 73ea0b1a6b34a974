"""Which texts bring every expert enough tokens."""

from __future__ import annotations

import heapq
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
    brings = _brings(text, wanted)
    left = wanted.ravel().copy()
    length = np.maximum(np.bincount(text.owner, minlength=text.n_requests), 1)

    def gain(request: int) -> float:
        mine = slice(brings.indptr[request], brings.indptr[request + 1])
        return float(np.minimum(brings.data[mine], left[brings.indices[mine]]).sum())

    # gains only fall: what was the best and still is, is (Minoux 1978)
    queue = [(-gain(i) / length[i], i) for i in range(text.n_requests)]
    heapq.heapify(queue)
    chosen: list[int] = []
    gained: list[float] = []
    while queue and left.any():
        _, best = heapq.heappop(queue)
        now = gain(best)
        if now <= 0:
            continue
        if queue and (-now / length[best], best) > queue[0]:
            heapq.heappush(queue, (-now / length[best], best))
            continue
        chosen.append(best)
        gained.append(now)
        mine = slice(brings.indptr[best], brings.indptr[best + 1])
        left[brings.indices[mine]] = np.maximum(left[brings.indices[mine]] - brings.data[mine], 0)
    added = np.zeros((n_layers, e))
    for layer in range(n_layers):
        ids = text.experts[np.isin(text.owner, chosen), layer].astype(np.int64)
        added[layer] = np.bincount(ids[ids < e], minlength=e)
    lacking = np.maximum(wanted - added, 0)
    return Cover(np.array(chosen, dtype=np.int64), np.array(gained), added, lacking)


def _brings(text: RoutedText, wanted: Floats) -> sparse.csr_array:
    """How many tokens each request brings to each expert that needs some: (R, L·E)."""
    n_layers, e = wanted.shape
    parts = []
    for layer in range(n_layers):
        ids = text.experts[:, layer].astype(np.int64)
        used = (ids < e) & np.append(wanted[layer] > 0, False)[np.minimum(ids, e)]
        cell = (text.owner[:, None] * e + np.minimum(ids, e - 1))[used]
        found, count = np.unique(cell, return_counts=True)
        parts.append(sparse.coo_array((count, (found // e, found % e)), shape=(text.n_requests, e)))
    return sparse.csr_array(sparse.hstack(parts, format="csr"))
