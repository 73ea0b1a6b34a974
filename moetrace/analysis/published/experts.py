"""The "MoE dynamics" experiment's measures of experts, formula for formula: alike, interfering, reached by inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import membership
from moetrace.analysis.experts.manipulation import Edit
from moetrace.analysis.experts.merging import cosine_of
from moetrace.model.experts import Expert


def as_published_similarity(
    experts: Sequence[Expert], threshold: float = 0.8, *, batched: bool = False
) -> pd.DataFrame:
    """The published comparison: cosine of two experts' down matrices as they lie in the file.

    Parameters
    ----------
    threshold
        "Mergeable" from here on.
    batched
        The published code compares experts that it finds in a Python list. GPT-OSS keeps them in one batched
        module, for which it returned an empty list: no pair was compared, and "0 % mergeable" was published.
        True does the same.

    One row per pair: ``expert_a``, ``expert_b``, ``cosine``, ``mergeable``. What is wrong with it beside that:
    neurons have no order, so that equal experts may have cosine 0, and gate and up are not looked at.
    """
    rows: list[tuple[int, int, float]] = []
    flat = [] if batched else [np.ravel(experts[i].down).astype(np.float64) for i in range(len(experts))]
    for a, b in combinations(range(len(flat)), 2):
        rows.append((a, b, cosine_of(flat[a], flat[b])))
    table = pd.DataFrame(rows, columns=["expert_a", "expert_b", "cosine"])
    return table.assign(mergeable=table["cosine"] >= threshold)


def as_published_interference(lengths: Mapping[int, npt.ArrayLike], default: int) -> pd.DataFrame:
    """The published comparison: how *long* the texts are that the model writes with k experts.

    Parameters
    ----------
    lengths
        k -> (P,) characters generated for each of P prompts; 1 and ``default`` among the k.
    default
        The model's own k.

    One row per k: ``k``, ``quality`` (mean of min(length/length with the default k, 2)) and ``interference``, prompts
    where it is below 0.8 of the length with one expert. A length says nothing about a text: nonsense is long.
    """
    base = np.maximum(np.asarray(lengths[default], np.float64), 1)
    single = np.asarray(lengths[1], np.float64)
    rows = []
    for k in sorted(lengths):
        own = np.asarray(lengths[k], np.float64)
        rows.append((k, float(np.minimum(own / base, 2).mean()), int((own < 0.8 * single).sum())))
    return pd.DataFrame(rows, columns=["k", "quality", "interference"])


def as_published_triggers(chosen: npt.ArrayLike) -> pd.DataFrame:
    """The published trigger scores of one layer.

    Parameters
    ----------
    chosen
        (T, M, E) bool: whether expert e is in the set of experts (over all tokens) of template m filled with token t.

    One row per token and expert with a score above 0: ``token`` (index), ``expert``, ``score`` (share of templates
    whose set contains it) and ``specificity``, 1/(1 + mean number of other experts/5). Wrong with it: the set is of
    the whole text, so that the template's own tokens trigger; specificity has a floor that k and the length set.
    """
    sets = np.asarray(chosen, bool)
    score = sets.mean(axis=1)
    others = np.where(sets, sets.sum(axis=2, keepdims=True) - 1, 0).sum(axis=1) / np.maximum(
        sets.sum(axis=1), 1
    )
    token, expert = np.nonzero(score)
    return pd.DataFrame(
        {
            "token": token,
            "expert": expert,
            "score": score[token, expert],
            "specificity": 1 / (1 + others[token, expert] / 5),
        }
    )


def as_published_robustness(edits: Sequence[Edit], n_expert: int) -> tuple[float, pd.DataFrame]:
    """The published robustness: texts' unions of experts before and after.

    Returns
    -------
    changed
        Share of (edit, layer) whose union of experts over all tokens differs. Adding one token almost forces it.
    experts
        One row per expert id, layers pooled: ``expert``, ``stability`` (share of the unions it was in that it is
        still in) and ``verdict`` ("stable" above .8, "volatile" below .5, else ""). Expert 3 of one layer is thrown
        together with expert 3 of every other.
    """
    before = np.stack([membership(edit.before, n_expert).astype(bool).any(axis=0) for edit in edits])
    after = np.stack([membership(edit.after, n_expert).astype(bool).any(axis=0) for edit in edits])
    seen = before.sum(axis=(0, 1))
    expert = np.flatnonzero(seen)
    stability = (before & after).sum(axis=(0, 1))[expert] / seen[expert]
    verdict = np.select([stability > 0.8, stability < 0.5], ["stable", "volatile"], "")
    table = pd.DataFrame({"expert": expert, "stability": stability, "verdict": verdict})
    return float((before != after).any(axis=2).mean()), table


def as_published_control(
    ids: npt.NDArray[np.integer], weights: npt.NDArray[np.floating], target: int
) -> bool:
    """The published success of an input, ids and weights (n, k): the target's weight is above 0.1 at any token.

    With k experts whose weights sum to 1, most that are chosen pass for k below 10: it says "chosen somewhere".
    """
    return bool(((ids == target) & (weights > 0.1)).any())
