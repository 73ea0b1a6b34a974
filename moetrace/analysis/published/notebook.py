"""The published analyses, formula for formula, faults included.

Notebook: "Expert Activation Pattern Analysis" (parts 1 to 10) and its README; scripts:
``expert_frequency.py``, ``gate_input_analysis.py`` and ``compare_gate_experts.py`` of a MoE-analysis
collection. Nothing here is corrected, so that old numbers can be reproduced and set beside the sound ones of
the other modules. What is wrong with each is said in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import chdtrc

from moetrace.analysis.counts import parts
from moetrace.analysis.counts.chosen import CHUNK, Chosen, by_prompt, present
from moetrace.analysis.counts.counting import RoutingCounts
from moetrace.analysis.counts.from_trace import Routing
from moetrace.analysis.experts import gate
from moetrace.analysis.experts.gate import pair_distances
from moetrace.analysis.statistics.information import entropy_bits, shares
from moetrace.analysis.statistics.shapes import Floats, Ints, layer_numbers
from moetrace.analysis.statistics.sums import MetricSums
from moetrace.errors import UsageError

COMPONENTS = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Activations:
    """What the notebook's parts take from its long table (one entry per domain, token, layer, component and
    rank).

    Components share one router decision, so each decision counts once per component: three times in all.

    Attributes
    ----------
    domains, layers
        (D,) names and (L,) numbers that occur, ascending.
    components
        (C,) names, in order of appearance.
    table
        (C, L, D, E) int64: entries by component, layer, domain and expert.
    tokens_per_domain
        (D,) different token ids.
    first
        Function of three indices (domain, layer, component) giving ``token_id`` and ``expert_id`` of the
        entries of rank 0, in the order of the long table.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    components: tuple[str, ...]
    table: Ints
    tokens_per_domain: Ints
    first: Callable[[int, int, int], tuple[Ints, Ints]]

    @classmethod
    def from_columns(
        cls,
        domain: npt.ArrayLike,
        token_id: npt.ArrayLike,
        layer_id: npt.ArrayLike,
        component: npt.ArrayLike,
        expert_id: npt.ArrayLike,
        position: npt.ArrayLike,
    ) -> Activations:
        """From the notebook's own six columns (n,), for example of its DataFrame."""
        d, domains = pd.factorize(np.asarray(domain), sort=True)
        c, components = pd.factorize(np.asarray(component))
        layers, n = np.unique(np.asarray(layer_id), return_inverse=True)
        tokens, experts = np.asarray(token_id), np.asarray(expert_id).astype(np.int64)
        if not experts.size:
            raise UsageError("there are no activations", fix="choose rows that have routing")
        shape = (len(components), len(layers), len(domains), int(experts.max()) + 1)
        key = ((c * shape[1] + n) * shape[2] + d) * shape[3] + experts
        leading = np.flatnonzero(np.asarray(position) == 0)

        def first(domain: int, layer: int, component: int) -> tuple[Ints, Ints]:
            mine = leading[(d[leading] == domain) & (n[leading] == layer) & (c[leading] == component)]
            return tokens[mine], experts[mine]

        return cls(
            tuple(str(name) for name in domains),
            tuple(int(number) for number in layers),
            tuple(str(name) for name in components),
            np.bincount(key, minlength=int(np.prod(shape))).reshape(shape).astype(np.int64),
            _different(d, tokens, len(domains)),
            first,
        )

    @classmethod
    def from_rows(
        cls,
        experts: npt.NDArray[np.unsignedinteger],
        domain: npt.ArrayLike,
        token_id: npt.ArrayLike,
        *,
        n_expert: int,
        layers: npt.ArrayLike | None = None,
        components: Sequence[str] = COMPONENTS,
        top: int | None = None,
        rows: npt.ArrayLike | None = None,
        chunk: int = 1 << 14,
    ) -> Activations:
        """From experts (N, L, k), which may be memory-mapped: each decision stands for all ``components``.

        ``rows`` (M,) are the rows to take, in order (default all); ``domain`` and ``token_id`` (M,) say what
        they are. ``top`` keeps the first ranks only (the notebook keeps 4). Ids of ``n_expert`` or more
        ("none") are left out.
        """
        d, domains = pd.factorize(np.asarray(domain), sort=True)
        tokens = np.asarray(token_id)
        n_layers = experts.shape[1]
        where = None if rows is None else np.asarray(rows, dtype=np.int64)
        width = n_expert + 1
        once = np.zeros((n_layers, len(domains), width), dtype=np.int64)
        layer_offset = (np.arange(n_layers) * (len(domains) * width))[:, None]
        for start in range(0, d.size, chunk):
            piece: Any = slice(start, start + chunk) if where is None else where[start : start + chunk]
            ids = np.minimum(experts[piece][:, :, :top], n_expert)
            key = ids.astype(np.int64)
            key += layer_offset + d[start : start + chunk, None, None] * width
            once += np.bincount(key.reshape(-1), minlength=once.size).reshape(once.shape)
        once = once[:, :, :n_expert]
        if not once.any():
            raise UsageError("there are no activations", fix="choose rows that have routing")
        numbers = layer_numbers(layers, n_layers)

        d = d.astype(np.int32)

        def first(domain: int, layer: int, component: int) -> tuple[Ints, Ints]:
            mine = np.flatnonzero(d == domain)
            ids = experts[mine if where is None else where[mine], layer, 0].astype(np.int64)
            return tokens[mine][ids < n_expert], ids[ids < n_expert]

        return cls(
            tuple(str(name) for name in domains),
            tuple(int(number) for number in numbers),
            tuple(components),
            np.broadcast_to(once, (len(components), *once.shape)),
            _different(d, tokens, len(domains)),
            first,
        )

    @classmethod
    def from_counts(
        cls,
        counts: npt.ArrayLike,
        domains: Sequence[str],
        *,
        layers: npt.ArrayLike | None = None,
        components: Sequence[str] = COMPONENTS,
    ) -> Activations:
        """From counts (D, L, E) alone, domains in any order. There are no tokens: ``tokens_per_domain`` is 0
        and ``first`` raises UsageError.
        """
        c = np.asarray(counts, dtype=np.int64)
        order = np.argsort(np.asarray(domains))
        numbers = layer_numbers(layers, c.shape[1])

        def first(domain: int, layer: int, component: int) -> tuple[Ints, Ints]:
            raise UsageError("counts have no order of tokens", fix="give a recording of tokens")

        once = c[order].transpose(1, 0, 2)
        return cls(
            tuple(str(domains[i]) for i in order),
            tuple(int(number) for number in numbers),
            tuple(components),
            np.broadcast_to(once, (len(components), *once.shape)),
            np.zeros(len(order), dtype=np.int64),
            first,
        )

    def __add__(self, other: Activations) -> Activations:
        """Entries of both, tokens being different ones. Raises UsageError if layers or components differ."""
        if (self.layers, self.components) != (other.layers, other.components):
            raise UsageError("activations of different models do not add: layers or components differ")
        domains = tuple(sorted({*self.domains, *other.domains}))
        width = max(self.table.shape[3], other.table.shape[3])
        table = np.zeros((*self.table.shape[:2], len(domains), width), dtype=np.int64)
        tokens = np.zeros(len(domains), dtype=np.int64)
        for part in (self, other):
            where = [domains.index(name) for name in part.domains]
            table[:, :, where, : part.table.shape[3]] += part.table
            tokens[where] += part.tokens_per_domain

        def first(domain: int, layer: int, component: int) -> tuple[Ints, Ints]:
            found = [
                part.first(part.domains.index(domains[domain]), layer, component)
                for part in (self, other)
                if domains[domain] in part.domains
            ]
            token_id, expert_id = (np.concatenate(column) for column in zip(*found, strict=True))
            return token_id, expert_id

        return Activations(domains, self.layers, self.components, table, tokens, first)

    def counts(self, layer: int, component: str) -> pd.DataFrame:
        """What ``pivot_table(aggfunc="size", fill_value=0)`` gives: domains × experts, those that occur.

        Unused experts, and domains without entries, are dropped: columns differ between layers (a fault:
        tables of different layers are not comparable). Not a copy: the same frame each time. Raises
        UsageError if the layer or component has no entry.
        """
        if layer not in self.layers or component not in self.components:
            raise UsageError(
                f"no activations in layer {layer}, component {component}",
                fix=f"layers {self.layers[0]}..{self.layers[-1]}, components {', '.join(self.components)}",
            )
        key = (self.layers.index(layer), self.components.index(component))
        if key not in self._pivots:
            full = self.table[key[1], key[0]]
            rows, cols = full.any(axis=1), full.any(axis=0)
            if not rows.any():
                raise UsageError(f"no activations in layer {layer}", fix="choose another layer")
            self._pivots[key] = pd.DataFrame(
                full[rows][:, cols],
                index=self._domain_index if rows.all() else self._domain_index[rows],
                columns=pd.Index(np.flatnonzero(cols), name="expert_id"),
            )
        return self._pivots[key]

    @cached_property
    def _pivots(self) -> dict[tuple[int, int], pd.DataFrame]:
        return {}

    @cached_property
    def _layer_index(self) -> pd.Index[int]:
        index: pd.Index[int] = pd.Index(np.array(self.layers), name="layer_id")
        return index

    @cached_property
    def _domain_index(self) -> pd.Index[str]:
        return pd.Index(self.domains, name="domain")


