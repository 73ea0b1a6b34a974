"""Tests of experts against kinds of token, the routing being rearranged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from moetrace.analysis.counts.routed import RoutedText, standardised
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints


def indicator(code: Ints, n: int) -> sparse.csr_array:
    """(n, M) 1 where a row has the code."""
    m = code.size
    return sparse.csr_array((np.ones(m, np.float32), (code, np.arange(m))), shape=(n, m))


Rearrange = Callable[[Ints, np.random.Generator], Ints]


@dataclass
class Associations:
    """Tests of experts against kinds of token: arrays (L, C, E), NaN where not tested."""

    text: RoutedText
    member: sparse.csr_array
    of_kind: Floats
    of_expert: Floats
    z: Floats
    p_value: Floats
    p_family: Floats

    @property
    def n_tested(self) -> int:
        return int((~np.isnan(self.p_value)).sum())

    def table(self, alpha: float, max_listed: int, names: Sequence[str], column: str) -> pd.DataFrame:
        """The strongest, with shares, lift and intervals."""
        score = np.where(np.isnan(self.p_value), -np.inf, self.z)
        order = np.argsort(-score, axis=None, kind="stable")
        with np.errstate(invalid="ignore"):
            sure = int((self.p_family <= alpha).sum())
        n = min(max(max_listed, sure), self.n_tested)
        rows = []
        for layer, kind, expert in np.stack(np.unravel_index(order[:n], score.shape), axis=1).tolist():
            rows.append(self._row(layer, kind, expert, names[kind]))
        columns = [
            "layer",
            "expert",
            column,
            "tokens",
            "of_expert",
            "of_pattern",
            "concentration",
            "corpus_share",
        ]
        columns += ["lift", "low", "high", "prompts", "z", "p_value", "p_family"]
        return pd.DataFrame(rows, columns=columns)

    def _row(self, layer: int, kind: int, expert: int, name: str) -> tuple[object, ...]:
        text = self.text
        rows = np.flatnonzero(text.known(layer))
        owner, n_prompts = text.owner[rows], text.n_requests
        is_kind = np.zeros(len(text))
        is_kind[self.member.indices[self.member.indptr[kind] : self.member.indptr[kind + 1]]] = 1.0
        use, here = (text.experts[rows, layer] == expert).any(axis=1).astype(np.float64), is_kind[rows]
        sums = [
            np.bincount(owner, weights=w, minlength=n_prompts)
            for w in (use * here, use, here, np.ones(rows.size))
        ]
        both, of_expert, of_kind, total = (s.sum() for s in sums)
        rest = [s.sum() - s for s in sums]
        with np.errstate(invalid="ignore", divide="ignore"):
            lift = both * total / (of_expert * of_kind)
            without = np.nan_to_num(rest[0] * rest[3] / (rest[1] * rest[2]), nan=0.0, posinf=0.0)
        interval = nulls.jackknife(lift, without[sums[3] > 0])
        return (
            int(text.layers[layer]),
            expert,
            name,
            int(both),
            int(of_expert),
            int(of_kind),
            both / of_expert,
            of_kind / total,
            lift,
            float(np.maximum(interval.low, 0.0)),
            float(interval.high),
            int((sums[0] > 0).sum()),
            self.z[layer, kind, expert],
            self.p_value[layer, kind, expert],
            self.p_family[layer, kind, expert],
        )


def associate(
    text: RoutedText,
    member: sparse.csr_array,
    rearrange: Rearrange,
    *,
    min_activity: int,
    min_support: int,
    min_prompts: int,
    n_permutations: int,
    seed: int,
    within: bool = False,
) -> Associations:
    """Test every expert against every kind of token, ``member`` (C, M), the routing being rearranged.

    ``within``: against the prompt's other tokens, for what is rearranged within prompts; by default against all tokens.
    """
    n_layers, n_kinds, n_expert = text.experts.shape[1], member.shape[0], text.n_expert
    shape = (n_layers, n_kinds, n_expert)
    of_kind, of_expert, z, p_value = (np.full(shape, np.nan) for _ in range(4))
    largest = np.full(n_permutations, -np.inf)
    # With a single prompt, or prompts of one token each, there may be nothing to rearrange.
    for layer in range(n_layers):
        rows = np.flatnonzero(text.known(layer))
        if not rows.size:
            continue
        sizes = np.bincount(text.owner[rows], minlength=text.n_requests)
        starts = np.concatenate(([0], np.cumsum(sizes[sizes > 0]))).astype(np.int64)
        uses = text.member(layer, rows)
        kinds = sparse.csr_array(member[:, rows])
        n_kind = np.asarray(kinds.sum(axis=1)).ravel().astype(np.float64)
        owners = sparse.csr_array(
            (np.ones(rows.size, np.float32), (np.arange(rows.size), text.owner[rows])),
            shape=(rows.size, text.n_requests),
        )
        in_prompts = np.asarray(((kinds @ owners) > 0).sum(axis=1)).ravel()
        eligible = ((n_kind >= min_support) & (in_prompts >= min_prompts))[:, None] & (
            uses.sum(axis=0) >= min_activity
        )[None, :]
        score = _WithinPrompts(kinds, starts) if within else _Overall(kinds)
        of_kind[layer], of_expert[layer] = n_kind[:, None], uses.sum(axis=0, dtype=np.float64)[None, :]
        null = np.empty((n_permutations + 1, int(eligible.sum())))
        null[0] = score(uses)[eligible]
        for draw in range(n_permutations):
            # The same numbers in every layer: what layers share, the largest statistic must share too.
            moved = uses[rearrange(starts, np.random.default_rng((seed, draw)))]
            null[draw + 1] = score(moved)[eligible]
        # What stays whatever is rearranged (the first token of every text, say) is no finding.
        null -= null.mean(axis=0)
        null /= np.maximum(null.std(axis=0), 1.0)
        z[layer][eligible] = null[0]
        p_value[layer][eligible] = nulls.permutation_p(null)
        largest = np.maximum(largest, null[1:].max(axis=1, initial=-np.inf))
    ordered = np.sort(largest)
    above = n_permutations - np.searchsorted(ordered, np.nan_to_num(z, nan=np.inf) - 1e-9)
    p_family = np.where(np.isnan(p_value), np.nan, (1 + above) / (n_permutations + 1))
    return Associations(text, member, of_kind, of_expert, z, p_value, p_family)


class _Overall:
    """How much more often than by their totals experts (m, E) meet kinds (C, m): (C, E)."""

    def __init__(self, kinds: sparse.csr_array) -> None:
        self._kinds = kinds
        self._size = np.asarray(kinds.sum(axis=1), dtype=np.float64).reshape(-1, 1)

    def __call__(self, uses: npt.NDArray[np.float32]) -> Floats:
        m, a, b = uses.shape[0], self._size, uses.sum(axis=0, dtype=np.float64)[None, :]
        variance = a * b * (m - a) * (m - b) / (m * m * max(m - 1, 1))
        return standardised(np.asarray(self._kinds @ uses, dtype=np.float64), a * b / m, variance)


class _WithinPrompts:
    """The same against each prompt's own totals, studentised over prompts.

    The first and last tokens of a text that remembers lie further from its mean than those inside, so a text that is
    turned round varies too little; how prompts differ from each other shows how much it should.
    """

    def __init__(self, kinds: sparse.csr_array, starts: Ints) -> None:
        self._starts, self._shape = starts, (kinds.shape[0], starts.size - 1)
        cells = sparse.coo_array(kinds)
        kind, row = cells.coords
        prompt = np.searchsorted(starts, row, side="right") - 1
        self._parts = sparse.csr_array(
            (cells.data, (kind * self._shape[1] + prompt, row)), shape=(np.prod(self._shape), kinds.shape[1])
        )
        self._size = np.asarray(self._parts.sum(axis=1), dtype=np.float64).reshape(*self._shape, 1)

    def __call__(self, uses: npt.NDArray[np.float32]) -> Floats:
        share = np.add.reduceat(uses, self._starts[:-1], axis=0, dtype=np.float64)
        share /= np.diff(self._starts)[:, None]
        excess = (
            np.asarray(self._parts @ uses, dtype=np.float64).reshape(*self._shape, -1) - self._size * share
        )
        return standardised(excess.sum(axis=1), np.zeros(()), (excess**2).sum(axis=1))
