"""Does a token whose attention is similar in two contexts use similar experts in them?

Similarities of all pairs of contexts are no independent observations, so contexts are permuted, not pairs (Mantel
1967): the contexts' experts are dealt out anew, and the correlation reckoned again. Both attention and routing may
depend on where in the text the token stands: what position explains is taken out of both, contexts are exchanged with
those of the same position, or of the next one, only, and attention is compared on a window of fixed length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts.routed import membership
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats
from moetrace.errors import UsageError

#: fewer contexts than this are not tested
FEWEST = 8


@dataclass(frozen=True)
class ContextTest:
    """One token, one layer.

    ``correlation`` is Pearson's over pairs of contexts as they are, ``partial`` with what position explains taken out
    of both, with ``low`` and ``high`` (jackknife over contexts); ``p_value`` is one-sided: attention and routing are
    more alike together than position makes them. ``attention`` and ``routing`` are mean similarities. NaN where
    nothing varies.
    """

    contexts: int
    correlation: float
    partial: float
    low: float
    high: float
    p_value: float
    attention: float
    routing: float


def attention_similarity(windows: npt.NDArray[Any]) -> Floats:
    """Of contexts (n, heads, W), each head's vector summing to 1: Σ√(p·q), mean over heads (n, n); 1 if equal.

    The Bhattacharyya coefficient: unlike the cosine it is not ruled by the one or two largest weights.
    """
    root = np.sqrt(np.maximum(np.asarray(windows, dtype=np.float64), 0))
    flat = root.reshape(root.shape[0], -1)
    return np.asarray(flat @ flat.T / root.shape[1])


def routing_similarity(experts: npt.NDArray[Any], n_expert: int) -> Floats:
    """Of contexts' expert ids (n, k): |A ∩ B|/k, (n, n)."""
    used = membership(experts, n_expert).astype(np.float64)
    return np.asarray(used @ used.T / max(used.sum(axis=1).max(initial=0.0), 1.0))


def context_attention_routing(
    attention: npt.NDArray[np.float64],
    routing: npt.NDArray[np.float64],
    position: npt.ArrayLike,
    *,
    n_permutations: int = 999,
    seed: int = 0,
) -> ContextTest:
    """Mantel's test between two similarity matrices (n, n) of contexts, position (n,) taken out.

    Twice: the correlation is the partial one, given the pair's positions (difference and level, linear and square, and
    whether they are equal; Smouse, Long & Sokal 1986), and contexts are exchanged among those of equal position only;
    where a context is alone at its position, with the next that is. It is reckoned anew for every exchange, so that the
    test is exact where contexts are exchangeable.

    Raises UsageError for fewer than :data:`FEWEST` contexts.
    """
    n, nan = len(attention), float("nan")
    if n < FEWEST:
        raise UsageError(f"{n} contexts are too few", fix=f"give {FEWEST} or more")
    rng, place = np.random.default_rng((seed, 6)), np.asarray(position, dtype=np.float64)
    i, j = np.triu_indices(n, 1)
    x, y = attention[i, j], routing[i, j]
    plain, mean = _correlation(x, y), (float(x.mean()), float(y.mean()))
    basis = _position_basis(place, i, j)
    rest = x - basis @ (basis.T @ x), y - basis @ (basis.T @ y)
    if np.isnan(_correlation(*rest)):
        return ContextTest(n, plain, nan, nan, nan, nan, *mean)
    strata = _strata(place)
    reached = np.empty(n_permutations + 1)
    size = np.linalg.norm(rest[0])
    for b in range(n_permutations + 1):
        dealt = np.arange(n)
        if b:
            for stratum in strata:
                dealt[stratum] = rng.permutation(stratum)
        other = routing[dealt[i], dealt[j]]
        left = other @ other - ((basis.T @ other) ** 2).sum()
        reached[b] = rest[0] @ other / (size * np.sqrt(max(left, 1e-18)))
    without = [_correlation(*(r[(i != c) & (j != c)] for r in rest)) for c in range(n)]
    interval = nulls.jackknife(reached[0], np.array(without))
    return ContextTest(
        n,
        plain,
        float(reached[0]),
        float(np.clip(interval.low, -1, 1)),
        float(np.clip(interval.high, -1, 1)),
        float(nulls.permutation_p(reached)) if n_permutations else nan,
        *mean,
    )


def _strata(position: Floats) -> list[npt.NDArray[np.intp]]:
    """Contexts of equal position; those that are alone at theirs, two by two in order of position."""
    order = np.argsort(position, kind="stable")
    together = np.split(order, np.flatnonzero(np.diff(position[order])) + 1)
    alone = np.array([stratum[0] for stratum in together if stratum.size == 1], dtype=np.intp)
    return [s for s in together if s.size > 1] + [alone[i : i + 2] for i in range(0, alone.size, 2)]


def _position_basis(position: Floats, i: npt.NDArray[np.intp], j: npt.NDArray[np.intp]) -> Floats:
    """What may depend on the positions of the pairs (i, j): an orthonormal basis (pairs, at most 8), 1 included."""
    log = np.log1p(np.maximum(position, 0))
    apart, far = np.abs(log[i] - log[j]), np.abs(position[i] - position[j]) / max(1.0, float(position.max()))
    level = log[i] + log[j]
    design = np.stack((np.ones(i.size), apart, apart**2, far, far**2, far == 0, level, level**2), axis=1)
    left, size, _ = np.linalg.svd(design, full_matrices=False)
    return np.asarray(left[:, size > 1e-9 * size[0]])


def _correlation(x: Floats, y: Floats) -> float:
    """Pearson's; NaN where one of them does not vary."""
    if x.std() < 1e-9 or y.std() < 1e-9:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
