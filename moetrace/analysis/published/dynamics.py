"""The "expert dynamics" experiment of chuk-mlx, formula for formula: circuits, dynamics of generation, cold experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.counting import member_words
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.statistics.shapes import Ints, layer_numbers


@dataclass(frozen=True)
class PublishedDynamics:
    """What the published definitions give, over all requests.

    ``consistency``: Σ|A_t ∩ A_{t+1}| / Σ max(|A_t|, |A_{t+1}|), mean of requests. ``handoffs_per_token``: layers in
    which the primary expert changes, per token. ``layers``: ``stability``, the share of steps with the same
    primary. ``boundaries``: phase boundaries by request and step; ``boundary_rate``, per step that can have one.
    """

    consistency: float
    handoffs_per_token: float
    layers: pd.DataFrame
    boundaries: pd.DataFrame
    boundary_rate: float


def as_published_dynamics(
    text: RoutedText, *, primary: str = "router", threshold: float = 0.5, seed: int = 0
) -> PublishedDynamics:
    """Consistency, handoffs, stability and phase boundaries as published.

    A boundary is a step t ≥ 2 with mean over layers of 1 − |A_t ∩ W|/|A_t ∪ W| above ``threshold``, W being all
    experts of the three steps before. ``primary``: "router" takes the router's first expert; "arbitrary" a random
    one of the chosen, which is what the published numbers rest on: that code read the first id of an unsorted
    partition.

    What is wrong: with k experts against up to 3k, the divergence is 2/3 or more even if all experts stay within
    the window, so that boundaries are everywhere; consistency and stability have no baseline.
    """
    m, n_layers, k = text.experts.shape
    picked = np.zeros((m, n_layers), dtype=np.int64)
    if primary == "arbitrary":
        picked = np.random.default_rng(seed).integers(0, k, (m, n_layers))
    place = np.arange(m) - text.starts[:-1][text.owner]
    shared, largest, n = (np.zeros(max(0, m - 1)), np.zeros(max(0, m - 1)), np.zeros(m, dtype=np.int64))
    apart = np.zeros(m)
    changes, same, pairs = 0, np.zeros(n_layers), np.zeros(n_layers)
    for layer in range(n_layers):
        ids = text.experts[:, layer]
        first = np.take_along_axis(ids, picked[:, layer, None], axis=1)[:, 0]
        words = [w[0] for w in member_words(ids[:, None], text.n_expert)]
        size = _count(words)
        both = (size[1:] > 0) & (size[:-1] > 0) & (place[1:] > 0)
        shared += np.where(both, _count([w[1:] & w[:-1] for w in words]), 0)
        largest += np.where(both, np.maximum(size[1:], size[:-1]), 0)
        stays = (first[1:] == first[:-1]) & both
        changes += int((both & ~stays).sum())
        same[layer], pairs[layer] = stays.sum(), both.sum()
        window = [_before(w, place) for w in words]
        there = (_count(window) > 0) & (size > 0)
        union = _count([w | before for w, before in zip(words, window, strict=True)])
        kept = _count([w & before for w, before in zip(words, window, strict=True)])
        n += there
        with np.errstate(invalid="ignore", divide="ignore"):
            apart += np.where(there, 1 - kept / union, 0.0)
    sums = [
        np.bincount(text.owner[1:], weights=x, minlength=text.n_requests)
        if len(text)
        else np.zeros(text.n_requests)
        for x in (shared, largest)
    ]
    consistencies = np.divide(sums[0], sums[1], out=np.ones(text.n_requests), where=sums[1] > 0)
    tokens = len(text)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = apart / n
    possible = int((place >= 2).sum())
    steps = np.flatnonzero((place >= 2) & (n > 0) & (np.nan_to_num(apart) > threshold))
    boundaries = [(text.prompts[text.owner[m]], int(place[m]), float(apart[m])) for m in steps.tolist()]
    return PublishedDynamics(
        float(np.mean(consistencies)) if consistencies.size else 1.0,
        changes / tokens if tokens else 0.0,
        pd.DataFrame(
            {
                "layer": text.layers,
                "stability": np.divide(same, pairs, out=np.ones_like(same), where=pairs > 0),
            }
        ),
        pd.DataFrame(boundaries, columns=["prompt", "step", "divergence"]),
        len(boundaries) / possible if possible else 0.0,
    )


def _count(words: list[npt.NDArray[np.unsignedinteger]]) -> Ints:
    """How many bits are set, over all words."""
    return np.asarray(sum(np.bitwise_count(w).astype(np.int64) for w in words))


def _before(word: npt.NDArray[np.unsignedinteger], place: Ints) -> npt.NDArray[np.unsignedinteger]:
    """(M,) the bits of the three rows before each row, within its request."""
    out = np.zeros_like(word)
    for lag in (1, 2, 3):
        out[lag:] |= np.where(place[lag:] >= lag, word[:-lag], word.dtype.type(0))
    return out


@dataclass(frozen=True)
class PublishedCircuits:
    """What the published definition gives: ``alignment`` of neighbouring layers, and ``pipelines``."""

    alignment: pd.DataFrame
    pipelines: pd.DataFrame
    global_consistency: float


def as_published_circuits(
    experts: npt.NDArray[np.unsignedinteger],
    weights: npt.NDArray[np.float32],
    n_expert: int,
    *,
    layers: npt.ArrayLike | None = None,
) -> PublishedCircuits:
    """Find pipelines as published, from the tokens of a single prompt: experts and weights (n, L, k).

    Profiles are an expert's weight at each position, 0 where it is not chosen. ``alignment`` is the mean
    Pearson correlation of greedily matched experts of neighbouring layers (r > 0.3). A pipeline follows, from
    each expert of the first layer, the most correlated expert of the next layer while r ≥ 0.3, and is kept if it
    covers 30 % of the layers; its ``consistency`` is the mean r.

    What is wrong: profiles of all prompts are collected and each overwrites the one before, so only the last
    prompt counts, some five tokens; and the largest of E correlations over five positions is always near 1. On
    random routing of 4 of 32 it finds about 15 pipelines of consistency 0.9 (docs/published.md).
    """
    n, n_layers, _ = experts.shape
    numbers = np.arange(n_layers) if layers is None else np.asarray(layers)
    profile = np.zeros((n_layers, n, n_expert + 1))
    for layer in range(n_layers):
        np.put_along_axis(
            profile[layer],
            np.minimum(experts[:, layer], n_expert).astype(np.int64),
            np.nan_to_num(weights[:, layer]).astype(np.float64),
            axis=1,
        )
    profile = profile[:, :, :-1]
    deviation = profile - profile.mean(axis=1, keepdims=True)
    length = np.sqrt((deviation**2).sum(axis=1, keepdims=True))
    still = profile.std(axis=1, keepdims=True) < 1e-10
    unit = np.where(still, 0.0, deviation / np.where(still, 1.0, length))
    alignment = []
    correlations = []
    for layer in range(n_layers - 1):
        r = unit[layer].T @ unit[layer + 1]
        correlations.append(np.where(still[layer + 1][0], -np.inf, r))
        free_a, free_b = np.ones(n_expert, bool), np.ones(n_expert, bool)
        matched: list[float] = []
        for where in np.argsort(-r, axis=None, kind="stable").tolist():
            a, b = divmod(where, n_expert)
            if r[a, b] <= 0.3:
                break
            if free_a[a] and free_b[b]:
                free_a[a] = free_b[b] = False
                matched.append(float(r[a, b]))
        score = max(0.0, float(np.mean(matched))) if matched else 0.0
        alignment.append((int(numbers[layer]), int(numbers[layer + 1]), len(matched), score))
    pipelines = []
    for start in range(n_expert):
        path, confidence = [start], []
        for r in correlations:
            if still[len(path) - 1][0, path[-1]]:
                break
            best = int(r[path[-1]].argmax())
            if not r[path[-1], best] >= 0.3:
                break
            confidence.append(float(r[path[-1], best]))
            path.append(best)
        if len(path) / n_layers >= 0.3:
            name = " → ".join(f"L{numbers[i]}-E{expert}" for i, expert in enumerate(path))
            consistency = float(np.mean(confidence)) if confidence else 1.0
            pipelines.append((name, len(path), len(path) / n_layers, consistency))
    table = pd.DataFrame(pipelines, columns=["pipeline", "layers", "coverage", "consistency"])
    aligned = pd.DataFrame(alignment, columns=["layer", "to_layer", "matched", "alignment"])
    return PublishedCircuits(
        aligned,
        table.sort_values(["coverage", "consistency"], ascending=False, kind="stable").reset_index(drop=True),
        float(aligned["alignment"].mean()) if len(aligned) else 0.0,
    )


def as_published_cold_experts(
    counts: npt.ArrayLike,
    tokens: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    cold_threshold: float = 0.01,
    prune_threshold: float = 0.001,
) -> pd.DataFrame:
    """Cold experts as published: rate = count/tokens of the layer; ``cold`` below 1 %, ``prune`` below 0.1 %.

    (P, L, E) and (P, L), as for :func:`cold_experts`. Returns one row per (layer, expert): ``rate``, ``cold``,
    ``prune``.

    What is wrong: there is no interval. With fewer than 1000 tokens, below 0.1 % means never seen, and an expert
    that 3 % of tokens use is not seen in 110 tokens in one case of 28.
    """
    used = np.asarray(counts).sum(axis=0)
    total = np.asarray(tokens).sum(axis=0)[:, None]
    rate = used / np.maximum(total, 1)
    n_layers, n_expert = used.shape
    numbers = layer_numbers(layers, n_layers)
    return pd.DataFrame(
        {
            "layer": np.repeat(numbers, n_expert),
            "expert": np.tile(np.arange(n_expert), n_layers),
            "rate": rate.ravel(),
            "cold": rate.ravel() < cold_threshold,
            "prune": rate.ravel() < prune_threshold,
        }
    )
