"""Experts that are hardly ever used: how sure that is, and which tokens use them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import RoutedText, uses_expert
from moetrace.analysis.statistics.nulls import clopper_pearson, jackknife
from moetrace.analysis.statistics.rates import Rates
from moetrace.analysis.statistics.shapes import Ints, layer_numbers
from moetrace.errors import UsageError


def cold_experts(
    counts: npt.ArrayLike,
    tokens: npt.ArrayLike,
    *,
    n_expert_used: npt.ArrayLike,
    layers: npt.ArrayLike | None = None,
    cold_below: float = 0.1,
    level: float = 0.95,
) -> pd.DataFrame:
    """How often each expert is used, with intervals, and which are cold beyond doubt.

    Parameters
    ----------
    counts, tokens
        (P, L, E) tokens of each prompt that used the expert; (P, L) tokens.
    n_expert_used
        (L,) or one number: experts per token, k.
    cold_below
        An expert is cold if its rate is below this share of an even split, k/E.

    Returns one row per (layer, expert), coldest first: ``tokens``, ``used``, ``rate``; ``low`` and ``high``, exact
    for independent tokens; ``effective_tokens``, what the tokens are worth given that those of one prompt are
    alike, and ``cluster_low``, ``cluster_high`` from these (Korn & Graubard 1998); ``bound``, the upper bound at a
    level that holds for all experts of all layers together (Bonferroni, one-sided); ``cold`` = bound < threshold;
    ``threshold``; ``prompts`` that use it; ``verdict``: "cold", "in use" (cluster_low ≥ threshold) or "undecided".

    What tokens are worth: :class:`~moetrace.analysis.statistics.rates.Rates`.
    """
    c = np.asarray(counts, dtype=np.float64)
    n = np.asarray(tokens, dtype=np.float64)
    if c.ndim != 3 or n.shape != c.shape[:2]:
        raise UsageError(f"counts {c.shape} and tokens {n.shape} do not fit", fix="give (P, L, E) and (P, L)")
    _, n_layers, n_expert = c.shape
    numbers = layer_numbers(layers, n_layers)
    used, total = c.sum(axis=0), n.sum(axis=0)[:, None]
    rates = Rates.of(c, n, level)
    low, high = clopper_pearson(used, np.broadcast_to(total, used.shape), level)
    bound = rates.bound((1 - level) / used.size)
    threshold = (cold_below * np.asarray(n_expert_used, dtype=np.float64) / n_expert) * np.ones(n_layers)
    cold = bound < threshold[:, None]
    verdict = np.where(cold, "cold", np.where(rates.low >= threshold[:, None], "in use", "undecided"))
    table = pd.DataFrame(
        {
            "layer": np.repeat(numbers, n_expert),
            "expert": np.tile(np.arange(n_expert), n_layers),
            "tokens": np.broadcast_to(total, used.shape).ravel().astype(np.int64),
            "used": used.ravel().astype(np.int64),
            "rate": rates.rate.ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            "effective_tokens": rates.effective.ravel(),
            "cluster_low": rates.low.ravel(),
            "cluster_high": rates.high.ravel(),
            "bound": bound.ravel(),
            "threshold": np.repeat(threshold, n_expert),
            "cold": cold.ravel(),
            "prompts": (c > 0).sum(axis=0).ravel(),
            "verdict": verdict.ravel(),
        }
    )
    return table.sort_values(["rate", "layer", "expert"], kind="stable").reset_index(drop=True)


def tokens_needed(
    n_expert: int, n_expert_used: int, n_layers: int, cold_below: float = 0.1, level: float = 0.95
) -> int:
    """Independent tokens without a pick after which an expert counts as cold among all of a model's."""
    tail = (1 - level) / (n_expert * n_layers)
    return int(np.ceil(np.log(tail) / np.log1p(-cold_below * n_expert_used / n_expert)))


