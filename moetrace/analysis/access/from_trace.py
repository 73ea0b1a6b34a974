"""The one place where a trace meets the analyses: columns in, arrays out.

Everything else in this package takes arrays. :func:`from_trace` chooses the rows of one phase, names prompts
and domains, counts once, and offers each analysis as a method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.access.from_tokens import Predictions
from moetrace.analysis.counts import compare
from moetrace.analysis.counts.counting import (
    MAX_LAG,
    Progress,
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
    last_rows,
    reading_order,
)
from moetrace.analysis.domains import domain, matched
from moetrace.analysis.domains import layers as depth
from moetrace.analysis.dynamics import temporal
from moetrace.analysis.experts import gate
from moetrace.analysis.published import notebook as published
from moetrace.analysis.published.notebook import Activations, ExpertFrequency
from moetrace.analysis.statistics.sums import MetricSums
from moetrace.analysis.text.routed import RoutedText
from moetrace.errors import ChannelMissingError, MoetraceError, UsageError

Phase = Literal["prefill", "decode", "unknown", "all"]
_PHASES = {"prefill": 0, "decode": 1, "unknown": 2}

NO_DOMAIN = "no request of the trace has a domain"
LABEL_THEM = "label requests (moetrace drive --label-key domain)"

_CHUNK = 1 << 13  # rows looked at together
# Token counts of all ids may take this much memory; beyond it the most frequent ids are kept.
_TOKEN_BYTES = 512 << 20


class RoutedRows(Protocol):
    """What the analyses need of a trace; shapes and dtypes as in docs/format.md, table ``rows``.

    Channels beyond ``experts`` (``weights``, ``scores``, ``logits``, ``gate_input``) are asked for where they
    are of use; a trace without one raises ChannelMissingError.
    """

    @property
    def experts(self) -> npt.NDArray[Any]: ...
    @property
    def state(self) -> npt.NDArray[np.uint8]: ...
    @property
    def token_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def positions(self) -> npt.NDArray[np.int32]: ...
    @property
    def request(self) -> npt.NDArray[np.int64]: ...
    @property
    def phase(self) -> npt.NDArray[np.uint8]: ...
    @property
    def step(self) -> npt.NDArray[np.uint32]: ...
    @property
    def row(self) -> npt.NDArray[np.uint32]: ...
    @property
    def requests(self) -> pd.DataFrame:
        """One row per request, the index its number; ``label``, ``id``, ``n_shifts`` and ``n_undecided`` (then
        ``n_prefill`` and ``n_decode`` too) where known.
        """
        ...

    @property
    def layers(self) -> npt.NDArray[np.int64]: ...
    @property
    def n_expert(self) -> npt.NDArray[np.int64]: ...
    @property
    def n_expert_used(self) -> npt.NDArray[np.int64]: ...
    @property
    def consumers(self) -> list[list[str]]: ...


def from_trace(
    *traces: RoutedRows,
    phase: Phase = "decode",
    top1: Literal["weight", "router"] = "weight",
    max_lag: int = MAX_LAG,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Analyses of one trace, or of several taken together.

    Parameters
    ----------
    phase
        Which rows to look at. "all" pools phases, which route differently: ask for it only on purpose.
        Imported traces may not know the phase: theirs is "unknown".
    top1
        What "first expert" means: the one of largest mixing weight ("weight", where the trace has weights),
        or the first in the router's order ("router"). They differ where selection is biased or grouped.
    names
        One name per trace, to tell their requests apart (default "0", "1", …; numbered where two are alike).
        Requests with the same ``id`` are one prompt, in whichever trace they are.

    Raises UsageError if no row is of this phase.
    """
    if not traces:
        raise UsageError("there is no trace to analyse", fix="give at least one")
    return Analysis(traces, phase, top1, max_lag, tuple(names or map(str, range(len(traces)))), progress)


