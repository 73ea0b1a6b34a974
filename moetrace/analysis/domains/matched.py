"""Do domains differ beyond their vocabulary? Separation at matched token ids.

Routing depends on the token, and domains use different words, so domains differ in routing even if a word is
routed alike everywhere (OpenMoE, arXiv 2402.01739: a "code expert" explained by ``=`` and ``\\n``). This
module takes the words out before it compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from moetrace.analysis.counts.counting import TokenCounts
from moetrace.analysis.domains.domain import N_PERMUTATIONS
from moetrace.analysis.statistics import information as info
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.nulls import Domains
from moetrace.analysis.statistics.shapes import Floats, Ints

#: room for the bases of many orders
_ORDER_BYTES = 64 << 20

NO_SHARED_WORDS = "cannot be tested: too few token ids are shared between prompts of different domains"


@dataclass(frozen=True)
class MatchedSeparation:
    """Separation of domains at the same token ids.

    Attributes
    ----------
    verdict
        Empty, or why nothing could be tested in some or all layers (their p-values are NaN).
    coverage
        Share of the tokens that stand at ids which occur in more than one prompt: only those can tell domain
        from vocabulary.
    n_prompts
        Prompts that shared token ids connect; the others are left out.
    table
        One row per layer: ``layer``; ``jsd_bits`` of the domains as they are; ``jsd_matched_bits`` of the domains with
        the token ids' own routing taken out, ``jsd_matched_null_mean``, what prompts alone produce of it, and
        ``jsd_matched_jackknife`` with ``jsd_matched_low`` and ``jsd_matched_high``, freed of that by the jackknife over
        prompts, with a 95 % interval (the token ids' routing as estimated from all); ``p_value``, ``q_value``
        (Benjamini-Hochberg over layers), ``p_family`` (max-T over layers).
    """

    verdict: str
    coverage: float
    n_prompts: int
    n_permutations: int
    table: pd.DataFrame


def matched_separation(
    counts: TokenCounts, *, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> MatchedSeparation:
    """Test whether domains differ at the same token ids.

    Model, layer by layer: the share of expert e at an occurrence of token id x in prompt i is μ(x, e) + u(i,
    e) + noise. Least squares over all occurrences (an analysis of variance with token ids and prompts as
    factors) gives u. Its errors are not alike: prompts that share many words with each other and few with the
    rest are known well among themselves and badly against the rest, which is just what domains do. So u is
    brought to independent coordinates of equal variance first: along the eigenvectors of the normal
    equations, coordinate j has variance τ² + σ²/λ_j, with τ² (prompts) and σ² (tokens) estimated within
    domains by moments. There the share of the sum of squares (over all experts) that domains explain is
    compared with that of permuted coordinates (Huh & Jhun 2001). Token ids that occur in one prompt only
    carry nothing, and those of one domain only tell its prompts apart, not domains.
    """
    domains = Domains.of(counts.labels)
    n_layers = counts.layers.size
    rng = np.random.default_rng(seed)
    jsd, matched, matched_null = np.full((3, n_layers), np.nan)
    knife = np.full((3, n_layers), np.nan)
    null = np.full((n_permutations + 1, n_layers), np.nan)
    reason = nulls.feasibility(domains).reason
    connected = 0
    for which, occurrences in enumerate(counts.occurrences):
        effects = _PromptEffects.of(occurrences, domains)
        if effects is None:
            reason = reason or NO_SHARED_WORDS
            continue
        connected = max(connected, effects.members.size)
        order = np.argsort(rng.random((n_permutations, effects.values.size)), axis=1)
        order = np.concatenate((np.arange(effects.values.size)[None, :], order))
        for layer in np.flatnonzero(counts.layer_class == which):
            c = counts.prompt_included[:, layer].astype(np.float64)
            y = effects.coordinates(c, counts.token_included[:, layer]) / counts.n_expert_used[layer]
            spread = effects.spread(y)
            null[:, layer] = effects.explained(y / spread[:, None], spread, order)
            by_domain = np.zeros((len(domains), c.shape[1]))
            np.add.at(by_domain, domains.codes, c)
            raw = info.shares(by_domain)
            jsd[layer] = info.jsd_bits(raw)
            middle = raw.mean(axis=0)
            matched[layer] = _apart(effects.means(y), middle)
            knife[:, layer] = effects.jackknife(y, middle)
            white = y / spread[:, None]
            mixed = np.stack([effects.means(white[o] * spread[:, None]) for o in order[1:101]])
            matched_null[layer] = _apart(mixed, middle).mean()
    if nulls.feasibility(domains).reason:
        null[:] = matched_null[:] = knife[:] = np.nan
    p, family = nulls.permutation_p(null), nulls.max_t(null)
    seen = [np.asarray((o > 0).sum(axis=0)).reshape(-1) > 1 for o in counts.occurrences]
    total = sum(float(o.sum()) for o in counts.occurrences)
    often = sum(float(o[:, np.flatnonzero(s)].sum()) for o, s in zip(counts.occurrences, seen, strict=True))
    return MatchedSeparation(
        verdict=reason,
        coverage=often / total if total else float("nan"),
        n_prompts=connected,
        n_permutations=n_permutations,
        table=pd.DataFrame(
            {
                "layer": counts.layers,
                "jsd_bits": jsd,
                "jsd_matched_bits": matched,
                "jsd_matched_null_mean": matched_null,
                "jsd_matched_jackknife": knife[0],
                "jsd_matched_low": knife[1],
                "jsd_matched_high": knife[2],
                "p_value": p,
                "q_value": nulls.benjamini_hochberg(p),
                "p_family": family,
            }
        ),
    )


@dataclass(frozen=True)
class _PromptEffects:
    """Prompt effects beside token effects, in the eigenbasis of the normal equations.

    The normal equations of u, with token effects eliminated, are a graph Laplacian over prompts: occurrences
    on the diagonal, less the occurrences that prompts have in common. ``members`` (M) are the prompts of its
    largest connected part, ``values`` (M − 1) its eigenvalues but 0, ``vectors`` (M, M − 1) theirs; they are
    orthogonal to the constant, so that only differences between prompts are left. ``design`` (M, D) says
    whose domain is whose.
    """

    occurrences: sparse.csr_array
    members: Ints
    values: Floats
    vectors: Floats
    design: Floats

    @classmethod
    def of(cls, occurrences: sparse.csr_array, domains: Domains) -> _PromptEffects | None:
        """None if the connected prompts lack a domain or have no prompt to spare."""
        n = occurrences.astype(np.float64)
        per_token = np.asarray(n.sum(axis=0)).reshape(-1)
        once = np.divide(1.0, per_token, out=np.zeros_like(per_token), where=per_token > 0)
        common = np.asarray((n @ sparse.diags_array(once) @ n.T).todense())
        _, part = connected_components(common > 0, directed=False)
        members = np.flatnonzero(part == np.bincount(part).argmax())
        codes = domains.codes[members]
        if np.unique(codes).size < len(domains) or members.size <= len(domains):
            return None
        laplacian = (np.diag(np.asarray(n.sum(axis=1)).reshape(-1)) - common)[np.ix_(members, members)]
        values, vectors = np.linalg.eigh(laplacian)
        design = (codes[:, None] == np.arange(len(domains))).astype(np.float64)
        return cls(occurrences, members, np.maximum(values[1:], 1e-9 * values[-1]), vectors[:, 1:], design)

    def coordinates(self, prompt_included: Floats, token_included: Ints) -> Floats:
        """Effects (M − 1, E) from counts of prompts (P, E) and token ids (X, E) of one layer."""
        per_token = np.maximum(np.asarray(self.occurrences.sum(axis=0)).reshape(-1), 1)
        residual = prompt_included - self.occurrences @ (token_included / per_token[:, None])
        return np.asarray((self.vectors.T @ residual[self.members]) / self.values[:, None])

    def spread(self, y: Floats) -> Floats:
        """Standard deviation (M − 1,) of each coordinate, √(τ² + σ²/λ), up to a common factor.

        Moments of what domains leave unexplained: sums of squares, plain and weighted by λ, set equal to
        their expectations.
        """
        basis = self._basis(np.ones(self.values.size))
        weight = self.values / self.values.mean()
        noise = self.values.mean() / self.values
        rest = y - basis @ (basis.T @ y)
        left = np.array([(rest**2).sum(), (weight[:, None] * rest**2).sum()])
        # the diagonals of K = I - BBᵀ and of KWK
        taken = (basis**2).sum(axis=1)
        keep = 1 - taken
        weighted = weight * (1 - 2 * taken) + ((basis @ (basis.T @ (weight[:, None] * basis))) * basis).sum(
            axis=1
        )
        expected = np.array([[keep.sum(), keep @ noise], [weighted.sum(), weighted @ noise]])
        try:
            prompts, tokens = np.linalg.solve(expected, left)
        except np.linalg.LinAlgError:
            prompts, tokens = 1.0, 0.0
        if prompts <= 0:
            prompts, tokens = 0.0, 1.0
        elif tokens < 0:
            prompts, tokens = 1.0, 0.0
        return np.asarray(np.sqrt(prompts + tokens * noise))

    def explained(self, white: Floats, spread: Floats, order: Ints) -> Floats:
        """Sum of squares that domains explain over the rest, for each ``order`` (B, M − 1) of coordinates."""
        basis = self._basis(spread)
        total = (white**2).sum()
        out = np.empty(order.shape[0])
        step = max(1, _ORDER_BYTES // (8 * max(1, basis.size)))
        for start in range(0, order.shape[0], step):
            mixes = order[start : start + step]
            # as well as the coordinates, the basis can be put into the opposite order: it is narrower
            moved = np.empty((mixes.shape[0], *basis.shape))
            np.put_along_axis(moved, mixes[:, :, None], basis[None], axis=1)
            found = moved.transpose(0, 2, 1).reshape(-1, white.shape[0]) @ white
            out[start : start + step] = (found**2).sum(axis=1).reshape(mixes.shape[0], -1).sum(axis=1)
        return np.asarray(out / np.maximum(total - out, 1e-300))

    def _basis(self, spread: Floats) -> Floats:
        """(M − 1, D − 1) orthonormal directions of the domains, each coordinate divided by its spread."""
        basis, _ = np.linalg.qr(self.domains / spread[:, None])
        return np.asarray(basis[:, : self.design.shape[1] - 1])

    @cached_property
    def domains(self) -> Floats:
        """(M − 1, D) which domain is whose, in the eigenbasis."""
        return np.asarray(self.vectors.T @ self.design)

    def means(self, y: Floats) -> Floats:
        """(D, E) mean effect of each domain's prompts."""
        return np.asarray((self.domains.T @ y) / self.design.sum(axis=0)[:, None])

    def jackknife(self, y: Floats, middle: Floats) -> tuple[Floats, Floats, Floats]:
        """:func:`_apart` of the means, freed of its bias, and its 95 % interval: each prompt is left out in turn."""
        each, sizes = self.vectors @ y, self.design.sum(axis=0)
        sums = self.design.T @ each
        of = self.design.argmax(axis=1)
        without = np.empty(len(each))
        step = max(1, _ORDER_BYTES // (8 * sums.size))
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums / sizes[:, None]
            left = (sums[of] - each) / (sizes[of] - 1)[:, None]
            for begin in range(0, len(each), step):
                some = np.arange(begin, min(begin + step, len(each)))
                means = np.repeat(mean[None], some.size, axis=0)
                means[some - begin, of[some]] = left[some]
                without[some] = _apart(means, middle)
            knife = nulls.jackknife(_apart(mean, middle), without, of)
        return np.maximum(knife.estimate, 0.0), np.maximum(knife.low, 0.0), np.maximum(knife.high, 0.0)


def _apart(mean: Floats, middle: Floats) -> Floats:
    """JSD of ``middle`` (E) + ``mean`` (..., D, E), the effects' own mean taken out, in bits (...)."""
    return info.jsd_bits(info.shares(np.maximum(middle + mean - mean.mean(axis=-2, keepdims=True), 0.0)))