@dataclass(frozen=True)
class Overview:
    """Part 2. ``tokens_per_domain`` is that of the first domain only, as in the notebook."""

    activations: int
    n_domains: int
    layers: tuple[int, ...]
    components: tuple[str, ...]
    n_experts: int
    expert_range: tuple[int, int]
    tokens_per_domain: int
    per_domain: pd.Series[int]
    per_layer: pd.Series[int]
    least: tuple[int, int]  # (activations, layer)
    most: tuple[int, int]
    mean_per_layer: float


def _at(where: np.intp, per_layer: pd.Series[int]) -> tuple[int, int]:
    return int(per_layer.iloc[int(where)]), int(per_layer.index[int(where)])


def overview(a: Activations) -> Overview:
    """Part 2, "Basic Statistics". Counts every decision once per component (a fault: three times)."""
    used = np.flatnonzero(a.table.any(axis=(0, 1, 2)))
    per_domain = pd.Series(a.table.sum(axis=(0, 1, 3)), index=a._domain_index)
    per_layer = pd.Series(a.table.sum(axis=(0, 2, 3)), index=a._layer_index)
    return Overview(
        activations=int(a.table.sum()),
        n_domains=len(a.domains),
        layers=a.layers,
        components=a.components,
        n_experts=used.size,
        expert_range=(int(used[0]), int(used[-1])),
        tokens_per_domain=int(a.tokens_per_domain[0]),
        per_domain=per_domain,
        per_layer=per_layer,
        least=_at(per_layer.to_numpy().argmin(), per_layer),
        most=_at(per_layer.to_numpy().argmax(), per_layer),
        mean_per_layer=float(per_layer.mean()),
    )


