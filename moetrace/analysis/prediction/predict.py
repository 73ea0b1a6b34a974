"""How well can a token's experts be told beforehand? Predictors, their scores on held-out prompts, and chance.

A predictor gives every expert a score; the m best are what it predicts. **Recall@m** is the share of a token's k
experts that are among them, precision recall·k/m. Scores are always those of prompts that the predictor was not
fitted on (cross-validation, whole prompts left out), and intervals redraw whole prompts. Published figures that
call "at least one of them was used by the prompt" accuracy are in
:mod:`moetrace.analysis.published.prediction`. :func:`~moetrace.analysis.attention_prediction` and
:func:`~moetrace.analysis.task_prediction` ask with them.

Shapes: n tokens, E experts, k used, F features, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from moetrace._native import layer_hits, pick_sums, top_hits
from moetrace.analysis.counts.routed import membership, usage
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError

Scores = npt.NDArray[np.floating[Any]]

N_FOLDS = 5
# A table's entry counts as much as this many tokens of the overall usage.
_PRIOR = 2.0
# Prompts of similar length that are exchanged with each other in a permutation.
_GROUP = 6
# Room for the scores of some layers: they stay in the processor's cache.
_SCORE_BYTES = 2 << 20
# Room for what each prompt's picks have in sum with the features of each prompt that it exchanges with.
_PAIR_BYTES = 64 << 20
# Components of the features that are tried again and again with other prompts'.
_MAX_FEATURES = 64


@dataclass(frozen=True)
class Problem:
    """What is to be predicted: the experts of n tokens in one layer.

    Attributes
    ----------
    used
        (n, E) f4, 1 for the experts that a token uses.
    picks
        (n, k) u2 their numbers; E where a token uses fewer.
    k
        Experts per token.
    prompt
        (n,) code of the prompt, tokens of one together and in reading order.
    run, token, position
        (n,) number of the unbroken run, token id, position.
    fold
        (n,) part that is left out together; all tokens of a prompt are in one.
    """

    used: npt.NDArray[np.float32]
    picks: npt.NDArray[np.uint16]
    k: int
    prompt: Ints
    run: Ints
    token: Ints
    position: Ints
    fold: Ints

    @classmethod
    def of(
        cls,
        experts: npt.NDArray[Any],
        n_expert: int,
        *,
        prompt: npt.ArrayLike,
        run: npt.ArrayLike | None = None,
        token: npt.ArrayLike | None = None,
        position: npt.ArrayLike | None = None,
        n_folds: int = N_FOLDS,
        seed: int = 0,
    ) -> Problem:
        """From expert ids (n, k), all present. ``run``, ``token`` and ``position`` default to nothing known.

        Raises UsageError if there are fewer than two prompts: nothing could be held out.
        """
        codes = np.unique(np.asarray(prompt), return_inverse=True)[1].astype(np.int64)
        n_prompts = int(codes.max()) + 1 if codes.size else 0
        if n_prompts < 2:
            raise UsageError(
                f"a prediction needs prompts to hold out, and there are {n_prompts}",
                fix="capture more prompts (moetrace capture -f prompts.jsonl)",
            )
        used = membership(experts, n_expert)
        folds = np.arange(n_prompts) % min(n_folds, n_prompts)
        fold = np.random.default_rng((seed, 1)).permutation(folds)[codes]
        same = np.zeros(codes.size, dtype=np.int64)

        def given(values: npt.ArrayLike | None) -> Ints:
            return same if values is None else np.asarray(values).astype(np.int64)

        k = int(used.sum(axis=1).max())
        runs = codes if run is None else given(run)
        picks = np.sort(np.minimum(experts, n_expert).astype(np.uint16), axis=1)[:, :k]
        return cls(used, picks, k, codes, runs, given(token), given(position), fold)

    @property
    def n_prompts(self) -> int:
        """P."""
        return int(self.prompt.max()) + 1

    @property
    def n_expert(self) -> int:
        """E."""
        return int(self.used.shape[1])

    def take(self, rows: Ints) -> Problem:
        """Some of the tokens, in the same folds; a copy."""
        names = ("used", "picks", "prompt", "run", "token", "position", "fold")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @cached_property
    def folds(self) -> list[tuple[Ints, Ints]]:
        """Of each fold: the rows that are fitted on, and those that are held out, ascending."""
        return [
            (np.flatnonzero(self.fold != f), np.flatnonzero(self.fold == f)) for f in np.unique(self.fold)
        ]

    @cached_property
    def rest_usage(self) -> Floats:
        """(folds, E) mean usage of the rows that are fitted on."""
        sizes = np.array([held.size for _, held in self.folds])
        own = np.stack([self.used[held].sum(axis=0, dtype=np.float64) for _, held in self.folds])
        return np.asarray((own.sum(axis=0) - own) / (sizes.sum() - sizes)[:, None])

    @cached_property
    def sparse_used(self) -> sparse.csr_array[np.float64]:
        """``used``, of which few are not 0."""
        there = self.picks < self.n_expert
        ends = np.append(0, np.cumsum(there.sum(axis=1)))
        return sparse.csr_array(
            (np.ones(int(ends[-1])), self.picks[there].astype(np.int32), ends), shape=self.used.shape
        )


# -- predictors: scores (n, E), each token's from what was learnt without its fold ------------------------


def popularity(p: Problem) -> Scores:
    """The experts that are used most, whatever the token."""
    out = np.empty(p.used.shape, dtype=np.float32)
    for (_, held), mean in zip(p.folds, p.rest_usage, strict=True):
        out[held] = mean
    return out


def previous(p: Problem) -> Scores:
    """The experts of the token before, then the popular ones; the first token of a run gets the popular ones."""
    out = popularity(p) * np.float32(1e-3)
    follows = np.flatnonzero(p.run[1:] == p.run[:-1]) + 1
    out[follows] += p.used[follows - 1]
    return out


def table(p: Problem, key: npt.ArrayLike, prior: float = _PRIOR) -> Scores:
    """Mean usage at each value of ``key`` (n,) (token id, position), drawn to the overall usage where it is rare."""
    code = np.unique(np.asarray(key), return_inverse=True)[1]
    out = np.empty(p.used.shape, dtype=np.float32)
    for (_, held), (sums, counts), mean in zip(p.folds, _rest_sums(p, code), p.rest_usage, strict=True):
        out[held] = ((sums + prior * mean) / (counts + prior)[:, None])[code[held]]
    return out


def _rest_sums(p: Problem, code: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Of each fold: what is fitted on, by code (n,): usage (C, E) in sum, and how many rows (C,)."""
    n = int(code.max()) + 1
    sums, counts = usage(p.picks, code, n, p.n_expert), np.bincount(code, minlength=n)
    for _, held in p.folds:
        own = usage(p.picks[held], code[held], n, p.n_expert)
        yield sums - own, counts - np.bincount(code[held], minlength=n)


