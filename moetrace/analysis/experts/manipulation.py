"""Which inputs make a router choose a given expert, and how much an edit changes what it chooses.

Nothing here runs a model: a search is given a function that scores token sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import membership
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.nulls import clopper_pearson
from moetrace.analysis.statistics.shapes import Bools, Floats, Ints, layer_numbers
from moetrace.errors import UsageError

Method = Literal["random", "greedy", "beam"]
METHODS: tuple[Method, ...] = ("random", "greedy", "beam")

#: (index on the layer axis, expert) pairs that are all to be chosen at one token
Path = tuple[tuple[int, int], ...]


# -- search ------------------------------------------------------------------------------------------------


def path_margin(scores: npt.NDArray[np.floating], path: Path, n_expert_used: Sequence[int]) -> Floats:
    """How far tokens are from using every expert of a path.

    Parameters
    ----------
    scores
        (n, L, E) what top-k selected on (the channel ``scores``); masked experts −inf.
    path
        Which experts. One pair is a single expert.
    n_expert_used
        (L,) k of each layer.

    Returns
    -------
    float64 (n,)
        The smallest, over the path, of: the expert's score less the k-th best of the others, in standard
        deviations of that token's scores. Above 0 exactly where all are chosen (but for ties).
    """
    out = np.full(len(scores), np.inf)
    for layer, expert in path:
        own = np.asarray(scores[:, layer], np.float64)
        others = np.delete(own, expert, axis=1)
        k = n_expert_used[layer]
        bar = np.sort(others, axis=1)[:, -k] if k <= others.shape[1] else np.full(len(own), -np.inf)
        finite = np.isfinite(own)
        n = np.maximum(finite.sum(axis=1), 1)
        mean = np.where(finite, own, 0).sum(axis=1) / n
        spread = np.sqrt((np.where(finite, own - mean[:, None], 0) ** 2).sum(axis=1) / n)
        with np.errstate(invalid="ignore"):
            gap = (own[:, expert] - bar) / np.maximum(spread, 1e-12)
        # a masked expert is further away than any that is not; an expert that all others are masked for is in
        gap = np.where(np.isneginf(own[:, expert]), -1e3, np.where(np.isneginf(bar), 1e3, gap))
        out = np.minimum(out, gap)
    return out


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes
    ----------
    tokens
        (n,) the best input.
    score
        Its score; the target is reached above 0.
    evaluations
        Inputs that were scored.
    reached_at
        How many had been scored when the target was reached first (that one counted); None if it was not.
    history
        Best score after each evaluation, (evaluations,).
    """

    tokens: Ints
    score: float
    evaluations: int
    reached_at: int | None
    history: Floats


def search_input(
    score: Callable[[Ints], Floats],
    template: npt.ArrayLike,
    vocabulary: npt.ArrayLike,
    *,
    method: Method = "beam",
    budget: int = 256,
    batch: int = 32,
    width: int = 4,
    seed: int = 0,
) -> Search:
    """Search token sequences for one whose score is above 0; ends when it is found or the budget is spent.

    Parameters
    ----------
    score
        Gives (B,) scores of (B, n) token ids.
    template
        (n,) token ids; −1 where the search may choose.
    vocabulary
        Token ids to choose among.
    method
        "random": each input is drawn anew, the baseline for the others. "greedy": one position after the other,
        in random order, takes the best of ``batch`` tokens (coordinate ascent). "beam": the ``width`` best inputs
        are kept, ``batch`` changes of one token in any of them are tried at a time.
    budget
        Inputs to score at most, the same meaning for every method.

    Raises
    ------
    UsageError
        If nothing is free, or an argument is impossible.
    """
    fixed, words = np.asarray(template, np.int64), np.asarray(vocabulary, np.int64)
    free = np.flatnonzero(fixed < 0)
    if not free.size or not words.size or min(budget, batch, width) < 1 or method not in METHODS:
        raise UsageError(
            "there is nothing to search",
            why="no position is free, no token may stand there, or a number is below 1",
            fix=f"mark free positions by -1; methods: {', '.join(METHODS)}",
        )
    rng = np.random.default_rng(seed)

    def fresh(n: int) -> Ints:
        out = np.tile(fixed, (n, 1))
        out[:, free] = rng.choice(words, (n, free.size))
        return out

    kept, kept_scores = np.empty((0, fixed.size), np.int64), np.empty(0)
    history: list[Floats] = []
    done, best = 0, -np.inf
    turn: list[int] = []
    while done < budget:
        n = min(batch, budget - done)
        if method == "random" or not kept.size:
            candidates = fresh(n)
        elif method == "greedy":
            turn = turn or rng.permutation(free).tolist()
            position = turn.pop()
            candidates = np.tile(kept[0], (n, 1))
            candidates[:, position] = rng.choice(words, n, replace=n > words.size)
        else:
            candidates = kept[rng.integers(0, len(kept), n)]
            candidates[np.arange(n), rng.choice(free, n)] = rng.choice(words, n)
        values = np.asarray(score(candidates), np.float64)
        history.append(np.maximum(np.maximum.accumulate(values), best))
        best = float(history[-1][-1])
        pool, pool_scores = np.concatenate([kept, candidates]), np.concatenate([kept_scores, values])
        pool, first = np.unique(pool, axis=0, return_index=True)
        order = np.argsort(-pool_scores[first], kind="stable")[: width if method == "beam" else 1]
        kept, kept_scores = pool[order], pool_scores[first][order]
        if best > 0:
            hit = int(np.flatnonzero(values > 0)[0])
            return Search(
                candidates[int(np.argmax(values))], best, done + n, done + hit + 1, np.concatenate(history)
            )
        done += n
    return Search(kept[0], best, done, None, np.concatenate(history))


