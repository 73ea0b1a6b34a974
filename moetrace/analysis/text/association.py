"""Tests of experts against kinds of token, the routing being rearranged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

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
#: rearrangements that are larger are not kept
_KEPT_BYTES = 32 << 20

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
            mine = np.flatnonzero(places[:, 0] == layer)
            of_layer = _Layer(self.text, self.member, layer, np.unique(places[mine, 1]))
            for i in mine.tolist():
                kind, expert = places[i, 1:].tolist()
                at = layer, kind, expert
                rows[i] = (
                    *of_layer.row(kind, expert, names[kind]), self.z[at], self.p_value[at], self.p_family[at]
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
    """One layer's tokens of some kinds: how many use each expert, and in how many prompts."""

    def __init__(self, text: RoutedText, member: sparse.csr_array, layer: int, kinds: Ints) -> None:
        self._number = int(text.layers[layer])
        self._place = {kind: i for i, kind in enumerate(kinds.tolist())}
        known = text.known(layer)
        n, e, rows = text.n_requests, text.n_expert, np.flatnonzero(known)
        total = np.bincount(text.owner[rows], minlength=n)
        of_expert = usage(text.experts[rows, layer], text.owner[rows], n, e)
        self._total, self._of_expert = int(total.sum()), of_expert.sum(axis=0)
        found = []
        for some in parts(kinds, 4 * n * e):
            cells = member[some].tocoo()
            which, row = (x[known[cells.coords[1]]] for x in cells.coords)
            code = which.astype(np.int64) * n + text.owner[row]
            met = usage(text.experts[row, layer], code, some.size * n, e).reshape(-1, n, e).transpose(1, 0, 2)
            here = np.bincount(code, minlength=some.size * n).reshape(-1, n).T
            found.append(_lifts(met, of_expert, here, total))
        self._of_kind = np.concatenate([of_kind for of_kind, _ in found])
        self._each = np.concatenate([each for _, each in found], axis=1)

    def row(self, kind: int, expert: int, name: str) -> tuple[object, ...]:
        """What the table says of a kind and an expert, but for the test."""
        place = self._place[kind]
        both, lift, low, high, prompts = self._each[:, place, expert].tolist()
        of_expert, of_kind = int(self._of_expert[expert]), int(self._of_kind[place])
        return (
            self._number,
            expert,
            name,
            int(both),
            of_expert,
            of_kind,
            both / of_expert,
            of_kind / self._total,
            lift,
            low,
            high,
            int(prompts),
        )


def _lifts(met: Ints, of_expert: Ints, here: Ints, total: Ints) -> tuple[Ints, Floats]:
    """Tokens of each kind (C,), and of kinds and experts (5, C, E): tokens of both, lift, low, high, prompts.

    From tokens by prompt: of both (P, C, E), of experts (P, E), of kinds (P, C), all (P,).
    """
    sums = [met, of_expert[:, None], here[:, :, None], total[:, None, None]]
    both, expert, kind, every = (s.sum(axis=0).astype(np.float64) for s in sums)
    rest = [whole - s for whole, s in zip((both, expert, kind, every), sums, strict=True)]
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = both * every / (expert * kind)
        without = np.nan_to_num(rest[0] * rest[3] / (rest[1] * rest[2]), nan=0.0, posinf=0.0)
    interval = nulls.jackknife(lift, without[total > 0])
    prompts = (met > 0).sum(axis=0)
    each = np.stack([both, lift, np.maximum(interval.low, 0.0), interval.high, prompts])
    return here.sum(axis=0), each


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
    """(1 + B, M) row numbers: as they are, and rearranged; not to be written to."""
    few = 4 * (n_permutations + 1) * int(starts[-1]) <= _KEPT_BYTES
    make = _orders if few else _orders.__wrapped__
    return make(rearrange, np.ascontiguousarray(starts, dtype=np.int64).tobytes(), n_permutations, seed)


@lru_cache(maxsize=2)  # several tests rearrange the same texts
def _orders(rearrange: Rearrange, starts: bytes, n_permutations: int, seed: int) -> npt.NDArray[np.int32]:
    begins = np.frombuffer(starts, dtype=np.int64)
    out = np.empty((n_permutations + 1, int(begins[-1])), dtype=np.int32)
    out[0] = np.arange(out.shape[1])
    for draw in range(n_permutations):
        out[draw + 1] = rearrange(begins, np.random.default_rng((seed, draw)))
    out.flags.writeable = False
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
    if at.each_once:
        b = np.bincount(ids[ids < n_expert], minlength=n_expert)[None, None].astype(np.float64)
    else:
        b = (at.times @ membership(ids, n_expert)).astype(np.float64)[:, None, :]
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