@dataclass(frozen=True)
class Agreement:
    """How two captures A and B of the same text agree.

    Attributes
    ----------
    sums
        :func:`moetrace.analysis.counts.compare.agreement` summed per prompt.
    phases
        The same by phase of A's token: prefill, decode, unknown, those that there are.
    included
        (2, P, L, E) int64: tokens that used the expert, in A and in B, over the compared cells; prompts as in
        ``sums``.
    texts
        :func:`moetrace.analysis.counts.compare.align`'s table: which texts were compared how far.
    only_in
        Prompts that only A has, and only B.
    published
        :func:`moetrace.analysis.published.notebook.compare_gate_experts`'s aggregate of every layer; None without the
        logits of both.
    layers, n_expert, n_expert_used
        (L,) of the model.
    """

    sums: MetricSums
    phases: dict[str, MetricSums]
    included: npt.NDArray[np.int64]
    texts: pd.DataFrame
    only_in: tuple[int, int]
    published: pd.DataFrame | None
    layers: npt.NDArray[np.int64]
    n_expert: npt.NDArray[np.int64]
    n_expert_used: npt.NDArray[np.int64]

    def by_layer(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.counts.compare.agreement_summary`."""
        return compare.agreement_summary(
            self.sums, n_expert=self.n_expert, n_expert_used=self.n_expert_used, layers=self.layers
        )

    def by_phase(self) -> pd.DataFrame:
        """All layers together, by phase: ``phase``, then as :meth:`by_depth`."""
        parts = []
        for phase, sums in self.phases.items():
            table = compare.agreement_by_depth(
                sums, n_expert=self.n_expert, n_expert_used=self.n_expert_used, layers=self.layers
            )
            table = table[table["depth"] == "all"].drop(columns=["depth", "layers"])
            parts.append(table.assign(phase=phase)[["phase", *table.columns]])
        return pd.concat(parts, ignore_index=True)

    def by_depth(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.counts.compare.agreement_by_depth`."""
        return compare.agreement_by_depth(
            self.sums, n_expert=self.n_expert, n_expert_used=self.n_expert_used, layers=self.layers
        )

    def usage(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.counts.compare.usage_difference`."""
        return compare.usage_difference(*self.included, layers=self.layers, n_expert=self.n_expert)


@dataclass(frozen=True)
class LayerRows:
    """Tokens of one layer, for analyses of what experts compute.

    Attributes
    ----------
    rows
        (n,) row numbers in the trace.
    gate_input, experts, weights
        (n, D), (n, k), (n, k).
    prompts
        (n,) the prompt of each.
    """

    rows: npt.NDArray[np.int64]
    gate_input: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    prompts: npt.NDArray[np.str_]


class Analysis:
    """Analyses of the chosen rows; counts are made at first use and kept."""

    def __init__(
        self,
        traces: Sequence[RoutedRows],
        phase: Phase,
        top1: Literal["weight", "router"],
        max_lag: int,
        names: Sequence[str],
        progress: Progress | None,
    ) -> None:
        self.phase = phase
        self._given, self._top1, self._max_lag = tuple(traces), top1, max_lag
        alike = len(set(names)) < len(names)
        given = [f"{name}.{i}" if alike else name for i, name in enumerate(names)]
        for trace, name in zip(traces, given, strict=True):
            _refuse_misfit(traces[0], given[0], trace, name)
        # a trace of several contexts is counted context by context: each one's columns are views
        each = [(part, name) for trace, name in zip(traces, given, strict=True) for part in _parts(trace)]
        self._traces, self._names = tuple(part for part, _ in each), tuple(name for _, name in each)
        self._progress = progress
        if not any(self._keep(trace).any() for trace in self._traces):
            there = sorted(
                {name for t in self._traces for name, code in _PHASES.items() if (t.phase == code).any()}
            )
            raise UsageError(
                f"the trace has no {phase} rows",
                fix=f"choose the phase {' or '.join(there)}" if there else "capture something first",
            )

    @cached_property
    def counts(self) -> RoutingCounts:
        """:class:`moetrace.analysis.counts.counting.RoutingCounts` of the chosen rows, one streaming pass."""
        parts = []
        for trace, name in zip(self._traces, self._names, strict=True):
            weights = _channel(trace, "weights") if self._top1 == "weight" else None
            parts.append(
                count_routing(
                    trace.experts,
                    trace.request,
                    trace.positions,
                    weights=weights,
                    max_lag=self._max_lag,
                    progress=self._progress,
                    **self._shared(trace, name),
                )
            )
        return reduce(add, parts)

    @cached_property
    def token_counts(self) -> TokenCounts:
        """:class:`moetrace.analysis.counts.counting.TokenCounts` of the labelled rows.

        Of all token ids if they fit into 512 MiB, else of the most frequent ones.
        """
        for trace in self._traces:
            _ = trace.experts  # or ChannelMissingError
        each = 8 * len(self.layers) * int(max(self.n_expert))
        at_most = max(1, _TOKEN_BYTES // each)
        every = [t.token_ids[self._keep(t) & self._labelled(t)] for t in self._traces]
        tokens = None
        if not any((part >= 0).any() for part in every):
            raise UsageError(
                "no labelled request of the recording has token ids",
                fix="capture with moetrace, which records them",
            )
        if np.unique(np.concatenate([np.unique(part) for part in every])).size > at_most:
            owner = [t.request[self._keep(t) & self._labelled(t)] for t in self._traces]
            step = np.cumsum([0] + [_width(t) for t in self._traces[:-1]])
            owners = np.concatenate([o + s for o, s in zip(owner, step, strict=True)])
            tokens = frequent_tokens(np.concatenate(every), owners, at_most)
        parts = [
            count_tokens(
                t.experts, t.token_ids, t.request, t.positions, tokens=tokens, **self._shared(t, n, True)
            )
            for t, n in zip(self._traces, self._names, strict=True)
        ]
        return reduce(add, parts)

    @property
    def layers(self) -> npt.NDArray[np.int64]:
        """(L,) llama.cpp's layer numbers."""
        return np.asarray(self._traces[0].layers)

    @property
    def n_expert(self) -> npt.NDArray[np.int64]:
        """(L,) experts that each layer has."""
        return np.asarray(self._traces[0].n_expert)

    def expert_usage(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.domains.domain.expert_usage`; unlabelled prompts count too."""
        c = self.counts
        return domain.expert_usage(c.included, c.tokens, layers=c.layers, n_expert=self.n_expert)

    def expert_frequency(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.domains.domain.expert_frequency`."""
        c = self._domains
        return domain.expert_frequency(c.included, c.tokens, c.labels, c.layers, self.n_expert)

    def domain_test(self, **options: Any) -> domain.DomainTest:
        """:func:`moetrace.analysis.domains.domain.domain_test`, with its options."""
        c = self._domains
        return domain.domain_test(c.included, c.labels, layers=c.layers, **options)

    def domain_lift(self, **options: Any) -> pd.DataFrame:
        """:func:`moetrace.analysis.domains.domain.domain_lift`, with its options."""
        c = self._domains
        return domain.domain_lift(c.included, c.labels, layers=c.layers, n_expert=self.n_expert, **options)

    def matched_separation(self, **options: Any) -> matched.MatchedSeparation:
        """:func:`moetrace.analysis.domains.matched.matched_separation`, with its options."""
        return matched.matched_separation(self.token_counts, **options)

    def depth_contrast(
        self, early: Iterable[int] | None = None, late: Iterable[int] | None = None
    ) -> depth.DepthContrast:
        """:func:`moetrace.analysis.domains.layers.depth_contrast`."""
        c = self._domains
        return depth.depth_contrast(c.included, c.labels, layers=c.layers, early=early, late=late)

    def deep_dive(self, layer: int | None = None) -> depth.DeepDive:
        """:func:`moetrace.analysis.domains.layers.deep_dive`."""
        c = self._domains
        return depth.deep_dive(
            c.included,
            c.labels,
            layers=c.layers,
            layer=layer,
            n_expert=self.n_expert,
            consumers=self._consumers,
        )

    def domain_entropy(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.domains.layers.domain_entropy`."""
        c = self._domains
        return depth.domain_entropy(c.included, c.labels, layers=c.layers, n_expert=self.n_expert)

    def load_balance(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.domains.layers.load_balance`; unlabelled prompts count too."""
        c = self.counts
        return depth.load_balance(c.included, c.tokens, layers=c.layers, n_expert=self.n_expert)

    def persistence(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.dynamics.temporal.persistence`; unlabelled prompts count too."""
        return temporal.persistence(self.counts)

    def shuffle_test(self, **options: Any) -> pd.DataFrame:
        """:func:`moetrace.analysis.dynamics.temporal.shuffle_test`, with its options; one trace only.

        Of a trace with several contexts the columns are copied together.
        """
        trace = self._single("a shuffle test")
        given = self._shared(trace, self._names[0])
        for unused in ("prompts", "labels", "n_expert_used"):
            given.pop(unused)
        return temporal.shuffle_test(trace.experts, trace.request, trace.positions, **given, **options)

    def transitions(self, layer: int) -> temporal.Transitions:
        """:func:`moetrace.analysis.dynamics.temporal.transitions`."""
        return temporal.transitions(self.counts, layer)

    def gate_distances(self, at_most: int | None = None) -> pd.DataFrame:
        """:func:`moetrace.analysis.experts.gate.gate_distances` of the chosen rows, and each row's ``prompt``.

        Prompt by prompt, each token's partner (for ``cosine_unpaired``) being the next one of its request, the
        first one for the last. ``at_most`` so many tokens, where the whole would be too large. ``row`` counts
        within each trace. Raises ChannelMissingError if a trace has no gate inputs.
        """
        parts, left = [], np.inf if at_most is None else at_most
        for trace, prompt, rows, partners in self._gate_rows():
            rows, partners = rows[: int(min(rows.size, left))], partners[: int(min(rows.size, left))]
            left -= rows.size
            found = gate.gate_distances(
                trace.gate_input,  # type: ignore[attr-defined]
                rows,
                partners=partners,
                state=trace.state,
                layers=trace.layers,
            )
            parts.append(found.assign(prompt=prompt))
            if left <= 0:
                break
        return pd.concat(parts, ignore_index=True)

    def gate_summary(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.experts.gate.gate_summary` over prompts, in memory that does not grow with rows."""
        parts = (
            gate.gate_sums(
                trace.gate_input,  # type: ignore[attr-defined]
                rows,
                [prompt] * rows.size,
                partners=partners,
                state=trace.state,
            )
            for trace, prompt, rows, partners in self._gate_rows()
        )
        return gate.gate_summary(reduce(add, parts), self.layers)

    def layer_rows(self, index: int, at_most: int | None = None) -> LayerRows:
        """Tokens of the layer at ``index`` of the layer axis, evenly spread over the chosen rows; one trace only.

        Rows in which the layer was not computed are left out. Raises ChannelMissingError if the trace has no gate
        inputs or weights.
        """
        trace = self._single("what experts compute")
        parts = _parts(trace)
        for part in parts:
            part.gate_input, part.weights  # type: ignore[attr-defined]  # noqa: B018  # these raise by themselves
        starts = np.concatenate(([0], np.cumsum([np.asarray(part.request).size for part in parts])))
        rows = np.concatenate(
            [
                start + np.flatnonzero(self._keep(part) & (np.asarray(part.state[:, index]) == 1))
                for start, part in zip(starts.tolist(), parts, strict=False)
            ]
        )
        if at_most is not None and rows.size > at_most:
            rows = rows[np.linspace(0, rows.size - 1, at_most).astype(np.int64)]
        k = int(trace.n_expert_used[index])
        found = []
        for i, part in enumerate(parts):
            mine = rows[(rows >= starts[i]) & (rows < starts[i + 1])] - starts[i]
            names = np.array([*self._prompts(part, self._names[0]), ""], dtype=np.str_)
            found.append(
                (
                    np.asarray(part.gate_input[mine, index], np.float32),  # type: ignore[attr-defined]
                    np.asarray(part.experts[mine, index, :k], np.int64),
                    np.asarray(part.weights[mine, index, :k], np.float32),  # type: ignore[attr-defined]
                    names[np.asarray(part.request)[mine]],
                )
            )
        return LayerRows(rows, *(np.concatenate(columns) for columns in zip(*found, strict=True)))

    def published_gate(self, at_most: int = 200) -> tuple[pd.DataFrame, pd.DataFrame]:
        """:func:`moetrace.analysis.published.notebook.gate_input_analysis` of these traces, all layers: its steps (the
        first ``at_most``) and its aggregate.

        The script takes row 0 of every ubatch, of whatever phase; prompts come in order of their names.
        """
        total: MetricSums | None = None
        steps: list[pd.DataFrame] = []
        n = 0
        for trace, _, rows, _ in self._gate_rows(every_phase=True):
            values = trace.gate_input  # type: ignore[attr-defined]
            mine = rows[np.asarray(trace.row)[rows] == 0]
            if not mine.size:
                continue
            whole = (np.asarray(trace.state[mine]) == 1).all(axis=1)
            part = gate.gate_sums(values, mine, np.zeros(mine.size, dtype=np.int64), state=trace.state)
            total = part if total is None else total + part
            shown = mine[whole][: max(at_most - n, 0)]
            if shown.size:
                found = gate.gate_distances(values, shown, state=trace.state, layers=trace.layers)
                step = np.repeat(n + np.arange(shown.size) + 1, len(self.layers) - 1)
                found.insert(0, "step", step)
                steps.append(found[["step", "layer", "next_layer", *published.SHOWN]])
            n += mine.size
        if total is None or not steps:
            raise UsageError("no ubatch has its row 0 in the trace", fix="choose another phase")
        aggregate = gate.gate_summary(total, self.layers)
        aggregate = aggregate[
            aggregate["metric"].isin(published.AGGREGATED) & (aggregate["tokens"] > 0) & (n > 1)
        ]
        return (
            pd.concat(steps, ignore_index=True),
            aggregate[["layer", "next_layer", "metric", "mean", "std"]].reset_index(drop=True),
        )

    def _gate_rows(
        self, every_phase: bool = False
    ) -> Iterator[tuple[RoutedRows, str, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Trace, prompt, rows and partners of every request, prompts in order of their names."""
        for trace in self._traces:
            if trace.gate_input.shape[1] < 2:  # type: ignore[attr-defined]  # raises ChannelMissingError by itself
                raise UsageError(
                    "there is one MoE layer: no next one to compare it with", fix="capture two layers or more"
                )
        found = []
        for number, (trace, name) in enumerate(zip(self._traces, self._names, strict=True)):
            there = (np.asarray(trace.request) >= 0) & ~self._undecided(trace)
            keep = there if every_phase else self._keep(trace)
            order = reading_order(trace.request, trace.positions, keep, self._shifted(trace))
            names = self._prompts(trace, name)
            starts = order.request_starts
            for i, request in enumerate(order.requests.tolist()):
                found.append((names[request], number, request, order.rows[starts[i] : starts[i + 1]]))
        for prompt, number, _, rows in sorted(found, key=lambda each: each[:3]):
            partners = np.roll(rows, -1) if rows.size > 1 else np.full(1, -1)
            yield self._traces[number], prompt, rows, partners

    def agreement(self, other: Analysis) -> Agreement:
        """Agreement with another capture of the same text, token by token: :class:`Agreement`.

        ``coverage_k`` needs the other capture's ``scores`` or ``logits``. Raises UsageError if the captures
        differ in layers or experts, or have no prompt in common.
        """
        mine, theirs = self._single("a comparison"), other._single("a comparison")
        for name in ("layers", "n_expert", "n_expert_used"):
            a, b = getattr(mine, name), getattr(theirs, name)
            if not np.array_equal(a, b):
                raise UsageError(
                    f"these captures cannot be compared: {name} differ ({a.tolist()} and {b.tolist()})",
                    fix="compare captures of models of the same shape",
                )
        names = [
            np.array(one._prompts(trace, ""), dtype=np.str_) for one, trace in ((self, mine), (other, theirs))
        ]
        every = np.unique(np.concatenate(names))
        rows, keys = [], []
        for one, trace, given in ((self, mine, names[0]), (other, theirs, names[1])):
            r = reading_order(trace.request, trace.positions, one._keep(trace), one._shifted(trace)).rows
            rows.append(r)
            columns = {
                "prompt": np.searchsorted(every, given)[trace.request[r]],
                "position": trace.positions[r],
                "token": trace.token_ids[r],
            }
            keys.append(pd.DataFrame(columns))
        a, b, texts = compare.align(keys[0], keys[1])
        texts["prompt"] = every[texts["prompt"].to_numpy()]
        scores = _channel(theirs, "scores")
        scores = _channel(theirs, "logits") if scores is None else scores
        who = every[keys[0]["prompt"].to_numpy()[a]]
        prompts = np.unique(who)
        e, n_layers = int(max(mine.n_expert)), len(mine.layers)
        included = np.zeros((2, prompts.size, n_layers, e), dtype=np.int64)
        total: MetricSums | None = None
        by_phase: dict[str, MetricSums] = {}
        phase = np.asarray(mine.phase)[rows[0][a]]
        # asked for once: of a trace with several contexts they are copied together
        columns_of = [(trace.experts, trace.state) for trace in (mine, theirs)]
        for start in range(0, a.size, _CHUNK):
            piece = slice(start, start + _CHUNK)
            ids = [
                _present(*columns_of[0], rows[0][a[piece]]),
                _present(*columns_of[1], rows[1][b[piece]]),
            ]
            metrics = compare.agreement(
                ids[0],
                ids[1],
                n_expert=e,
                scores_b=None if scores is None else np.asarray(scores[rows[1][b[piece]]]),
                n_expert_used=mine.n_expert_used,
            )
            part = MetricSums.of(who[piece], metrics)
            total = part if total is None else total + part
            for name, code in _PHASES.items():
                here = phase[piece] == code
                if here.any():
                    some = MetricSums.of(who[piece][here], {m: v[here] for m, v in metrics.items()})
                    by_phase[name] = by_phase[name] + some if name in by_phase else some
            both = ~np.isnan(metrics["overlap"])
            at = np.searchsorted(prompts, who[piece])
            for side, x in zip(included, ids, strict=True):
                token, layer, rank = np.nonzero((x < e) & both[:, :, None])
                np.add.at(side, (at[token], layer, x[token, layer, rank]), 1)
        if total is None:
            raise UsageError("the captures have no token in common", fix="capture the same prompts with both")
        with_rows = [set(keys_of["prompt"].unique()) for keys_of in keys]
        return Agreement(
            total,
            by_phase,
            included,
            texts,
            (len(with_rows[0] - with_rows[1]), len(with_rows[1] - with_rows[0])),
            _published_agreement(mine, theirs, rows[0][a], rows[1][b]),
            mine.layers,
            mine.n_expert,
            mine.n_expert_used,
        )

    def published(self, top: int | None = None) -> Activations:
        """The chosen, labelled rows as the notebook's table, for the functions of
        :mod:`moetrace.analysis.published.notebook`.

        ``token_id`` numbers a domain's tokens, prompts in order of their names, each in reading order. One entry
        per consumer of the ids (gate, up, down). Raises UsageError if no request has a label.
        """
        if not any(self._labelled(trace).any() for trace in self._traces):
            raise UsageError(NO_DOMAIN, fix=LABEL_THEM)
        names = np.unique(
            np.concatenate(
                [
                    np.array(self._prompts(t, n), dtype=np.str_)
                    for t, n in zip(self._traces, self._names, strict=True)
                ]
            )
        )
        orders, ranks = [], []
        for trace, name in zip(self._traces, self._names, strict=True):
            keep = self._keep(trace) & self._labelled(trace)
            order = reading_order(trace.request, trace.positions, keep, self._shifted(trace))
            mine = np.array(self._prompts(trace, name), dtype=np.str_)[order.requests]
            orders.append(order)
            ranks.append(np.searchsorted(names, mine))
        # where each request's tokens begin among those of its domain
        domains = [
            np.array(self._labels(t), dtype=np.str_)[o.requests]
            for t, o in zip(self._traces, orders, strict=True)
        ]
        sizes = np.concatenate([np.diff(order.request_starts) for order in orders])
        sort = np.lexsort((np.concatenate(ranks), np.concatenate(domains)))
        begin = np.empty(sizes.size, dtype=np.int64)
        begin[sort] = np.cumsum(sizes[sort]) - sizes[sort]
        parts, done = [], 0
        for trace, order, labels in zip(self._traces, orders, domains, strict=True):
            n = np.diff(order.request_starts)
            offset = begin[done : done + n.size] - order.request_starts[:-1]
            done += n.size
            if not n.size:
                continue
            kinds, code = np.unique(labels, return_inverse=True)
            parts.append(
                published.Activations.from_rows(
                    trace.experts,
                    pd.Categorical.from_codes(np.repeat(code, n), pd.Index([str(k) for k in kinds])),
                    np.repeat(offset, n) + np.arange(order.rows.size),
                    n_expert=max(trace.n_expert),
                    layers=trace.layers,
                    components=self._consumers or published.COMPONENTS,
                    top=top,
                    rows=order.rows,
                )
            )
        return reduce(add, parts)

    def published_frequency(self) -> ExpertFrequency:
        """:func:`moetrace.analysis.published.notebook.expert_frequency` of the chosen rows, prompts in order of their
        names; unlabelled prompts count too.
        """
        n_layers, e = len(self.layers), int(max(self.n_expert))
        counts = np.zeros((n_layers, e), dtype=np.int64)
        best: dict[tuple[int, int], tuple[Any, ...]] = {}
        for number, (trace, name) in enumerate(zip(self._traces, self._names, strict=True)):
            names = self._prompts(trace, name)
            request = np.asarray(trace.request)
            order = reading_order(request, trace.positions, self._keep(trace), self._shifted(trace))
            sort = sorted(range(order.requests.size), key=lambda i: (names[order.requests[i]], i))
            pieces = [order.rows[order.request_starts[i] : order.request_starts[i + 1]] for i in sort]
            rows = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
            new = np.zeros((n_layers, e), dtype=bool)
            for start in range(0, rows.size, _CHUNK):
                mine = rows[start : start + _CHUNK]
                ids = (
                    _present(trace.experts, trace.state, mine).transpose(1, 0, 2).astype(np.int64)
                )  # (L, m, k)
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
                    step = int(trace.step[row])
                    where = (names[request[row]], number, step, int(layer), start + i, rank)
                    cell = (int(layer), int(expert))
                    best[cell] = min(best.get(cell, where), where)
        # the log goes ubatch by ubatch, in it layer by layer, in it row by row
        ascending = {where: i for i, where in enumerate(sorted(best.values()))}
        place = np.full((n_layers, e), len(ascending))
        for cell, where in best.items():
            place[cell] = ascending[where]
        return published.frequency_of_counts(counts, self.layers, place, place.min(axis=0))

    @property
    def _consumers(self) -> tuple[str, ...]:
        """The matrices that the ids went to, where the recording says so."""
        try:
            return tuple(self._traces[0].consumers[0])
        except MoetraceError:
            return ()

    @cached_property
    def text(self) -> RoutedText:
        """The chosen rows as whole texts in reading order; a copy. One request per prompt: the first.

        Numbers and weights are as the traces have them, which ``sources`` counts in the order given; a cell that
        was not computed or is lost has no expert.
        """
        chosen: list[npt.NDArray[np.int64]] = []
        sizes: list[int] = []
        prompts: list[str] = []
        labels: list[str] = []
        seen: set[str] = set()
        for trace, name in zip(self._traces, self._names, strict=True):
            order = reading_order(trace.request, trace.positions, self._keep(trace), self._shifted(trace))
            names, domains = self._prompts(trace, name), self._labels(trace)
            pieces = [np.empty(0, dtype=np.int64)]
            for i, number in enumerate(order.requests.tolist()):
                if names[number] not in seen:
                    seen.add(names[number])
                    prompts.append(names[number])
                    labels.append(domains[number])
                    pieces.append(order.rows[order.request_starts[i] : order.request_starts[i + 1]])
            sizes += [piece.size for piece in pieces[1:]]
            chosen.append(np.concatenate(pieces))
        parts = list(zip(self._traces, chosen, strict=True))
        columns = [_channel(trace, "weights") if self._top1 == "weight" else None for trace in self._traces]
        weights = [np.asarray(c[rows]) for c, rows in zip(columns, chosen, strict=True) if c is not None]
        return RoutedText(
            np.concatenate([_present(trace.experts, trace.state, rows) for trace, rows in parts]),
            np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
            int(max(self.n_expert)),
            weights=np.concatenate(weights) if len(weights) == len(parts) else None,
            tokens=np.concatenate([trace.token_ids[rows] for trace, rows in parts]),
            positions=np.concatenate([trace.positions[rows] for trace, rows in parts]),
            sources=np.repeat(np.arange(len(parts)), [rows.size for rows in chosen]),
            rows=np.concatenate(chosen),
            prompts=prompts,
            labels=labels,
            layers=self.layers,
        )

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The text of each token id, as bytes. Raises MoetraceError if the trace does not know it."""
        for trace in self._traces:
            found: list[bytes] | None = getattr(getattr(trace, "trace", trace), "vocabulary", None)
            if found is not None:
                return found
        raise MoetraceError(
            "the recording does not know the text of its tokens",
            why="it has no vocabulary.json, and its model file is not where it was",
            fix="record it with moetrace, or put the model back",
        )

    def pieces(self, text: RoutedText) -> list[bytes]:
        """The text of each of these rows' tokens, as bytes; of ids that have none, nothing."""
        words, n = self.vocabulary, len(self.vocabulary)
        return [words[t] if 0 <= t < n else b"" for t in text.tokens.tolist()]

    def request_column(self, name: str) -> dict[str, Any]:
        """Prompt -> what the clients said about it under this key; only those who said something."""
        out: dict[str, Any] = {}
        for trace, given in zip(self._traces, self._names, strict=True):
            requests = trace.requests
            if name in requests:
                names = self._prompts(trace, given)
                for number, value in requests[name].items():
                    if value is not None and not (isinstance(value, float) and np.isnan(value)):
                        out.setdefault(names[int(str(number))], value)
        return out

    @cached_property
    def predictions(self) -> Predictions:
        """What attention, contexts and early layers tell about experts, and what a cache of experts would hit."""
        return Predictions(self._traces, self.text)

    @cached_property
    def _domains(self) -> RoutingCounts:
        counts = self.counts.labelled()
        if not counts.prompts.size:
            raise UsageError(NO_DOMAIN, fix=LABEL_THEM)
        return counts

    def _keep(self, trace: RoutedRows) -> npt.NDArray[np.bool_]:
        phase = np.asarray(trace.phase)
        there = (np.asarray(trace.request) >= 0) & ~self._undecided(trace)
        return np.asarray(there if self.phase == "all" else there & (phase == _PHASES[self.phase]))

    def _undecided(self, trace: RoutedRows) -> npt.NDArray[np.bool_]:
        """Rows that were removed when their request ended: drafts that may be no text."""
        requests = trace.requests
        if "n_undecided" not in requests:
            return np.zeros(len(trace.request), dtype=bool)
        return last_rows(
            trace.request,
            requests.index,
            requests["n_prefill"] + requests["n_decode"],
            requests["n_undecided"].fillna(0),
        )

    def _labelled(self, trace: RoutedRows) -> npt.NDArray[np.bool_]:
        known = np.array([bool(label) for label in self._labels(trace)] + [False])
        return np.asarray(known[np.asarray(trace.request)])

    def _shared(self, trace: RoutedRows, name: str, labelled: bool = False) -> dict[str, Any]:
        keep = self._keep(trace)
        return {
            "n_expert": max(trace.n_expert),
            "state": trace.state,
            "keep": keep & self._labelled(trace) if labelled else keep,
            "shifted": self._shifted(trace),
            "prompts": self._prompts(trace, name),
            "labels": self._labels(trace),
            "layers": trace.layers,
            "n_expert_used": trace.n_expert_used,
        }

    def _prompts(self, trace: RoutedRows, name: str) -> list[str]:
        ids = _texts(trace, "id")
        return [given or f"{name}#{number:06d}" for number, given in enumerate(ids)]

    def _labels(self, trace: RoutedRows) -> list[str]:
        return _texts(trace, "label")

    def _shifted(self, trace: RoutedRows) -> npt.NDArray[np.int64]:
        requests = trace.requests
        if "n_shifts" not in requests:
            return np.empty(0, dtype=np.int64)
        # where it is not known (events were lost) rows whose position is taken again are left out
        return requests.index[requests["n_shifts"].fillna(0) > 0].to_numpy(dtype=np.int64)

    def _single(self, what: str) -> RoutedRows:
        if len(self._given) != 1:
            raise UsageError(f"{what} takes one trace, not {len(self._given)}", fix="analyse them one by one")
        return self._given[0]


def _parts(trace: RoutedRows) -> tuple[RoutedRows, ...]:
    """The contexts of a trace that shows several, one by one; else itself."""
    parts: tuple[RoutedRows, ...] = getattr(trace, "parts", (trace,))
    return parts


def _refuse_misfit(one: RoutedRows, name_of_one: str, other: RoutedRows, name: str) -> None:
    """Raises UsageError, saying what differs, if the traces cannot be counted together."""
    different = [
        f"{what} ({_short(mine)} in {name_of_one}, {_short(theirs)} in {name})"
        for what, mine, theirs in (
            ("layers", one.layers, other.layers),
            ("experts", one.n_expert, other.n_expert),
            ("experts used per token", one.n_expert_used, other.n_expert_used),
        )
        if not np.array_equal(mine, theirs)
    ]
    if different:
        raise UsageError(
            f"the traces {name_of_one} and {name} cannot be taken together",
            why=f"they differ in {', '.join(different)}",
            fix="analyse them one by one",
        )


def _short(values: npt.NDArray[np.int64]) -> str:
    kinds = np.unique(values)
    if kinds.size == values.size and kinds.size > 1:  # layer numbers
        return f"{kinds.size} from {kinds[0]} to {kinds[-1]}"
    return "/".join(map(str, kinds.tolist()))


def _width(trace: RoutedRows) -> int:
    """One more than the largest request number."""
    return int(trace.requests.index.max()) + 1 if len(trace.requests) else 0


def _texts(trace: RoutedRows, column: str) -> list[str]:
    """A text column of the requests, indexed by request number; "" where nothing is known."""
    out = [""] * _width(trace)
    if column in trace.requests:
        for number, value in trace.requests[column].items():
            out[int(str(number))] = "" if pd.isna(value) else str(value)
    return out


def _channel(trace: RoutedRows, name: str) -> npt.NDArray[Any] | None:
    try:
        column: npt.NDArray[Any] = getattr(trace, name)
        return column
    except (AttributeError, ChannelMissingError):
        return None


def _published_agreement(
    one: RoutedRows, two: RoutedRows, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]
) -> pd.DataFrame | None:
    """``compare_gate_experts.py`` of rows a of one and b of two: layer_id, metric, mean, std (ddof 0)."""
    logits = [_channel(trace, "logits") for trace in (one, two)]
    if logits[0] is None or logits[1] is None:
        return None
    total: MetricSums | None = None
    for start in range(0, a.size, _CHUNK):
        x = np.asarray(logits[0][a[start : start + _CHUNK]])
        y = np.asarray(logits[1][b[start : start + _CHUNK]])
        known = np.isfinite(x).all(axis=2) & np.isfinite(y).all(axis=2)
        columns: dict[str, npt.NDArray[np.float64]] = {}
        for layer, k in enumerate(one.n_expert_used):
            e = int(one.n_expert[layer])
            here = known[:, layer]
            found = published.compare_gate_experts(x[here, layer, :e], y[here, layer, :e], int(k)).samples
            for metric in found:
                column = columns.setdefault(str(metric), np.full(known.shape, np.nan))
                column[here, layer] = found[metric]
        part = MetricSums.of(np.zeros(x.shape[0], dtype=np.int64), columns)
        total = part if total is None else total + part
    if total is None:
        return None
    table = total.table()
    table.insert(0, "layer_id", np.asarray(one.layers)[table.pop("place").to_numpy()])
    return table[["layer_id", "metric", "tokens", "mean", "std"]]


def _present(
    experts: npt.NDArray[Any], state: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.unsignedinteger]:
    ids = np.asarray(experts[rows])
    return np.where((np.asarray(state[rows]) == 1)[:, :, None], ids, np.iinfo(ids.dtype).max)