@dataclass(frozen=True)
class Frequency:
    """Part 3, "Domain Comparison". ``top``, by domain: five experts (``nlargest``), their summed percent."""

    counts: pd.DataFrame
    percent: pd.DataFrame
    top: pd.DataFrame


def frequency(a: Activations, layer: int = 0, component: str = "ffn_down") -> Frequency:
    """Part 3, "Domain Comparison". ``top``: ``domain``, ``experts`` (``nlargest(5)``), their ``percent``."""
    table = a.counts(layer, component)
    percent = _percent(table)
    share, experts = percent.to_numpy(), table.columns.to_numpy()
    rank = np.argsort(-share, axis=1, kind="stable")[:, :5]
    lists = np.empty(len(share), dtype=object)
    lists[:] = [experts[r].tolist() for r in rank]
    total = np.take_along_axis(share, rank, axis=1).sum(axis=1)
    top = pd.DataFrame({"experts": lists, "percent": total}, index=table.index, copy=False)
    return Frequency(table, percent, top)


@dataclass(frozen=True)
class ChiSquare:
    """Part 4. ``verdict`` is the notebook's: "highly significant" below .001, "significant" below .05."""

    chi2: float
    p_value: float
    dof: int
    expected: Floats
    verdict: str


def chi_square(a: Activations, layer: int = 0, component: str = "ffn_down") -> ChiSquare:
    """Part 4, chi-square test of independence (``scipy.stats.chi2_contingency``, Yates at dof 1).

    Takes every pick for an independent observation and one prompt for a domain: with prompts that merely
    differ from each other it rejects almost always (docs/statistics.md).
    """
    chi2, p, dof, expected = _contingency(a.counts(layer, component).to_numpy())
    verdict = "highly significant" if p < 0.001 else "significant" if p < 0.05 else "not significant"
    return ChiSquare(chi2, p, dof, expected, verdict)


@dataclass(frozen=True)
class Classification:
    """Part 5. ``variation`` per expert; ``preferred``: expert_id, domain, percent of each specialist."""

    variation: pd.Series[float]
    specialists: list[int]
    generalists: list[int]
    preferred: pd.DataFrame


def classification(a: Activations, layer: int = 0, component: str = "ffn_down") -> Classification:
    """Part 5, specialists and generalists by the coefficient of variation of raw counts (ddof 1).

    The quartile cut names about a quarter of the experts either way whatever the data; rarely used experts
    vary most. ``percent`` is the expert's share of the domain's picks, although the notebook calls it a share
    of the expert's usage.
    """
    table = a.counts(layer, component)
    c, experts = table.to_numpy(), table.columns.to_numpy()
    by_expert = np.ascontiguousarray(c.T.astype(np.float64))
    variation = np.sqrt(_variance(by_expert)) / (by_expert.mean(axis=1) + 1e-10)
    high, low = np.quantile(variation, (0.75, 0.25)) if len(c) > 1 else (np.nan, np.nan)
    special = np.flatnonzero(variation > high)
    favourite = c.argmax(axis=0)[special]
    share = c / c.sum(axis=1, keepdims=True) * 100
    preferred = pd.DataFrame(
        {
            "expert_id": experts[special],
            "domain": table.index[favourite],
            "percent": share[favourite, special],
        },
        copy=False,
    )
    return Classification(
        pd.Series(variation, index=table.columns),
        experts[special].tolist(),
        experts[variation < low].tolist(),
        preferred,
    )


