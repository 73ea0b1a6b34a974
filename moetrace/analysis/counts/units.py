"""Prompts that stand together: as many as a table of prompts can be long, of one domain each.

Tests of domains exchange whole prompts, and intervals leave out one at a time. Of very many prompts, groups drawn at
random take their place: the delete-a-group jackknife (Kott 2001), and exchanges of groups of equal numbers of prompts,
which are as exchangeable as prompts are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moetrace.analysis.statistics.shapes import Ints

#: so many groups tell as much as prompts do
ENOUGH = 2048
#: fewer of a domain than so many are few: then groups are smaller, as far as memory allows
FEWEST = 16


def taken_together(domains: Sequence[str], at_most: int) -> Ints:
    """Give each prompt the number of its group, (P,) int64: ``domains`` (P,) are the prompts'.

    Groups hold as many prompts (those of a domain differ by one; a domain with fewer is one group), drawn at random
    within the domain. There are about ``at_most`` groups or fewer; as few as :data:`ENOUGH`, unless a domain would
    have fewer than :data:`FEWEST`. Prompts stay alone, in order, if there are no more than ``at_most``.
    """
    n = len(domains)
    if n <= at_most:
        return np.arange(n)
    names, code, sizes = np.unique(np.array(domains, np.str_), return_inverse=True, return_counts=True)
    rare = sizes[names != ""].min(initial=n)
    each = max(-(-n // at_most), min(-(-n // ENOUGH), int(rare) // FEWEST))
    out, begun = np.empty(n, dtype=np.int64), 0
    rng = np.random.default_rng(0)
    for domain in range(names.size):
        mine = rng.permutation(np.flatnonzero(code == domain))
        groups = max(1, mine.size // each)
        out[mine] = begun + np.arange(mine.size) % groups
        begun += groups
    return out


def evenly(domains: Sequence[str], at_most: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw ``at_most`` prompts, as many of each domain as of the others, as far as it has them: a mask (P,)."""
    _, code, sizes = np.unique(np.array(domains, np.str_), return_inverse=True, return_counts=True)
    # who would be how many-th of its domain, in a random order
    order = rng.permutation(code.size)
    order = order[np.argsort(code[order], kind="stable")]
    rank = np.empty(code.size, dtype=np.int64)
    rank[order] = np.arange(code.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(code.size, dtype=bool)
    chosen[np.lexsort((rng.random(code.size), rank))[:at_most]] = True
    return chosen
