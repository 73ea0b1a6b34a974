"""Does a token whose attention is similar in two contexts use similar experts in them?

Similarities of all pairs of contexts are no independent observations, so contexts are permuted, not pairs (Mantel
1967): the contexts' experts are dealt out anew, and the correlation reckoned again. Both attention and routing may
depend on where in the text the token stands; contexts are therefore exchanged among contexts of similar positions only,
and attention is compared on a window of fixed length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrace.analysis import nulls
from moetrace.analysis.rows import membership
from moetrace.errors import UsageError

Floats = npt.NDArray[np.float64]

# Contexts of neighbouring positions that are exchanged with each other.
_STRATUM = 3
#: fewer contexts than this are not tested
FEWEST = 8


@dataclass(frozen=True)
class ContextTest:
    """One token, one layer.

    ``correlation`` is Pearson's over pairs of contexts, with ``low`` and ``high`` (jackknife over contexts);
    ``null_mean`` what it is where contexts of similar positions are exchanged, ``p_value`` one-sided: attention and
    routing are more alike together than position makes them. ``attention`` and ``routing`` are mean similarities.
    NaN where nothing varies.
    """

    contexts: int
    correlation: float
    low: float
    high: float
    null_mean: float
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
    """Mantel's test between two similarity matrices (n, n) of contexts, within strata of ``position`` (n,).

    Raises UsageError for fewer than :data:`FEWEST` contexts.
    """
    n = len(attention)
    if n < FEWEST:
        raise UsageError(f"{n} contexts are too few", fix=f"give {FEWEST} or more")
    nan, rng = float("nan"), np.random.default_rng((seed, 6))
    i, j = np.triu_indices(n, 1)
    x = _standard(attention[i, j])
    y = routing[i, j]
    if x is None or _standard(y) is None:
        return ContextTest(n, nan, nan, nan, nan, nan, float(attention[i, j].mean()), float(y.mean()))
    order = np.lexsort((rng.random(n), np.asarray(position)))
    strata = np.array_split(order, max(1, n // _STRATUM))
    reached = np.empty(n_permutations + 1)
    scale = y.size * y.std()
    for b in range(n_permutations + 1):
        dealt = np.arange(n)
        if b:
            for stratum in strata:
                dealt[stratum] = rng.permutation(stratum)
        reached[b] = x @ routing[dealt[i], dealt[j]] / scale
    without = np.array([_without(attention, routing, c) for c in range(n)])
    interval = nulls.jackknife(reached[0], without)
    return ContextTest(
        n,
        float(reached[0]),
        float(np.clip(interval.low, -1, 1)),
        float(np.clip(interval.high, -1, 1)),
        float(reached[1:].mean()) if n_permutations else float("nan"),
        float(nulls.permutation_p(reached)),
        float(attention[i, j].mean()),
        float(y.mean()),
    )


def _standard(values: Floats) -> Floats | None:
    spread = values.std()
    return None if spread < 1e-12 else (values - values.mean()) / spread


def _without(attention: Floats, routing: Floats, c: int) -> float:
    """The correlation without context c; NaN where nothing varies any more."""
    rest = np.delete(np.arange(len(attention)), c)
    i, j = np.triu_indices(rest.size, 1)
    x, y = attention[rest[i], rest[j]], routing[rest[i], rest[j]]
    if x.std() < 1e-12 or y.std() < 1e-12:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