def layer_separation(
    a: Activations, component: str = "ffn_down", layers: Iterable[int] | None = None
) -> pd.DataFrame:
    """Part 6, all layers: ``layer_id``, ``chi2``, ``p_value``, ``avg_variance``, ``significant`` (p < .001).

    ``avg_variance`` is the variance of the normalised usage over domains (ddof 1), averaged over the experts
    that occur: it shrinks with the number of experts and counts sampling noise. No correction for many
    layers.
    """
    numbers = [n for n in (a.layers if layers is None else layers) if n in a.layers]
    tables = a.table[a.components.index(component), [a.layers.index(n) for n in numbers]].astype(np.float64)
    some = np.asarray(tables.any(axis=(1, 2)))
    tables, numbers = tables[some], [n for n, there in zip(numbers, some.tolist(), strict=True) if there]
    rows = tables.sum(axis=2, keepdims=True)
    cols = tables.sum(axis=1, keepdims=True)
    expected = rows * cols / rows.sum(axis=1, keepdims=True)
    n_rows, n_cols = (rows > 0).sum(axis=(1, 2)), (cols > 0).sum(axis=(1, 2))
    dof = (n_rows - 1) * (n_cols - 1)
    gap = expected - tables
    # Yates' correction, as scipy applies it at one degree of freedom.
    gap = np.where((dof == 1)[:, None, None], gap - np.clip(gap, -0.5, 0.5), gap)
    chi2 = np.divide(gap**2, expected, out=np.zeros_like(gap), where=expected > 0).sum(axis=(1, 2))
    chi2[dof == 0] = 0.0
    p = np.where(dof > 0, chdtrc(np.maximum(dof, 1), chi2), 1.0)
    share = np.divide(tables, rows, out=np.zeros_like(tables), where=rows > 0)
    mean = share.sum(axis=1, keepdims=True) / n_rows[:, None, None]
    square = ((share - mean) ** 2 * (rows > 0)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = square.sum(axis=1) / (n_rows - 1) / n_cols
    return pd.DataFrame(
        {"layer_id": numbers, "chi2": chi2, "p_value": p, "avg_variance": spread, "significant": p < 0.001},
        copy=False,
    )


def most_specific(separation: pd.DataFrame, n: int = 5) -> list[int]:
    """Part 6: the layers of largest chi-square (``nlargest``), from :func:`layer_separation`."""
    order = np.argsort(-separation["chi2"].to_numpy(), kind="stable")[:n]
    return [int(i) for i in separation["layer_id"].to_numpy()[order]]


def deep_dive(a: Activations, layer: int | None = None) -> dict[str, pd.DataFrame]:
    """Part 7: percentages (domains × experts) per component, in the order down, gate, up.

    By default the most domain-specific layer. The three are the same table: one decision serves all three.
    """
    number = most_specific(layer_separation(a), 1)[0] if layer is None else layer
    components = [c for c in ("ffn_down", "ffn_gate", "ffn_up") if c in a.components]
    return {str(c): _percent(a.counts(number, c)) for c in components}


def entropy(a: Activations, layer: int = 0, component: str = "ffn_down") -> pd.Series[float]:
    """Part 8: plug-in Shannon entropy per domain, in bits. Biased downwards by about (m − 1)/(2N ln 2)."""
    table = a.counts(layer, component)
    return pd.Series(entropy_bits(shares(table.to_numpy())), index=table.index)


@dataclass(frozen=True)
class Lag1:
    """Part 9: ``same`` of ``pairs`` neighbours share their first expert; ``sticky`` if more than 20 %."""

    sequence: Ints
    same: int
    pairs: int
    probability: float
    baseline: float
    sticky: bool


def lag1(
    a: Activations, domain: str, layer: int = 0, component: str = "ffn_down", n_expert: int = 32
) -> Lag1:
    """Part 9, lag-1 agreement of the first expert (``position == 0``) in one domain, layer and component.

    Sorts by ``token_id`` with numpy's unstable quicksort, as pandas does: where a token id stands twice (the
    warm-up) the order of the two is arbitrary. The 20 % rule is arbitrary too, and the baseline 1/E ignores
    that some experts are used more.
    """
    _known(a, domain, layer, component)
    token_id, expert_id = a.first(
        a.domains.index(domain), a.layers.index(layer), a.components.index(component)
    )
    ascending = (token_id[1:] > token_id[:-1]).all()
    sequence = expert_id if ascending else expert_id[np.argsort(token_id, kind="quicksort")]
    if sequence.size < 2:
        raise UsageError(f"{domain} has {sequence.size} token(s) in layer {layer}", fix="lag 1 needs two")
    same = int((sequence[:-1] == sequence[1:]).sum())
    probability = same / (sequence.size - 1)
    return Lag1(sequence, same, sequence.size - 1, probability, 1 / n_expert, probability > 0.2)


def early_late(
    a: Activations,
    component: str = "ffn_down",
    early: Iterable[int] = range(6),
    late: Iterable[int] = range(18, 24),
) -> pd.DataFrame:
    """README, "Layer-wise Analysis": part 6 averaged over early (0-5) and late (18-23) layers.

    One row per group: ``group``, ``layers``, mean ``chi2``, mean ``avg_variance``, ``significant`` (how
    many).
    """
    table = layer_separation(a, component).set_index("layer_id")
    rows = []
    for name, group in (("early", early), ("late", late)):
        part = table.loc[[n for n in group if n in table.index]]
        rows.append(
            (
                name,
                len(part),
                part["chi2"].mean(),
                part["avg_variance"].mean(),
                int(part["significant"].sum()),
            )
        )
    return pd.DataFrame(rows, columns=["group", "layers", "chi2", "avg_variance", "significant"])


def transition_matrix(
    a: Activations, domain: str, layer: int = 0, component: str = "ffn_down", n_expert: int = 32
) -> pd.DataFrame:
    """Part 10, "build transition matrices": P(next first expert | first expert), experts × experts.

    From the sequence of :func:`lag1`; rows of experts that never came first are 0.
    """
    sequence = lag1(a, domain, layer, component, n_expert).sequence
    counts = np.zeros((n_expert, n_expert))
    np.add.at(counts, (sequence[:-1], sequence[1:]), 1)
    total = counts.sum(axis=1, keepdims=True)
    axis = pd.RangeIndex(n_expert)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    return pd.DataFrame(share, index=axis.rename("from"), columns=axis.rename("to"))


@dataclass(frozen=True)
class ExpertFrequency:
    """``expert_frequency.py``. Frames have ``expert_id``, ``count``, ``percent``; ``layer_id`` too but
    ``world``.

    ``top``: ten most used per layer; ``bottom``: five least used *of those used* (an expert never used cannot
    appear); ``world``: ten most used over all layers (pools unrelated experts of different layers that happen
    to share a number); ``totals``: ``layer_id``, ``selections``, ``unique``.
    """

    totals: pd.DataFrame
    top: pd.DataFrame
    bottom: pd.DataFrame
    world: pd.DataFrame
    world_selections: int
    world_unique: int


def expert_frequency(layer_id: npt.ArrayLike, expert_ids: npt.ArrayLike) -> ExpertFrequency:
    """Selections per expert from a log of (n,) layers and (n, k) expert ids; negative ids mean "none".

    Ties keep the order of first appearance (``Counter.most_common``).
    """
    layers, ids = np.asarray(layer_id), np.asarray(expert_ids).astype(np.int64)
    numbers = np.unique(layers)
    e = int(ids.max(initial=-1)) + 1
    counts = np.zeros((numbers.size, e), dtype=np.int64)
    place = np.full((numbers.size, e), ids.size)
    for i, layer in enumerate(numbers):
        mine = np.flatnonzero(layers == layer)
        seen, first, count = np.unique(ids[mine].reshape(-1), return_index=True, return_counts=True)
        there = seen >= 0
        counts[i, seen[there]] = count[there]
        place[i, seen[there]] = (
            mine[first[there] // ids.shape[1]] * ids.shape[1] + first[there] % ids.shape[1]
        )
    return frequency_of_counts(counts, numbers, place, place.min(axis=0, initial=ids.size))


def frequency_of_counts(
    counts: npt.ArrayLike, layers: npt.ArrayLike, place: npt.ArrayLike, world_place: npt.ArrayLike
) -> ExpertFrequency:
    """:func:`expert_frequency` from counts (L, E) and from where each expert first appears: ``place`` (L, E)
    within its layer, ``world_place`` (E,) in the whole log. Any numbers that ascend as the log does.
    """
    c, where = np.asarray(counts, dtype=np.int64), np.asarray(place)
    numbers = np.asarray(layers)
    totals, top, bottom = [], [], []
    for i, layer in enumerate(numbers):
        ranked = _most_common(c[i], where[i])
        ranked.insert(0, "layer_id", int(layer))
        totals.append((int(layer), int(c[i].sum()), len(ranked)))
        top.append(ranked.head(10))
        bottom.append(ranked.tail(5))
    world = _most_common(c.sum(axis=0), np.asarray(world_place))
    return ExpertFrequency(
        pd.DataFrame(totals, columns=["layer_id", "selections", "unique"]),
        pd.concat(top, ignore_index=True),
        pd.concat(bottom, ignore_index=True),
        world.head(10),
        int(world["count"].sum()),
        len(world),
    )


@dataclass(frozen=True)
class GateInputs:
    """``gate_input_analysis.py``: ``steps`` (one row per step and pair of layers), ``aggregate`` (mean, std).

    ``n_steps`` counts all steps, whole or not; ``steps`` holds the whole ones; ``aggregate`` pairs of layers
    from all steps that have both, and is empty for a single step.
    """

    n_steps: int
    steps: pd.DataFrame
    aggregate: pd.DataFrame


SHOWN = ("cosine_similarity", "euclidean", "l2_normalized", "pearson_corr", "mean_abs_diff")
AGGREGATED = ("cosine_similarity", "cosine_distance", *SHOWN[1:])


def gate_input_analysis(
    layer_id: npt.ArrayLike,
    token_id: npt.ArrayLike,
    values: npt.ArrayLike,
    layers: Sequence[int] = (20, 21, 22, 23, 24),
) -> GateInputs:
    """Distances between consecutive layers' gate inputs, from log entries in order: (n,), (n,), (n, D).

    Keeps entries of ``token_id`` 0; a new step begins whenever ``layers[0]`` comes again. Token 0 of a prompt
    batch is kept like a generated token (a fault). ``std`` has ddof 0.
    """
    numbers, tokens, x = np.asarray(layer_id), np.asarray(token_id), np.asarray(values, dtype=np.float64)
    steps: list[dict[int, Floats]] = []
    current: dict[int, Floats] = {}
    for i in np.flatnonzero((tokens == 0) & np.isin(numbers, layers)):
        number = int(numbers[i])
        if number == layers[0] and current:
            steps.append(current)
            current = {}
        current[number] = x[i]
    if current:
        steps.append(current)
    shown, pooled = [], []
    for n, step in enumerate(steps, 1):
        for a, b in pairwise(layers):
            if a in step and b in step:
                metrics = {name: float(v) for name, v in pair_distances(step[a], step[b]).items()}
                pooled.append({"layer": a, "next_layer": b, **{m: metrics[m] for m in AGGREGATED}})
                if all(number in step for number in layers):
                    shown.append({"step": n, "layer": a, "next_layer": b, **{m: metrics[m] for m in SHOWN}})
    aggregate = []
    if len(steps) > 1 and pooled:
        for pair, part in pd.DataFrame(pooled).groupby(["layer", "next_layer"], sort=True):
            for metric in AGGREGATED:
                known = part[metric].dropna()
                if len(known):
                    aggregate.append((*pair, metric, float(known.mean()), float(known.std(ddof=0))))
    return GateInputs(
        len(steps),
        pd.DataFrame(shown, columns=["step", "layer", "next_layer", *SHOWN]),
        pd.DataFrame(aggregate, columns=["layer", "next_layer", "metric", "mean", "std"]),
    )


@dataclass(frozen=True)
class GateExperts:
    """``compare_gate_experts.py``: ``samples`` (a row per token) and ``aggregate`` (``metric``, ``mean``,
    ``std``).
    """

    samples: pd.DataFrame
    aggregate: pd.DataFrame


def compare_gate_experts(logits_a: npt.ArrayLike, logits_b: npt.ArrayLike, k: int = 8) -> GateExperts:
    """Agreement of the top k by two sets of gate logits (n, E) of the same tokens; the shorter one's length
    counts.

    Kendall's τ is over common experts, and set to 1 for one common expert and 0 for none (a fault: there is
    no order to agree on). ``precision``, ``recall`` and ``f1`` are all |A∩B|/k. ``std`` has ddof 0.
    """
    a, b = np.asarray(logits_a, dtype=np.float64), np.asarray(logits_b, dtype=np.float64)
    n = min(len(a), len(b))
    order_a, order_b = np.argsort(a[:n], axis=1)[:, ::-1], np.argsort(b[:n], axis=1)[:, ::-1]
    top_a, top_b = order_a[:, :k], order_b[:, :k]
    same = top_a[:, :, None] == top_b[:, None, :]
    common = same.any(axis=2)
    shared = common.sum(axis=1)
    rank_b = np.where(common, same.argmax(axis=2), 0)
    score, pairs = np.zeros(n), np.zeros(n)
    for i in range(k):
        for j in range(i + 1, k):
            both = common[:, i] & common[:, j]
            pairs += both
            score += np.where(both, np.where(rank_b[:, i] < rank_b[:, j], 1, -1), 0)
    tau = np.where(shared > 1, score / np.maximum(pairs, 1), np.where(shared == 1, 1.0, 0.0))
    place = np.argsort(order_b, axis=1)
    share = shared / k
    samples = pd.DataFrame(
        {
            "precision": share,
            "recall": share,
            "f1": share,
            "exact_match": (shared == k).astype(np.float64),
            "top1_match": (top_a[:, 0] == top_b[:, 0]).astype(np.float64),
            "kendall_tau": tau,
            "intersection_size": shared,
            "coverage_k": np.maximum(np.take_along_axis(place, top_a, axis=1).max(axis=1) + 1, k),
        }
    )
    return GateExperts(
        samples,
        pd.DataFrame(
            {
                "metric": samples.columns,
                "mean": samples.mean().to_numpy(),
                "std": samples.std(ddof=0).to_numpy(),
            }
        ),
    )


def _different(domain: Ints, token_id: npt.NDArray[Any], n_domains: int) -> Ints:
    """How many different token ids each domain has."""
    _, code = np.unique(token_id, return_inverse=True)
    seen = np.zeros((n_domains, int(code.max(initial=-1)) + 1), dtype=bool)
    seen[domain, code] = True
    return np.asarray(seen.sum(axis=1), dtype=np.int64)


def _most_common(counts: Ints, place: npt.NDArray[Any]) -> pd.DataFrame:
    """Experts that occur, by count, then by where they first appear."""
    experts = np.flatnonzero(counts)
    experts = experts[np.lexsort((place[experts], -counts[experts]))]
    count = counts[experts]
    return pd.DataFrame(
        {"expert_id": experts, "count": count, "percent": count / max(int(count.sum()), 1) * 100}
    )


def _percent(table: pd.DataFrame) -> pd.DataFrame:
    c = table.to_numpy()
    return pd.DataFrame(c / c.sum(axis=1, keepdims=True) * 100, index=table.index, columns=table.columns)


def _variance(values: Floats) -> Floats:
    """Variance over the last axis with ddof 1, in pandas' order of operations; NaN for one value."""
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    mean = values.sum(axis=-1, keepdims=True) / n
    return np.asarray(((mean - values) ** 2).sum(axis=-1) / (n - 1))


def _contingency(counts: Ints) -> tuple[float, float, int, Floats]:
    """``scipy.stats.chi2_contingency`` without its per-call overhead: chi2, p, dof, expected."""
    observed = counts.astype(np.float64)
    expected = observed.sum(axis=1, keepdims=True) * observed.sum(axis=0, keepdims=True) / observed.sum()
    dof = (counts.shape[0] - 1) * (counts.shape[1] - 1)
    if dof == 0:
        return 0.0, 1.0, 0, expected
    if dof == 1:
        gap = expected - observed
        observed = observed + np.minimum(0.5, np.abs(gap)) * np.sign(gap)
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    return chi2, float(chdtrc(dof, chi2)), dof, expected


def _known(a: Activations, domain: str, layer: int, component: str) -> None:
    for value, among, what in (
        (domain, a.domains, "domain"),
        (layer, a.layers, "layer"),
        (component, a.components, "component"),
    ):
        if value not in among:
            raise UsageError(
                f"{what} {value!r} has no activations", fix=f"choose one of {', '.join(map(str, among))}"
            )


# -- of a trace's chosen rows ------------------------------------------------------------------------------


def activations(routing: Routing, top: int | None = None) -> Activations:
    """The chosen, labelled rows as the notebook's table.

    ``token_id`` numbers a domain's tokens, prompts in order of their names, each in reading order. One entry
    per consumer of the ids (gate, up, down). Raises UsageError if no request has a label.
    """
    chosen = routing.labelled
    held = list(parts.each(_held, chosen, routing.executor))
    prompts, domains, sizes = (np.concatenate([one[i] for one in held]) for i in range(3))
    # where each request's tokens begin among those of its domain
    sort = np.lexsort((prompts, domains))
    begin = np.empty(sizes.size, dtype=np.int64)
    begin[sort] = np.cumsum(sizes[sort]) - sizes[sort]
    ends = np.cumsum([one[2].size for one in held])
    begun = [(each, mine) for each, mine in zip(chosen, np.split(begin, ends[:-1]), strict=True) if mine.size]
    count = partial(_activations, components=routing.consumers or COMPONENTS, top=top)
    found = parts.added(list(parts.each(count, begun, routing.executor)))
    beside = np.zeros(len(found.domains), dtype=np.int64)
    # passes that share the number of another one's file (importers/token_json); none was generated
    for label, n in routing.request_values("passes_beside") if routing.phase != "decode" else ():
        if label in found.domains:
            beside[found.domains.index(label)] += int(n)
    return replace(found, tokens_per_domain=found.tokens_per_domain - beside)


def _held(chosen: Chosen) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.str_], Ints]:
    """The prompts, domains and sizes of a part's requests."""
    order = chosen.order
    prompts, domains = (
        np.array(names, dtype=np.str_)[order.requests] for names in (chosen.prompts, chosen.labels)
    )
    return prompts, domains, np.diff(order.request_starts)


