"""The one place where a trace meets the analyses: it chooses rows, names them, counts them, and puts texts together.

Everything else in :mod:`moetrace.analysis` takes arrays, counts, texts, or the :class:`Chosen` rows themselves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts import parts
from moetrace.analysis.counts.chosen import Chosen, Phase, RoutedRows, present
from moetrace.analysis.counts.columns import TokenColumns
from moetrace.analysis.counts.counting import (
    MAX_LAG,
    Progress,
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
)
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.counts.survey import MOST_TOKENS, clusters, domain_of, survey
from moetrace.analysis.counts.units import ENOUGH, evenly, taken_together
from moetrace.analysis.statistics.shapes import Ints, some_requests, spans
from moetrace.errors import MoetraceError, UsageError

Top1 = Literal["weight", "router"]

NO_DOMAIN = "no request of the trace has a domain"
LABEL_THEM = "give each line of the prompts file a `label` (moetrace drive -f)"
# What tables of prompts, of token ids, and texts may take of memory. Beyond it prompts are taken together or drawn,
# the most frequent ids are kept, and texts are drawn.
_TABLE_BYTES = 512 << 20
_TOKEN_BYTES = 512 << 20
_TEXT_BYTES = 256 << 20
# Prompts that are compared each with each.
_PAIRED = 2000


def from_trace(
    *traces: RoutedRows,
    phase: Phase = "decode",
    top1: Top1 = "weight",
    max_lag: int = MAX_LAG,
    names: Sequence[str] | None = None,
    group_key: str | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Routing:
    """The routing of one trace, or of several taken together.

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
    group_key
        What clients said that tells which prompts are one observation: those that have the same. None: prompts of
        one ``group``, and those whose texts begin alike (:func:`~moetrace.analysis.counts.clusters.text_clusters`),
        each domain by itself. "id": every prompt stands for itself.
    executor
        Where rows are read and counted, trace by trace: processes of ``concurrent.futures``, or Dask's
        (``Client.get_executor()``), to which traces have the same paths. None: here. Numbers are the same.
    progress
        Told how many rows of a trace are counted, of how many, where they are counted here.

    Raises UsageError if no row is of this phase, or no request has the key.
    """
    if not traces:
        raise UsageError("there is no trace to analyse", fix="give at least one")
    given = tuple(names or map(str, range(len(traces))))
    return Routing(traces, phase, top1, max_lag, given, group_key, executor, progress)


@dataclass(frozen=True)
class Texts:
    """Where texts stand, (T,) each: the part, the place in its reading order, the size, the prompt, the domain."""

    parts: Ints
    begin: Ints
    sizes: Ints
    prompts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        """All their tokens."""
        return int(self.sizes.sum())


class Routing:
    """The chosen rows of traces; what is made of them is made at first use and kept.

    Attributes
    ----------
    phase
        Which rows.
    chosen
        They, trace by trace; of a trace with several contexts context by context, so that columns are views.
    group_key
        What told which prompts are one observation; None: ``group``, and their texts.
    clusters
        Which prompts are one observation.
    executor
        Where rows are read; None: here.
    """

    def __init__(
        self,
        traces: Sequence[RoutedRows],
        phase: Phase,
        top1: Top1,
        max_lag: int,
        names: Sequence[str],
        group_key: str | None,
        executor: Executor | None,
        progress: Progress | None,
    ) -> None:
        self.phase = phase
        self.group_key = group_key
        self.executor = executor
        self._given, self._top1, self._max_lag = tuple(traces), top1, max_lag
        self._said: dict[str, dict[str, Any]] = {}
        alike = len(set(names)) < len(names)
        given = [f"{name}.{i}" if alike else name for i, name in enumerate(names)]
        for trace, name in zip(traces, given, strict=True):
            _refuse_misfit(traces[0], given[0], trace, name)
        each = [
            (part, name) for t, name in zip(traces, given, strict=True) for part in getattr(t, "parts", (t,))
        ]
        self._progress = progress
        chosen = [Chosen(part, name, phase) for part, name in each]
        compare = sum(len(part.request) for part, _ in each) <= MOST_TOKENS
        look = partial(survey, key=group_key, compare=compare)
        self._surveys = list(parts.each(look, chosen, executor))
        if not any(one.numbers.size for one in self._surveys):
            there = sorted(frozenset().union(*(one.phases for one in self._surveys)))
            raise UsageError(
                f"the trace has no {phase} rows",
                fix=f"choose the phase {' or '.join(there)}" if there else "capture something first",
            )
        self.clusters = clusters(self._surveys, group_key)
        self._surveys = [replace(one, beginnings=()) for one in self._surveys]
        self.chosen = tuple(
            replace(each, clusters=self.clusters.of(one.prompts))
            for each, one in zip(chosen, self._surveys, strict=True)
        )

    @property
    def labelled(self) -> tuple[Chosen, ...]:
        """The chosen rows of requests that have a domain. Raises UsageError if there are none."""
        if not any(one.labels[i] for one in self._surveys for i in one.numbers.tolist()):
            raise UsageError(NO_DOMAIN, fix=LABEL_THEM)
        return tuple(replace(chosen, labelled=True) for chosen in self.chosen)

    @property
    def layers(self) -> Ints:
        """(L,) llama.cpp's layer numbers."""
        return np.asarray(self._given[0].layers)

    @property
    def n_expert(self) -> Ints:
        """(L,) experts that each layer has."""
        return np.asarray(self._given[0].n_expert)

    @property
    def consumers(self) -> tuple[str, ...]:
        """The matrices that the ids went to, where the recording says so."""
        try:
            return tuple(self._given[0].consumers[0])
        except MoetraceError:
            return ()

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """(P,) the prompts that have rows, in order of their names: of each cluster the one that stands for it."""
        return tuple(sorted(self._domains))

    @property
    def domains(self) -> tuple[str, ...]:
        """(P,) their domains; "" where they have none."""
        return tuple(self._domains[prompt] for prompt in self.prompts)

    @cached_property
    def n_prompts(self) -> int:
        """How many there are if each stands for itself."""
        return len(domain_of(pair for one in self._surveys for pair in one.asked))

    @property
    def labelled_prompts(self) -> tuple[str, ...]:
        """Those of them that have a domain."""
        return tuple(prompt for prompt in self.prompts if self._domains[prompt])

    @cached_property
    def _domains(self) -> dict[str, str]:
        _ = self.n_prompts  # refuses a prompt of two domains
        return domain_of(
            pair
            for one in self._surveys
            for pair in zip(
                self.clusters.of([prompt for prompt, _ in one.asked]),
                (label for _, label in one.asked),
                strict=True,
            )
        )

    def _room(self, *sizes: int) -> int:
        """How many prompts there is room for, of tables with so many numbers for each layer."""
        return max(1, _TABLE_BYTES // (8 * len(self.layers) * sum(sizes)))

    @cached_property
    def counts(self) -> RoutingCounts:
        """:class:`~moetrace.analysis.RoutingCounts` of the chosen rows, one streaming pass.

        Of more prompts than there is room for, groups stand for them
        (:func:`~moetrace.analysis.counts.units.taken_together`): sums are the same; there are no lags.
        """
        if self.each_apart:
            return self.prompt_counts
        e = int(max(self.n_expert))
        at_most = min(self._room(2 * e), 4 * ENOUGH)
        group = taken_together(self.domains, at_most)
        of = dict(zip(self.prompts, group.tolist(), strict=True))
        grouped = [
            replace(chosen, clusters=[f"{of[name]:07d}" if name in of else name for name in chosen.clusters])
            for chosen in self.chosen
        ]
        found = self._counted(grouped, 0)
        return replace(found, n_prompts=np.bincount(group)[found.prompts.astype(np.int64)])

    @cached_property
    def each_apart(self) -> bool:
        """Whether there is room for tables of all prompts."""
        return len(self.prompts) <= self._room(2 * int(max(self.n_expert)), 3 * self._max_lag)

    @cached_property
    def prompt_counts(self) -> RoutingCounts:
        """The same prompt by prompt, with lags: of all, or of as many as there is room for, drawn at random."""
        if self.each_apart:
            return self._counted(self.chosen, self._max_lag)
        drawn = np.random.default_rng(0).permutation(len(self.prompts))
        drawn = drawn[: self._room(2 * int(max(self.n_expert)), 3 * self._max_lag)]
        only = frozenset(self.prompts[i] for i in drawn.tolist())
        return self._counted([replace(chosen, only=only) for chosen in self.chosen], self._max_lag)

    @cached_property
    def order_counts(self) -> RoutingCounts:
        """:attr:`prompt_counts` for questions of order: without position 0, which is followed but never follows.

        Where it is routed apart from all others (the attention sink), the rest shares more than random orders do,
        whatever its order. If nothing but position 0 is there, that is all.
        """
        if not self.has_first or not any(one.has_later for one in self._surveys):
            return self.prompt_counts
        later = [replace(chosen, later=True) for chosen in self.chosen]
        if not self.each_apart:
            only = frozenset(self.prompt_counts.prompts.tolist())
            later = [replace(chosen, only=only) for chosen in later]
        return self._counted(later, self._max_lag)

    @property
    def has_first(self) -> bool:
        """Whether a chosen row stands at position 0."""
        return any(one.has_first for one in self._surveys)

    def _counted(self, chosen: Sequence[Chosen], max_lag: int) -> RoutingCounts:
        here = self.executor is None
        count = partial(
            _count,
            top1=self._top1,
            max_lag=max_lag,
            threads=(os.cpu_count() or 1) if here else 1,
            progress=self._progress if here else None,
        )
        return parts.total(count, chosen, self.executor)

    @cached_property
    def token_counts(self) -> TokenCounts:
        """:class:`~moetrace.analysis.TokenCounts` of the labelled rows.

        Of all token ids if they fit into 512 MiB, else of the most frequent ones. Of more than 2,000 prompts as
        many are drawn, as many of each domain as there are.
        """
        _ = self.chosen[0].trace.experts  # or ChannelMissingError
        each = 8 * len(self.layers) * int(max(self.n_expert))
        at_most = max(1, _TOKEN_BYTES // each)
        chosen, names = self.labelled, self.labelled_prompts
        if len(names) > _PAIRED:
            drawn = evenly([self._domains[name] for name in names], _PAIRED, np.random.default_rng(0))
            only = frozenset(name for name, wanted in zip(names, drawn, strict=True) if wanted)
            chosen = tuple(replace(one, only=only) for one in chosen)
        ids = np.unique(np.concatenate(list(parts.each(_ids, chosen, self.executor))))
        if not (ids >= 0).any():
            raise UsageError(
                "no labelled request of the recording has token ids",
                fix="capture with moetrace, which records them",
            )
        tokens = None
        if ids.size > at_most:
            owned = list(parts.each(_owned_ids, chosen, self.executor))
            step = np.cumsum([0] + [len(one.labels) for one in self._surveys[:-1]])
            owners = [owner + first for (_, owner), first in zip(owned, step, strict=True)]
            tokens = frequent_tokens(
                np.concatenate([found for found, _ in owned]), np.concatenate(owners), at_most
            )
        return parts.total(partial(_count_tokens, tokens=tokens), chosen, self.executor)

    @cached_property
    def texts(self) -> Texts:
        """Where each prompt's text stands: the first request of each cluster."""
        found: list[tuple[int, int, int, str, str]] = []
        seen: set[str] = set()
        for part, where in enumerate(parts.each(_begun, self.chosen, self.executor)):
            labels, names = self._surveys[part].labels, self.chosen[part].clusters
            for number, start, size in where.tolist():
                if names[number] not in seen:
                    seen.add(names[number])
                    found.append((part, start, size, names[number], labels[number]))
        place = np.array([one[:3] for one in found], dtype=np.int64).reshape(-1, 3)
        return Texts(
            place[:, 0],
            place[:, 1],
            place[:, 2],
            tuple(one[3] for one in found),
            tuple(one[4] for one in found),
        )

    @cached_property
    def text(self) -> RoutedText:
        """The chosen rows as whole texts in reading order; a copy. One request per prompt: the first.

        Numbers and weights are as the traces have them, which ``sources`` counts in the order given; a cell that
        was not computed or is lost has no expert. Of more than fit into 256 MiB (:attr:`texts` says how many there
        are) whole ones are drawn at random.
        """
        texts = self.texts
        cells = len(self.layers) * int(max(self._given[0].n_expert_used))
        room = _TEXT_BYTES // (cells * (self.chosen[0].trace.experts.dtype.itemsize + 4) + 64)
        every = np.arange(len(texts.prompts))
        if len(texts) > room:
            edges = np.concatenate(([0], np.cumsum(texts.sizes)))
            every = some_requests(edges, room, np.random.default_rng(0), None)[0]
        wanted = [
            (chosen, texts.begin[mine], texts.sizes[mine])
            for part, chosen in enumerate(self.chosen)
            for mine in (every[texts.parts[every] == part],)
        ]
        read = list(parts.each(partial(_read, top1=self._top1), wanted, self.executor))
        weights = [one.weights for one in read if one.weights is not None]
        return RoutedText(
            np.concatenate([one.experts for one in read]),
            np.concatenate(([0], np.cumsum(texts.sizes[every]))).astype(np.int64),
            int(max(self.n_expert)),
            weights=np.concatenate(weights) if len(weights) == len(read) else None,
            tokens=np.concatenate([one.tokens for one in read]),
            positions=np.concatenate([one.positions for one in read]),
            sources=np.repeat(np.arange(len(read)), [one.rows.size for one in read]),
            rows=np.concatenate([one.rows for one in read]),
            prompts=[texts.prompts[i] for i in every.tolist()],
            labels=[texts.labels[i] for i in every.tolist()],
            layers=self.layers,
        )

    @cached_property
    def columns(self) -> TokenColumns:
        """:attr:`text` with the traces' other columns."""
        return TokenColumns([chosen.trace for chosen in self.chosen], self.text)

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The text of each token id, as bytes. Raises MoetraceError if the trace does not know it."""
        for chosen in self.chosen:
            found: list[bytes] | None = getattr(
                getattr(chosen.trace, "trace", chosen.trace), "vocabulary", None
            )
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
        if name in self._said:
            return self._said[name]
        out = self._said[name] = {}
        each = parts.each(partial(_said, name=name), self.chosen, self.executor)
        for chosen, said in zip(self.chosen, each, strict=True):
            for number, value in said.items():
                out.setdefault(chosen.clusters[number], value)
        return out

    def request_values(self, name: str) -> list[tuple[str, Any]]:
        """The domain of every request that has this key, and what it says; request by request."""
        each = parts.each(partial(_said, name=name), self.chosen, self.executor)
        return [
            (one.labels[number], value)
            for one, said in zip(self._surveys, each, strict=True)
            for number, value in said.items()
            if one.labels[number]
        ]

    def whole(self, what: str) -> Chosen:
        """The chosen rows of the one trace, numbered as there; several contexts' columns are copied together.

        Raises UsageError, naming what takes one trace, if there are several.
        """
        if len(self._given) != 1:
            raise UsageError(f"{what} takes one trace, not {len(self._given)}", fix="analyse them one by one")
        if len(self.chosen) == 1:
            return self.chosen[0]
        every = Chosen(self._given[0], self.chosen[0].name, self.phase)
        names = list(every.prompts)
        for chosen in self.chosen:
            for number in chosen.trace.requests.index.tolist():
                names[number] = chosen.clusters[number]
        return replace(every, clusters=names)


def _weights(chosen: Chosen, top1: Top1) -> npt.NDArray[Any] | None:
    """What first experts are chosen by; None: the router's order."""
    return chosen.channel("weights") if top1 == "weight" else None


def _count(
    chosen: Chosen, top1: Top1, max_lag: int, threads: int, progress: Progress | None
) -> RoutingCounts:
    return count_routing(
        chosen.trace.experts,
        chosen.trace.request,
        chosen.trace.positions,
        weights=_weights(chosen, top1),
        max_lag=max_lag,
        threads=threads,
        progress=progress,
        **chosen.columns,
        **chosen.names,
    )


def _count_tokens(chosen: Chosen, tokens: Ints | None) -> TokenCounts:
    trace = chosen.trace
    return count_tokens(
        trace.experts, trace.token_ids, trace.request, trace.positions, tokens=tokens,
        **chosen.columns, **chosen.names,
    )  # fmt: skip


def _ids(chosen: Chosen) -> npt.NDArray[np.int32]:
    """The token ids of the chosen rows, each once."""
    _ = chosen.trace.experts  # or ChannelMissingError
    return np.unique(chosen.trace.token_ids[chosen.keep])


def _owned_ids(chosen: Chosen) -> tuple[npt.NDArray[np.int32], Ints]:
    """The token ids of the chosen rows, and their requests."""
    return np.asarray(chosen.trace.token_ids[chosen.keep]), np.asarray(chosen.trace.request[chosen.keep])


def _said(chosen: Chosen, name: str) -> dict[int, Any]:
    """What clients said under this key, by request."""
    requests = chosen.trace.requests
    given = requests[name].dropna().items() if name in requests else ()
    return {int(str(number)): value for number, value in given}


def _begun(chosen: Chosen) -> Ints:
    """Of each request that has rows: its number, where they begin in reading order, and how many there are."""
    order = chosen.order
    return np.stack((order.requests, order.request_starts[:-1], np.diff(order.request_starts)), axis=1)


@dataclass(frozen=True)
class _Read:
    """Rows of one part."""

    rows: Ints
    experts: npt.NDArray[np.unsignedinteger]
    weights: npt.NDArray[np.float32] | None
    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]


def _read(wanted: tuple[Chosen, Ints, Ints], top1: Top1) -> _Read:
    """Rows of a part that begin at, and are as many as, said, in reading order."""
    chosen, begin, sizes = wanted
    trace = chosen.trace
    rows = chosen.order.rows[spans(begin, sizes)] if begin.size else np.empty(0, dtype=np.int64)
    weights = _weights(chosen, top1)
    return _Read(
        rows,
        present(trace.experts, trace.state, rows),
        None if weights is None else np.asarray(weights[rows]),
        np.asarray(trace.token_ids[rows]),
        np.asarray(trace.positions[rows]),
    )


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


def _short(values: Ints) -> str:
    kinds = np.unique(values)
    if kinds.size == values.size and kinds.size > 1:  # layer numbers
        return f"{kinds.size} from {kinds[0]} to {kinds[-1]}"
    return "/".join(map(str, kinds.tolist()))
