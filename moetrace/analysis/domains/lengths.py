"""Classes of length: where domains' prompts differ in length, they are exchanged among prompts as long as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc

from moetrace.analysis.statistics.nulls import Domains
from moetrace.analysis.statistics.shapes import Ints

#: the longest prompt of a class has at most so many times the tokens of the shortest
WIDTH = 1.5
#: domains differ in length if the chance of such ranks is less, or if the mean lengths differ by this factor
CHANCE, FACTOR = 0.05, 2.0


@dataclass(frozen=True)
class LengthClasses:
    """Prompts by length: ``codes`` (P,) from the shortest on, the domains' ``medians`` (D,) in tokens, and ``alone``.

    These are domains none of whose prompts shares a class with one of another domain: what they differ in cannot be
    told from length.
    """

    codes: Ints
    medians: dict[str, float]
    alone: tuple[str, ...]


def length_classes(
    tokens: npt.ArrayLike, labels: npt.ArrayLike, *, always: bool = False
) -> LengthClasses | None:
    """Classes by the lengths ``tokens`` (P,) of prompts of domains ``labels`` (P,); None if domains are alike in it.

    They differ if ranks do (Kruskal-Wallis, 5 %), or if a domain's prompts are twice as long as another's in the
    mean: of few prompts ranks say little. With ``always`` they are taken to differ.
    """
    n, domains = np.asarray(tokens, dtype=np.float64), Domains.of(labels)
    by_domain = [n[domains.codes == d] for d in range(len(domains))]
    means = np.array([each.mean() for each in by_domain])
    if len(domains) < 2 or n.min() == n.max():
        return None
    alike = kruskal_wallis(n, domains) > CHANCE and means.max() < FACTOR * max(means.min(), 1.0)
    if alike and not always:
        return None
    order = np.argsort(n, kind="stable")
    codes = np.empty(n.size, dtype=np.int64)
    code, shortest = 0, n[order[0]]
    for i in order.tolist():
        if n[i] > WIDTH * shortest:
            code, shortest = code + 1, n[i]
        codes[i] = code
    shared = np.array([np.unique(domains.codes[codes == c]).size > 1 for c in range(code + 1)])
    meets = [bool(shared[codes[domains.codes == d]].any()) for d in range(len(domains))]
    return LengthClasses(
        codes,
        {name: float(np.median(each)) for name, each in zip(domains.names, by_domain, strict=True)},
        tuple(name for name, some in zip(domains.names, meets, strict=True) if not some),
    )


def kruskal_wallis(values: npt.ArrayLike, domains: Domains) -> float:
    """p-value of Kruskal & Wallis (1952), with ties, of values (P,): whether their ranks differ between domains.

    1 if all are alike. (``scipy.stats`` has it, but takes half a second to import.)
    """
    _, which, same = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    rank = (np.cumsum(same) - (same - 1) / 2)[which]
    n = rank.size
    ties = 1 - float(((same**3.0) - same).sum()) / (n**3 - n)
    if ties <= 0:
        return 1.0
    sums = np.bincount(domains.codes, weights=rank)
    h = 12 / (n * (n + 1)) * float((sums**2 / domains.sizes).sum()) - 3 * (n + 1)
    return float(chdtrc(len(domains) - 1, h / ties))