def _numbered(chosen: Chosen, begin: Ints) -> tuple[list[str], Ints, Ints]:
    """The domains of a part, and of each row, in reading order, its domain and number among the domain's tokens."""
    order = chosen.order
    n = np.diff(order.request_starts)
    kinds, code = np.unique(np.array(chosen.labels, dtype=np.str_)[order.requests], return_inverse=True)
    token = np.repeat(begin - order.request_starts[:-1], n) + np.arange(order.rows.size)
    return [str(kind) for kind in kinds], np.repeat(code, n), token


@dataclass(frozen=True)
class _First:
    """First experts of a part's rows, read when they are asked for, wherever that is."""

    chosen: Chosen
    begin: Ints

    def __call__(self, domain: int, layer: int, component: int) -> tuple[Ints, Ints]:
        _, code, token = _numbered(self.chosen, self.begin)
        mine = np.flatnonzero(code == domain)
        trace = self.chosen.trace
        ids = trace.experts[self.chosen.order.rows[mine], layer, 0].astype(np.int64)
        there = ids < max(trace.n_expert)
        return token[mine][there], ids[there]


def _activations(begun: tuple[Chosen, Ints], components: Sequence[str], top: int | None) -> Activations:
    """Those of one part, of which each request's tokens are numbered from the given number on."""
    chosen, begin = begun
    kinds, code, token = _numbered(chosen, begin)
    found = Activations.from_rows(
        chosen.trace.experts,
        pd.Categorical.from_codes(code, pd.Index(kinds)),
        token,
        n_expert=max(chosen.trace.n_expert),
        layers=chosen.trace.layers,
        components=components,
        top=top,
        rows=chosen.order.rows,
    )
    return replace(found, first=_First(chosen, begin))


