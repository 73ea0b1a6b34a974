"""What changes with depth: separation early and late, one layer in detail, entropy, balance of load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.domains.domain import delete_one_domains, domain_counts
from moetrace.analysis.statistics import information as info
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.nulls import Domains
from moetrace.analysis.statistics.rates import Rates
from moetrace.analysis.statistics.shapes import Floats, Ints, layer_numbers, per_layer
from moetrace.errors import UsageError


@dataclass(frozen=True)
class DepthContrast:
    """Domain separation in early against late layers: mean Jensen-Shannon divergence in bits.

    ``early``, ``late`` and ``difference`` (late − early) are bias-corrected by the jackknife over prompts;
    ``low`` and ``high`` bound the difference (95 %). All NaN where a domain has a single prompt.
    """

    early_layers: tuple[int, ...]
    late_layers: tuple[int, ...]
    early: float
    late: float
    difference: float
    low: float
    high: float


def depth_contrast(
    counts: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    early: Iterable[int] | None = None,
    late: Iterable[int] | None = None,
    level: float = 0.95,
) -> DepthContrast:
    """Compare separation (counts (P, L, E), labels (P,)) between two groups of layer numbers.

    By default the first and the last quarter of the layers: 0-5 and 18-23 of 24, as the data-analytics README
    has it. Raises UsageError if a group has no layer.
    """
    c = np.asarray(counts, dtype=np.float64)
    numbers = layer_numbers(layers, c.shape[1])
    quarter = max(1, c.shape[1] // 4)
    first = np.flatnonzero(np.isin(numbers, list(early))) if early is not None else np.arange(quarter)
    last = (
        np.flatnonzero(np.isin(numbers, list(late)))
        if late is not None
        else np.arange(c.shape[1] - quarter, c.shape[1])
    )
    if not first.size or not last.size:
        raise UsageError(
            "a group of layers is empty", fix=f"choose among layers {numbers.min()}..{numbers.max()}"
        )
    domains = Domains.of(labels)
    full, without = delete_one_domains(c, domains)

    def three(sums: Floats) -> Floats:
        jsd = info.jsd_bits(info.shares(sums.transpose(1, 0, 2)))
        a, b = jsd[first].mean(), jsd[last].mean()
        return np.array([a, b, b - a])

    result = nulls.jackknife(
        three(full), np.stack([three(without(i)) for i in range(c.shape[0])]), domains.codes, level
    )
    a, b, gap = (float(v) for v in result.estimate)
    return DepthContrast(
        tuple(int(n) for n in numbers[first]),
        tuple(int(n) for n in numbers[last]),
        a,
        b,
        gap,
        float(result.low[2]),
        float(result.high[2]),
    )


@dataclass(frozen=True)
class DeepDive:
    """One layer in detail: ``percent`` and ``lift``, both domains × experts.

    ``consumers`` names the expert matrices that the ids went to (gate, up, down): they share one decision, so
    there is one table, where the notebook draws the same one three times.
    """

    layer: int
    consumers: tuple[str, ...]
    percent: pd.DataFrame
    lift: pd.DataFrame


def deep_dive(
    counts: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    layer: int | None = None,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
    consumers: Sequence[str] = (),
) -> DeepDive:
    """Usage of every expert by every domain in one layer (counts (P, L, E), labels (P,)).

    By default the layer whose domains lie furthest apart (bias-corrected Cramér's V), the first where none has a
    V (one domain). ``n_expert`` (L,) are the experts of each layer, where layers differ.
    """
    names, by_domain = domain_counts(counts, labels)
    numbers = layer_numbers(layers, by_domain.shape[1])
    if layer is None:
        v = info.cramers_v(by_domain.transpose(1, 0, 2))[1]
        where = 0 if np.isnan(v).all() else int(np.nanargmax(v))
    else:
        found = np.flatnonzero(numbers == layer)
        if not found.size:
            raise UsageError(f"layer {layer} is not in the counts", fix=f"choose one of {numbers.tolist()}")
        where = int(found[0])
    own = by_domain.shape[2] if n_expert is None else int(np.asarray(n_expert)[where])
    share = info.shares(by_domain[:, where, :own])
    mean = share.mean(axis=0)
    index, columns = pd.Index(names, name="domain"), pd.RangeIndex(share.shape[1], name="expert")
    lift = np.divide(share, mean, out=np.full_like(share, np.nan), where=mean > 0)
    return DeepDive(
        int(numbers[where]),
        tuple(consumers),
        pd.DataFrame(100 * share, index=index, columns=columns),
        pd.DataFrame(lift, index=index, columns=columns),
    )


def domain_entropy(
    counts: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """How evenly each domain uses a layer's experts.

    Parameters
    ----------
    counts, labels
        (P, L, E) tokens that used the expert; (P,) domains.
    n_expert
        (L,) experts that each layer has, where layers differ; E if not given.

    Returns one row per (layer, domain): ``picks``, ``experts_used``; ``entropy_bits`` (plug-in, as
    published), ``entropy_miller_madow_bits``, ``entropy_jackknife_bits`` with ``low`` and ``high`` (prompts
    left out one by one, which also removes the bias that prompts cause); ``max_bits`` = log2 E;
    ``perplexity`` = 2^entropy_miller_madow, the effective number of experts. Whether domains differ in
    entropy is tested by ``domain_test(..., statistic="entropy")``.
    """
    c = np.asarray(counts, dtype=np.float64)
    domains = Domains.of(labels)
    numbers = layer_numbers(layers, c.shape[1])
    own = per_layer(n_expert, c.shape[1], c.shape[2])
    parts = []
    for d, name in enumerate(domains.names):
        mine = c[domains.codes == d]
        total = mine.sum(axis=0)
        plain = info.entropy_bits(info.shares(total))
        rest = np.stack([info.entropy_bits(info.shares(total - own)) for own in mine])
        knife = nulls.jackknife(plain, rest, level=level)
        parts.append(
            pd.DataFrame(
                {
                    "layer": numbers,
                    "domain": name,
                    "picks": total.sum(axis=1).astype(np.int64),
                    "experts_used": (total > 0).sum(axis=1),
                    "entropy_bits": plain,
                    "entropy_miller_madow_bits": info.miller_madow_bits(total),
                    "entropy_jackknife_bits": knife.estimate,
                    "low": knife.low,
                    "high": knife.high,
                    "max_bits": np.log2(own),
                    "perplexity": 2.0 ** info.miller_madow_bits(total),
                }
            )
        )
    return pd.concat(parts).sort_values(["layer", "domain"], kind="stable").reset_index(drop=True)


def jain_index(load: npt.ArrayLike, n_expert: npt.ArrayLike) -> Floats:
    """Jain's fairness index (...) of loads (..., E) over ``n_expert`` experts: 1 even, 1/E one expert; NaN no load."""
    x = np.asarray(load, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(x.sum(axis=-1) ** 2 / (np.asarray(n_expert) * (x**2).sum(axis=-1)))


def load_balance(
    counts: npt.ArrayLike,
    tokens: npt.ArrayLike | None,
    *,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """How evenly load falls on a layer's experts, all prompts together.

    Parameters
    ----------
    counts, tokens
        (P, L, E) tokens that used the expert and (P, L) tokens; None if only counts are known, not whose they are:
        then there are neither rates nor intervals.
    n_expert
        (L,) experts that each layer has, where layers differ; E if not given.

    Returns one row per layer: ``tokens``; ``hottest`` and ``hottest_rate`` (share of tokens that use the most
    used expert), ``peak`` (its load over uniform load); ``cv`` (population standard deviation of load over
    its mean); ``jain`` (Jain's fairness index, 1 = even, 1/E = one expert), too low of few tokens, so that
    ``jain_jackknife`` with ``jain_low``, ``jain_high`` (over prompts) stands beside it; ``unused`` experts, and
    ``unused_rate_bound``: the rate that one of them may still have, of one prompt as if its tokens were independent
    (``high`` of :class:`~moetrace.analysis.statistics.rates.Rates`; NaN where all were used).
    """
    c = np.asarray(counts, dtype=np.float64)
    n = np.zeros(c.shape[1]) if tokens is None else np.asarray(tokens, dtype=np.float64).sum(axis=0)
    total = c.sum(axis=0)
    own = per_layer(n_expert, c.shape[1], c.shape[2])
    mean = total.sum(axis=1) / own
    without = np.stack([jain_index(total - each, own) for each in c])
    knife = nulls.jackknife(jain_index(total, own), without, level=level)
    bound = np.full(len(own), np.nan)
    if tokens is not None:
        never = (total == 0) & (np.arange(total.shape[1]) < own[:, None])
        bound = np.where(
            never.any(axis=1), np.where(never, Rates.of(c, tokens, level).high, 0.0).max(axis=1), np.nan
        )
    hottest: Ints = total.argmax(axis=1)
    spread = np.sqrt(np.maximum((total**2).sum(axis=1) / own - mean**2, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        table = pd.DataFrame(
            {
                "layer": layer_numbers(layers, c.shape[1]),
                "tokens": n.astype(np.int64),
                "hottest": hottest,
                "hottest_rate": total.max(axis=1) / np.where(n > 0, n, np.nan),
                "peak": total.max(axis=1) / mean,
                "cv": spread / mean,
                "jain": jain_index(total, own),
                "jain_jackknife": np.clip(knife.estimate, 1 / own, 1.0),
                "jain_low": np.clip(knife.low, 1 / own, 1.0),
                "jain_high": np.clip(knife.high, 1 / own, 1.0),
                "unused": own - (total > 0).sum(axis=1),
                "unused_rate_bound": bound,
            }
        )
    if tokens is None:
        table[["tokens", "jain_jackknife", "jain_low", "jain_high"]] = np.nan
    return table
