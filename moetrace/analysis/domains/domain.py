"""Do domains use different experts, how strongly, and which ones?

Counts come per prompt, (P, L, E), with one label per prompt, as in
:class:`moetrace.analysis.counts.counting.RoutingCounts`. Tests move whole prompts between domains; intervals resample
or leave out whole prompts. Domains weigh equally in every mean, so that no result depends on which of them
was asked more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace._native import group_sums
from moetrace.analysis.domains import spread
from moetrace.analysis.statistics import information as info
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.nulls import Domains
from moetrace.analysis.statistics.rates import Rates
from moetrace.analysis.statistics.shapes import Floats, Ints, layer_numbers, per_layer
from moetrace.errors import UsageError

Statistic = Literal["welch", "jsd", "pseudo_f", "entropy"]

N_PERMUTATIONS = 999
#: of arrangements, so many show what prompts alone produce
_SHOWN = 199
N_BOOT = 2000


@dataclass(frozen=True)
class DomainSeparation:
    """How far apart the domains of one table of counts (D, E) are.

    ``chi2``, ``dof`` and ``p_value`` are Pearson's and take every pick for an independent observation: the
    p-value says nothing about domains unless prompts do not matter (:func:`domain_test` is the sound one).
    ``cramers_v_corrected`` is Bergsma's (2013). ``jsd_bits`` is the Jensen-Shannon divergence of the domains'
    distributions, equally weighted, in bits.
    """

    chi2: float
    dof: int
    p_value: float
    cramers_v: float
    cramers_v_corrected: float
    jsd_bits: float
    n_picks: int
    experts_used: int


def domain_separation(counts: npt.ArrayLike) -> DomainSeparation:
    """Separation of domains from their counts (D, E); experts that nobody used do not matter.

    Raises
    ------
    UsageError
        If counts are not (D ≥ 1, E), negative, or a domain has none.
    """
    c = np.asarray(counts, dtype=np.float64)
    if c.ndim != 2 or not c.size or (c < 0).any() or (c.sum(axis=1) == 0).any():
        raise UsageError(
            "counts must be (domains, experts), not negative, with at least one pick per domain",
            fix="leave out domains without picks",
        )
    chi2, dof, p, n = info.chi_square(c)
    plain, corrected = info.cramers_v(c)
    return DomainSeparation(
        chi2=float(chi2),
        dof=int(dof),
        p_value=float(p),
        cramers_v=float(plain),
        cramers_v_corrected=float(corrected),
        jsd_bits=float(info.jsd_bits(info.shares(c))),
        n_picks=int(n),
        experts_used=int((c.sum(axis=0) > 0).sum()),
    )


def domain_counts(counts: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[tuple[str, ...], Ints]:
    """Counts of prompts (P, ...) summed by domain: names (D) and sums (D, ...)."""
    domains = Domains.of(labels)
    c = np.asarray(counts)
    out = np.zeros((len(domains), *c.shape[1:]), dtype=np.int64)
    np.add.at(out, domains.codes, c)
    return domains.names, out


def expert_frequency(
    counts: npt.ArrayLike,
    tokens: npt.ArrayLike,
    labels: npt.ArrayLike,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
) -> pd.DataFrame:
    """Domain × expert frequency of every layer, all experts kept.

    Parameters
    ----------
    counts, tokens
        (P, L, E) tokens that used the expert and (P, L) tokens, as ``included`` and ``tokens`` of the counts.
    labels
        (P,) domains.
    n_expert
        (L,) experts that each layer has, where layers differ; E if not given.

    Returns one row per (layer, domain, expert): ``count``; ``percent`` of the domain's picks in this layer
    (sums to 100, as in the notebook); ``percent_of_tokens`` of the domain's tokens that used the expert (sums
    to 100·k; OLMoE's domain specialisation N_iD/N_D, arXiv 2409.02060). NaN where the domain has no token in
    the layer.
    """
    names, by_domain = domain_counts(counts, labels)
    _, by_tokens = domain_counts(tokens, labels)
    _, n_layers, e = by_domain.shape
    of_tokens = 100.0 * by_domain / np.where(by_tokens > 0, by_tokens, np.nan)[:, :, None]
    index = pd.MultiIndex.from_product(
        [layer_numbers(layers, n_layers), names, range(e)], names=["layer", "domain", "expert"]
    )
    order = (1, 0, 2)
    return pd.DataFrame(
        {
            "count": by_domain.transpose(order).reshape(-1),
            "percent": 100.0 * info.shares(by_domain).transpose(order).reshape(-1),
            "percent_of_tokens": of_tokens.transpose(order).reshape(-1),
        },
        index=index,
    )[_existing(n_expert, n_layers, e, len(names))].reset_index()


def expert_usage(
    counts: npt.ArrayLike,
    tokens: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """How often each expert of every layer is used, all prompts together; arrays as for
    :func:`expert_frequency`.

    Returns one row per (layer, expert): ``count``; ``percent`` of the layer's picks; ``percent_of_tokens`` that
    used it, with ``low`` and ``high`` (:class:`~moetrace.analysis.statistics.rates.Rates`; of one prompt as if its
    tokens were independent for experts that it never used, else NaN); ``rank`` in its layer, 1 for the most used,
    equal counts by expert id.
    """
    c, n = np.asarray(counts, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    _, n_layers, e = c.shape
    rates, total = Rates.of(c, n, level), c.sum(axis=0)
    known = (total == 0) | (len(c) > 1)
    low, high = (np.where(known, 100.0 * end, np.nan) for end in (rates.low, rates.high))
    place = np.argsort(np.argsort(-total, axis=1, kind="stable"), axis=1) + 1
    index = pd.MultiIndex.from_product([layer_numbers(layers, n_layers), range(e)], names=["layer", "expert"])
    return pd.DataFrame(
        {
            "count": total.astype(np.int64).reshape(-1),
            "percent": 100.0 * info.shares(total).reshape(-1),
            "percent_of_tokens": 100.0 * rates.rate.reshape(-1),
            "low": low.reshape(-1),
            "high": high.reshape(-1),
            "rank": place.reshape(-1),
        },
        index=index,
    )[_existing(n_expert, n_layers, e, 1)].reset_index()


@dataclass(frozen=True)
class DomainTest:
    """Whether domains differ, layer by layer, and by how much.

    Attributes
    ----------
    verdict
        Empty, or why no p-value exists (then ``p_value``, ``q_value`` and ``p_family`` are NaN), for example
        "cannot be tested: domain and prompt are the same thing".
    min_p
        Smallest p-value that this number of prompts and permutations allows.
    table
        One row per layer: ``layer``; ``jsd_bits`` (plug-in), ``jsd_null_mean`` and ``jsd_null_q95`` (the same
        with prompts exchanged between domains: what prompts alone produce), ``jsd_jackknife`` with
        ``jsd_low``, ``jsd_high`` (bias-corrected, 95 %), ``cramers_v``, ``cramers_v_corrected`` (Bergsma),
        ``cramers_v_jackknife`` with ``v_low``, ``v_high``; ``chi2``, ``dof`` and ``chi2_p`` (as published:
        not a test of domains); ``p_value`` (permutation of whole prompts), ``q_value`` (Benjamini-Hochberg
        over layers), ``p_family`` (max-T over layers); ``dispersion_p`` and ``dispersion_q``, the same of a test
        whether prompts of some domains scatter more than those of others
        (:func:`~moetrace.analysis.domains.spread.dispersion`).
    """

    verdict: str
    min_p: float
    n_prompts: int
    n_domains: int
    n_permutations: int
    statistic: Statistic
    table: pd.DataFrame

    @property
    def testable(self) -> bool:
        """Whether the p-values exist."""
        return not self.verdict


def domain_test(
    counts: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    statistic: Statistic = "welch",
    n_permutations: int = N_PERMUTATIONS,
    strata: npt.ArrayLike | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> DomainTest:
    """Test each layer for domain differences by permuting whole prompts between domains.

    Parameters
    ----------
    counts
        (P, L, E) tokens that used the expert, per prompt.
    labels
        (P,) domain of each prompt.
    statistic
        "welch": distance of the domains' middles, prompts weighing equally, each domain with its own scatter
        (:func:`~moetrace.analysis.domains.spread.welch`); "jsd": divergence of the pooled domains, which long
        prompts rule; "pseudo_f": PERMANOVA (Anderson 2001) on squared
        Jensen-Shannon distances between prompts; "entropy": spread of the domains' entropies (Miller-Madow)
        around their mean.
    strata
        (P,) optional groups (prompt template, length) within which prompts are exchanged.

    Prompts are taken to be exchangeable between domains if domain does not matter. Where domains' prompts differ in
    length, only "welch" is calibrated, as long as routing does not change along a prompt; where it may, give
    classes of length as strata (:func:`~moetrace.analysis.domains.lengths.length_classes`).
    """
    c = _prompt_counts(counts)
    domains = Domains.of(labels)
    _same_prompts(c, domains)
    chance_of = nulls.feasibility(domains, strata)
    n_layers = c.shape[1]
    _, by_domain = domain_counts(c, labels)
    per_layer = by_domain.transpose(1, 0, 2)
    chi2, dof, chi2_p, _ = info.chi_square(per_layer)
    plain, corrected = info.cramers_v(per_layer)
    jsd, v = jackknife_separation(c, domains, level)
    null = np.full((1, n_layers), np.nan)
    jsd_null = np.full((1, n_layers), np.nan)
    p = q = family = scattered = np.full(n_layers, np.nan)
    if chance_of.testable:
        codes = nulls.permuted_codes(domains, n_permutations, np.random.default_rng(seed), strata)
        null = _statistics(c, codes, len(domains), statistic)
        jsd_null = (null if statistic == "jsd" else _statistics(c, codes[: _SHOWN + 1], len(domains), "jsd"))[
            1:
        ]
        some = codes[: _SHOWN + 1]
        scattered = nulls.permutation_p(
            np.stack(
                [spread.dispersion(c[:, layer], some, len(domains)) for layer in range(n_layers)], axis=1
            )
        )
        p, family = nulls.permutation_p(null), nulls.max_t(null)
        q = nulls.benjamini_hochberg(p)
    # an arrangement that leaves a domain without tokens in a layer has no value there
    jsd_chance = [layer[~np.isnan(layer)] for layer in jsd_null.T]
    table = pd.DataFrame(
        {
            "layer": layer_numbers(layers, n_layers),
            "jsd_bits": info.jsd_bits(info.shares(per_layer)),
            "jsd_null_mean": [layer.mean() if layer.size else np.nan for layer in jsd_chance],
            "jsd_null_q95": [np.quantile(layer, 0.95) if layer.size else np.nan for layer in jsd_chance],
            "jsd_jackknife": jsd.estimate,
            "jsd_low": jsd.low,
            "jsd_high": jsd.high,
            "cramers_v": plain,
            "cramers_v_corrected": corrected,
            "cramers_v_jackknife": v.estimate,
            "v_low": v.low,
            "v_high": v.high,
            "chi2": chi2,
            "dof": dof,
            "chi2_p": chi2_p,
            "p_value": p,
            "q_value": q,
            "p_family": family,
            "dispersion_p": scattered,
            "dispersion_q": nulls.benjamini_hochberg(scattered),
        }
    )
    return DomainTest(
        verdict=chance_of.reason,
        min_p=max(chance_of.min_p, 1 / (n_permutations + 1)),
        n_prompts=c.shape[0],
        n_domains=len(domains),
        n_permutations=n_permutations if chance_of.testable else 0,
        statistic=statistic,
        table=table,
    )


def jackknife_separation(
    counts: npt.ArrayLike, domains: Domains, level: float = 0.95
) -> tuple[nulls.Interval, nulls.Interval]:
    """Bias-corrected JSD (bits) and Cramér's V of each layer (L,), with intervals over prompts, not below 0.

    V is corrected through its square, which is smooth where domains do not differ; its error is that of V².
    """
    c = _prompt_counts(counts)
    full, without = delete_one_domains(c, domains)

    def both(sums: Floats) -> Floats:
        tables = sums.transpose(1, 0, 2)
        return np.stack((info.jsd_bits(info.shares(tables)), info.cramers_v(tables)[0] ** 2))

    knife = nulls.jackknife(
        both(full), np.stack([both(without(i)) for i in range(len(c))]), domains.codes, level
    )
    parts = (np.maximum(part, 0.0) for part in (knife.estimate, knife.low, knife.high))
    (jsd, v2), (jsd_low, v2_low), (jsd_high, v2_high) = parts
    return (
        nulls.Interval(jsd, knife.error[0], jsd_low, jsd_high),
        nulls.Interval(np.sqrt(v2), knife.error[1], np.sqrt(v2_low), np.sqrt(v2_high)),
    )


class _Without:
    """Domain sums (D, L, E) with one prompt left out."""

    def __init__(self, counts: Floats, domains: Domains, full: Floats) -> None:
        self._counts, self._codes, self._full = counts, domains.codes, full

    def __call__(self, prompt: int) -> Floats:
        out = self._full.copy()
        out[self._codes[prompt]] -= self._counts[prompt]
        return out


def delete_one_domains(counts: Floats, domains: Domains) -> tuple[Floats, _Without]:
    """Domain sums (D, L, E) of all prompts, and a function giving them without prompt i."""
    full = np.zeros((len(domains), *counts.shape[1:]))
    np.add.at(full, domains.codes, counts)
    return full, _Without(counts, domains, full)


def _statistics(counts: Floats, codes: Ints, n_domains: int, statistic: Statistic) -> Floats:
    """The statistic of every layer under every assignment of prompts: (B, L)."""
    out = np.empty((codes.shape[0], counts.shape[1]))
    if statistic == "welch":
        for layer in range(counts.shape[1]):
            out[:, layer] = spread.welch(counts[:, layer], codes, n_domains)
        return out
    if statistic == "pseudo_f":
        for layer in range(counts.shape[1]):
            out[:, layer] = pseudo_f(jensen_shannon_distances(counts[:, layer]), codes, n_domains)
        return out
    for batch, sums in nulls.pooled(counts, codes, n_domains):
        tables = sums.transpose(0, 2, 1, 3)
        if statistic == "jsd":
            out[batch] = info.jsd_bits(info.shares(tables))
        else:
            out[batch] = info.miller_madow_bits(tables).std(axis=-1)
    return out


def jensen_shannon_distances(counts: npt.ArrayLike) -> Floats:
    """Squared Jensen-Shannon distances, in bits, between the distributions of prompts (P, E): (P, P)."""
    p = info.shares(counts)
    h = info.entropy_bits(p)
    mixed = np.stack([info.entropy_bits(0.5 * (p + row)) for row in p])
    return np.maximum(mixed - 0.5 * (h[:, None] + h[None, :]), 0.0)


def pseudo_f(squared: npt.ArrayLike, codes: Ints, n_domains: int) -> Floats:
    """PERMANOVA's pseudo-F for assignments ``codes`` (B, P) given squared distances (P, P): (B,).

    F = (SS_between/(D − 1)) / (SS_within/(P − D)), with SS_within = Σ_domains Σ_{i<j} d²_ij / n_domain
    (Anderson 2001).
    """
    d2 = np.asarray(squared, dtype=np.float64)
    p = d2.shape[0]
    total = d2.sum() / 2 / p
    within = np.zeros(codes.shape[0])
    for domain in range(n_domains):
        member = (codes == domain).astype(np.float64)
        size = member.sum(axis=1)
        within += np.einsum("bi,bi->b", member @ d2, member) / 2 / size
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((total - within) / (n_domains - 1) / (within / (p - n_domains)))


def domain_lift(
    counts: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    layers: npt.ArrayLike | None = None,
    n_expert: npt.ArrayLike | None = None,
    n_boot: int = N_BOOT,
    n_permutations: int = N_PERMUTATIONS,
    strata: npt.ArrayLike | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """How much more often a domain uses an expert than domains do on average.

    lift = P(expert | domain) / mean over domains of P(expert | domain), from pooled counts (P, L, E).
    ``n_expert`` (L,) leaves out experts that a layer does not have, where layers differ.

    Returns one row per (layer, domain, expert): ``count``, ``share`` (of the domain's picks), ``lift`` with
    ``low`` and ``high`` (cluster bootstrap: each domain's prompts redrawn; expanded percentile interval,
    Hesterberg 2015; where a domain never chose the expert, widened by the share that may go unseen,
    :class:`~moetrace.analysis.statistics.rates.Rates`, which no redrawing shows); ``gap``, the domain's mean share,
    prompts weighing equally, less the mean over domains, in standard errors
    (:func:`~moetrace.analysis.domains.spread.gaps`); and ``p_family``: its permutation p-value, two-sided, prompts
    exchanged between domains, corrected by max-T over all experts and domains of all layers. An expert that nobody
    used has lift NaN. With a single prompt in the domain the interval is NaN, and ``p_family`` is NaN where domains
    cannot be tested (:func:`moetrace.analysis.statistics.nulls.feasibility`).
    """
    c = _prompt_counts(counts)
    domains = Domains.of(labels)
    _same_prompts(c, domains)
    d, (_, n_layers, e) = len(domains), c.shape
    rng = np.random.default_rng(seed)
    weights = nulls.bootstrap_weights(domains, n_boot, rng)
    testable = nulls.feasibility(domains, strata).testable
    codes = nulls.permuted_codes(domains, n_permutations, rng, strata) if testable else None
    low, high = np.full((2, n_layers, d, e), np.nan)
    p_family, gap = np.full((2, n_layers, d, e), np.nan)
    blocks = _expert_blocks(e, d * max(n_boot, n_permutations))
    for layer in range(n_layers):
        own = np.ascontiguousarray(c[:, layer])
        low[layer], high[layer] = _drawn_lift(own, weights, domains, blocks, level)
        table = group_sums(domains.codes[None].astype(np.int32), own, d)[0]
        unseen = np.stack([_unseen(own[domains.codes == i], level) for i in range(d)])
        least, largest = _beyond_zero(table, unseen)
        low[layer] = np.minimum(low[layer], least)
        high[layer] = np.where(table > 0, high[layer], np.maximum(high[layer], largest))
    if codes is not None:

        def gaps() -> Iterator[Floats]:
            for layer in range(n_layers):
                for block in blocks:
                    found = spread.gaps(c[:, layer], codes, d, block)
                    gap[layer, :, block] = found[0]
                    yield np.abs(found).reshape(len(found), -1)

        parts = iter(nulls.max_t_of_parts(gaps()))
        for layer in range(n_layers):
            p_family[layer] = np.concatenate([next(parts).reshape(d, -1) for _ in blocks], axis=1)
    _, by_domain = domain_counts(np.asarray(counts), labels)
    table = by_domain.transpose(1, 0, 2)
    index = pd.MultiIndex.from_product(
        [layer_numbers(layers, n_layers), domains.names, range(e)], names=["layer", "domain", "expert"]
    )
    return pd.DataFrame(
        {
            "count": table.reshape(-1),
            "share": info.shares(table).reshape(-1),
            "lift": _lift(table).reshape(-1),
            "low": low.reshape(-1),
            "high": high.reshape(-1),
            "gap": gap.reshape(-1),
            "p_family": p_family.reshape(-1),
        },
        index=index,
    )[_existing(n_expert, n_layers, e, d)].reset_index()


def specialists(lift: pd.DataFrame, *, alpha: float = 0.05, margin: float = 1.5) -> pd.DataFrame:
    """Which experts prefer a domain, which serve all, and about which the data cannot say.

    From :func:`domain_lift`, one row per (layer, expert): ``kind``, ``domain`` (the one of largest lift),
    ``lift``, ``low``, ``high``, ``p_family`` of that domain.

    "specialist": significant in its domain (``p_family`` ≤ alpha, lift > 1, gap > 0); "generalist": every domain's
    interval lies within [1/margin, margin]; "unused": nobody used it; "undecided": everything else. The
    notebook's quartile cut instead always names a quarter of the experts either way.
    """
    keys = ["layer", "expert"]
    best = lift.fillna({"lift": -1.0}).groupby(keys)["lift"].idxmax()
    out = lift.loc[best, [*keys, "domain", "lift", "low", "high", "gap", "p_family", "count"]].set_index(keys)
    inside = lift.assign(inside=(lift["low"] >= 1 / margin) & (lift["high"] <= margin))
    everywhere = inside.groupby(keys)["inside"].all()
    used = lift.groupby(keys)["count"].sum() > 0
    kind = np.select(
        [~used, (out["p_family"] <= alpha) & (out["lift"] > 1) & (out["gap"] > 0), everywhere],
        ["unused", "specialist", "generalist"],
        "undecided",
    )
    out.insert(0, "kind", kind)
    return out.drop(columns=["count", "gap"]).reset_index()


def _expert_blocks(n_expert: int, each: int, max_bytes: int = 16 << 20) -> list[slice]:
    """Experts in blocks, so that ``each`` numbers of every expert take about ``max_bytes``."""
    step = max(1, max_bytes // (8 * max(1, each)))
    return [slice(start, start + step) for start in range(0, n_expert, step)]


def _drawn_lift(
    counts: Floats, weights: Floats, domains: Domains, blocks: list[slice], level: float
) -> tuple[Floats, Floats]:
    """Percentiles, each (D, E), of the lift of one layer (P, E), prompts drawn as often as ``weights`` (B, P) say."""
    d = len(domains)
    mine = [np.flatnonzero(domains.codes == i) for i in range(d)]
    of_domain = [np.ascontiguousarray(weights[:, prompts]) for prompts in mine]
    tails = [nulls.expanded_tail(int(n), level) for n in domains.sizes]
    low, high = np.full((2, d, counts.shape[1]), np.nan)
    picks = np.stack(
        [w @ counts[prompts].sum(axis=1) for w, prompts in zip(of_domain, mine, strict=True)], axis=1
    )
    for block in blocks:
        sums = np.stack(
            [w @ counts[prompts, block] for w, prompts in zip(of_domain, mine, strict=True)], axis=1
        )
        drawn = _lift(sums, picks)
        for i, tail in enumerate(tails):
            if not np.isnan(tail):
                low[i, block], high[i, block] = _percentiles(drawn[:, i], tail)
    return low, high


def _lift(sums: npt.ArrayLike, picks: npt.ArrayLike | None = None) -> Floats:
    """Lift of domain sums (..., D, E) over the mean of domains; NaN where nobody used the expert.

    ``picks`` (..., D) are those of all experts, where the sums are of some.
    """
    share = info.shares(sums, picks)
    mean = share.mean(axis=-2, keepdims=True)
    return np.asarray(np.divide(share, mean, out=np.full_like(share, np.nan), where=mean > 0))


def _unseen(counts: Floats, level: float) -> Floats:
    """(E,) shares that experts which prompts (P, E) never chose may have: bootstrap samples cannot show it."""
    return np.asarray(Rates.of(counts[:, None], counts.sum(axis=1)[:, None], level).high[0])


def _beyond_zero(sums: npt.ArrayLike, unseen: Floats) -> tuple[Floats, Floats]:
    """Least and largest lift (D, E) of counts (D, E) if experts that a domain never chose have ``unseen`` shares."""
    c = np.asarray(sums, dtype=np.float64)
    share = info.shares(c)
    with np.errstate(invalid="ignore", divide="ignore"):
        may = np.where(c > 0, share, unseen)
        least = share / may.mean(axis=0)
        largest = may / np.where(c > 0, may.mean(axis=0), (share.sum(axis=0) + may) / len(c))
    return least, largest


def _percentiles(drawn: Floats, tail: float) -> tuple[Floats, Floats]:
    """Lower and upper percentile of draws (B, E); an expert absent from some draws counts there as lift 1."""
    unused = np.isnan(drawn)
    values = np.where(unused & ~unused.all(axis=0), 1.0, drawn)
    low, high = np.quantile(values, (tail, 1 - tail), axis=0)
    return low, high


def _prompt_counts(counts: npt.ArrayLike) -> Floats:
    c = np.asarray(counts, dtype=np.float64)
    if c.ndim == 2:
        c = c[:, None, :]
    if c.ndim != 3:
        raise UsageError(f"counts have shape {c.shape}", fix="give (prompts, layers, experts)")
    return c


def _same_prompts(counts: Floats, domains: Domains) -> None:
    if counts.shape[0] != domains.codes.size:
        raise UsageError(
            f"{counts.shape[0]} prompts but {domains.codes.size} labels", fix="give one label per prompt"
        )


def _existing(n_expert: npt.ArrayLike | None, n_layers: int, e: int, repeat: int) -> npt.NDArray[np.bool_]:
    """Which rows of a (layer, ..., expert) product are experts that the layer has."""
    own = per_layer(n_expert, n_layers, e)
    there = np.arange(e)[None, :] < own[:, None]
    return np.repeat(there, repeat, axis=0).reshape(-1)