_Best = dict[tuple[int, int], tuple[Any, ...]]


def frequency_of_rows(routing: Routing) -> ExpertFrequency:
    """:func:`expert_frequency` of the chosen rows, prompts in order of their names; unlabelled ones count too."""
    n_layers, e = len(routing.layers), int(max(routing.n_expert))
    counts = np.zeros((n_layers, e), dtype=np.int64)
    best: _Best = {}
    numbered = list(enumerate(routing.chosen))
    for found, firsts in parts.each(partial(_frequency, shape=(n_layers, e)), numbered, routing.executor):
        counts += found
        for cell, where in firsts.items():
            best[cell] = min(best.get(cell, where), where)
    # the log goes ubatch by ubatch, in it layer by layer, in it row by row
    ascending = {where: i for i, where in enumerate(sorted(best.values()))}
    place_of = np.full((n_layers, e), len(ascending))
    for cell, where in best.items():
        place_of[cell] = ascending[where]
    return frequency_of_counts(counts, routing.layers, place_of, place_of.min(axis=0))


def _frequency(numbered: tuple[int, Chosen], shape: tuple[int, int]) -> tuple[Ints, _Best]:
    """Counts (L, E) of one part, and where each cell was first chosen in it."""
    number, each = numbered
    n_layers, e = shape
    counts = np.zeros(shape, dtype=np.int64)
    best: _Best = {}
    trace, names, request = each.trace, each.prompts, np.asarray(each.trace.request)
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(rows for *_, rows in by_prompt([each]))])
    new = np.zeros(shape, dtype=bool)
    experts, state = trace.experts, trace.state
    for start in range(0, rows.size, CHUNK):
        mine = rows[start : start + CHUNK]
        ids = present(experts, state, mine).transpose(1, 0, 2).astype(np.int64)  # (L, m, k)
        key = np.minimum(ids, e) + np.arange(n_layers)[:, None, None] * (e + 1)
        found = np.bincount(key.reshape(-1), minlength=n_layers * (e + 1)).reshape(n_layers, e + 1)
        fresh = (found[:, :e] > 0) & ~new
        counts += found[:, :e]
        if not fresh.any():
            continue
        new |= fresh
        at = dict(zip(*np.unique(key.reshape(-1), return_index=True), strict=True))
        for layer, expert in zip(*np.nonzero(fresh), strict=True):
            place = int(at[layer * (e + 1) + expert]) % (ids.shape[1] * ids.shape[2])
            i, rank = divmod(place, ids.shape[2])
            row = int(mine[i])
            where = (names[request[row]], number, int(trace.step[row]), int(layer), start + i, rank)
            cell = (int(layer), int(expert))
            best[cell] = min(best.get(cell, where), where)
    return counts, best