def routing_manipulation(
    runs: pd.DataFrame, *, budget: int, n_permutations: int = 1999, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """How often each method reached its targets, against random search with the same budget.

    Parameters
    ----------
    runs
        One row per search: ``target`` (any label), ``method``, ``reached_at`` (NaN where it was not reached). Every
        method on every target, once.

    Returns
    -------
    pandas.DataFrame
        One row per method: ``targets``, ``reached``, ``rate`` with ``low`` and ``high`` (Clopper-Pearson over
        targets); ``mean_evaluations`` (a target that was not reached counts the whole budget);
        ``saved``, evaluations fewer than random search on the same target, mean, with ``saved_low`` and
        ``saved_high`` (jackknife over targets); ``p_value`` of that difference, two-sided: signs of the targets'
        differences flipped at random; ``p_family`` over the methods (max-T). NaN for random search itself.
    """
    table = runs.pivot(index="target", columns="method", values="reached_at")
    if "random" not in table or len(table) != len(runs) / table.shape[1]:
        raise UsageError(
            "success rates need random search on the same targets", fix='run method "random" on each target'
        )
    spent = table.fillna(budget)
    saved = spent.drop(columns="random").rsub(spent["random"], axis=0)
    flipped = sign_flips(saved.to_numpy(np.float64), n_permutations=n_permutations, seed=seed)
    p_value, p_family = nulls.permutation_p(flipped), nulls.max_t(flipped) if len(saved.columns) else flipped
    rows = []
    for method in table.columns:
        n, hits = len(table), int(table[method].notna().sum())
        low, high = clopper_pearson(hits, n, level)
        row = {
            "method": method,
            "targets": n,
            "reached": hits,
            "rate": hits / n,
            "low": float(low),
            "high": float(high),
            "mean_evaluations": spent[method].mean(),
        }
        if method != "random":
            fewer, i = saved[method].to_numpy(np.float64), saved.columns.get_loc(method)
            reach = nulls.ratio_interval(fewer, np.ones(n), level)
            row |= {
                "saved": fewer.mean(),
                "saved_low": float(reach.low),
                "saved_high": float(reach.high),
                "p_value": p_value[i],
                "p_family": p_family[i],
            }
        rows.append(row)
    order = {name: i for i, name in enumerate(METHODS)}
    return pd.DataFrame(rows).sort_values(
        "method", key=lambda names: names.map(lambda name: order.get(name, len(order))), ignore_index=True
    )


def sign_flips(differences: npt.ArrayLike, *, n_permutations: int = 1999, seed: int = 0) -> Floats:
    """Null of a mean of 0: |sum| of paired differences (n, m), signs of the n flipped at random; row 0 as they are.

    (1 + n_permutations, m), for :func:`~moetrace.analysis.statistics.nulls.permutation_p` and ``max_t``: two-sided,
    exact for differences that are symmetric about 0. A column of zeros gets p = 1.
    """
    d = np.asarray(differences, np.float64)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (n_permutations, len(d)))
    return np.asarray(np.abs(np.concatenate([d.sum(axis=0)[None], signs @ d])))