def _fold_by_fold(
    p: Problem, features: npt.NDArray[Any] | sparse.csr_array
) -> tuple[list[sparse.csr_array[np.float64]], Floats, Floats]:
    """Features (n, F) of each fold's rows, their sums (folds, F), and their products with usage (folds, F, E)."""
    x: sparse.csr_array[np.float64] = sparse.csr_array(features).astype(np.float64)
    parts = [x[held] for _, held in p.folds]
    sums: list[Floats] = [np.asarray(part.sum(axis=0)).reshape(-1) for part in parts]
    products = [
        (part.T @ p.sparse_used[held]).toarray() for part, (_, held) in zip(parts, p.folds, strict=True)
    ]
    return parts, np.stack(sums), np.stack(products)


def transition(p: Problem, features: npt.NDArray[Any] | sparse.csr_array) -> Scores:
    """Mean of P(expert | an expert used elsewhere) over those used elsewhere (n, E'): a transition table."""
    parts, sums, products = _fold_by_fold(p, features)
    out = np.empty(p.used.shape, dtype=np.float32)
    for i, (_, held) in enumerate(p.folds):
        both, alone = products.sum(axis=0) - products[i], sums.sum(axis=0) - sums[i]
        share = (both + _PRIOR * p.rest_usage[i]) / (alone[:, None] + _PRIOR)
        out[held] = parts[i] @ share
    return out


