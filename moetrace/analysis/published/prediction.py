"""Published predictions of routing, formula for formula, faults included.

``attention-prediction``, ``context-attention-routing`` and ``task-prediction`` of the "MoE dynamics" experiment
(nine analyses; attention_prediction_service.py, context_attention_routing_service.py, task_prediction_service.py).
Nothing here is corrected; what is wrong with each is said in its docstring. One thing differs by necessity: the
original's routers return experts in no order, so that its "primary" expert was an arbitrary one of the k; here it is
the router's first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import gammaln

from moetrace.analysis.counts.columns import TokenColumns
from moetrace.analysis.prediction.by_layer import Frames, early_index
from moetrace.analysis.statistics.shapes import Floats
from moetrace.errors import UsageError

#: attention features of a token, in the order of :func:`head_mean_features`
FEATURES = ("self_attention", "entropy", "top_k_concentration", "recent_window_mass", "early_token_mass")
_RIDGE = 0.01
_FEWEST = 10  # samples without which nothing is fitted


def head_mean_features(row: npt.NDArray[Any]) -> Floats:
    """The five features (:data:`FEATURES`) of one token's attention (heads, keys), itself the last key.

    Of the mean over heads: the last weight; −Σ w ln w with 10⁻¹⁰ added to every weight; the sums of the 3
    largest, the 5 last and the 3 first of these.
    """
    mean = np.asarray(row, dtype=np.float64).mean(axis=0)
    w = mean + 1e-10
    return np.array([mean[-1], -(w * np.log(w)).sum(), np.sort(w)[::-1][:3].sum(), w[-5:].sum(), w[:3].sum()])


@dataclass(frozen=True)
class LayerRouting:
    """Routing of n tokens in one layer: ``experts`` (n, k), the first the primary one, and ``weights`` (n, k)."""

    layer: int
    experts: npt.NDArray[Any]
    weights: npt.NDArray[Any]


def as_published_attention_prediction(
    features: npt.NDArray[np.float64],
    routing: Sequence[LayerRouting],
    prompt: npt.ArrayLike,
    n_expert: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Routing told from attention, as published.

    Parameters
    ----------
    features
        (n, 5): :func:`head_mean_features` of the **last** layer's attention, whichever layer is predicted: the
        original hooks the attention class, so that every layer's call overwrote the one before.
    routing
        The layers; the original takes the first, the middle and the last.
    prompt
        (n,) code of each token's prompt, ascending; the first half of the prompts is fitted on, the rest
        evaluated.

    Returns the evaluation, one row per layer and one for all (``layer`` -1): ``predictions``, ``top1_accuracy``,
    ``topk_overlap`` (Jaccard, called overlap), ``weight_correlation`` (Pearson over experts in both sets, where there
    are two or more) and, for all, ``predictability_score`` = 0.5·top1 + 0.3·overlap + 0.2·max(0, correlation); and the
    correlations, one row per (layer, expert).

    Faults: the layer; sinks and windows; no intercept; no baseline (k/E of Jaccard and 1/E are what chance gives, and
    the most popular experts give more). The correlation of self-attention with an expert pairs the first n values of
    all tokens' self-attention with the n weights of the tokens that *chose* the expert: two series of other tokens.
    """
    who = np.unique(np.asarray(prompt), return_inverse=True)[1]
    n_prompts = int(who.max()) + 1 if who.size else 0
    fit = who < n_prompts // 2
    rows, pairs, all_r = [], [], []
    for layer in routing:
        x, k = features[fit], layer.experts.shape[1]
        target = np.zeros((x.shape[0], n_expert))
        np.put_along_axis(
            target, layer.experts[fit].astype(np.int64), layer.weights[fit].astype(np.float64), axis=1
        )
        if x.shape[0] < _FEWEST:
            raise UsageError(
                f"{x.shape[0]} tokens to fit on: the original then falls back on made-up scores",
                fix="capture more prompts",
            )
        weight = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ target).T
        scores = features[~fit] @ weight.T
        chance = np.exp(scores - scores.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        predicted = np.argsort(chance, axis=1)[:, ::-1][:, :k]
        actual, used = layer.experts[~fit].astype(np.int64), layer.weights[~fit]
        top1 = predicted[:, 0] == actual[:, 0]
        shared = (predicted[:, :, None] == actual[:, None, :]).any(axis=2).sum(axis=1)
        overlap = shared / (2 * k - shared)
        r = []
        for i in np.flatnonzero(shared > 1):
            common = np.intersect1d(predicted[i], actual[i])
            a = used[i][[int(np.flatnonzero(actual[i] == e)[0]) for e in common]].astype(np.float64)
            b = chance[i][common]
            if a.std() > 0 and b.std() > 0:
                r.append(float(np.corrcoef(a, b)[0, 1]))
        all_r += r
        rows.append([layer.layer, top1.size, top1.mean(), overlap.mean(), float(np.mean(r)) if r else 0.0])
        for expert in range(n_expert):
            taken = layer.weights[layer.experts == expert].astype(np.float64)
            n = taken.size
            if n >= _FEWEST and taken.std() > 0 and features[:n, 0].std() > 0:
                pairs.append((layer.layer, expert, n, float(np.corrcoef(features[:n, 0], taken)[0, 1])))
    table = pd.DataFrame(
        rows, columns=["layer", "predictions", "top1_accuracy", "topk_overlap", "weight_correlation"]
    )
    total = {
        "layer": -1,
        "predictions": int(table["predictions"].sum()),
        "top1_accuracy": float(table["top1_accuracy"].mean()),
        "topk_overlap": float(table["topk_overlap"].mean()),
        "weight_correlation": float(np.mean(all_r)) if all_r else 0.0,
    }
    total["predictability_score"] = (
        0.5 * total["top1_accuracy"]
        + 0.3 * total["topk_overlap"]
        + 0.2 * max(0.0, total["weight_correlation"])
    )
    correlations = pd.DataFrame(pairs, columns=["layer", "expert", "activations", "self_attention_r"])
    return pd.concat([table, pd.DataFrame([total])], ignore_index=True), correlations


@dataclass(frozen=True)
class Context:
    """One context of the token: ``attention`` (prompt's length,) head-mean of the *last* layer from the token to every
    position, those after it 0; ``experts`` (k,), the primary one first.
    """

    attention: Floats
    experts: tuple[int, ...]


def as_published_context_attention_routing(contexts: Sequence[Context]) -> dict[str, float]:
    """Attention similarity against routing similarity over all pairs of contexts, as published, for one layer.

    Gives ``correlation`` (Pearson over pairs), ``attention_similarity`` and ``routing_similarity`` (means),
    ``unique_experts``, ``contexts``, and ``zeroed``: pairs whose attention counts as unlike only because their
    prompts differ in length. Attention: cosine, **0 if the prompts differ in length**. Routing: Jaccard J, or (J + 1)/2
    if the primary expert is the same. Other faults: the last layer's attention for every layer; pairs share
    contexts, so that they are no independent observations; no test.
    """
    attention, routing, zeroed = [], [], 0
    for a, b in combinations(contexts, 2):
        norm = float(np.linalg.norm(a.attention) * np.linalg.norm(b.attention)) if a.attention.size else 0.0
        if a.attention.size != b.attention.size:
            zeroed += 1
            attention.append(0.0)
        else:
            attention.append(float(a.attention @ b.attention) / norm if norm else 0.0)
        one, two = set(a.experts), set(b.experts)
        jaccard = len(one & two) / len(one | two)
        routing.append((jaccard + 1) / 2 if a.experts[0] == b.experts[0] else jaccard)
    x, y = np.array(attention), np.array(routing)
    varies = x.size >= 2 and x.std() > 0 and y.std() > 0
    return {
        "contexts": len(contexts),
        "correlation": float(np.corrcoef(x, y)[0, 1]) if varies else 0.0,
        "attention_similarity": float(x.mean()) if x.size else 0.0,
        "routing_similarity": float(y.mean()) if y.size else 0.0,
        "unique_experts": len({c.experts[0] for c in contexts}),
        "pairs": x.size,
        "zeroed": zeroed,
    }


def probe_features(hidden: npt.NDArray[Any]) -> Floats:
    """The 64 features of a prompt's hidden states (tokens, D): 20 of the mean over tokens, the rest 0.

    Mean, standard deviation, norm, largest, smallest; the indices (over D) of the ten entries largest in size,
    ascending in size; the 10, 25, 50, 75 and 90 % quantiles.
    """
    mean = np.asarray(hidden, dtype=np.float64).mean(axis=0)
    top = np.argsort(np.abs(mean))[-10:] / mean.size
    moments = [mean.mean(), mean.std(), np.linalg.norm(mean), mean.max(), mean.min()]
    values = np.concatenate((moments, top, np.percentile(mean, [10, 25, 50, 75, 90])))
    return np.pad(values, (0, 64 - values.size))


def as_published_task_prediction(
    features: npt.NDArray[np.float64],
    experts: Mapping[int, Sequence[npt.NDArray[Any]]],
    n_expert: int,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Later layers' experts told from an early layer, per prompt, as published.

    Parameters
    ----------
    features
        (P, 64): :func:`probe_features` of each prompt.
    experts
        Target layer -> each prompt's expert ids (tokens, k).

    Returns one row per target layer: ``accuracy`` (share of prompts for which *any* of the k experts predicted is among
    those that *any* token of the prompt used), ``precision`` and ``recall`` against that union, ``prefetch_efficiency``
    (hits over predicted), ``union`` (its mean size), ``probe`` ("ridge", or "random" where fewer than ten prompts are
    fitted on: the original then predicts random experts and says nothing). Beside them what k experts picked
    at random score, exactly: ``accuracy_random`` = 1 − C(E − u, k)/C(E, k), ``precision_random`` = u/E.

    Half of the prompts are fitted on. Faults: the accuracy grows with the prompt's length and nothing else; a
    prompt's union cannot be fetched ahead of its tokens; 64 features, 44 of them 0, for 10 prompts.
    """
    n = len(features)
    half = n // 2
    rng = np.random.default_rng((seed, 5))
    out = []
    for layer, ids in experts.items():
        k = ids[0].shape[1]
        use = np.stack([np.bincount(np.asarray(e).reshape(-1), minlength=n_expert)[:n_expert] for e in ids])
        share = use / np.maximum(use.sum(axis=1, keepdims=True), 1)
        x = features[:half]
        if half < _FEWEST:
            scores, probe = rng.random((n - half, n_expert)), "random"
        else:
            weight = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ share[:half])
            scores, probe = features[half:] @ weight, "ridge"
        predicted = np.argsort(scores, axis=1)[:, ::-1][:, :k]
        seen = use[half:] > 0
        found = np.take_along_axis(seen, predicted, axis=1).sum(axis=1)
        union = seen.sum(axis=1)
        with np.errstate(invalid="ignore"):
            none = np.exp(_log_choose(n_expert - union, k) - _log_choose(np.full(union.size, n_expert), k))
        out.append(
            {
                "layer": layer,
                "probe": probe,
                "prompts": n - half,
                "accuracy": float((found > 0).mean()),
                "precision": float((found / k).mean()),
                "recall": float((found / np.maximum(union, 1)).mean()),
                "prefetch_efficiency": float(found.sum() / (k * found.size)),
                "union": float(union.mean()),
                "accuracy_random": float((1 - none).mean()),
                "precision_random": float((union / n_expert).mean()),
            }
        )
    return pd.DataFrame(out)


def _log_choose(n: npt.NDArray[Any], k: int) -> Floats:
    """ln C(n, k), -inf where k > n."""
    m = np.maximum(n, k)
    value = gammaln(m + 1) - gammaln(k + 1) - gammaln(m - k + 1)
    return np.where(n >= k, value, -np.inf)


# -- of a trace's tokens -----------------------------------------------------------------------------------


def attention_by_layer(columns: TokenColumns) -> Frames:
    """:func:`as_published_attention_prediction` of these tokens.

    Of the first, middle and last layer that have routing of them. Raises ChannelMissingError without attention
    or weights.
    """
    known = [n for n in columns.text.layers.tolist() if columns.text.known(columns.index(n)).any()]
    chosen = (
        [columns.index(n) for n in sorted({known[0], known[len(known) // 2], known[-1]})] if known else []
    )
    if not chosen:
        raise UsageError("these tokens have no routing", fix="choose another phase")
    attention = columns.attention(columns.text, int(columns.text.layers[-1]))
    there = np.logical_and.reduce([attention.known, *(columns.text.known(i) for i in chosen)])
    features = np.stack([head_mean_features(attention.row(int(i))) for i in np.flatnonzero(there)])
    part = columns.text.take(there)
    routing = [
        LayerRouting(int(part.layers[i]), part.experts[:, i], columns.need("weights", part, i))
        for i in chosen
    ]
    return as_published_attention_prediction(features, routing, part.owner, part.n_expert)


def contexts_by_layer(columns: TokenColumns, token: int) -> pd.DataFrame:
    """:func:`as_published_context_attention_routing`, layer by layer.

    Of the first, middle and last layer, in every prompt that has the token: where it stands first.
    """
    text, layers = columns.text, columns.text.layers.tolist()
    first = np.flatnonzero(text.tokens == token)
    first = first[np.unique(text.owner[first], return_index=True)[1]]
    last = np.zeros(text.n_requests, dtype=np.int64)
    np.maximum.at(last, text.owner, text.positions)
    part = text.take(first)
    attention = columns.attention(part, layers[-1])
    out = []
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        index = columns.index(layer)
        contexts = []
        for i in np.flatnonzero(part.known(index) & attention.known):
            row, start = attention.row(int(i)).mean(axis=0), int(attention.first_position[i])
            whole = np.zeros(max(int(last[part.owner[i]]) + 1, start + row.size))
            whole[start : start + row.size] = row
            ids = part.experts[i, index]
            contexts.append(Context(whole, tuple(ids[ids < part.n_expert].tolist())))
        if len(contexts) >= 2:
            found = as_published_context_attention_routing(contexts)
            out.append({"token": token, "layer": layer, **found})
    return pd.DataFrame(out)


def task_by_layer(columns: TokenColumns, early_layer: int = 4, *, seed: int = 0) -> pd.DataFrame:
    """:func:`as_published_task_prediction` of these tokens.

    From the mean of the early layer's gate inputs (the original: of the layer's input, before attention), to
    the second half of the layers. Raises ChannelMissingError without gate inputs.
    """
    early = early_index(columns, early_layer)
    targets = list(range(columns.text.layers.size // 2, columns.text.layers.size))
    text = columns.text
    targets = [i for i in targets if text.known(i).any()]
    part = text.take(np.logical_and.reduce([text.known(early), *(text.known(i) for i in targets)]))
    hidden = columns.need("gate_input", part, early)
    edges = np.flatnonzero(np.diff(part.owner)) + 1
    features = np.stack([probe_features(h) for h in np.split(hidden, edges)])
    experts = {int(text.layers[i]): np.split(part.experts[:, i], edges) for i in targets}
    if len(features) < 2 or not experts:
        raise UsageError("there are fewer than two prompts with routing", fix="capture more prompts")
    return as_published_task_prediction(features, experts, part.n_expert, seed=seed)