# -- edits -------------------------------------------------------------------------------------------------


def text_edits(text: str) -> dict[str, str]:
    """The published edits of a text: kind -> edited text. Those that change nothing are left out."""
    edited = {
        "suffix": f"{text} Please",
        "prefix": f"Note: {text}",
        "case": text.lower() if text != text.lower() else text.upper(),
        "spacing": text.replace(" ", "  "),
        "ellipsis": f"{text}...",
    }
    return {kind: new for kind, new in edited.items() if new != text}


def align_tokens(before: npt.ArrayLike, after: npt.ArrayLike) -> tuple[Ints, Bools]:
    """Which tokens of an edited text are the same as before.

    Returns
    -------
    pairs
        (m, 2) positions (before, after) of tokens that an alignment (longest matching blocks, as difflib) maps to
        each other; ids are equal.
    later
        (m,) whether the pair stands behind the first difference: only those can be routed otherwise in a causal
        model.
    """
    a, b = np.asarray(before).tolist(), np.asarray(after).tolist()
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    blocks = SequenceMatcher(None, a[same:], b[same:], autojunk=False).get_matching_blocks()
    pairs = [(i, i) for i in range(same)]
    pairs += [(same + m.a + i, same + m.b + i) for m in blocks for i in range(m.size)]
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array, array[:, 0] >= same


@dataclass(frozen=True)
class Edit:
    """One text before and after an edit, routed by the same model.

    Attributes
    ----------
    prompt, kind
        Which text, and what was done to it.
    before, after
        (n, L, k) and (m, L, k) expert ids.
    pairs, later
        Of :func:`align_tokens`.
    """

    prompt: str
    kind: str
    before: npt.NDArray[np.integer]
    after: npt.NDArray[np.integer]
    pairs: Ints
    later: Bools


def halves_kept(
    before: npt.NDArray[np.integer], after: npt.NDArray[np.integer], n_expert: int
) -> tuple[float, float]:
    """How many of their experts tokens keep: Σ|A ∩ B| / Σ|A| over layers and every other token, and over the rest.

    Parameters
    ----------
    before, after
        (n, L, k) ids of the same tokens, n ≥ 2; ids of ``n_expert`` or more are none.
    """
    a, b = _indicators(before, n_expert), _indicators(after, n_expert)
    kept, there = (a & b).sum(axis=(1, 2)), a.sum(axis=(1, 2))
    return float(kept[::2].sum() / there[::2].sum()), float(kept[1::2].sum() / there[1::2].sum())


