"""Do experts of different layers work together? Dependence between layers, and paths that hold on other prompts.

Everything is held against the same prompts' tokens turned round: the later layer's routing is moved along each
prompt by a random number of tokens. That keeps how often experts are used, in every prompt, and how long they
stay; what goes is that both layers look at the same token. As rotations form a group, the p-values are exact
however few tokens there are; from 5 tokens nothing can be concluded, and nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace._native import pair_draws
from moetrace.analysis.counts.routed import RoutedText, standardised, turned, usage, uses_expert
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.information import entropy_bits, shares
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import UsageError

_LN2 = float(np.log(2.0))


@dataclass(frozen=True)
class Circuits:
    """Dependence between layers.

    Attributes
    ----------
    layers
        One row per pair of layers (``layer``, ``to_layer``): ``tokens``; ``mi_bits``, mutual information of the
        two first experts (plug-in); ``mi_corrected_bits`` less Miller and Madow's bias (m_a − 1)(m_b − 1)/(2N
        ln 2); ``mi_null_bits``, the mean over rotations; ``excess_bits``, plug-in less that; ``share``, the
        excess over the smaller of the two entropies; ``p_value``, and ``p_family`` over all pairs of layers
        (max-T).
    edges
        One row per pair of experts, the strongest first: ``layer``, ``expert``, ``to_layer``, ``to_expert``;
        ``tokens`` that use both, ``expected`` over rotations; ``lift`` = P(to | from)/P(to); ``within``, tokens
        over expected, with ``low``, ``high`` (jackknife over prompts, 95 %); ``given_token``: tokens over what
        the token ids alone would give (NaN where ids are unknown), 1 if the two share no more than their words;
        ``z``; ``p_value``; ``p_family``, over all edges of all layers.
    paths
        Chains of significant edges found in one half of the prompts, tested in the other half: ``path``,
        ``length`` in experts, ``tokens`` of the other half that use all of it, ``expected`` over rotations, ``lift``,
        ``p_value``, ``p_family`` over all paths (max-T), ``replicated``.
    edges_tested, prompts, tokens
        How many.
    paths_found
        Chains found in the first half; more than in ``paths`` if there were too many to test.
    chains
        Of each row of ``paths``, its experts: (layer index, expert).
    """

    layers: pd.DataFrame
    edges: pd.DataFrame
    paths: pd.DataFrame
    edges_tested: int
    prompts: int
    tokens: int
    paths_found: int
    chains: tuple[tuple[tuple[int, int], ...], ...] = ()


def expert_circuits(
    text: RoutedText,
    *,
    max_gap: int = 1,
    min_support: int = 5,
    alpha: float = 0.05,
    n_permutations: int = 199,
    max_rows: int = 8000,
    max_edges: int = 500,
    max_paths: int = 100,
    seed: int = 0,
) -> Circuits:
    """Look for dependence between layers, edges between experts, and paths.

    Parameters
    ----------
    max_gap
        Compare each layer with so many of the following ones.
    min_support
        Experts used by fewer tokens are left out of the edges.
    alpha
        Level at which edges enter paths, and paths count as replicated.
    n_permutations, seed
        Random rotations.
    max_rows
        Prompts, or stretches of long ones, are drawn at random until they hold so many tokens.
    max_edges, max_paths
        So many are listed, the strongest first; edges with ``p_family`` ≤ alpha always.

    Raises UsageError if there are fewer than two layers.
    """
    if text.experts.shape[1] < 2:
        raise UsageError("a circuit needs two layers or more", fix="capture more layers")
    used = text.some(max_rows, seed)
    rng = np.random.default_rng(seed)
    whole = _Edges.of(used, max_gap, min_support, n_permutations, rng)
    order = rng.permutation(used.n_requests)
    half = used.n_requests // 2
    found: list[tuple[tuple[int, int], ...]] = []
    if half >= 1:
        part = _Edges.of(used.of(np.sort(order[:half])), max_gap, min_support, n_permutations, rng)
        found = _chains(part.significant(alpha))
        paths = path_test(
            used.of(np.sort(order[half:])), found[:max_paths], n_permutations=n_permutations, seed=seed
        )
    else:
        paths = path_test(used, [])
    paths["replicated"] = paths["p_family"] <= alpha
    return Circuits(
        whole.layers_table(),
        whole.edges_table(alpha, max_edges),
        paths,
        whole.n_tested,
        used.n_requests,
        len(used),
        len(found),
        tuple(found[: len(paths)]),
    )


@dataclass
class _Pair:
    """Two layers: the rows at which both are known, experts there, and tables over edges (E, E)."""

    a: int
    b: int
    rows: Ints
    starts: Ints
    in_a: npt.NDArray[np.uint16]
    in_b: npt.NDArray[np.uint16]
    first_a: Ints
    first_b: Ints
    eligible: npt.NDArray[np.bool_]
    expected: Floats
    variance: Floats

    @classmethod
    def of(cls, text: RoutedText, a: int, b: int, min_support: int) -> _Pair:
        rows = np.flatnonzero(text.known(a) & text.known(b))
        sizes = np.bincount(text.owner[rows], minlength=text.n_requests)
        sizes = sizes[sizes > 0]
        starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        in_a, in_b = text.experts[rows, a].astype(np.uint16), text.experts[rows, b].astype(np.uint16)
        owner = np.repeat(np.arange(sizes.size), sizes)
        sum_a, sum_b = (usage(x, owner, sizes.size, text.n_expert).astype(np.float64) for x in (in_a, in_b))
        n = sizes.astype(np.float64)[:, None]
        spread = np.where(n > 1, n * n * (n - 1), 1.0)
        return cls(
            a,
            b,
            rows,
            starts,
            in_a,
            in_b,
            text.first[rows, a],
            text.first[rows, b],
            (sum_a.sum(axis=0) >= min_support)[:, None] & (sum_b.sum(axis=0) >= min_support),
            (sum_a / n).T @ sum_b,
            (sum_a * (n - sum_a) / spread).T @ (sum_b * (n - sum_b)),
        )

    def seen(self) -> tuple[Floats, Floats]:
        """Joint counts (E, E), and z (E, E; −inf where not eligible)."""
        n_expert = self.eligible.shape[0]
        cells = self.in_a[:, :, None].astype(np.int64) * n_expert + self.in_b[:, None, :]
        there = (self.in_a < n_expert)[:, :, None] & (self.in_b < n_expert)[:, None, :]
        joint = np.bincount(cells[there], minlength=n_expert**2).reshape(n_expert, n_expert)
        z = standardised(joint, self.expected, self.variance)
        return joint.astype(np.float64), np.where(self.eligible, z, -np.inf)

    def draws(self, score: Floats, order: npt.NDArray[np.int32]) -> tuple[Ints, Floats, Floats]:
        """Of rearrangements (B, N): how often each cell's z reaches ``score`` (E, E), the largest (B,) z of each, and
        (B,) mutual information in bits.
        """
        spread = np.sqrt(self.variance + 0.5)
        reached, largest, joint = pair_draws(
            self.in_a,
            self.in_b,
            self.first_a,
            self.first_b,
            order,
            self.expected,
            spread,
            score,
            self.eligible,
        )
        n_expert = self.eligible.shape[0]
        alone = sum(
            float(entropy_bits(shares(np.bincount(x, minlength=n_expert).astype(np.float64))))
            for x in (self.first_a, self.first_b)
        )
        return reached.astype(np.int64), largest, alone - joint

    def information(self) -> float:
        """Mutual information of the two first experts, in bits."""
        n_expert = self.eligible.shape[0]
        table = np.bincount(self.first_a * n_expert + self.first_b, minlength=n_expert**2)
        return _information(table.reshape(n_expert, n_expert))


def _information(table: npt.ArrayLike) -> float:
    c = np.asarray(table, dtype=np.float64)
    if not c.sum():
        return float("nan")
    joint = entropy_bits(shares(c.ravel()))
    return float(entropy_bits(shares(c.sum(axis=0))) + entropy_bits(shares(c.sum(axis=1))) - joint)


@dataclass
class _Edges:
    text: RoutedText
    pairs: list[_Pair]
    joint: list[Floats]
    z: list[Floats]
    p_value: list[Floats]
    p_family: list[Floats]
    information: Floats  # (1 + B, pairs)

    @classmethod
    def of(
        cls, text: RoutedText, max_gap: int, min_support: int, n_permutations: int, rng: np.random.Generator
    ) -> _Edges:
        n_layers = text.experts.shape[1]
        pairs = [
            _Pair.of(text, a, b, min_support)
            for a in range(n_layers)
            for b in range(a + 1, min(a + max_gap, n_layers - 1) + 1)
        ]
        information = np.full((n_permutations + 1, len(pairs)), np.nan)
        largest = np.full(n_permutations, -np.inf)
        joint, z, reached = [], [], []
        for i, pair in enumerate(pairs):
            seen, score = pair.seen()
            information[0, i] = pair.information()
            order = turned(pair.starts, rng.random((n_permutations, len(pair.starts) - 1)))
            count, null, information[1:, i] = pair.draws(score, order)
            largest = np.maximum(largest, null)
            joint.append(seen)
            z.append(score)
            reached.append(count)
        ordered = np.sort(largest)
        above = [n_permutations - np.searchsorted(ordered, score - 1e-9) for score in z]
        total = n_permutations + 1
        return cls(
            text,
            pairs,
            joint,
            z,
            [np.where(p.eligible, (1 + c) / total, np.nan) for p, c in zip(pairs, reached, strict=True)],
            [np.where(p.eligible, (1 + c) / total, np.nan) for p, c in zip(pairs, above, strict=True)],
            information,
        )

    @property
    def n_tested(self) -> int:
        return int(sum(pair.eligible.sum() for pair in self.pairs))

    def significant(self, alpha: float) -> dict[tuple[int, int], list[tuple[int, int, float]]]:
        """(layer, expert) -> its significant edges (layer, expert, z), layers as indices."""
        out: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
        for pair, z, p in zip(self.pairs, self.z, self.p_family, strict=True):
            with np.errstate(invalid="ignore"):
                some = np.argwhere((p <= alpha) & (z > 0))
            for a, b in some.tolist():
                out.setdefault((pair.a, a), []).append((pair.b, b, float(z[a, b])))
        return out

    def layers_table(self) -> pd.DataFrame:
        rows = []
        for i, pair in enumerate(self.pairs):
            n = pair.rows.size
            n_expert = self.text.n_expert
            used = [np.bincount(x, minlength=n_expert) for x in (pair.first_a, pair.first_b)]
            kinds = [int((u > 0).sum()) for u in used]
            plain, null = self.information[0, i], self.information[1:, i].mean()
            ceiling = min(float(entropy_bits(shares(u))) for u in used) if n else float("nan")
            bias = (kinds[0] - 1) * (kinds[1] - 1) / (2 * n * _LN2) if n else float("nan")
            rows.append(
                {
                    "layer": int(self.text.layers[pair.a]),
                    "to_layer": int(self.text.layers[pair.b]),
                    "tokens": n,
                    "mi_bits": plain,
                    "mi_corrected_bits": plain - bias,
                    "mi_null_bits": null,
                    "excess_bits": plain - null,
                    "share": (plain - null) / ceiling if ceiling > 0 else float("nan"),
                }
            )
        table = pd.DataFrame(rows)
        table["p_value"] = nulls.permutation_p(self.information)
        table["p_family"] = nulls.max_t(self.information)
        return table

    def edges_table(self, alpha: float, max_edges: int) -> pd.DataFrame:
        flat = [
            (z[a, b], i, a, b)
            for i, z in enumerate(self.z)
            for a, b in _strongest(z, self.p_family[i], alpha, max_edges)
        ]
        flat.sort(key=lambda edge: -edge[0])
        sure = sum(self.p_family[i][a, b] <= alpha for _, i, a, b in flat)
        chosen = np.array([edge[1:] for edge in flat[: max(max_edges, int(sure))]], dtype=np.int64)
        chosen = chosen.reshape(-1, 3)
        tables = [self._of_pair(i, *chosen[chosen[:, 0] == i, 1:].T) for i in np.unique([0, *chosen[:, 0]])]
        order = np.argsort(np.argsort(chosen[:, 0], kind="stable"), kind="stable")
        return pd.concat(tables, ignore_index=True).take(order).reset_index(drop=True)

    def _of_pair(self, i: int, a: Ints, b: Ints) -> pd.DataFrame:
        """What the table says of some edges of a pair of layers."""
        pair, n_expert = self.pairs[i], self.text.n_expert
        sizes = np.diff(pair.starts)
        owner = np.repeat(np.arange(sizes.size), sizes)
        of_a, of_b = (usage(x, owner, sizes.size, n_expert) for x in (pair.in_a, pair.in_b))
        together = _together(pair, a, b)
        seen, expected = self.joint[i][a, b], pair.expected[a, b]
        within = nulls.ratio_interval(together, of_a[:, a] * of_b[:, b] / sizes[:, None])
        given = np.full(a.size, np.nan)
        tokens = np.asarray(self.text.tokens)[pair.rows]
        if tokens.size and (tokens >= 0).all():
            code, words = np.unique(tokens, return_inverse=True, return_counts=True)[1:]
            by_a, by_b = (usage(x, code, words.size, n_expert) for x in (pair.in_a, pair.in_b))
            by_words = np.array([(by_a[:, x] * by_b[:, y] / words).sum() for x, y in zip(a, b, strict=True)])
            np.divide(seen, by_words, out=given, where=by_words > 0)
        return pd.DataFrame(
            {
                "layer": int(self.text.layers[pair.a]),
                "expert": a,
                "to_layer": int(self.text.layers[pair.b]),
                "to_expert": b,
                "tokens": seen.astype(np.int64),
                "expected": expected,
                "lift": seen * pair.rows.size / (of_a.sum(axis=0)[a] * of_b.sum(axis=0)[b]),
                "within": np.divide(seen, expected, out=np.full(a.size, np.nan), where=expected > 0),
                "low": np.maximum(within.low, 0.0),
                "high": within.high,
                "given_token": given,
                "z": self.z[i][a, b],
                "p_value": self.p_value[i][a, b],
                "p_family": self.p_family[i][a, b],
            }
        )


def _together(pair: _Pair, a: Ints, b: Ints) -> Floats:
    """(P, edges) tokens of each request that use both experts of an edge."""
    uses = [
        {e: uses_expert(ids, e) for e in set(experts.tolist())}
        for ids, experts in ((pair.in_a, a), (pair.in_b, b))
    ]
    out = np.empty((a.size, len(pair.starts) - 1))
    for mine, x, y in zip(out, a.tolist(), b.tolist(), strict=True):
        mine[:] = np.add.reduceat(uses[0][x] & uses[1][y], pair.starts[:-1], dtype=np.int64)
    return out.T


def _strongest(z: Floats, family: Floats, alpha: float, at_most: int) -> list[tuple[int, int]]:
    order = np.argsort(-z, axis=None, kind="stable")
    with np.errstate(invalid="ignore"):
        n = max(min(at_most, int(np.isfinite(z).sum())), int((family <= alpha).sum()))
    return [(int(i // z.shape[1]), int(i % z.shape[1])) for i in order[:n]]


def _chains(
    edges: dict[tuple[int, int], list[tuple[int, int, float]]], at_most: int = 10_000
) -> list[tuple[tuple[int, int], ...]]:
    """Chains that cannot be made longer, those with the strongest weakest edge first."""
    reached = {(layer, expert) for out in edges.values() for layer, expert, _ in out}
    done: list[tuple[float, tuple[tuple[int, int], ...]]] = []
    open_: list[tuple[float, tuple[tuple[int, int], ...]]] = [
        (float("inf"), (start,)) for start in edges if start not in reached
    ]
    while open_ and len(done) < at_most:
        weakest, path = open_.pop()
        following = edges.get(path[-1], [])
        if not following:
            done.append((weakest, path))
        open_ += [(min(weakest, z), (*path, (layer, expert))) for layer, expert, z in following]
    done.sort(key=lambda item: (-item[0], item[1]))
    return [path for _, path in done]


def path_test(
    text: RoutedText,
    paths: list[tuple[tuple[int, int], ...]],
    *,
    n_permutations: int = 199,
    seed: int = 0,
) -> pd.DataFrame:
    """Test given paths of (layer index, expert): do tokens use all of a path more often than rotations give?

    Every layer's routing but the first is turned round by itself. Returns the columns of ``Circuits.paths``
    but ``replicated``. Meant for prompts in which the paths were not looked for.
    """
    counts = np.zeros((n_permutations + 1, len(paths)))
    known = [text.known(layer) for layer in range(text.experts.shape[1])]
    # Paths that are known at the same rows are turned together.
    groups: dict[bytes, list[int]] = {}
    masks = [np.logical_and.reduce([known[layer] for layer, _ in path]) for path in paths]
    for i, mask in enumerate(masks):
        groups.setdefault(np.packbits(mask).tobytes(), []).append(i)
    for mine in groups.values():
        where = np.flatnonzero(masks[mine[0]])
        sizes = np.bincount(text.owner[where], minlength=text.n_requests)
        starts = np.concatenate(([0], np.cumsum(sizes[sizes > 0]))).astype(np.int64)
        nodes = sorted({node for i in mine for node in paths[i]})
        uses = {(a, e): uses_expert(text.experts[where, a], e) for a, e in nodes}
        layers = sorted({layer for layer, _ in nodes})
        for draw in range(n_permutations + 1):
            moved = uses
            if draw:
                by = [np.random.default_rng((seed, draw, layer)).random(len(starts) - 1) for layer in layers]
                order = dict(zip(layers, turned(starts, np.stack(by)), strict=True))
                moved = {node: use.take(order[node[0]]) for node, use in uses.items()}
            for i in mine:
                counts[draw, i] = np.count_nonzero(reduce(np.logical_and, [moved[node] for node in paths[i]]))
    expected = counts[1:].mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = counts[0] / expected
    return pd.DataFrame(
        {
            "path": [
                " → ".join(f"L{text.layers[layer]}-E{expert}" for layer, expert in path) for path in paths
            ],
            "length": [len(path) for path in paths],
            "tokens": counts[0].astype(np.int64),
            "expected": expected,
            "lift": lift,
            "p_value": nulls.permutation_p(counts),
            "p_family": nulls.max_t(counts) if paths else np.empty(0),
        }
    )
