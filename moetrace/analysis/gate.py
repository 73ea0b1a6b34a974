"""How the router's input changes from one MoE layer to the next."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis import nulls
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


def pair_distances(a: npt.ArrayLike, b: npt.ArrayLike) -> dict[str, nulls.Floats]:
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
        Row numbers to look at: those of one phase (the published script means decode but lets prompt batches
        in).
    state
        (N, L): pairs with a cell other than 1 are left out.

    Returns one row per (row, consecutive pair of layers): ``row``, ``layer``, ``next_layer``, the
    :data:`METRICS`, and ``cosine_unpaired``: the cosine between this layer of this token and the next layer
    of another token (the next of ``rows``), the level that two unrelated tokens have. ``cosine_similarity``
    means little until it is above that. NaN for a single token.
    """
    if gate_input.ndim != 3:
        raise UsageError(f"gate_input has shape {gate_input.shape}", fix="give (rows, layers, n_embd)")
    where = np.asarray(rows, dtype=np.int64)
    numbers = np.arange(gate_input.shape[1]) if layers is None else np.asarray(layers)
    parts: list[pd.DataFrame] = []
    for start in range(0, where.size, chunk):
        mine = where[start : start + chunk]
        other = np.roll(where, -1)[start : start + chunk]
        x, z = np.asarray(gate_input[mine]), np.asarray(gate_input[other])
        metrics = pair_distances(x[:, :-1], x[:, 1:])
        unpaired = pair_distances(x[:, :-1], z[:, 1:])["cosine_similarity"]
        if where.size < 2:
            unpaired = np.full_like(unpaired, np.nan)
        there = np.isfinite(metrics["euclidean"])
        if state is not None:
            known = np.asarray(state[mine]) == 1
            there &= known[:, :-1] & known[:, 1:]
            unpaired = np.where(np.asarray(state[other])[:, 1:] == 1, unpaired, np.nan)
        token, pair = np.nonzero(there)
        parts.append(
            pd.DataFrame(
                {
                    "row": mine[token],
                    "layer": numbers[pair],
                    "next_layer": numbers[pair + 1],
                    **{name: metrics[name][there] for name in METRICS},
                    "cosine_unpaired": unpaired[there],
                }
            )
        )
    if not parts:
        return pd.DataFrame(
            columns=["row", "layer", "next_layer", *METRICS, "cosine_unpaired"], dtype=np.float64
        )
    return pd.concat(parts, ignore_index=True)


def gate_summary(distances: pd.DataFrame, prompts: npt.ArrayLike, level: float = 0.95) -> pd.DataFrame:
    """Aggregate :func:`gate_distances` per pair of layers; ``prompts`` (rows of the frame) names each row's
    prompt.

    Returns one row per (layer, next_layer, metric): ``tokens``, ``mean`` and ``std`` (ddof 0, as published),
    and ``low``, ``high`` for the mean over prompts (jackknife; NaN for fewer than two prompts).
    """
    names = [*METRICS, "cosine_unpaired"]
    who = pd.factorize(np.asarray(prompts))[0]
    if who.size != len(distances):
        raise UsageError(
            f"{who.size} prompts for {len(distances)} distances", fix="name the prompt of every row"
        )
    out = []
    for (layer, after), part in distances.groupby(["layer", "next_layer"], sort=True):
        values = part[names].to_numpy(dtype=np.float64)
        mine = pd.factorize(who[distances.index.get_indexer(part.index)])[0]
        known = ~np.isnan(values)
        sums, sizes = np.zeros((2, int(mine.max()) + 1, len(names)))
        np.add.at(sums, mine, np.where(known, values, 0.0))
        np.add.at(sizes, mine, known)
        interval = nulls.ratio_interval(sums, sizes, level)
        n = sizes.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums.sum(axis=0) / n
            std = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / n)
        out.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "next_layer": after,
                    "metric": names,
                    "tokens": n.astype(np.int64),
                    "mean": mean,
                    "std": std,
                    "low": interval.low,
                    "high": interval.high,
                }
            )
        )
    columns = ["layer", "next_layer", "metric", "tokens", "mean", "std", "low", "high"]
    return pd.concat(out, ignore_index=True) if out else pd.DataFrame(columns=columns)
