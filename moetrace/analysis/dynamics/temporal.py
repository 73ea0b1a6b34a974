"""Does a token's routing tell the next one's? Persistence at lags 1 to 32, and transitions.

Two baselines stand beside every observed rate. **Marginal**: neighbours drawn independently from the layer's
overall usage; beating it only means that prompts differ. **Shuffle**: the same prompt's tokens in random
order; beating it means that order matters. Prefill and decode are never mixed: count one phase at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace._native import lag_agreement
from moetrace.analysis.counts.chosen import Chosen
from moetrace.analysis.counts.counting import (
    MAX_LAG,
    PRESENT,
    ReadingOrder,
    RoutingCounts,
    member_words,
    reading_order,
)
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, layer_numbers, some_requests, spans
from moetrace.errors import UsageError


def persistence(counts: RoutingCounts, level: float = 0.95) -> pd.DataFrame:
    """Agreement of a token's experts with those d tokens later, layer by layer.

    Returns one row per (layer, lag), two families of columns: ``top1`` (same first expert) and ``overlap``
    (|A_t ∩ A_{t+d}|/k). For each: the observed rate; ``_marginal``, Σ_e p_e² (top-1) or Σ_e π_e²/k (sets),
    with p and π the layer's overall usage (for uniform usage 1/E and k/E); ``_shuffle``, the exact mean over
    all orders of each prompt's tokens, Σ_e c_e(c_e − 1)/(n(n − 1)); ``_excess``, observed − shuffle, with
    ``_low`` and ``_high`` (jackknife over prompts). ``pairs`` is the number of pairs, ``prompts`` that of
    prompts which have any.
    """
    out: dict[str, npt.NDArray[np.generic]] = {
        "layer": np.repeat(counts.layers, counts.max_lag),
        "lag": np.tile(np.arange(1, counts.max_lag + 1), counts.layers.size),
        "pairs": counts.lag_pairs.sum(axis=0).reshape(-1),
        "prompts": (counts.lag_pairs > 0).sum(axis=0).reshape(-1),
    }
    for name in ("top1", "overlap"):
        # a layer at a time: tables of very many prompts are large
        each = [_of_layer(counts, layer, name, level) for layer in range(counts.layers.size)]
        for part in each[0] if each else ():
            out[f"{name}{part}"] = np.concatenate([columns[part] for columns in each])
    return pd.DataFrame(out)


def _of_layer(counts: RoutingCounts, layer: int, name: str, level: float) -> dict[str, Floats]:
    """The columns of one family of :func:`persistence`, by their ends, (D,) each."""
    n, k = counts.tokens[:, layer].astype(np.float64), float(counts.n_expert_used[layer])
    pairs = counts.lag_pairs[:, layer].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        if name == "top1":
            observed, used, per = counts.lag_top1[:, layer].astype(np.float64), counts.top1, 1.0
        else:
            observed, used, per = counts.lag_shared[:, layer] / k, counts.included, k
        c = used[:, layer].astype(np.float64)
        marginal = ((c.sum(axis=0) / n.sum()) ** 2).sum() / per
        shuffle = ((c * (c - 1)).sum(axis=1) / (n * (n - 1)))[:, None] / per
        expected = np.where(pairs > 0, pairs * shuffle, 0.0)
        excess = nulls.ratio_interval(observed - expected, pairs, level)
        return {
            "": observed.sum(axis=0) / pairs.sum(axis=0),
            "_marginal": np.full(counts.max_lag, marginal),
            "_shuffle": expected.sum(axis=0) / pairs.sum(axis=0),
            "_excess": (observed - expected).sum(axis=0) / pairs.sum(axis=0),
            "_low": excess.low,
            "_high": excess.high,
        }


def shuffle_test(
    experts: npt.NDArray[np.unsignedinteger],
    request: npt.ArrayLike,
    position: npt.ArrayLike,
    *,
    n_expert: int,
    state: npt.NDArray[np.uint8] | None = None,
    keep: npt.ArrayLike | None = None,
    shifted: npt.ArrayLike = (),
    layers: npt.ArrayLike | None = None,
    max_lag: int = MAX_LAG,
    n_permutations: int = 199,
    max_rows: int = 8000,
    seed: int = 0,
    order: ReadingOrder | None = None,
) -> pd.DataFrame:
    """Test whether the order of tokens matters: each request's tokens are put in random order, many times.

    Arrays as for :func:`moetrace.analysis.counts.counting.count_routing`; first experts in the router's order.
    Requests, or stretches of long ones, are drawn at random until they hold ``max_rows`` rows. ``order`` is the
    reading order of these columns, if it is known.

    Returns one row per (layer, lag): ``top1`` and ``overlap`` observed on these rows, their mean over the
    orders (``_shuffle``), ``_p`` (one-sided: more agreement than in random order) and ``_p_family`` (max-T
    over all layers and lags). NaN where there is no pair. ``DataFrame.attrs`` holds ``rows`` and ``requests``
    used, and ``n_permutations``.
    """
    rng = np.random.default_rng(seed)
    order = reading_order(request, position, keep, shifted) if order is None else order
    drawn, begin, held = some_requests(order.request_starts, max_rows, rng)
    chosen = spans(begin, held)
    if not chosen.size:
        raise UsageError("there are no rows to shuffle", fix="choose a phase and requests that have rows")
    owner = np.repeat(drawn, held)
    run = np.searchsorted(order.run_starts, chosen, side="right")
    rows = order.rows[chosen]
    ids = np.asarray(experts[rows])
    if state is not None:
        missing = np.asarray(state[rows]) != PRESENT
        ids = np.where(missing[:, :, None], np.iinfo(ids.dtype).max, ids)
    k = np.maximum((ids < n_expert).sum(axis=2).max(axis=0), 1)
    m, n_layers = ids.shape[:2]
    lags = [lag for lag in range(1, max_lag + 1) if lag < m and (run[lag:] == run[:-lag]).any()]
    together = np.zeros((len(lags), m), dtype=bool)
    for i, lag in enumerate(lags):
        together[i, lag:] = run[lag:] == run[:-lag]
    mixed = np.empty((n_permutations + 1, m), dtype=np.int32)
    mixed[0] = np.arange(m)
    for b in range(n_permutations):
        mixed[b + 1] = np.argsort(owner + rng.random(m))
    words = np.stack(member_words(ids, n_expert)).astype(np.uint64)
    first = np.ascontiguousarray(ids[:, :, 0].T.astype(np.uint16))
    top1, overlap = np.full((2, n_permutations + 1, n_layers, max_lag), np.nan)
    if lags:
        where = np.array(lags) - 1
        pairs, same, shared = lag_agreement(words, first, np.array(lags), together, mixed, n_expert)
        with np.errstate(invalid="ignore", divide="ignore"):
            overlap[:, :, where] = shared / pairs / k[:, None]
            top1[:, :, where] = same / pairs
    numbers = layer_numbers(layers, n_layers)
    out: dict[str, npt.NDArray[np.generic]] = {
        "layer": np.repeat(numbers, max_lag),
        "lag": np.tile(np.arange(1, max_lag + 1), n_layers),
    }
    for name, null in (("top1", top1), ("overlap", overlap)):
        flat = null.reshape(n_permutations + 1, -1)
        seen = ~np.isnan(flat).any(axis=0)
        p, family, mean = np.full((3, flat.shape[1]), np.nan)
        if seen.any():
            p[seen], family[seen] = nulls.permutation_p(flat[:, seen]), nulls.max_t(flat[:, seen])
            mean[seen] = flat[1:, seen].mean(axis=0)
        out[name], out[f"{name}_shuffle"] = flat[0], mean
        out[f"{name}_p"], out[f"{name}_p_family"] = p, family
    table = pd.DataFrame(out)
    table.attrs.update(rows=int(m), requests=int(np.unique(owner).size), n_permutations=n_permutations)
    return table


def shuffle_chosen(chosen: Chosen, **options: Any) -> pd.DataFrame:
    """:func:`shuffle_test` of a trace's chosen rows, with its options."""
    trace = chosen.trace
    return shuffle_test(
        trace.experts, trace.request, trace.positions, order=chosen.order, **chosen.columns, **options
    )


