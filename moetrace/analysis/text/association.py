"""Tests of experts against kinds of token, the routing being rearranged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from moetrace._native import kind_counts, kind_moments
from moetrace.analysis.counts.routed import RoutedText, membership, standardised, usage
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints


def indicator(code: Ints, n: int) -> sparse.csr_array:
    """(n, M) 1 where a row has the code."""
    m = code.size
    return sparse.csr_array((np.ones(m, np.float32), (code, np.arange(m))), shape=(n, m))


#: room for the statistics of all rearrangements of some kinds
_NULL_BYTES = 128 << 20

Rearrange = Callable[[Ints, np.random.Generator], Ints]


@dataclass
class Associations:
    """Tests of experts against kinds of token: arrays (L, C, E), NaN where not tested."""

    text: RoutedText
    member: sparse.csr_array
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
        places = np.stack(np.unravel_index(order[:n], score.shape), axis=1)
        rows: list[tuple[object, ...]] = [()] * n
        for layer in np.unique(places[:, 0]).tolist():
            mine = _Layer(self.text, self.member, layer)
            for i in np.flatnonzero(places[:, 0] == layer).tolist():
                kind, expert = places[i, 1:].tolist()
                at = layer, kind, expert
                rows[i] = (
                    *mine.row(kind, expert, names[kind]), self.z[at], self.p_value[at], self.p_family[at]
                )  # fmt: skip
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


class _Layer:
    """One layer's tokens by prompt: of experts, of kinds, and of both."""

    def __init__(self, text: RoutedText, member: sparse.csr_array, layer: int) -> None:
        self._text, self._member, self._layer = text, member, layer
        self._known = text.known(layer)
        self._ids = text.experts[:, layer]
        rows = np.flatnonzero(self._known)
        self._total = self._by_prompt(rows)
        of_expert = usage(self._ids[rows], text.owner[rows], text.n_requests, text.n_expert)
        self._of_expert = of_expert.astype(np.float64)
        self._of_kind: dict[int, tuple[Ints, Floats]] = {}
        self._found: dict[int, tuple[float, float, Floats]] = {}

    def _by_prompt(self, rows: Ints) -> Floats:
        return np.bincount(self._text.owner[rows], minlength=self._text.n_requests).astype(np.float64)

    def _kind(self, kind: int) -> tuple[Ints, Floats]:
        if kind not in self._of_kind:
            begin, end = self._member.indptr[kind : kind + 2].tolist()
            rows = self._member.indices[begin:end].astype(np.int64)
            rows = rows[self._known[rows]]
            self._of_kind[kind] = rows, self._by_prompt(rows)
        return self._of_kind[kind]

    def row(self, kind: int, expert: int, name: str) -> tuple[object, ...]:
        """What the table says of a kind and an expert, but for the test."""
        of_kind, total, each = self._experts(kind)
        both, of_expert, lift, low, high, prompts = each[:, expert].tolist()
        return (
            int(self._text.layers[self._layer]),
            expert,
            name,
            int(both),
            int(of_expert),
            int(of_kind),
            both / of_expert,
            of_kind / total,
            lift,
            low,
            high,
            int(prompts),
        )

    def _experts(self, kind: int) -> tuple[float, float, Floats]:
        """Tokens of a kind, all tokens; for each expert (6, E): tokens of both, of it, lift, low, high, prompts."""
        if kind not in self._found:
            rows, here = self._kind(kind)
            text = self._text
            met = usage(self._ids[rows], text.owner[rows], text.n_requests, text.n_expert).astype(np.float64)
            sums = [met, self._of_expert, here[:, None], self._total[:, None]]
            both, of_expert, of_kind, total = (s.sum(axis=0) for s in sums)
            rest = [s.sum(axis=0) - s for s in sums]
            with np.errstate(invalid="ignore", divide="ignore"):
                lift = both * total / (of_expert * of_kind)
                without = np.nan_to_num(rest[0] * rest[3] / (rest[1] * rest[2]), nan=0.0, posinf=0.0)
            interval = nulls.jackknife(lift, without[self._total > 0])
            prompts = (met > 0).sum(axis=0)
            each = [both, of_expert, lift, np.maximum(interval.low, 0.0), interval.high, prompts]
            self._found[kind] = float(of_kind[0]), float(total[0]), np.stack(each)
        return self._found[kind]


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
    z, p_value = (np.full(shape, np.nan) for _ in range(2))
    largest = np.full(n_permutations, -np.inf)
    # With a single prompt, or prompts of one token each, there may be nothing to rearrange.
    at: _Rows | None = None
    for layer in range(n_layers):
        rows = np.flatnonzero(text.known(layer))
        if not rows.size:
            continue
        if at is None or not np.array_equal(rows, at.rows):
            # The same numbers in every layer: what layers share, the largest statistic must share too.
            at = _Rows.of(text, member, rows, rearrange, n_permutations, seed)
        ids = text.experts[rows, layer].astype(np.uint16)
        active = np.bincount(ids[ids < n_expert], minlength=n_expert) >= min_activity
        eligible = ((at.n_kind >= min_support) & (at.in_prompts >= min_prompts))[:, None] & active
        score = _within_prompts(at, ids, n_expert) if within else _overall(at, ids, n_expert)
        for some in parts(np.flatnonzero(eligible.any(axis=1)), n_expert * (n_permutations + 1)):
            tested = eligible[some]
            scores = score(some)
            null = scores.reshape(len(scores), -1) if tested.all() else scores[:, tested]
            # What stays whatever is rearranged (the first token of every text, say) is no finding.
            null -= null.mean(axis=0)
            null /= np.maximum(np.sqrt(np.einsum("bc,bc->c", null, null) / len(null)), 1.0)
            where = np.nonzero(tested)
            z[layer, some[where[0]], where[1]] = null[0]
            p_value[layer, some[where[0]], where[1]] = nulls.permutation_p(null)
            largest = np.maximum(largest, null[1:].max(axis=1, initial=-np.inf))
    ordered = np.sort(largest)
    above = n_permutations - np.searchsorted(ordered, np.nan_to_num(z, nan=np.inf) - 1e-9)
    p_family = np.where(np.isnan(p_value), np.nan, (1 + above) / (n_permutations + 1))
    return Associations(text, member, z, p_value, p_family)