def pick_ridge(p: Problem, features: npt.NDArray[Any] | sparse.csr_array) -> Scores:
    """:func:`ridge` on features (n, F) of which few are not 0: which experts a token uses elsewhere."""
    parts, sums, products = _fold_by_fold(p, features)
    n = len(p.used)
    square = np.sum([np.asarray((x * x).sum(axis=0)).reshape(-1) for x in parts], axis=0) / n
    spread = np.sqrt(np.maximum(square - (sums.sum(axis=0) / n) ** 2, 0.0))
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-5)
    grams = np.stack([(x.T @ x).toarray() for x in parts])
    scores = np.empty(p.used.shape)
    for i, (fit, held) in enumerate(p.folds):
        a, b = (sums.sum(axis=0) - sums[i]) / fit.size, p.rest_usage[i]
        gram = (grams.sum(axis=0) - grams[i] - fit.size * np.outer(a, a)) * scale * scale[:, None]
        gram[np.diag_indices_from(gram)] += max(a.size, 1)
        cross = (products.sum(axis=0) - products[i] - fit.size * np.outer(a, b)) * scale[:, None]
        weight = np.linalg.solve(gram, cross) * scale[:, None]
        scores[held] = parts[i] @ weight + (b - a @ weight)
    return scores


def ridge(
    p: Problem,
    features: npt.NDArray[Any],
    *,
    nuisance: npt.NDArray[Any] | None = None,
    offset: Scores | None = None,
    fitted_offset: Sequence[Scores] | None = None,
) -> Scores:
    """Ridge regression of usage on features (n, F), with intercept.

    Features are scaled to standard deviation 1 and penalised by λ = F, which asks all of them together to explain
    as much as they leave unexplained; nothing is tuned. Columns of ``nuisance`` (n, Z) are hardly penalised.
    ``offset`` (n, E) is added to the held-out scores, ``fitted_offset[f]`` (n, E) subtracted from the usage that
    fold f's regression is fitted on. Features must be finite.
    """
    x = _scaled(features)
    penalty = np.full(x.shape[1], float(max(x.shape[1], 1)))
    if nuisance is not None:
        z = _scaled(nuisance)
        x, penalty = np.hstack((z, x)), np.concatenate((np.full(z.shape[1], 1e-3), penalty))
    scores = np.zeros(p.used.shape) if offset is None else np.array(offset, dtype=np.float64)
    folds = p.folds
    grams = [(x[held].T @ x[held]).astype(np.float64) for _, held in folds]
    for i, (fit, held) in enumerate(folds):
        y = p.used[fit] if fitted_offset is None else p.used[fit] - fitted_offset[i][fit]
        gram = np.sum([g for j, g in enumerate(grams) if j != i], axis=0)
        weight, base = _solve(x[fit], y.astype(x.dtype), gram, penalty)
        scores[held] += x[held] @ weight + base
    return scores


def token_ridge(p: Problem, features: npt.NDArray[Any], nuisance: npt.NDArray[Any] | None = None) -> Scores:
    """The table by token id, and a :func:`ridge` on what it leaves.

    What it leaves of a prompt that is fitted on is reckoned without that prompt, as it is for held-out ones.
    """
    code = np.unique(p.token, return_inverse=True)[1]
    pair, own = np.unique(np.stack((p.prompt, code)), axis=1, return_inverse=True)
    sums = usage(p.picks, own, pair.shape[1], p.n_expert)
    counts = np.bincount(own, minlength=pair.shape[1]).astype(np.float64)
    left = []
    for (fit, _), (total, n), mean in zip(p.folds, _rest_sums(p, code), p.rest_usage, strict=True):
        fitted = np.zeros(code.size)
        fitted[fit] = 1.0
        rest = total[code] - sums[own] * fitted[:, None]
        left.append((rest + _PRIOR * mean) / (n[code] - counts[own] * fitted + _PRIOR)[:, None])
    return ridge(p, features, nuisance=nuisance, offset=table(p, p.token), fitted_offset=left)