def cold_types(
    text: RoutedText,
    experts: Sequence[tuple[int, int]],
    kind: Ints,
    names: Sequence[str],
    level: float = 0.95,
) -> pd.DataFrame:
    """Which types of token use these experts, (layer index, expert), all of them together.

    Parameters
    ----------
    kind, names
        (M,) each token's type, an index of ``names`` (:func:`moetrace.analysis.type_words`).

    Returns one row per type that occurs, the largest lift first: ``type``; ``uses``, how often its tokens use one of
    the experts; ``share`` of all uses; ``text_share`` of the tokens of these layers; ``lift``, one over the other, with
    ``low`` and ``high`` (jackknife over prompts, at a level that holds for all types together).
    """
    kinds = np.unique(kind)
    shape = (text.n_requests, kinds.size)
    uses, tokens = np.zeros(shape), np.zeros(shape)
    cell = text.owner * kinds.size + np.searchsorted(kinds, kind)
    layers = sorted({layer for layer, _ in experts})
    for layer in layers:
        mine = [expert for at, expert in experts if at == layer]
        count = np.isin(text.experts[:, layer], mine).sum(axis=1)
        uses += np.bincount(cell, weights=count, minlength=uses.size).reshape(shape)
        known = text.known(layer)
        tokens += np.bincount(cell[known], minlength=uses.size).reshape(shape)
    total = np.stack([uses, tokens]).sum(axis=1)  # (2, types)
    rest = total[:, None] - np.stack([uses, tokens])  # (2, prompts, types)

    def lift(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            share = sums / sums.sum(axis=-1, keepdims=True)
            return np.asarray(share[0] / share[1])

    there = tokens.sum(axis=1) > 0
    each = 1 - (1 - level) / kinds.size
    interval = jackknife(lift(total), np.nan_to_num(lift(rest))[there], level=each)
    with np.errstate(invalid="ignore"):
        share = total / total.sum(axis=1, keepdims=True)
    table = pd.DataFrame(
        {
            "type": [names[k] for k in kinds.tolist()],
            "uses": total[0].astype(np.int64),
            "share": share[0],
            "text_share": share[1],
            "lift": lift(total),
            "low": np.maximum(interval.low, 0.0),
            "high": interval.high,
        }
    )
    return table.sort_values("lift", ascending=False, kind="stable").reset_index(drop=True)


def trigger_tokens(
    text: RoutedText,
    experts: Sequence[tuple[int, int]],
    vocabulary: Sequence[bytes] | None = None,
    *,
    at_most: int = 10,
    context: int = 5,
) -> pd.DataFrame:
    """Which tokens use these experts, (layer index, expert), with the text around them.

    Returns one row per occurrence, at most ``at_most`` per expert, those of the largest mixing weight first:
    ``layer``, ``expert``, ``prompt``, ``position``, ``token``, ``piece``, ``weight`` (NaN if unknown), ``context``
    (``context`` tokens on either side, the token in ⟦ ⟧; None without a vocabulary), ``token_share``: of the same
    token's occurrences, how many use the expert, and ``token_count``, how many there are.
    """
    tokens = text.tokens
    rows: list[tuple[object, ...]] = []
    for layer, expert in experts:
        uses = uses_expert(text.experts[:, layer], expert)
        where = np.flatnonzero(uses)
        weight = np.full(where.size, np.nan)
        if text.weights is not None:
            mine = text.experts[where, layer] == expert
            weight = np.where(mine, text.weights[where, layer], -np.inf).max(axis=1)
        known = text.known(layer)
        for i in np.argsort(-np.nan_to_num(weight), kind="stable")[:at_most]:
            row = int(where[i])
            same = known & (tokens == tokens[row])
            rows.append(
                (
                    int(text.layers[layer]),
                    expert,
                    text.prompts[int(text.owner[row])],
                    int(text.positions[row]),
                    int(tokens[row]),
                    _piece(vocabulary, tokens[row : row + 1]),
                    float(weight[i]),
                    _around(text, row, vocabulary, context),
                    float(uses[same].mean()),
                    int(same.sum()),
                )
            )
    names = ["layer", "expert", "prompt", "position", "token", "piece", "weight", "context"]
    return pd.DataFrame(rows, columns=[*names, "token_share", "token_count"])


def _piece(vocabulary: Sequence[bytes] | None, tokens: npt.NDArray[np.int64]) -> str | None:
    if vocabulary is None or ((tokens < 0) | (tokens >= len(vocabulary))).any():
        return None
    return b"".join(vocabulary[int(t)] for t in tokens).decode("utf-8", "replace")


def _around(text: RoutedText, row: int, vocabulary: Sequence[bytes] | None, reach: int) -> str | None:
    request = int(text.owner[row])
    start = max(int(text.starts[request]), row - reach)
    stop = min(int(text.starts[request + 1]), row + reach + 1)
    tokens = text.tokens
    parts = [_piece(vocabulary, tokens[a:b]) for a, b in ((start, row), (row, row + 1), (row + 1, stop))]
    return None if None in parts else f"{parts[0]}⟦{parts[1]}⟧{parts[2]}"


def candidate_tokens(
    text: RoutedText, experts: Sequence[tuple[int, int]], *, at_most: int = 20
) -> dict[tuple[int, int], Ints]:
    """Token ids that may wake an expert, most promising first: those that used it, by their share of uses."""
    tokens = text.tokens
    out = {}
    for layer, expert in experts:
        uses = uses_expert(text.experts[:, layer], expert) & (tokens >= 0)
        ids, where = np.unique(tokens, return_inverse=True)
        seen = np.bincount(where, weights=text.known(layer).astype(np.float64))
        hits = np.bincount(where, weights=uses.astype(np.float64))
        order = np.lexsort((-hits, -hits / np.maximum(seen, 1)))
        out[layer, expert] = ids[order][hits[order] > 0][:at_most].astype(np.int64)
    return out


def wake_rates(
    woken: npt.ArrayLike, tried: npt.ArrayLike, base: npt.ArrayLike, level: float = 0.95
) -> pd.DataFrame:
    """How often inputs made with the intent to wake an expert did, against tokens of ordinary text.

    ``woken`` of ``tried`` (n,), and ``base`` (n,), the expert's rate there. Returns ``woken``, ``tried``, ``rate``,
    ``low``, ``high`` (exact), ``base_rate`` and ``lift``.
    """
    c, n = np.asarray(woken, dtype=np.float64), np.asarray(tried, dtype=np.float64)
    low, high = clopper_pearson(c, n, level)
    b = np.asarray(base, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "woken": c.astype(np.int64),
                "tried": n.astype(np.int64),
                "rate": c / n,
                "low": low,
                "high": high,
                "base_rate": b,
                "lift": np.where(b > 0, c / n / b, np.nan),
            }
        )