def frequency_of_table(counts: RoutingCounts) -> ExpertFrequency:
    """:func:`expert_frequency` of a table, ties in order of expert ids: the order of the log is not known."""
    total = counts.included.sum(axis=0)
    ids = np.arange(total.shape[1])
    return frequency_of_counts(total, counts.layers, np.broadcast_to(ids, total.shape), ids)


def gate_steps(routing: Routing, at_most: int = 200) -> tuple[pd.DataFrame, pd.DataFrame]:
    """:func:`gate_input_analysis` of these traces, all layers: its steps (the first ``at_most``), its aggregate.

    The script takes row 0 of every ubatch, of whatever phase; prompts come in order of their names.
    """
    total: MetricSums | None = None
    steps: list[pd.DataFrame] = []
    n = 0
    for each, _, rows, _ in gate.gate_rows([replace(chosen, phase="all") for chosen in routing.chosen]):
        trace, values = each.trace, each.need("gate_input")
        mine = rows[np.asarray(trace.row)[rows] == 0]
        if not mine.size:
            continue
        whole = (np.asarray(trace.state[mine]) == 1).all(axis=1)
        part = gate.gate_sums(values, mine, np.zeros(mine.size, dtype=np.int64), state=trace.state)
        total = part if total is None else total + part
        shown = mine[whole][: max(at_most - n, 0)]
        if shown.size:
            found = gate.gate_distances(values, shown, state=trace.state, layers=trace.layers)
            step = np.repeat(n + np.arange(shown.size) + 1, len(routing.layers) - 1)
            found.insert(0, "step", step)
            steps.append(found[["step", "layer", "next_layer", *SHOWN]])
        n += mine.size
    if total is None or not steps:
        raise UsageError("no ubatch has its row 0 in the trace", fix="choose another phase")
    aggregate = gate.gate_summary(total, routing.layers)
    aggregate = aggregate[aggregate["metric"].isin(AGGREGATED) & (aggregate["tokens"] > 0) & (n > 1)]
    return (
        pd.concat(steps, ignore_index=True),
        aggregate[["layer", "next_layer", "metric", "mean", "std"]].reset_index(drop=True),
    )