def position_basis(position: npt.ArrayLike, n_knots: int = 8) -> Floats:
    """Hats over the quantiles of log(1 + position): (n, at most ``n_knots`` - 1), a piecewise linear function's basis.

    (n, 0) if there is one position only.
    """
    x = np.log1p(np.maximum(np.asarray(position, dtype=np.float64), 0))
    knots = np.unique(np.quantile(x, np.linspace(0, 1, n_knots))) if x.size else x
    if knots.size < 2:
        return np.empty((x.size, 0))
    hats = [np.interp(x, knots, np.eye(knots.size)[i]) for i in range(1, knots.size)]
    return np.stack(hats, axis=1)


# -- scores -------------------------------------------------------------------------------------------------


def hits(p: Problem, scores: Scores, sizes: Sequence[int]) -> Ints:
    """How many of each token's experts are among the m best, for each m of ``sizes``: (n, sizes).

    Equal scores: the lower expert id first.
    """
    return top_hits(np.asarray(scores), p.picks, np.asarray(sizes, dtype=np.int64)).astype(np.int64)


@dataclass(frozen=True)
class Interval:
    """A share of sums over prompts with its bootstrap interval; NaN bounds for fewer than three prompts."""

    estimate: float
    low: float
    high: float


def bootstrap_share(
    numerator: npt.ArrayLike,
    denominator: npt.ArrayLike,
    *,
    n_boot: int = 999,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Σ numerator / Σ denominator over prompts (P,), with a percentile interval from redrawn prompts.

    Widened for few prompts (:func:`moetrace.analysis.statistics.nulls.expanded_tail`).
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    estimate = float(a.sum() / b.sum()) if b.sum() else float("nan")
    if a.size < 3 or not b.sum():
        return Interval(estimate, float("nan"), float("nan"))
    draws = _draws(a.size, n_boot, seed)
    bottom = draws @ b
    tail = nulls.expanded_tail(a.size, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.nanquantile((draws @ a) / bottom, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


@lru_cache(maxsize=2)
def _draws(n: int, n_boot: int, seed: int) -> Floats:
    """(B, n) how often each of n prompts is redrawn."""
    drawn = np.random.default_rng((seed, 2)).multinomial(n, np.full(n, 1 / n), size=n_boot)
    return drawn.astype(np.float64)


def by_prompt(p: Problem, values: npt.ArrayLike) -> Floats:
    """Values (n,) summed by prompt, (P,)."""
    sums = np.bincount(p.prompt, np.asarray(values, dtype=np.float64), minlength=p.n_prompts)
    return sums.astype(np.float64)


def score_table(
    p: Problem, scores: Mapping[str, Scores], sizes: Sequence[int] = (), *, n_boot: int = 999, seed: int = 0
) -> pd.DataFrame:
    """Recall and precision of predictors, by how many experts are predicted.

    Returns one row per (predictor, m), ``m`` each of ``sizes`` (default k, 2k, 4k): ``recall`` with ``low`` and
    ``high`` over prompts, ``precision``, ``chance`` (recall of m experts picked at random, m/E), ``tokens`` and
    ``prompts``.
    """
    wanted = sorted({m for m in (sizes or (p.k, 2 * p.k, 4 * p.k)) if 1 <= m <= p.n_expert})
    need = by_prompt(p, p.used.sum(axis=1))
    out = []
    for name, values in scores.items():
        found = hits(p, values, wanted)
        for i, m in enumerate(wanted):
            recall = bootstrap_share(by_prompt(p, found[:, i]), need, n_boot=n_boot, seed=seed)
            out.append(
                {
                    "predictor": name,
                    "m": m,
                    "recall": recall.estimate,
                    "low": recall.low,
                    "high": recall.high,
                    "precision": float(found[:, i].sum() / (m * p.prompt.size)),
                    "chance": m / p.n_expert,
                    "tokens": p.prompt.size,
                    "prompts": p.n_prompts,
                }
            )
    return pd.DataFrame(out)


def gain(p: Problem, better: Scores, than: Scores, *, n_boot: int = 999, seed: int = 0) -> Interval:
    """Recall@k of one predictor less that of another, with its interval over prompts."""
    difference = hits(p, better, [p.k])[:, 0] - hits(p, than, [p.k])[:, 0]
    return bootstrap_share(
        by_prompt(p, difference), by_prompt(p, p.used.sum(axis=1)), n_boot=n_boot, seed=seed
    )


@dataclass(frozen=True)
class Prediction:
    """What one layer's experts could be told from.

    Attributes
    ----------
    recall
        :func:`score_table` of all predictors.
    gains
        One row per comparison, ``better`` over ``than``: ``gain`` in recall@k on held-out prompts, ``low`` and
        ``high`` (prompts redrawn); for the comparison that is tested also ``null_gain``, what the features of
        another prompt's token at the same place gain, and ``p_value`` (:func:`gain_test`); else NaN.
    """

    recall: pd.DataFrame
    gains: pd.DataFrame


def comparison(better: str, than: str, gained: Interval, test: GainTest | None = None) -> dict[str, Any]:
    """One row of :attr:`Prediction.gains`."""
    return {
        "better": better,
        "than": than,
        "gain": gained.estimate,
        "low": gained.low,
        "high": gained.high,
        "null_gain": float("nan") if test is None else test.null_mean,
        "p_value": float("nan") if test is None else test.p_value,
    }


# -- a test -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GainTest:
    """Whether features tell more of the experts than the nuisance does.

    ``gain`` is recall@k gained on the ``tokens`` that could be exchanged, ``null_mean`` and ``null_q95`` what
    features of other prompts gain, ``p_value`` one-sided. NaN if there are fewer than four prompts.
    """

    gain: float
    null_mean: float
    null_q95: float
    p_value: float
    tokens: int


def gain_test(
    p: Problem,
    features: npt.NDArray[Any],
    nuisance: npt.NDArray[Any] | None = None,
    *,
    n_permutations: int = 199,
    max_tokens: int = 4000,
    seed: int = 0,
) -> GainTest:
    """Test it: every prompt gets another prompt's features, token for token, and everything is fitted anew.

    Prompts are sorted by length and put into groups of six, cut to the shortest of their group, and exchanged
    within it, so that a token gets the features of the token at the same place of another prompt. What the nuisance
    explains of the features is taken out of them first (Freedman & Lane 1983). Of more than 64 features their first 64
    principal components are used. Whole prompts are exchanged: that their tokens follow each other does not matter.
    Prompts must be exchangeable if features say nothing.
    """
    options: dict[str, Any] = {"n_permutations": n_permutations, "max_tokens": max_tokens, "seed": seed}
    return gain_tests([p], features, nuisance, **options)[0]


def gain_tests(
    problems: Iterable[Problem],
    features: npt.NDArray[Any],
    nuisance: npt.NDArray[Any] | None = None,
    *,
    n_permutations: int = 199,
    max_tokens: int = 4000,
    seed: int = 0,
) -> list[GainTest]:
    """:func:`gain_test` of several problems (layers) of the same tokens with the same features, side by side.

    Every problem gets the same exchanges. They may be made one by one: none is kept.
    """
    following = iter(problems)
    p, rng = next(following), np.random.default_rng((seed, 3))
    groups = _exchange_groups(p.prompt, max_tokens, rng)
    n = sum(starts.size * length for starts, length in groups)
    fold = p.fold[[i for starts, _ in groups for i in starts.tolist()]]
    if np.unique(fold).size < 2 or n_permutations < 1:
        return [
            GainTest(float("nan"), float("nan"), float("nan"), float("nan"), n) for _ in chain([p], following)
        ]
    rows = np.concatenate([(s[:, None] + np.arange(cut)).reshape(-1) for s, cut in groups])
    z = np.ones((n, 1)) if nuisance is None else np.hstack((np.ones((n, 1)), _scaled(nuisance[rows])))
    x = _scaled(features[rows]).astype(np.float64)
    x = _main_components(_scaled(x - z @ np.linalg.lstsq(z, x, rcond=None)[0]), _MAX_FEATURES)
    picks = [each.picks[rows] for each in chain([p], following)]
    exchange = _Exchange(groups, z, x, picks, p.n_expert, fold)
    floor, own = exchange.recall(None), np.arange(fold.size)
    reached = np.stack(
        [exchange.recall(_shuffled(groups, rng) if b else own) - floor for b in range(n_permutations + 1)]
    )
    p_values = nulls.permutation_p(reached)
    return [
        GainTest(
            float(reached[0, i]),
            float(reached[1:, i].mean()),
            float(np.quantile(reached[1:, i], 0.95)),
            float(p_values[i]),
            n,
        )
        for i in range(len(picks))
    ]


class _Exchange:
    """Cross-validated ridge regressions of prompts (P) with each other's features, x (n, F), beside z (n, Z).

    Rows lie prompt by prompt as the groups name them, and are put fold by fold here. The regressions of several
    problems have the same features: what is to be inverted is inverted once.
    """

    def __init__(
        self,
        groups: list[tuple[Ints, int]],
        z: Floats,
        x: Floats,
        picks: list[npt.NDArray[np.uint16]],
        n_expert: int,
        fold: Ints,
    ) -> None:
        lengths = np.concatenate([np.full(starts.size, length) for starts, length in groups])
        self._begin = np.cumsum(lengths) - lengths
        sizes = np.array([starts.size for starts, _ in groups])
        self._size = np.repeat(sizes, sizes)  # of each prompt's group
        self._first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._prompts = np.argsort(fold, kind="stable")
        self._lengths = lengths[self._prompts]
        self._place = np.arange(len(z)) - np.repeat(np.cumsum(self._lengths) - self._lengths, self._lengths)
        rows = self._rows(np.arange(fold.size))
        self._z, self._x = z[rows], x
        self._part = np.unique(fold, return_inverse=True)[1]
        self._fold = np.repeat(self._part[self._prompts], self._lengths).astype(np.int32)
        ends = np.append(np.flatnonzero(np.diff(self._fold)) + 1, self._fold.size)
        self._folds = [slice(a, b) for a, b in pairwise([0, *ends.tolist()])]
        self._k = np.array([each.shape[1] for each in picks])
        self._n_expert = n_expert
        self._picks = np.full((len(picks), len(z), int(self._k.max())), n_expert, dtype=np.uint16)
        for mine, each in zip(self._picks, picks, strict=True):
            mine[:, : each.shape[1]] = each[rows]
        self._n_used = (self._picks < self._n_expert).sum(axis=(1, 2))
        self._penalty = np.concatenate((np.full(z.shape[1], 1e-3), np.full(x.shape[1], float(x.shape[1]))))
        self._penalty[0] = 1e-9  # the intercept's

    def _rows(self, owner: Ints) -> Ints:
        rows: Ints = np.repeat(self._begin[owner[self._prompts]], self._lengths) + self._place
        return rows

    @cached_property
    def _pair_sums(self) -> npt.NDArray[np.float32] | None:
        """(S, P, L, E, Z + F) features of the prompt s further in its group, summed over rows that pick an expert.

        Of any exchange they need only be added up. None if they are many: then they are summed for each exchange.
        """
        n_prompts = self._size.size
        features = self._z.shape[1] + self._x.shape[1]
        shape = (int(self._size.max()), n_prompts, len(self._picks), self._n_expert, features)
        if 4 * math.prod(shape) > _PAIR_BYTES:
            return None
        of_row = np.repeat(self._prompts, self._lengths).astype(np.int32)
        pairs = np.empty(shape, dtype=np.float32)
        for further, mine in enumerate(pairs):
            owner = self._first + (np.arange(n_prompts) - self._first + further) % self._size
            single = np.hstack((self._z, self._x[self._rows(owner)])).astype(np.float32)
            mine[:] = pick_sums(single, self._picks, of_row, n_prompts, self._n_expert, n_threads=1)
        return pairs

    def recall(self, owner: Ints | None) -> Floats:
        """Recall@k of each problem on held-out prompts if prompt i has the features of prompt ``owner[i]``.

        With None there are no features.
        """
        a = self._z if owner is None else np.hstack((self._z, self._x[self._rows(owner)]))
        grams = [a[mine].T @ a[mine] for mine in self._folds]
        gram = sum(grams) + np.diag(self._penalty[: a.shape[1]])
        solved = [np.linalg.inv(gram - own).astype(np.float32) for own in grams]
        single = a.astype(np.float32)
        pairs = None if owner is None else self._pair_sums
        found = np.zeros(self._n_used.size)
        step = max(
            1, _SCORE_BYTES // (4 * self._n_expert * max(mine.stop - mine.start for mine in self._folds))
        )
        for begin in range(0, found.size, step):
            layers = slice(begin, begin + step)
            picks = self._picks[layers]
            if owner is None or pairs is None:
                targets = pick_sums(single, picks, self._fold, len(grams), self._n_expert, n_threads=1)
            else:
                targets = np.zeros((len(grams), *pairs[0, 0, layers].shape), dtype=np.float32)
                for i, part in enumerate(self._part.tolist()):
                    targets[part] += pairs[(owner[i] - i) % self._size[i], i, layers]
            targets = targets.reshape(len(grams), -1, a.shape[1])
            total = targets.sum(axis=0)
            for i, mine in enumerate(self._folds):
                scores = ((total - targets[i]) @ solved[i]) @ single[mine].T
                scores = scores.reshape(len(picks), self._n_expert, -1)
                found[layers] += layer_hits(scores, picks[:, mine], self._k[layers], n_threads=1)
        return np.asarray(found / self._n_used)


def _exchange_groups(prompt: Ints, max_tokens: int, rng: np.random.Generator) -> list[tuple[Ints, int]]:
    """Groups of prompts of similar length: where each begins, and the length they are cut to."""
    starts = np.flatnonzero(np.diff(prompt, prepend=-1))
    sizes = np.diff(np.append(starts, prompt.size))
    if starts.size < 4:
        return []
    if sizes.sum() > max_tokens:
        draw = rng.permutation(starts.size)
        few = np.sort(draw[: max(_GROUP, int((np.cumsum(sizes[draw]) <= max_tokens).sum()))])
        starts, sizes = starts[few], sizes[few]
    order = np.argsort(sizes, kind="stable")
    parts = np.array_split(order, max(1, order.size // _GROUP))
    return [(starts[part], int(sizes[part].min())) for part in parts]


def _shuffled(groups: list[tuple[Ints, int]], rng: np.random.Generator) -> Ints:
    """Whose features each prompt gets: (P,), prompts numbered as the groups name them."""
    edges = np.cumsum([0, *(starts.size for starts, _ in groups)])
    return np.concatenate([rng.permutation(np.arange(a, b)) for a, b in pairwise(edges.tolist())])


def _main_components(x: Floats, at_most: int) -> Floats:
    """(n, F) centred columns, or their coordinates along the ``at_most`` axes of largest variance."""
    if x.shape[1] <= at_most:
        return x
    return np.asarray(x @ np.linalg.eigh(x.T @ x)[1][:, : -at_most - 1 : -1])


def _scaled(features: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Columns of mean 0 and standard deviation 1; those that do not vary are 0. Single precision if many."""
    x = np.asarray(features, dtype=np.float32 if features.shape[1] > 1024 else np.float64)
    x = x - x.mean(axis=0)
    spread = x.std(axis=0)
    return np.asarray(x / np.where(spread > 1e-5, spread, np.inf))


def _solve(
    x: npt.NDArray[Any], y: npt.NDArray[Any], gram: Floats, penalty: Floats
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Weights (F, E) and intercept (E,) of a ridge regression whose intercept is free; ``gram`` (F, F) is xᵀx."""
    mx, my = x.mean(axis=0), y.mean(axis=0)
    if not x.shape[1]:
        return np.empty((0, y.shape[1])), my
    gram = gram - x.shape[0] * np.outer(mx, mx)
    cross = (x.T @ y).astype(np.float64) - x.shape[0] * np.outer(mx, my)
    gram[np.diag_indices_from(gram)] += penalty
    # numpy's, as all else here: its threads and those of scipy's library would wait for each other
    weight = np.linalg.solve(gram, cross).astype(x.dtype)
    return weight, my - mx @ weight