def edit_effect(
    edits: Sequence[Edit], n_expert: int, *, layers: npt.ArrayLike | None = None, level: float = 0.95
) -> pd.DataFrame:
    """How much of each unchanged token's routing an edit leaves as it was.

    Tokens are compared with themselves, not texts with texts: a text's union of experts differs as soon as a token
    is added.

    Returns
    -------
    pandas.DataFrame
        One row per ``kind``, ``region`` ("before" the edit, where a causal model cannot change; "after") and
        ``layer``: ``tokens``, ``prompts``, ``jaccard`` of the token's expert sets with ``low`` and ``high``
        (jackknife over prompts; NaN for fewer than two), ``top1`` (same first expert), and ``jaccard_other``: that
        of a token and the next unchanged one, the level of no relation to the token itself.
    """
    rows = []
    for edit in edits:
        a = _indicators(edit.before[edit.pairs[:, 0]], n_expert)
        b = _indicators(edit.after[edit.pairs[:, 1]], n_expert)
        top = edit.before[edit.pairs[:, 0], :, 0] == edit.after[edit.pairs[:, 1], :, 0]
        for region, chosen in (("before", ~edit.later), ("after", edit.later)):
            if not chosen.any():
                continue
            other = np.roll(b[chosen], -1, axis=0)
            same = _jaccard(a[chosen], b[chosen]).sum(axis=0)
            unrelated = (
                _jaccard(a[chosen], other).sum(axis=0) if chosen.sum() > 1 else np.full(same.shape, np.nan)
            )
            for layer in range(a.shape[1]):
                rows.append(
                    (edit.kind, region, layer, edit.prompt, chosen.sum(), same[layer],
                     top[chosen, layer].sum(), unrelated[layer])
                )  # fmt: skip
    names = ["kind", "region", "layer", "prompt", "tokens", "jaccard", "top1", "jaccard_other"]
    table = pd.DataFrame(rows, columns=names)
    out = []
    for key, part in table.groupby(["kind", "region", "layer"], sort=True):
        sums = part.groupby("prompt")[["tokens", "jaccard", "top1"]].sum()
        n = sums["tokens"].to_numpy(np.float64)
        interval = nulls.ratio_interval(sums["jaccard"].to_numpy(), n, level)
        known = part[part["jaccard_other"].notna()]
        out.append(
            (
                *key,
                int(n.sum()),
                len(n),
                sums["jaccard"].sum() / n.sum(),
                float(interval.low),
                float(interval.high),
                sums["top1"].sum() / n.sum(),
                known["jaccard_other"].sum() / known["tokens"].sum() if len(known) else np.nan,
            )
        )
    names = [
        "kind",
        "region",
        "layer",
        "tokens",
        "prompts",
        "jaccard",
        "low",
        "high",
        "top1",
        "jaccard_other",
    ]
    found = pd.DataFrame(out, columns=names)
    if layers is not None:
        found["layer"] = np.asarray(layers)[found["layer"].to_numpy(np.int64)]
    return found


def expert_robustness(
    edits: Sequence[Edit],
    n_expert: int,
    *,
    layers: npt.ArrayLike | None = None,
    min_tokens: int = 20,
    level: float = 0.95,
) -> pd.DataFrame:
    """How reliably each expert of each layer stays with an unchanged token behind an edit.

    Returns
    -------
    pandas.DataFrame
        One row per ``layer`` and ``expert`` that was chosen at ``min_tokens`` such tokens or more: ``tokens``,
        ``prompts``, ``kept`` (share of them where it is chosen again after the edit) with ``low`` and ``high``
        (jackknife over prompts), and ``rate``, its share of all tokens: what ``kept`` would be if the choice did
        not depend on the token. An expert of one layer has nothing to do with that of the same number in another.
    """
    prompts = sorted({edit.prompt for edit in edits})
    shape = (len(prompts), edits[0].before.shape[1], n_expert) if edits else (0, 0, n_expert)
    there, kept, again, total = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape[0])
    for edit in edits:
        i = prompts.index(edit.prompt)
        a = _indicators(edit.before[edit.pairs[edit.later, 0]], n_expert)
        b = _indicators(edit.after[edit.pairs[edit.later, 1]], n_expert)
        there[i] += a.sum(axis=0)
        again[i] += b.sum(axis=0)
        kept[i] += (a & b).sum(axis=0)
        total[i] += len(a)
    layer, expert = np.nonzero(there.sum(axis=0) >= min_tokens)
    numbers = layer_numbers(layers, shape[1])
    mine, stay = there[:, layer, expert], kept[:, layer, expert]
    used = (mine > 0).sum(axis=0)
    low, high = np.full((2, len(layer)), np.nan)
    for j in np.flatnonzero(used > 1):
        own = mine[:, j] > 0
        interval = nulls.ratio_interval(stay[own, j], mine[own, j], level)
        low[j], high[j] = float(interval.low), float(interval.high)
    return pd.DataFrame(
        {
            "layer": numbers[layer],
            "expert": expert,
            "tokens": mine.sum(axis=0).astype(np.int64),
            "prompts": used,
            "kept": stay.sum(axis=0) / mine.sum(axis=0),
            "low": np.clip(low, 0, 1),
            "high": np.clip(high, 0, 1),
            "rate": again[:, layer, expert].sum(axis=0) / max(total.sum(), 1),
        }
    )


def _indicators(ids: npt.NDArray[np.integer], n_expert: int) -> Bools:
    return membership(ids, n_expert).astype(bool)


def _jaccard(a: Bools, b: Bools) -> Floats:
    both, either = (a & b).sum(axis=2), (a | b).sum(axis=2)
    return np.asarray(np.where(either > 0, both / np.maximum(either, 1), np.nan))