def gate_experts_of_rows(one: Chosen, two: Chosen, a: Ints, b: Ints) -> pd.DataFrame | None:
    """``compare_gate_experts.py`` of rows a of one and b of two: layer_id, metric, mean, std (ddof 0).

    None without the logits of both.
    """
    logits = (one.channel("logits"), two.channel("logits"))
    if logits[0] is None or logits[1] is None:
        return None
    total: MetricSums | None = None
    for start in range(0, a.size, CHUNK):
        x = np.asarray(logits[0][a[start : start + CHUNK]])
        y = np.asarray(logits[1][b[start : start + CHUNK]])
        known = np.isfinite(x).all(axis=2) & np.isfinite(y).all(axis=2)
        columns: dict[str, npt.NDArray[np.float64]] = {}
        for layer, k in enumerate(one.trace.n_expert_used):
            e = int(one.trace.n_expert[layer])
            here = known[:, layer]
            found = compare_gate_experts(x[here, layer, :e], y[here, layer, :e], int(k)).samples
            for metric in found:
                column = columns.setdefault(str(metric), np.full(known.shape, np.nan))
                column[here, layer] = found[metric]
        part = MetricSums.of(np.zeros(x.shape[0], dtype=np.int64), columns)
        total = part if total is None else total + part
    if total is None:
        return None
    table = total.table()
    table.insert(0, "layer_id", np.asarray(one.trace.layers)[table.pop("place").to_numpy()])
    return table[["layer_id", "metric", "tokens", "mean", "std"]]
