"""How the router's input changes from one MoE layer to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.chosen import Chosen, by_prompt
from moetrace.analysis.statistics.shapes import Floats, Ints, layer_numbers
from moetrace.analysis.statistics.sums import MetricSums
from moetrace.errors import UsageError

METRICS = (
    "cosine_similarity",
    "cosine_distance",
    "euclidean",
    "l1",
    "l2_normalized",
    "pearson_corr",
    "max_abs_diff",
    "mean_abs_diff",
)
SUMMED = (*METRICS, "cosine_unpaired")


def pair_distances(a: npt.ArrayLike, b: npt.ArrayLike) -> dict[str, Floats]:
    """Distances of vectors a and b, both (..., D): each metric of :data:`METRICS` as an array (...), float64.

    ``l2_normalized`` is ‖a − b‖₂/√D and ``l1`` is Σ|a − b|, as in gate_input_analysis.py. Cosine and Pearson
    are NaN where a vector is constant zero, respectively constant.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    gap = np.abs(x - y)
    euclidean = np.sqrt((gap**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (x * y).sum(axis=-1) / np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
        xc, yc = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
        pearson = (xc * yc).sum(axis=-1) / np.sqrt((xc**2).sum(axis=-1) * (yc**2).sum(axis=-1))
    return {
        "cosine_similarity": cosine,
        "cosine_distance": 1 - cosine,
        "euclidean": euclidean,
        "l1": gap.sum(axis=-1),
        "l2_normalized": euclidean / np.sqrt(x.shape[-1]),
        "pearson_corr": pearson,
        "max_abs_diff": gap.max(axis=-1),
        "mean_abs_diff": gap.mean(axis=-1),
    }


def gate_distances(
    gate_input: npt.NDArray[np.float32],
    rows: npt.ArrayLike,
    *,
    partners: npt.ArrayLike | None = None,
    state: npt.NDArray[np.uint8] | None = None,
    layers: npt.ArrayLike | None = None,
    chunk: int = 64,
) -> pd.DataFrame:
    """Distances between consecutive MoE layers, token by token.

    Parameters
    ----------
    gate_input
        (N, L, D) f4, may be memory-mapped: what each layer's router read. Only ``chunk`` rows are held at a
        time.
    rows
        (M,) row numbers to look at: those of one phase (the published script means decode but lets prompt
        batches in).
    partners
        (M,) for each of them, the row of another token; negative: there is none. By default the next of
        ``rows``, after the last the first.
    state
        (N, L): pairs with a cell other than 1 are left out.

    Returns one row per (row, consecutive pair of layers): ``row``, ``layer``, ``next_layer``, the
    :data:`METRICS`, and ``cosine_unpaired``: the cosine between this layer of this token and the next layer
    of its partner, the level that two different tokens have. ``cosine_similarity`` means little until it is
    above that. NaN without a partner. A frame of all tokens is large: :func:`gate_sums` does not grow.
    """
    numbers = layer_numbers(layers, gate_input.shape[1])
    parts: list[pd.DataFrame] = []
    for mine, metrics in _distances(gate_input, rows, partners, state, chunk):
        token, pair = np.nonzero(~np.isnan(metrics["euclidean"]))
        there = (token, pair)
        parts.append(
            pd.DataFrame(
                {
                    "row": mine[token],
                    "layer": numbers[pair],
                    "next_layer": numbers[pair + 1],
                    **{name: values[there] for name, values in metrics.items()},
                }
            )
        )
    if not parts:
        return pd.DataFrame(columns=["row", "layer", "next_layer", *SUMMED], dtype=np.float64)
    return pd.concat(parts, ignore_index=True)


def gate_sums(
    gate_input: npt.NDArray[np.float32],
    rows: npt.ArrayLike,
    prompts: npt.ArrayLike,
    *,
    partners: npt.ArrayLike | None = None,
    state: npt.NDArray[np.uint8] | None = None,
    chunk: int = 64,
) -> MetricSums:
    """Sums of the distances of :func:`gate_distances` per prompt; ``prompts`` (M,) names each row's. They add.

    Memory does not grow with the rows.
    """
    if gate_input.ndim == 3 and gate_input.shape[1] < 2:
        raise UsageError(
            "there is one MoE layer: no next one to compare it with", fix="capture two layers or more"
        )
    names = np.asarray(prompts).astype(np.str_)
    if names.size != np.asarray(rows).size:
        raise UsageError(
            f"{names.size} prompts for {np.asarray(rows).size} rows", fix="name every row's prompt"
        )
    total, start = None, 0
    for mine, metrics in _distances(gate_input, rows, partners, state, chunk):
        part = MetricSums.of(names[start : start + mine.size], metrics)
        total, start = part if total is None else total + part, start + mine.size
    if total is None:
        raise UsageError("there are no rows to compare", fix="choose a phase that has rows")
    return total


def gate_summary(sums: MetricSums, layers: npt.ArrayLike | None = None, level: float = 0.95) -> pd.DataFrame:
    """Aggregate :func:`gate_sums` per pair of layers.

    Returns one row per (layer, next_layer, metric): ``tokens``, ``mean`` and ``std`` (ddof 0, as published),
    and ``low``, ``high`` for the mean over prompts (jackknife; NaN for fewer than two prompts).
    """
    table = sums.table(level)
    numbers = layer_numbers(layers, sums.tokens.shape[1] + 1)
    place = table.pop("place").to_numpy()
    table.insert(0, "layer", numbers[place])
    table.insert(1, "next_layer", numbers[place + 1])
    return table


def gate_rows(chosen: Sequence[Chosen]) -> Iterator[tuple[Chosen, str, Ints, Ints]]:
    """Rows, prompt and partners of every request, prompts in order of their names.

    Each token's partner (for ``cosine_unpaired``) is the next one of its request, the first one for the last.
    Raises ChannelMissingError if a trace has no gate inputs, UsageError if it has one layer.
    """
    for each in chosen:
        if each.need("gate_input").shape[1] < 2:
            raise UsageError(
                "there is one MoE layer: no next one to compare it with", fix="capture two layers or more"
            )
    for each, prompt, rows in by_prompt(chosen):
        yield each, prompt, rows, np.roll(rows, -1) if rows.size > 1 else np.full(1, -1)


def distances_by_prompt(chosen: Sequence[Chosen], at_most: int) -> pd.DataFrame:
    """:func:`gate_distances` of the first ``at_most`` chosen rows, prompt by prompt, and each one's ``prompt``.

    ``row`` counts within each trace. Raises as :func:`gate_rows`.
    """
    parts: list[pd.DataFrame] = []
    for each, prompt, rows, partners in gate_rows(chosen):
        rows, partners = rows[:at_most], partners[:at_most]
        at_most -= rows.size
        values, trace = each.need("gate_input"), each.trace
        found = gate_distances(values, rows, partners=partners, state=trace.state, layers=trace.layers)
        parts.append(found.assign(prompt=prompt))
        if at_most <= 0:
            break
    return pd.concat(parts, ignore_index=True)


def summary_by_prompt(chosen: Sequence[Chosen]) -> pd.DataFrame:
    """:func:`gate_summary` over prompts, in memory that does not grow with rows. Raises as :func:`gate_rows`."""
    parts = (
        gate_sums(
            each.need("gate_input"), rows, [prompt] * rows.size, partners=partners, state=each.trace.state
        )
        for each, prompt, rows, partners in gate_rows(chosen)
    )
    return gate_summary(reduce(add, parts), chosen[0].trace.layers)


def _distances(
    gate_input: npt.NDArray[np.float32],
    rows: npt.ArrayLike,
    partners: npt.ArrayLike | None,
    state: npt.NDArray[np.uint8] | None,
    chunk: int,
) -> Iterator[tuple[Ints, dict[str, Floats]]]:
    """Rows (m,) and :data:`SUMMED` of them, each (m, L − 1), NaN where a cell is not there; chunk by chunk."""
    if gate_input.ndim != 3:
        raise UsageError(f"gate_input has shape {gate_input.shape}", fix="give (rows, layers, n_embd)")
    where = np.asarray(rows, dtype=np.int64)
    if partners is None:
        other = np.roll(where, -1) if where.size > 1 else np.full(where.shape, -1)
    else:
        other = np.asarray(partners, dtype=np.int64)
    for start in range(0, where.size, chunk):
        mine, theirs = where[start : start + chunk], other[start : start + chunk]
        x, z = np.asarray(gate_input[mine]), np.asarray(gate_input[theirs])
        metrics = pair_distances(x[:, :-1], x[:, 1:])
        unpaired = pair_distances(x[:, :-1], z[:, 1:])["cosine_similarity"]
        there = np.isfinite(metrics["euclidean"])
        known = np.broadcast_to((theirs >= 0)[:, None], unpaired.shape)
        if state is not None:
            here = np.asarray(state[mine]) == 1
            there &= here[:, :-1] & here[:, 1:]
            known = known & (np.asarray(state[theirs])[:, 1:] == 1)
        metrics["cosine_unpaired"] = np.where(known, unpaired, np.nan)
        yield mine, {name: np.where(there, values, np.nan) for name, values in metrics.items()}
