"""What routing by pure chance looks like: the constants to hold any agreement against.

All functions take E, the number of experts of a layer, and k, how many of them a token uses, and assume that
every token draws a k-subset uniformly and independently (no expert preferred, no memory). Real routers prefer
some experts, so their own marginal baseline (:mod:`moetrace.analysis.dynamics.temporal`) is the stricter one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from moetrace.errors import UsageError


@dataclass(frozen=True)
class Chance:
    """Agreement of two independent uniform k-subsets of E experts.

    Attributes
    ----------
    top1
        P(both have the same first expert) = 1/E.
    jaccard
        E|A∩B|/|A∪B|, the mean over the hypergeometric distribution of |A∩B|.
    any_shared
        P(A∩B is not empty) = 1 − C(E−k, k)/C(E, k) (Mixtral, arXiv 2401.04088, table 5).
    coactivation
        P(expert j is used | expert i ≠ j is used by the same token) = (k−1)/(E−1).
    overlap
        E|A∩B|/k = k/E.
    """

    n_expert: int
    n_expert_used: int
    top1: float
    jaccard: float
    any_shared: float
    coactivation: float
    overlap: float


def chance(n_expert: int, n_expert_used: int) -> Chance:
    """Chance constants for uniform routing of ``n_expert_used`` out of ``n_expert``.

    Raises
    ------
    UsageError
        If not 1 ≤ k ≤ E.
    """
    e, k = n_expert, n_expert_used
    if not 1 <= k <= e:
        raise UsageError(f"no routing of {k} out of {e} experts", fix="give 1 <= n_expert_used <= n_expert")
    ways = comb(e, k)
    jaccard = sum(j / (2 * k - j) * comb(k, j) * comb(e - k, k - j) for j in range(1, k + 1)) / ways
    return Chance(
        n_expert=e,
        n_expert_used=k,
        top1=1 / e,
        jaccard=jaccard,
        any_shared=1 - comb(e - k, k) / ways,
        coactivation=(k - 1) / (e - 1) if e > 1 else 0.0,
        overlap=k / e,
    )