def orders(rearrange: Rearrange, starts: Ints, n_permutations: int, seed: int) -> npt.NDArray[np.int32]:
    """(1 + B, M) row numbers: as they are, and rearranged."""
    out = np.empty((n_permutations + 1, int(starts[-1])), dtype=np.int32)
    out[0] = np.arange(out.shape[1])
    for draw in range(n_permutations):
        out[draw + 1] = rearrange(starts, np.random.default_rng((seed, draw)))
    return out


def parts(kinds: Ints, cells_each: int) -> Iterator[Ints]:
    """Cut kinds into parts whose statistics fit into ``_NULL_BYTES``."""
    step = max(1, _NULL_BYTES // (8 * cells_each))
    for start in range(0, kinds.size, step):
        yield kinds[start : start + step]


@dataclass(frozen=True)
class _Rows:
    """The rows at which a layer is known, and all that follows from them alone.

    ``starts`` (P + 1,) is where each prompt's begin, ``order`` (1 + B, M) their rearrangements. ``kind``, ``row`` and
    ``prompt`` are the memberships, sorted by kind and row; ``n_kind`` and ``in_prompts`` (C,) how many rows each kind
    has, in how many prompts.
    """

    rows: Ints
    starts: Ints
    order: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.int32]
    n_kind: Ints
    in_prompts: Ints

    @classmethod
    def of(
        cls,
        text: RoutedText,
        member: sparse.csr_array,
        rows: Ints,
        rearrange: Rearrange,
        n_permutations: int,
        seed: int,
    ) -> _Rows:
        sizes = np.bincount(text.owner[rows], minlength=text.n_requests)
        starts = np.concatenate(([0], np.cumsum(sizes[sizes > 0]))).astype(np.int64)
        mine = sparse.csr_array(member[:, rows])
        mine.sort_indices()
        kind, row = (np.asarray(x, dtype=np.int32) for x in mine.tocoo().coords)
        prompt = (np.searchsorted(starts, row, side="right") - 1).astype(np.int32)
        n = member.shape[0]
        met = np.unique(kind.astype(np.int64) * len(starts) + prompt) // len(starts)
        return cls(
            rows,
            starts,
            orders(rearrange, starts, n_permutations, seed),
            kind,
            row,
            prompt,
            np.bincount(kind, minlength=n),
            np.bincount(met, minlength=n),
        )

    @cached_property
    def times(self) -> npt.NDArray[np.float32]:
        """(1 + B, M) how often each row is taken: an exchange of prompts of unequal length takes some twice."""
        n = self.order.shape[1]
        return np.stack([np.bincount(one, minlength=n) for one in self.order]).astype(np.float32)

    @cached_property
    def each_once(self) -> bool:
        """Whether every row is taken once in every rearrangement."""
        return bool((self.times == 1).all())

    def cells(self, some: Ints) -> tuple[npt.NDArray[np.int32], ...]:
        """The memberships of some kinds (ascending): kind, numbered among these, row, and prompt."""
        number = np.full(self.n_kind.size, -1, dtype=np.int32)
        number[some] = np.arange(some.size)
        mine = np.flatnonzero(number[self.kind] >= 0)
        return number[self.kind[mine]], self.row[mine], self.prompt[mine]


#: statistics of some kinds (C',) against all experts, for each rearrangement: (1 + B, C', E)
_Score = Callable[[Ints], Floats]


def _overall(at: _Rows, ids: npt.NDArray[np.uint16], n_expert: int) -> _Score:
    """How much more often than by their totals experts meet kinds."""
    m = len(ids)
    used = membership(ids, n_expert)
    b = (used.sum(axis=0)[None] if at.each_once else at.times @ used).astype(np.float64)[:, None, :]
    b_rest = b * (m - b) / (m * m * max(m - 1, 1))

    def score(some: Ints) -> Floats:
        kind, row, _ = at.cells(some)
        by_row = np.argsort(row, kind="stable")  # a text's rows lie side by side, also where they are put
        counts = kind_counts(kind[by_row], row[by_row], ids, at.order, some.size, n_expert)
        a = at.n_kind[some].astype(np.float64)[:, None]
        return standardised(counts, b * (a / m), b_rest * (a * (m - a)))

    return score


def _within_prompts(at: _Rows, ids: npt.NDArray[np.uint16], n_expert: int) -> _Score:
    """The same against each prompt's own totals, studentised over prompts.

    The first and last tokens of a text that remembers lie further from its mean than those inside, so a text that is
    turned round varies too little; how prompts differ from each other shows how much it should.
    """
    sizes = np.diff(at.starts)
    share = usage(ids, np.repeat(np.arange(sizes.size), sizes), sizes.size, n_expert) / sizes[:, None]

    def score(some: Ints) -> Floats:
        kind, row, prompt = at.cells(some)
        n = np.bincount(kind * sizes.size + prompt, minlength=some.size * sizes.size).reshape(some.size, -1)
        expected = n[:, :, None] * share
        total, squares = kind_moments(kind, row, prompt, ids, at.order, expected)
        excess = total - expected.sum(axis=1)
        return standardised(excess, np.zeros(()), squares + (expected**2).sum(axis=1))

    return score
