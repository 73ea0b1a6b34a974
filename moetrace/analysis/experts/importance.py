"""What each expert does for a model: how often it is used, with how much weight, and how much it adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError

#: what experts can be ranked by -> the column of :attr:`ExpertImportance.experts`
CRITERIA = {
    "count": "share",
    "weight": "weight_share",
    "saliency": "saliency",
    "contribution": "saliency_share",
}


@dataclass(frozen=True)
class ExpertImportance:
    """What :func:`expert_importance` gives.

    Attributes
    ----------
    experts
        One row per (layer, expert): ``uses``; ``share`` of tokens that use it; with mixing weights ``weight_share``
        of the layer's mixing weights, ``mean_weight`` and ``mean_rank`` (0: the largest of its token) where it is
        used; with norms of outputs ``saliency``, the mean of weight × ‖output‖ over the tokens that use it (REAP,
        arXiv 2510.13999, eq. 9), 0 if none does, and ``saliency_share``, the sum over these tokens as a share of the
        layer's. ``share``,
        ``weight_share`` and ``saliency`` with ``_low`` and ``_high``: 95 % intervals, jackknife over prompts. NaN
        where a layer has no such expert's tokens, or there is one prompt.
    stability
        One row per (criterion, layer): ``spearman``, rank correlation of the experts' values in two halves of the
        prompts, and ``overlap``, the share of the least important quarter of one half that is so in the other
        (chance: ``overlap_chance``); means over random halves. NaN with fewer than two prompts.
    """

    experts: pd.DataFrame
    stability: pd.DataFrame

    def values(self, criterion: str) -> dict[int, Floats]:
        """Layer -> (E,) how much each expert counts by a criterion.

        Raises UsageError if it was not measured, or nothing is known of a layer.
        """
        column = CRITERIA.get(criterion)
        if column is None or column not in self.experts:
            have = [name for name, column in CRITERIA.items() if column in self.experts]
            raise UsageError(
                f"experts cannot be ranked by {criterion!r} here",
                why="saliency and contribution need the channels weights and outputs, weight the channel weights",
                fix=f"choose among: {', '.join(have)}; or capture experts,weights,outputs",
            )
        out = {}
        for layer, part in self.experts.groupby("layer", sort=True):
            if part["share"].isna().all():
                raise UsageError(f"nothing is known of the experts of layer {layer}", fix="record it")
            out[int(str(layer))] = part[column].fillna(0.0).to_numpy(np.float64)
        return out


def expert_importance(
    text: RoutedText,
    outputs: Sequence[npt.NDArray[np.float32]] | None = None,
    *,
    weighed: bool = False,
    n_expert: npt.ArrayLike | None = None,
    n_splits: int = 20,
    seed: int = 0,
    level: float = 0.95,
) -> ExpertImportance:
    """Count uses, mixing weights and, with norms of their outputs, saliency of all experts.

    Parameters
    ----------
    text
        Rows; one request per prompt.
    outputs
        For each layer (M, k) norms of what the chosen experts made, NaN where unknown; None: not known.
    weighed
        Whether the mixing weights are in ``outputs`` already, as where a model weighs what experts take (llama4).
    n_expert
        (L,) experts that each layer has, where they differ.
    n_splits
        Random halves of the prompts, for stability.

    Raises UsageError if there is no routing.
    """
    e = text.n_expert
    if not len(text) or not (text.experts < e).any():
        raise UsageError("there is no routing to look at", fix="choose a phase that has rows")
    sizes = np.full(text.layers.size, e) if n_expert is None else np.asarray(n_expert, dtype=np.int64)
    halves = _halves(text.n_requests, n_splits, np.random.default_rng(seed))
    frames, stable = [], []
    for i, layer in enumerate(text.layers.tolist()):
        sums = _sums(text, i, None if outputs is None else outputs[i], weighed)
        sums = {name: values[:, : sizes[i]] for name, values in sums.items() if values.ndim == 2} | {
            "tokens": sums["tokens"]
        }
        frames.append(_layer(layer, sums, level))
        for criterion in CRITERIA:
            per_half = _per_half(criterion, sums, halves)
            if per_half is not None:
                stable.append({"criterion": criterion, "layer": layer} | _agreement(*per_half))
    stability = pd.DataFrame(stable).sort_values(["criterion", "layer"], ignore_index=True, kind="stable")
    return ExpertImportance(pd.concat(frames, ignore_index=True), stability)


def _sums(
    text: RoutedText, layer: int, norm: npt.NDArray[np.float32] | None, weighed: bool
) -> dict[str, Floats]:
    """Of each prompt and expert (P, E): uses, and sums of weights, ranks and saliencies; ``tokens`` (P, 1)."""
    ids, e, p = text.experts[:, layer].astype(np.int64), text.n_expert, text.n_requests
    there = ids < e
    owner = np.broadcast_to(text.owner[:, None], ids.shape)
    cell = (owner * e + ids)[there]

    def total(values: npt.NDArray[np.floating] | None) -> Floats:
        weights = None if values is None else np.asarray(values, dtype=np.float64)
        return np.bincount(cell, weights, minlength=p * e).reshape(p, e).astype(np.float64)

    out = {
        "uses": total(None),
        "tokens": np.bincount(text.owner[there.any(axis=1)], minlength=p).astype(np.float64)[:, None],
    }
    if text.weights is None:
        return out
    weight = text.weights[:, layer].astype(np.float64)
    rank = np.argsort(np.argsort(-np.where(there, weight, -np.inf), axis=1, kind="stable"), axis=1)
    out |= {"weight": total(weight[there]), "rank": total(rank[there].astype(np.float64))}
    if norm is not None:
        # tokens whose output is not known have no part in the mean
        made = (norm if weighed else weight * norm)[there].astype(np.float64)
        known = np.isfinite(made)
        out |= {"made": total(np.where(known, made, 0.0)), "known": total(known.astype(np.float64))}
    return out


def _layer(layer: int, sums: dict[str, Floats], level: float) -> pd.DataFrame:
    uses = sums["uses"].sum(axis=0)
    e = uses.size
    columns: dict[str, npt.NDArray[np.generic]] = {
        "layer": np.full(e, layer),
        "expert": np.arange(e),
        "uses": uses.astype(np.int64),
    }
    columns |= _ratio("share", sums["uses"], sums["tokens"], level)
    with np.errstate(invalid="ignore", divide="ignore"):
        if "weight" in sums:
            columns |= _ratio(
                "weight_share", sums["weight"], sums["weight"].sum(axis=1, keepdims=True), level
            )
            columns["mean_weight"] = sums["weight"].sum(axis=0) / uses
            columns["mean_rank"] = sums["rank"].sum(axis=0) / uses
        if "made" in sums:
            made = sums["made"].sum(axis=0)
            columns |= _ratio("saliency", sums["made"], sums["known"], level)
            columns["saliency"] = np.where(
                sums["known"].sum(axis=0) > 0, made / sums["known"].sum(axis=0), 0.0
            )
            columns["saliency_share"] = made / made.sum()
    return pd.DataFrame(columns)


def _ratio(name: str, top: Floats, bottom: Floats, level: float) -> dict[str, Floats]:
    found = nulls.ratio_interval(top, bottom, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = top.sum(axis=0) / bottom.sum(axis=0)
    return {name: value, f"{name}_low": np.maximum(found.low, 0.0), f"{name}_high": found.high}


def _halves(n: int, n_splits: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """(S, P) which prompts are of the first half; none of fewer than two prompts."""
    if n < 2:
        return np.empty((0, n), dtype=bool)
    return np.argsort(rng.random((n_splits, n)), axis=1) < n // 2


def _per_half(
    criterion: str, sums: dict[str, Floats], halves: npt.NDArray[np.bool_]
) -> tuple[Floats, Floats] | None:
    """The criterion's values (S, E) in the one halves and in the others; None if it is not known."""
    top, bottom = {
        "count": ("uses", None),
        "weight": ("weight", None),
        "saliency": ("made", "known"),
        "contribution": ("made", None),
    }[criterion]
    if top not in sums:
        return None
    first = halves.astype(np.float64)

    def value(chosen: Floats) -> Floats:
        total = chosen @ sums[top]
        return total if bottom is None else total / np.maximum(chosen @ sums[bottom], 1.0)

    return value(first), value(1.0 - first)


def _agreement(a: Floats, b: Floats) -> dict[str, float]:
    """How alike two rankings of experts are, over pairs of halves (S, E)."""
    e = a.shape[1]
    quarter = max(1, e // 4)
    chance = {"overlap_chance": quarter / e}
    if not len(a):
        return {"spearman": np.nan, "overlap": np.nan} | chance
    spearman = [_spearman(x, y) for x, y in zip(a, b, strict=True)]
    lowest = [np.argsort(x, axis=1, kind="stable")[:, :quarter] for x in (a, b)]
    both = [np.intersect1d(x, y).size / quarter for x, y in zip(*lowest, strict=True)]
    return {"spearman": float(np.mean(spearman)), "overlap": float(np.mean(both))} | chance


def _spearman(a: Floats, b: Floats) -> float:
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / scale if scale > 0 else np.nan


def _ranks(values: Floats) -> Floats:
    """Ranks from 0, equal values the mean of theirs."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    end: Ints = np.cumsum(count)
    return np.asarray((end - (count + 1) / 2)[inverse], dtype=np.float64)