@dataclass(frozen=True)
class Transitions:
    """From a token's first expert to the next token's, in one layer; frames of experts × experts (from × to).

    ``expected`` is the mean count over all orders of each prompt's tokens, and ``lift`` = counts/expected
    (NaN where nothing is expected). ``stay`` is the observed share of repeats, ``stay_expected`` that in
    random order.
    """

    layer: int
    counts: pd.DataFrame
    probability: pd.DataFrame
    expected: pd.DataFrame
    lift: pd.DataFrame
    stay: float
    stay_expected: float


def transitions(counts: RoutingCounts, layer: int) -> Transitions:
    """Transition matrix of one layer, by llama.cpp's layer number.

    ``probability`` rows sum to 1 (NaN for experts that never came first). Raises UsageError if the layer is
    not there or the counts are of chosen prompts only.
    """
    found = np.flatnonzero(counts.layers == layer)
    if not found.size:
        raise UsageError(f"layer {layer} is not in the counts", fix=f"choose one of {counts.layers.tolist()}")
    if not counts.transitions.shape[1]:
        raise UsageError("counts of chosen prompts have no transitions", fix="count those prompts alone")
    if not counts.max_lag:
        raise UsageError("these counts were made without neighbours", fix="count with max_lag of 1 or more")
    where = int(found[0])
    seen = counts.transitions[where].astype(np.float64)
    n = counts.tokens[:, where].astype(np.float64)
    c = counts.top1[:, where].astype(np.float64)
    weight = np.divide(counts.lag_pairs[:, where, 0], n * (n - 1), out=np.zeros_like(n), where=n > 1)
    expected: Floats = (c * weight[:, None]).T @ c
    expected[np.diag_indices_from(expected)] -= weight @ c
    expected = np.maximum(expected, 0.0)
    axis = [pd.RangeIndex(seen.shape[0], name=name) for name in ("from", "to")]

    def frame(values: npt.NDArray[np.generic]) -> pd.DataFrame:
        return pd.DataFrame(values, index=axis[0], columns=axis[1])

    total = seen.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return Transitions(
            int(counts.layers[where]),
            frame(counts.transitions[where]),
            frame(seen / seen.sum(axis=1, keepdims=True)),
            frame(expected),
            frame(np.where(expected > 0, seen / expected, np.nan)),
            float(np.trace(seen) / total) if total else float("nan"),
            float(np.trace(expected) / total) if total else float("nan"),
        )
