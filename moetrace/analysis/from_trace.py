"""The one place where a trace meets the analyses: columns in, arrays out.

Everything else in this package takes arrays. :func:`from_trace` chooses the rows of one phase, names prompts
and domains, counts once, and offers each analysis as a method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis import compare, domain, gate, layers, matched, published, temporal
from moetrace.analysis.counts import (
    MAX_LAG,
    Progress,
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
    reading_order,
)
from moetrace.errors import ChannelMissingError, MoetraceError, UsageError

Phase = Literal["prefill", "decode", "unknown", "all"]
_PHASES = {"prefill": 0, "decode": 1, "unknown": 2}

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
    def requests(self) -> pd.DataFrame:
        """One row per request, the index its number; ``label``, ``id`` and ``n_shifts`` where known."""
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
        One name per trace, to tell their requests apart (default "0", "1", …). Requests with the same ``id``
        are one prompt, in whichever trace they are.

    Raises UsageError if no row is of this phase.
    """
    if not traces:
        raise UsageError("there is no trace to analyse", fix="give at least one")
    return Analysis(traces, phase, top1, max_lag, tuple(names or map(str, range(len(traces)))), progress)


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
        self._traces, self._top1, self._max_lag, self._names = tuple(traces), top1, max_lag, tuple(names)
        self._progress = progress
        for trace in traces:
            if list(trace.layers) != list(traces[0].layers) or list(trace.n_expert) != list(
                traces[0].n_expert
            ):
                raise UsageError("these traces are of different models", fix="analyse them one by one")
        if not any(self._keep(trace).any() for trace in traces):
            there = sorted(
                {name for t in traces for name, code in _PHASES.items() if (t.phase == code).any()}
            )
            raise UsageError(
                f"the trace has no {phase} rows",
                fix=f"choose the phase {' or '.join(there)}" if there else "capture something first",
            )

    @cached_property
    def counts(self) -> RoutingCounts:
        """:class:`moetrace.analysis.counts.RoutingCounts` of the chosen rows, one streaming pass."""
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
        """:class:`moetrace.analysis.counts.TokenCounts` of the labelled rows.

        Of all token ids if they fit into 512 MiB, else of the most frequent ones.
        """
        each = 8 * len(self._traces[0].layers) * max(self._traces[0].n_expert)
        at_most = max(1, _TOKEN_BYTES // each)
        every = [t.token_ids[self._keep(t) & self._labelled(t)] for t in self._traces]
        tokens = None
        if sum(np.unique(part).size for part in every) > at_most:
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

    def expert_frequency(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.domain.expert_frequency`."""
        c = self._domains
        return domain.expert_frequency(c.included, c.tokens, c.labels, c.layers)

    def domain_test(self, **options: Any) -> domain.DomainTest:
        """:func:`moetrace.analysis.domain.domain_test`, with its options."""
        c = self._domains
        return domain.domain_test(c.included, c.labels, layers=c.layers, **options)

    def domain_lift(self, **options: Any) -> pd.DataFrame:
        """:func:`moetrace.analysis.domain.domain_lift`, with its options."""
        c = self._domains
        return domain.domain_lift(c.included, c.labels, layers=c.layers, **options)

    def matched_separation(self, **options: Any) -> matched.MatchedSeparation:
        """:func:`moetrace.analysis.matched.matched_separation`, with its options."""
        return matched.matched_separation(self.token_counts, **options)

    def depth_contrast(
        self, early: Iterable[int] | None = None, late: Iterable[int] | None = None
    ) -> layers.DepthContrast:
        """:func:`moetrace.analysis.layers.depth_contrast`."""
        c = self._domains
        return layers.depth_contrast(c.included, c.labels, layers=c.layers, early=early, late=late)

    def deep_dive(self, layer: int | None = None) -> layers.DeepDive:
        """:func:`moetrace.analysis.layers.deep_dive`."""
        c = self._domains
        try:
            consumers = tuple(self._traces[0].consumers[0])
        except MoetraceError:
            consumers = ()
        return layers.deep_dive(c.included, c.labels, layers=c.layers, layer=layer, consumers=consumers)

    def domain_entropy(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.layers.domain_entropy`."""
        c = self._domains
        return layers.domain_entropy(c.included, c.labels, layers=c.layers)

    def load_balance(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.layers.load_balance`; unlabelled prompts count too."""
        return layers.load_balance(self.counts.included, self.counts.tokens, layers=self.counts.layers)

    def persistence(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.temporal.persistence`; unlabelled prompts count too."""
        return temporal.persistence(self.counts)

    def shuffle_test(self, **options: Any) -> pd.DataFrame:
        """:func:`moetrace.analysis.temporal.shuffle_test`, with its options; one trace only."""
        trace = self._single("a shuffle test")
        given = self._shared(trace, self._names[0])
        for unused in ("prompts", "labels", "n_expert_used"):
            given.pop(unused)
        return temporal.shuffle_test(trace.experts, trace.request, trace.positions, **given, **options)

    def transitions(self, layer: int) -> temporal.Transitions:
        """:func:`moetrace.analysis.temporal.transitions`."""
        return temporal.transitions(self.counts, layer)

    def gate_distances(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.gate.gate_distances` of the chosen rows, and each row's ``prompt``.

        Raises ChannelMissingError if the trace has no gate inputs.
        """
        trace = self._single("gate distances")
        values = trace.gate_input  # type: ignore[attr-defined]  # raises ChannelMissingError by itself
        rows = reading_order(trace.request, trace.positions, self._keep(trace), self._shifted(trace)).rows
        out = gate.gate_distances(values, rows, state=trace.state, layers=trace.layers)
        names = np.array(self._prompts(trace, self._names[0]), dtype=np.str_)
        return out.assign(prompt=names[trace.request[out["row"].to_numpy(dtype=np.int64)]])

    def gate_summary(self) -> pd.DataFrame:
        """:func:`moetrace.analysis.gate.gate_summary` over prompts."""
        distances = self.gate_distances()
        return gate.gate_summary(distances, distances["prompt"].to_numpy())

    def layer_rows(self, index: int, at_most: int | None = None) -> LayerRows:
        """Tokens of the layer at ``index`` of the layer axis, evenly spread over the chosen rows; one trace only.

        Rows in which the layer was not computed are left out. Raises ChannelMissingError if the trace has no gate
        inputs or weights.
        """
        trace = self._single("what experts compute")
        inputs, weights = trace.gate_input, trace.weights  # type: ignore[attr-defined]  # these raise by themselves
        rows = np.flatnonzero(self._keep(trace) & (np.asarray(trace.state[:, index]) == 1))
        if at_most is not None and rows.size > at_most:
            rows = rows[np.linspace(0, rows.size - 1, at_most).astype(np.int64)]
        k = int(trace.n_expert_used[index])
        names = np.array(self._prompts(trace, self._names[0]), dtype=np.str_)
        return LayerRows(
            rows,
            np.asarray(inputs[rows, index], np.float32),
            np.asarray(trace.experts[rows, index, :k], np.int64),
            np.asarray(weights[rows, index, :k], np.float32),
            names[np.asarray(trace.request)[rows]],
        )

    def agreement(self, other: Analysis) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Agreement with another capture of the same text, token by token.

        Returns :func:`moetrace.analysis.compare.agreement_summary` and the alignment of each prompt
        (:func:`moetrace.analysis.compare.align`). ``coverage_k`` needs the other capture's ``scores`` or
        ``logits``.
        """
        mine, theirs = self._single("a comparison"), other._single("a comparison")
        rows, keys = [], []
        for one, trace in ((self, mine), (other, theirs)):
            r = reading_order(trace.request, trace.positions, one._keep(trace), one._shifted(trace)).rows
            names = np.array(one._prompts(trace, one._names[0]), dtype=np.str_)
            rows.append(r)
            columns = {
                "prompt": names[trace.request[r]],
                "position": trace.positions[r],
                "token": trace.token_ids[r],
            }
            keys.append(pd.DataFrame(columns))
        a, b, report = compare.align(keys[0], keys[1])
        scores = _channel(theirs, "scores")
        scores = _channel(theirs, "logits") if scores is None else scores
        metrics = compare.agreement(
            _present(mine, rows[0][a]),
            _present(theirs, rows[1][b]),
            n_expert=max(mine.n_expert),
            scores_b=None if scores is None else np.asarray(scores[rows[1][b]]),
        )
        summary = compare.agreement_summary(
            metrics,
            keys[0]["prompt"].to_numpy()[a],
            n_expert=max(mine.n_expert),
            n_expert_used=max(mine.n_expert_used),
            layers=mine.layers,
        )
        return summary, report

    def published(self, top: int | None = None) -> published.Activations:
        """The chosen, labelled rows as the notebook's table, for the functions of
        :mod:`moetrace.analysis.published`.

        ``token_id`` numbers a domain's tokens in reading order. One entry per consumer of the ids (gate, up,
        down).
        """
        trace = self._single("the published analyses")
        keep = self._keep(trace) & self._labelled(trace)
        rows = reading_order(trace.request, trace.positions, keep, self._shifted(trace)).rows
        labels = np.array(self._labels(trace), dtype=np.str_)[trace.request[rows]]
        token_id = pd.Series(labels).groupby(labels).cumcount().to_numpy()
        consumers = trace.consumers[0] or published.COMPONENTS
        return published.Activations.from_rows(
            trace.experts,
            labels,
            token_id,
            n_expert=max(trace.n_expert),
            layers=trace.layers,
            components=consumers,
            top=top,
            rows=rows,
        )

    @cached_property
    def _domains(self) -> RoutingCounts:
        counts = self.counts.labelled()
        if not counts.prompts.size:
            raise UsageError(
                "no request of the trace has a domain",
                fix="label requests (moetrace drive --label-key domain)",
            )
        return counts

    def _keep(self, trace: RoutedRows) -> npt.NDArray[np.bool_]:
        phase = np.asarray(trace.phase)
        there = np.asarray(trace.request) >= 0
        return np.asarray(there if self.phase == "all" else there & (phase == _PHASES[self.phase]))

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
        return requests.index[requests["n_shifts"] > 0].to_numpy(dtype=np.int64)

    def _single(self, what: str) -> RoutedRows:
        if len(self._traces) != 1:
            raise UsageError(
                f"{what} takes one trace, not {len(self._traces)}", fix="analyse them one by one"
            )
        return self._traces[0]


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


def _present(trace: RoutedRows, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.unsignedinteger]:
    ids = np.asarray(trace.experts[rows])
    return np.where((np.asarray(trace.state[rows]) == 1)[:, :, None], ids, np.iinfo(ids.dtype).max)
