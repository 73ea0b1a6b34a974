"""Which experts of a layer are alike, which could be one, and what they would be.

Experts are held against each other by their weights, by what they compute, and by when they are chosen. The
order of an expert's hidden neurons means nothing, so weights are compared after the neurons are matched
(:func:`align`); two experts that differ in nothing but that order are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.routed import membership
from moetrace.analysis.experts.outputs import blocks_of_pairs
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError
from moetrace.model.experts import Activation, Expert
from moetrace.model.grouping import Grouping

_KEYS = ["expert_a", "expert_b"]
_OUTPUT_COLUMNS = ("cosine_mean_output", "output_distance", "output_distance_low", "output_distance_high")
_ROUTING_COLUMNS = ("both", "coactivation", "logit_correlation")

#: what experts can be grouped by
CRITERIA = ("outputs", "weights", "routing", "dominant", "random", "prune")


# -- neurons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neurons:
    """An expert as a set of hidden neurons.

    Attributes
    ----------
    fixed
        (F, …) the part of each neuron that can only be permuted: the gate's row, or everything.
    free
        (F, …) the up row and the down column, brought to equal length: multiplying one by c and dividing the
        other by c changes nothing, c = −1 included. None where that is not so (experts without a gate, gpt-oss).
    scale
        (F,) what the up row was multiplied with, and the down column divided by.
    n_up
        Width of the up row within ``free``.
    """

    fixed: Floats
    free: Floats | None
    scale: Floats
    n_up: int


def neurons(expert: Expert, activation: Activation = "silu") -> Neurons:
    """Take an expert apart into its hidden neurons; biases belong to their rows."""

    def rows(weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None) -> Floats:
        parts = [weight] if bias is None else [weight, bias[:, None]]
        return np.concatenate(parts, axis=1, dtype=np.float64)

    up, down = rows(expert.up, expert.up_bias), expert.down.T.astype(np.float64)
    ones = np.ones(len(up))
    if expert.gate is None:
        return Neurons(np.concatenate([up, down], axis=1), None, ones, up.shape[1])
    gate = rows(expert.gate, expert.gate_bias)
    if activation == "swiglu_oai":
        return Neurons(np.concatenate([gate, up, down], axis=1), None, ones, up.shape[1])
    n_up, n_down = np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=1)
    both = (n_up > 0) & (n_down > 0)
    scale = np.where(both, np.sqrt(np.divide(n_down, n_up, out=ones.copy(), where=both)), 1.0)
    free = np.concatenate([up * scale[:, None], down / scale[:, None]], axis=1)
    return Neurons(gate, free, scale, up.shape[1])


@dataclass(frozen=True)
class Alignment:
    """How the neurons of expert b match those of expert a.

    Attributes
    ----------
    order
        (F,) neuron ``order[i]`` of b matches neuron i of a.
    sign
        (F,) ±1: what b's up row and down column are multiplied with.
    cosine
        Of both experts' weights after matching; 1 only if they compute the same.
    """

    order: Ints
    sign: Floats
    cosine: float


def align(a: Neurons, b: Neurons) -> Alignment:
    """Match the neurons of two experts so that the cosine of their weights is as large as can be.

    The Hungarian algorithm on the inner products of neurons: gate, up and down at once (Ainsworth et al.,
    arXiv 2209.04836, within one layer, where the matching is exact).
    """
    from scipy.optimize import linear_sum_assignment  # a tenth of a second to import

    gain = a.fixed @ b.fixed.T
    sign = np.ones_like(gain)
    if a.free is not None and b.free is not None:
        loose = a.free @ b.free.T
        sign = np.where(loose < 0, -1.0, 1.0)
        gain += np.abs(loose)
    row, column = linear_sum_assignment(gain, maximize=True)
    norm = np.sqrt(_square(a) * _square(b))
    cosine = float(gain[row, column].sum() / norm) if norm > 0 else float("nan")
    return Alignment(column.astype(np.int64), sign[row, column], cosine)


def weight_similarity(
    experts: Sequence[Expert],
    activation: Activation = "silu",
    *,
    pairs: npt.ArrayLike | None = None,
    n_null: int = 19,
    seed: int = 0,
    max_bytes: int = 1 << 30,
) -> pd.DataFrame:
    """Compare the weights of a layer's experts, neurons as they lie and matched.

    Parameters
    ----------
    experts
        A list, or anything that gives one expert at a time (:class:`moetrace.model.experts.LayerExperts`).
    pairs
        (n, 2) pairs to compare; default: all E(E − 1)/2.
    n_null
        Null comparisons, each as much work as the comparison itself. Matching alone makes unrelated experts look
        alike; how much is seen by flipping the signs of each expert's input and output dimensions at random,
        which leaves every expert as it is by itself and unrelates it from the others.
    max_bytes
        Memory for dequantised experts.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``expert_a``, ``expert_b``; ``cosine`` of all weights as they lie, ``cosine_down`` of
        the down matrices alone; ``cosine_aligned`` after matching; ``null_mean`` and ``null_max``, what matching
        makes of unrelated experts; ``p_family`` (max-T over the pairs: are the two more alike than unrelated
        experts?). NaN without null comparisons.
    """
    n = len(experts)
    chosen = np.array(list(combinations(range(n), 2)) if pairs is None else pairs, np.int64).reshape(-1, 2)
    cosine, down = np.full((2, len(chosen)), np.nan)
    aligned = np.full((1 + n_null, len(chosen)), np.nan)
    if not len(chosen):
        return _similarity_table(chosen, cosine, down, aligned)
    rng = np.random.default_rng(seed)
    width = experts[0].down.shape[0]
    flips = rng.choice(np.array([-1.0, 1.0]), (n_null, n, 2, width))
    for held, mine in blocks_of_pairs(experts, chosen, max_bytes, factor=4):
        parts = {e: neurons(expert, activation) for e, expert in held.items()}
        flat = {e: _flat(expert) for e, expert in held.items()}
        for i in mine:
            a, b = (int(e) for e in chosen[i])
            cosine[i] = cosine_of(flat[a], flat[b])
            down[i] = cosine_of(np.ravel(held[a].down), np.ravel(held[b].down))
            aligned[0, i] = align(parts[a], parts[b]).cosine
        for round_, sign in enumerate(flips, start=1):
            flipped = {e: _flipped(parts[e], sign[e]) for e in held}
            for i in mine:
                aligned[round_, i] = align(flipped[int(chosen[i, 0])], flipped[int(chosen[i, 1])]).cosine
    return _similarity_table(chosen, cosine, down, aligned)


def _similarity_table(pairs: Ints, cosine: Floats, down: Floats, aligned: Floats) -> pd.DataFrame:
    nothing = np.full(len(pairs), np.nan)
    tested = len(aligned) > 1 and len(pairs) > 0
    return pd.DataFrame(
        {
            "expert_a": pairs[:, 0],
            "expert_b": pairs[:, 1],
            "cosine": cosine,
            "cosine_down": down,
            "cosine_aligned": aligned[0],
            "null_mean": aligned[1:].mean(axis=0) if tested else nothing,
            "null_max": aligned[1:].max(axis=0) if tested else nothing,
            "p_family": nulls.max_t(aligned) if tested else nothing,
        }
    )


def _flipped(parts: Neurons, sign: Floats) -> Neurons:
    """The same neurons with dimensions of the input (sign[0]) and the output (sign[1]) flipped."""
    read, written = sign
    width = len(read)

    def flip(values: Floats, blocks: Iterable[Floats]) -> Floats:
        out = values.copy()
        at = 0
        for block in blocks:
            out[:, at : at + width] *= block
            at += n_up if block is read else width
        return out

    n_up = parts.n_up  # a bias, if there is one, stands behind each read block
    if parts.free is not None:
        return Neurons(flip(parts.fixed, [read]), flip(parts.free, [read, written]), parts.scale, parts.n_up)
    n_read = (parts.fixed.shape[1] - width) // n_up
    return Neurons(flip(parts.fixed, [read] * n_read + [written]), None, parts.scale, parts.n_up)


def _square(parts: Neurons) -> float:
    return float((parts.fixed**2).sum() + (0.0 if parts.free is None else (parts.free**2).sum()))


def _flat(expert: Expert) -> Floats:
    every = [expert.gate, expert.up, expert.gate_bias, expert.up_bias, expert.down]
    return np.concatenate([np.ravel(part).astype(np.float64) for part in every if part is not None])


def cosine_of(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else float("nan")


# -- outputs and routing -----------------------------------------------------------------------------------


def output_similarity(
    outputs: npt.NDArray[np.float32], prompts: npt.ArrayLike, level: float = 0.95
) -> pd.DataFrame:
    """Compare what the experts of a layer compute from the same inputs.

    Parameters
    ----------
    outputs
        (E, n, D) what each expert makes of each of n inputs (:func:`moetrace.analysis.experts.outputs.expert_outputs`).
    prompts
        (n,) which prompt each input is from: intervals rest on prompts.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``expert_a``, ``expert_b``; ``cosine_mean_output`` of the two mean outputs, by which
        HC-SMoE (arXiv 2410.08589) groups experts; ``output_distance``, Σ‖f_a(x) − f_b(x)‖² / Σ(‖f_a(x)‖² +
        ‖f_b(x)‖²): 0 for equal functions, 1 for outputs at right angles; ``output_distance_low`` and
        ``output_distance_high`` of its jackknife interval (NaN for fewer than two prompts).
    """
    unit = np.unique(np.asarray(prompts), return_inverse=True)[1]
    n = len(outputs)
    mean = outputs.mean(axis=1, dtype=np.float64)
    gram = np.zeros((int(unit.max()) + 1, n, n))
    for prompt in range(len(gram)):
        own = outputs[:, unit == prompt].reshape(n, -1).astype(np.float64)
        gram[prompt] = own @ own.T
    size = np.diagonal(gram, axis1=1, axis2=2)
    a, b = np.triu_indices(n, 1)
    both = size[:, a] + size[:, b]
    far = np.maximum(both - 2 * gram[:, a, b], 0)
    found = nulls.ratio_interval(far, both, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = far.sum(axis=0) / both.sum(axis=0)
    return pd.DataFrame(
        {
            "expert_a": a,
            "expert_b": b,
            "cosine_mean_output": [cosine_of(mean[i], mean[j]) for i, j in zip(a, b, strict=True)],
            "output_distance": distance,
            "output_distance_low": np.maximum(found.low, 0),
            "output_distance_high": found.high,
        }
    )


def routing_similarity(
    ids: npt.NDArray[np.integer], n_expert: int, logits: npt.NDArray[np.float32] | None = None
) -> pd.DataFrame:
    """Compare when the experts of a layer are chosen.

    Parameters
    ----------
    ids
        (n, k) expert ids of n tokens.
    logits
        (n, E) the router's output for the same tokens, if known.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``expert_a``, ``expert_b``; ``both``, tokens that use both; ``coactivation``, the phi
        coefficient of "uses a" and "uses b" over all tokens, every pair counted (OLMoE's published
        co-activation looks at neighbours in rank only); ``logit_correlation`` over tokens, by which M-SMoE
        (arXiv 2310.01334) groups experts, NaN without logits. NaN where an expert is never or always used.
    """
    used = membership(ids, n_expert).astype(np.float64)
    a, b = np.triu_indices(n_expert, 1)
    correlation = np.full(len(a), np.nan)
    if logits is not None:
        correlation = _correlation(logits.astype(np.float64))[a, b]
    return pd.DataFrame(
        {
            "expert_a": a,
            "expert_b": b,
            "both": (used.T @ used)[a, b].astype(np.int64),
            "coactivation": _correlation(used)[a, b],
            "logit_correlation": correlation,
        }
    )


def _correlation(values: Floats) -> Floats:
    centred = values - values.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((centred.T @ centred) / np.outer(spread, spread))


def expert_merging(
    experts: Sequence[Expert],
    activation: Activation = "silu",
    *,
    pairs: npt.ArrayLike | None = None,
    n_null: int = 19,
    seed: int = 0,
    routing: tuple[npt.NDArray[np.integer], npt.NDArray[np.float32] | None] | None = None,
    outputs: tuple[npt.NDArray[np.float32], npt.ArrayLike] | None = None,
) -> pd.DataFrame:
    """Compare every pair of experts of a layer in three ways.

    Parameters
    ----------
    experts, activation, pairs, n_null, seed
        Of :func:`weight_similarity`.
    routing
        (ids, logits) of :func:`routing_similarity`, if known.
    outputs
        (outputs, prompts) of :func:`output_similarity`, if known.

    Returns one row per pair, all E(E − 1)/2 of them, with the columns of the three functions; NaN where a pair was
    not compared in that way.
    """
    n = len(experts)
    table = pd.DataFrame(np.stack(np.triu_indices(n, 1), axis=1), columns=_KEYS)
    weights = weight_similarity(experts, activation, pairs=pairs, n_null=n_null, seed=seed)
    table = table.merge(weights, on=_KEYS, how="left")
    if outputs is not None:
        table = table.merge(output_similarity(*outputs), on=_KEYS)
    if routing is not None:
        table = table.merge(routing_similarity(routing[0], n, routing[1]), on=_KEYS)
    return table.reindex(columns=list(dict.fromkeys([*table.columns, *_OUTPUT_COLUMNS, *_ROUTING_COLUMNS])))


def merge_candidates(
    pairs: pd.DataFrame, *, max_distance: float = 0.5, min_cosine: float = 0.8
) -> pd.DataFrame:
    """Choose the pairs of a comparison that could be one expert; the most alike first.

    A pair is a candidate if its outputs are near (the upper end of ``output_distance``'s interval is below
    ``max_distance``), or its weights are after matching (``cosine_aligned`` ≥ ``min_cosine`` and ``p_family`` ≤
    .05 where it was tested). ``by`` says which: outputs, weights or both.
    """
    nothing = pd.Series(np.nan, index=pairs.index)
    near = pairs.get("output_distance_high", nothing) < max_distance
    alike = pairs.get("cosine_aligned", nothing) >= min_cosine
    tested = pairs.get("p_family", nothing)
    alike &= tested.isna() | (tested <= 0.05)
    by = np.select([near & alike, near, alike], ["both", "outputs", "weights"], "")
    found = pairs.assign(by=by).loc[by != ""]
    by_output = bool("output_distance" in found and found["output_distance"].notna().any())
    found = found.sort_values("output_distance" if by_output else "cosine_aligned", ascending=by_output)
    return pd.DataFrame(found)


# -- grouping ----------------------------------------------------------------------------------------------


def group_experts(
    distance: npt.ArrayLike, n_expert: int, use: npt.ArrayLike, *, n_blocks: int = 1
) -> Grouping:
    """Group the experts of a layer into ``n_expert`` ones: average linkage, as HC-SMoE.

    Parameters
    ----------
    distance
        (E, E) symmetric; NaN counts as the largest.
    use
        (E,) how often each is used.
    n_blocks
        Blocks of experts that must stay apart (the expert groups of DeepSeek-V3): each gives the same number.

    Raises
    ------
    UsageError
        If ``n_expert`` is not in 1 … E, or not a multiple of ``n_blocks``.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage  # as above
    from scipy.spatial.distance import squareform

    d = np.array(distance, np.float64)
    n = _check_count(len(d), n_expert, n_blocks)
    finite = d[np.isfinite(d)]
    d[~np.isfinite(d)] = finite.max() if finite.size else 1.0
    np.fill_diagonal(d, 0)
    group = np.empty(len(d), np.int64)
    size = len(d) // n_blocks
    for block in range(n_blocks):
        part = slice(block * size, (block + 1) * size)
        own = np.zeros(size, np.int64)
        if size > 1:
            tree = linkage(squareform((d[part, part] + d[part, part].T) / 2, checks=False), "average")
            own = cut_tree(tree, n_clusters=[n // n_blocks])[:, 0]
        # numbered by first member, so that a group stays where its first member was
        first = np.unique(own, return_index=True)[1]
        group[part] = np.argsort(np.argsort(first))[own] + block * (n // n_blocks)
    return Grouping(group, np.asarray(use, np.float64))


def drop_experts(use: npt.ArrayLike, n_expert: int, *, n_blocks: int = 1) -> Grouping:
    """Keep the ``n_expert`` most used experts of a layer (of each block alike) and leave the others out.

    Raises UsageError as :func:`group_experts`.
    """
    weight = np.asarray(use, np.float64)
    n = _check_count(len(weight), n_expert, n_blocks)
    rank = np.argsort(np.argsort(-weight.reshape(n_blocks, -1), axis=1, kind="stable"), axis=1)
    kept = (rank < n // n_blocks).ravel()
    return Grouping(np.where(kept, np.cumsum(kept) - 1, -1), weight)


def group_around_used(
    distance: npt.ArrayLike, n_expert: int, use: npt.ArrayLike, *, n_blocks: int = 1
) -> Grouping:
    """Keep the ``n_expert`` most used experts of a layer; each other one joins the nearest kept one (M-SMoE).

    Raises UsageError as :func:`group_experts`.
    """
    kept = drop_experts(use, n_expert, n_blocks=n_blocks)
    d = np.array(distance, np.float64)
    d[np.isnan(d)] = np.inf
    block = np.arange(len(d)) // (len(d) // n_blocks)
    d[block[:, None] != block] = np.inf
    stays = np.flatnonzero(kept.group >= 0)
    # of the kept ones of its own block, should all distances be unknown
    own = np.where(block[:, None] == block[stays], np.minimum(d[:, stays], 1e300), np.inf)
    group = np.where(kept.group >= 0, kept.group, kept.group[stays[own.argmin(axis=1)]])
    return Grouping(group, kept.use)


def _check_count(n_before: int, n_expert: int, n_blocks: int) -> int:
    if not 1 <= n_expert <= n_before or n_expert % n_blocks or n_before % n_blocks:
        raise UsageError(
            f"{n_before} experts cannot become {n_expert}"
            + (f" in {n_blocks} groups of equal size" if n_blocks > 1 else ""),
            fix=f"give 1 to {n_before}" + (f", a multiple of {n_blocks}" if n_blocks > 1 else ""),
        )
    return n_expert


def pair_matrix(pairs: pd.DataFrame, column: str, n_expert: int) -> Floats:
    """A column of a table of pairs as a symmetric matrix (E, E), NaN where a pair is missing."""
    out = np.full((n_expert, n_expert), np.nan)
    a, b = pairs["expert_a"].to_numpy(), pairs["expert_b"].to_numpy()
    out[a, b] = out[b, a] = pairs[column].to_numpy(np.float64)
    return out


def merge(members: Sequence[Expert], shares: npt.ArrayLike, activation: Activation = "silu") -> Expert:
    """One expert from several: their neurons matched to the first one's, and averaged.

    Parameters
    ----------
    shares
        (n,) weights of the average; they sum to 1.

    The first member's neurons keep their scale. Merging experts that are equal up to the order (and, where that
    changes nothing, the scale and sign) of their neurons gives the first one back.
    """
    weight = np.asarray(shares, np.float64)
    first = members[0]
    base = neurons(first, activation)
    fixed = base.fixed * weight[0]
    free = None if base.free is None else base.free * weight[0]
    for expert, share in zip(members[1:], weight[1:], strict=True):
        parts = neurons(expert, activation)
        match = align(base, parts)
        fixed += share * parts.fixed[match.order]
        if free is not None and parts.free is not None:
            free += share * match.sign[:, None] * parts.free[match.order]
    if free is None:
        n_read = fixed.shape[1] - first.down.shape[0]
        gate = fixed[:, : n_read - base.n_up] if first.gate is not None else None
        up, down = fixed[:, n_read - base.n_up : n_read], fixed[:, n_read:]
    else:
        gate = fixed
        up, down = free[:, : base.n_up] / base.scale[:, None], free[:, base.n_up :] * base.scale[:, None]
    width = first.up.shape[1]
    biases = [e.down_bias for e in members if e.down_bias is not None]
    return Expert(
        up=up[:, :width].astype(np.float32),
        down=np.ascontiguousarray(down.T, np.float32),
        gate=None if gate is None else gate[:, :width].astype(np.float32),
        up_bias=up[:, width].astype(np.float32) if first.up_bias is not None else None,
        gate_bias=gate[:, width].astype(np.float32)
        if gate is not None and first.gate_bias is not None
        else None,
        down_bias=np.tensordot(weight, np.stack(biases), 1).astype(np.float32) if biases else None,
    )


def group_layers(
    distances: Mapping[int, npt.ArrayLike],
    use: Mapping[int, npt.ArrayLike],
    n_expert: int,
    *,
    criterion: str,
    n_blocks: int = 1,
    seed: int = 0,
) -> dict[int, Grouping]:
    """Group every layer's experts into the same number, which is what model files take.

    Parameters
    ----------
    distances
        Layer -> (E, E); not looked at by the criteria "random" and "prune".
    use
        Layer -> (E,).
    criterion
        One of :data:`CRITERIA`: merge by a distance ("dominant": into the most used ones, else by average linkage),
        merge at random (what any criterion must beat), or leave out the least used ("prune").
    """
    rng = np.random.default_rng(seed)
    out = {}
    for layer, counts in use.items():
        if criterion == "prune":
            out[layer] = drop_experts(counts, n_expert, n_blocks=n_blocks)
            continue
        n = len(np.asarray(counts))
        distance = rng.random((n, n)) if criterion == "random" else distances[layer]
        group = group_around_used if criterion == "dominant" else group_experts
        out[layer] = group(distance, n_expert, counts, n_blocks=n_blocks)
    return out


def frontier(size: npt.ArrayLike, loss: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which of n files no other beats: none is at most as large and loses at most as much, one of the two by less.

    Parameters
    ----------
    size, loss
        (n,) of each file; NaN is beaten.
    """
    a, b = np.asarray(size, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    no_worse = (a[:, None] <= a) & (b[:, None] <= b)
    better = (a[:, None] < a) | (b[:, None] < b)
    return np.asarray(~(no_worse & better).any(axis=0) & ~np.isnan(a + b))
