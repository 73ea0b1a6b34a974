"""The one place where a trace meets the analyses: it chooses rows, names them, counts them, and puts texts together.

Everything else in :mod:`moetrace.analysis` takes arrays, counts, texts, or the :class:`Chosen` rows themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from moetrace.analysis.counts.clusters import text_clusters
from moetrace.analysis.counts.columns import TokenColumns
from moetrace.analysis.counts.counting import (
    MAX_LAG,
    PRESENT,
    Progress,
    ReadingOrder,
    RoutingCounts,
    TokenCounts,
    count_routing,
    count_tokens,
    frequent_tokens,
    last_rows,
    reading_order,
    two_domains,
)
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.counts.units import ENOUGH, evenly, taken_together
from moetrace.analysis.statistics.shapes import Ints, some_requests, spans
from moetrace.errors import ChannelMissingError, MoetraceError, UsageError

Phase = Literal["prefill", "decode", "unknown", "all"]
PHASES = {"prefill": 0, "decode": 1, "unknown": 2}

NO_DOMAIN = "no request of the trace has a domain"
LABEL_THEM = "give each line of the prompts file a `label` (moetrace drive -f)"
#: what clients call requests that are no independent observations
GROUP = "group"

CHUNK = 1 << 13  # rows looked at together
# What tables of prompts, of token ids, and texts may take of memory. Beyond it prompts are taken together or drawn,
# the most frequent ids are kept, and texts are drawn.
_TABLE_BYTES = 512 << 20
_TOKEN_BYTES = 512 << 20
_TEXT_BYTES = 256 << 20
# Prompts that are compared each with each.
_PAIRED = 2000


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
        """One row per request, the index its number; ``label``, ``id``, ``n_shifts``, ``n_undecided`` (then
        ``n_prefill`` and ``n_decode`` too) and ``n_cached`` (then ``slot`` and ``first_serial`` too) where known.
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
    group_key: str | None = None,
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

    Raises UsageError if no row is of this phase, or no request has the key.
    """
    if not traces:
        raise UsageError("there is no trace to analyse", fix="give at least one")
    given = tuple(names or map(str, range(len(traces))))
    return Routing(traces, phase, top1, max_lag, given, group_key, progress)


@dataclass(frozen=True)
class Chosen:
    """The rows of a trace, or of one context of it, that are looked at, and whose they are.

    Attributes
    ----------
    trace
        Where they are from.
    name
        Of the trace: its requests without an id are called after it.
    phase
        Which rows: those of requests in this phase, without drafts that may be no text.
    labelled
        Only rows of requests that have a domain.
    only
        Only rows of these clusters; None: of all.
    clusters
        Of each request, by its number, what it is an observation of: the prompt that stands for all that are not
        independent of it (:meth:`Routing.chosen`).
    later
        Without position 0, which many models route apart from all others (the attention sink).
    """

    trace: RoutedRows
    name: str
    phase: Phase
    labelled: bool = False
    only: frozenset[str] | None = None
    clusters: Sequence[str] = ()
    later: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what was found out meanwhile."""
        names = ("trace", "name", "phase", "labelled", "only", "clusters", "later")
        return Chosen, tuple(getattr(self, name) for name in names)

    @cached_property
    def keep(self) -> npt.NDArray[np.bool_]:
        """(N,) the rows."""
        trace = self.trace
        request, requests = np.asarray(trace.request), trace.requests
        keep = request >= 0
        if self.phase != "all":
            keep &= np.asarray(trace.phase) == PHASES[self.phase]
        if "n_undecided" in requests:  # rows that were removed when their request ended
            sizes, undecided = requests["n_prefill"] + requests["n_decode"], requests["n_undecided"].fillna(0)
            keep &= ~last_rows(request, requests.index, sizes, undecided)
        if self.later:
            keep &= np.asarray(trace.positions) != 0
        if self.labelled:
            keep &= np.array([*(bool(label) for label in self.labels), False])[request]
        if self.only is not None:
            keep &= np.array([*(cluster in self.only for cluster in self.clusters), False])[request]
        return keep

    @cached_property
    def asked(self) -> dict[str, str]:
        """The prompts that have rows here, and their domains. Raises UsageError if one has two."""
        return _domain_of((self.prompts[i], self.labels[i]) for i in self._numbers)

    @property
    def observed(self) -> dict[str, str]:
        """The clusters that have rows here, and their domains."""
        return {self.clusters[i]: self.labels[i] for i in self._numbers}

    @cached_property
    def _numbers(self) -> list[int]:
        request = np.asarray(self.trace.request)[self.keep]
        numbers: list[int] = np.flatnonzero(np.bincount(request, minlength=len(self.prompts))).tolist()
        return numbers

    @cached_property
    def prompts(self) -> list[str]:
        """The prompt of each request, by its number."""
        return [given or f"{self.name}#{n:06d}" for n, given in enumerate(_texts(self.trace, "id"))]

    @cached_property
    def labels(self) -> list[str]:
        """The domain of each request, by its number; "" where it has none."""
        return _texts(self.trace, "label")

    @cached_property
    def order(self) -> ReadingOrder:
        """The rows in the order in which each request's text reads."""
        return reading_order(self.trace.request, self.trace.positions, self.keep, self.shifted)

    @property
    def shifted(self) -> Ints:
        """Requests whose positions were shifted on purpose.

        Where it is not known (events were lost) rows whose position is taken again are left out.
        """
        requests = self.trace.requests
        if "n_shifts" not in requests:
            return np.empty(0, dtype=np.int64)
        return requests.index[requests["n_shifts"].fillna(0) > 0].to_numpy(dtype=np.int64)

    @property
    def columns(self) -> dict[str, Any]:
        """What functions of columns take beside experts, requests and positions."""
        trace = self.trace
        return {
            "n_expert": max(trace.n_expert),
            "state": trace.state,
            "keep": self.keep,
            "shifted": self.shifted,
            "layers": trace.layers,
        }

    @property
    def names(self) -> dict[str, Any]:
        """What counting takes beside :attr:`columns`."""
        return {"prompts": self.clusters, "labels": self.labels, "n_expert_used": self.trace.n_expert_used}

    def need(self, name: str) -> npt.NDArray[Any]:
        """A column that a trace may lack. Raises ChannelMissingError if it does."""
        column: npt.NDArray[Any] = getattr(self.trace, name)
        return column

    def channel(self, name: str) -> npt.NDArray[Any] | None:
        """A column that a trace may lack; then None."""
        try:
            return self.need(name)
        except (AttributeError, ChannelMissingError):
            return None


def in_text(trace: RoutedRows) -> npt.NDArray[np.bool_]:
    """Which rows of a trace, (N,), are tokens of a request's text: neither rejected drafts nor without a request."""
    found = np.zeros(np.asarray(trace.request).shape, dtype=bool)
    found[Chosen(trace, "", "all").order.rows] = True
    return found


def _domain_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Prompt -> domain. Raises UsageError if a prompt has two."""
    out: dict[str, str] = {}
    for prompt, domain in pairs:
        known = out.setdefault(prompt, domain)
        if known != domain:
            raise two_domains(prompt, known, domain)
    return out


def by_prompt(chosen: Iterable[Chosen]) -> Iterator[tuple[Chosen, str, Ints]]:
    """The rows of every request in reading order, and its cluster; prompts in order of their names."""
    found = []
    for number, each in enumerate(chosen):
        order = each.order
        for i, request in enumerate(order.requests.tolist()):
            rows = order.rows[order.request_starts[i] : order.request_starts[i + 1]]
            found.append((each.prompts[request], number, request, each, rows))
    for _, _, request, each, rows in sorted(found, key=lambda one: one[:3]):
        yield each, each.clusters[request], rows


def present(
    experts: npt.NDArray[Any], state: npt.NDArray[np.uint8], rows: Ints
) -> npt.NDArray[np.unsignedinteger]:
    """Experts of these rows, (n, L, k), a copy; the dtype's largest where an entry is not there."""
    ids = np.asarray(experts[rows])
    return np.where((np.asarray(state[rows]) == PRESENT)[:, :, None], ids, np.iinfo(ids.dtype).max)


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
    n_continued
        How many requests go on from a text in the server's cache of which it is not known whose it was: they stand for
        themselves, but need not be independent.
    """

    def __init__(
        self,
        traces: Sequence[RoutedRows],
        phase: Phase,
        top1: Literal["weight", "router"],
        max_lag: int,
        names: Sequence[str],
        group_key: str | None,
        progress: Progress | None,
    ) -> None:
        self.phase = phase
        self.group_key = group_key
        self._given, self._top1, self._max_lag = tuple(traces), top1, max_lag
        alike = len(set(names)) < len(names)
        given = [f"{name}.{i}" if alike else name for i, name in enumerate(names)]
        for trace, name in zip(traces, given, strict=True):
            _refuse_misfit(traces[0], given[0], trace, name)
        each = [
            (part, name) for t, name in zip(traces, given, strict=True) for part in getattr(t, "parts", (t,))
        ]
        self._progress = progress
        chosen = [Chosen(part, name, phase) for part, name in each]
        if not any(one.keep.any() for one in chosen):
            there = sorted(
                {name for part, _ in each for name, code in PHASES.items() if (part.phase == code).any()}
            )
            raise UsageError(
                f"the trace has no {phase} rows",
                fix=f"choose the phase {' or '.join(there)}" if there else "capture something first",
            )
        self.chosen, self.n_continued = _clustered(chosen, group_key)

    @property
    def labelled(self) -> tuple[Chosen, ...]:
        """The chosen rows of requests that have a domain. Raises UsageError if there are none."""
        labelled = tuple(replace(chosen, labelled=True) for chosen in self.chosen)
        if not any(chosen.keep.any() for chosen in labelled):
            raise UsageError(NO_DOMAIN, fix=LABEL_THEM)
        return labelled

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
        return len(_domain_of(pair for chosen in self.chosen for pair in chosen.asked.items()))

    @property
    def labelled_prompts(self) -> tuple[str, ...]:
        """Those of them that have a domain."""
        return tuple(prompt for prompt in self.prompts if self._domains[prompt])

    @cached_property
    def _domains(self) -> dict[str, str]:
        _ = self.n_prompts  # refuses a prompt of two domains
        return _domain_of(pair for chosen in self.chosen for pair in chosen.observed.items())

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
        found = self._counted(self.chosen, 0, lambda prompt: f"{of[prompt]:07d}" if prompt in of else prompt)
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
        later = [replace(chosen, later=True) for chosen in self.chosen]
        if not self.has_first or not any(chosen.keep.any() for chosen in later):
            return self.prompt_counts
        if not self.each_apart:
            only = frozenset(self.prompt_counts.prompts.tolist())
            later = [replace(chosen, only=only) for chosen in later]
        return self._counted(later, self._max_lag)

    @cached_property
    def has_first(self) -> bool:
        """Whether a chosen row stands at position 0."""
        return any(bool((np.asarray(c.trace.positions)[c.keep] == 0).any()) for c in self.chosen)

    def _counted(
        self, parts: Iterable[Chosen], max_lag: int, group: Callable[[str], str] | None = None
    ) -> RoutingCounts:
        each = []
        for chosen in parts:
            names = chosen.names
            if group is not None:
                names["prompts"] = [group(prompt) for prompt in names["prompts"]]
            each.append(
                count_routing(
                    chosen.trace.experts,
                    chosen.trace.request,
                    chosen.trace.positions,
                    weights=self._weights(chosen),
                    max_lag=max_lag,
                    threads=os.cpu_count() or 1,
                    progress=self._progress,
                    **chosen.columns,
                    **names,
                )
            )
        return _sum(each)

    @cached_property
    def token_counts(self) -> TokenCounts:
        """:class:`~moetrace.analysis.TokenCounts` of the labelled rows.

        Of all token ids if they fit into 512 MiB, else of the most frequent ones. Of more than 2,000 prompts as
        many are drawn, as many of each domain as there are.
        """
        for chosen in self.chosen:
            _ = chosen.trace.experts  # or ChannelMissingError
        each = 8 * len(self.layers) * int(max(self.n_expert))
        at_most = max(1, _TOKEN_BYTES // each)
        parts, names = self.labelled, self.labelled_prompts
        if len(names) > _PAIRED:
            drawn = evenly([self._domains[name] for name in names], _PAIRED, np.random.default_rng(0))
            only = frozenset(name for name, chosen in zip(names, drawn, strict=True) if chosen)
            parts = tuple(replace(chosen, only=only) for chosen in parts)
        every = [chosen.trace.token_ids[chosen.keep] for chosen in parts]
        tokens = None
        if not any((part >= 0).any() for part in every):
            raise UsageError(
                "no labelled request of the recording has token ids",
                fix="capture with moetrace, which records them",
            )
        if np.unique(np.concatenate([np.unique(part) for part in every])).size > at_most:
            step = np.cumsum([0] + [len(chosen.labels) for chosen in parts[:-1]])
            owners = [c.trace.request[c.keep] + s for c, s in zip(parts, step, strict=True)]
            tokens = frequent_tokens(np.concatenate(every), np.concatenate(owners), at_most)
        return _sum(
            [
                count_tokens(
                    c.trace.experts, c.trace.token_ids, c.trace.request, c.trace.positions, tokens=tokens,
                    **c.columns, **c.names,
                )
                for c in parts
            ]
        )  # fmt: skip

    @cached_property
    def texts(self) -> Texts:
        """Where each prompt's text stands: the first request of each cluster."""
        found: list[tuple[int, int, int, str, str]] = []
        seen: set[str] = set()
        for part, chosen in enumerate(self.chosen):
            order = chosen.order
            sizes = np.diff(order.request_starts).tolist()
            for number, start, size in zip(
                order.requests.tolist(), order.request_starts.tolist(), sizes, strict=False
            ):
                prompt = chosen.clusters[number]
                if prompt not in seen:
                    seen.add(prompt)
                    found.append((part, start, size, prompt, chosen.labels[number]))
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
        rows = []
        for part, chosen in enumerate(self.chosen):
            mine = every[texts.parts[every] == part]
            rows.append(chosen.order.rows[spans(texts.begin[mine], texts.sizes[mine])])
        parts = [(chosen.trace, mine) for chosen, mine in zip(self.chosen, rows, strict=True)]
        columns = [self._weights(chosen) for chosen in self.chosen]
        weights = [np.asarray(c[mine]) for c, mine in zip(columns, rows, strict=True) if c is not None]
        return RoutedText(
            np.concatenate([present(trace.experts, trace.state, mine) for trace, mine in parts]),
            np.concatenate(([0], np.cumsum(texts.sizes[every]))).astype(np.int64),
            int(max(self.n_expert)),
            weights=np.concatenate(weights) if len(weights) == len(parts) else None,
            tokens=np.concatenate([trace.token_ids[mine] for trace, mine in parts]),
            positions=np.concatenate([trace.positions[mine] for trace, mine in parts]),
            sources=np.repeat(np.arange(len(parts)), [mine.size for mine in rows]),
            rows=np.concatenate(rows),
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
        out: dict[str, Any] = {}
        for chosen in self.chosen:
            requests = chosen.trace.requests
            if name in requests:
                for number, value in requests[name].items():
                    if value is not None and not (isinstance(value, float) and np.isnan(value)):
                        out.setdefault(chosen.clusters[int(str(number))], value)
        return out

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

    def _weights(self, chosen: Chosen) -> npt.NDArray[Any] | None:
        """What first experts are chosen by; None: the router's order."""
        return chosen.channel("weights") if self._top1 == "weight" else None


def _clustered(parts: Sequence[Chosen], key: str | None) -> tuple[tuple[Chosen, ...], int]:
    """The same with their clusters: named after the first, in order of names, of the prompts in each.

    Also gives the number of requests that go on from a text of which it is not known whose it was.
    """
    if key == "id":
        return tuple(replace(chosen, clusters=chosen.prompts) for chosen in parts), 0
    number: dict[str, int] = {}  # of each prompt
    same: list[tuple[int, int]] = []
    first: dict[tuple[object, ...], int] = {}  # who had this first

    def join(what: tuple[object, ...], prompt: str) -> None:
        mine = number.setdefault(prompt, len(number))
        same.append((first.setdefault(what, mine), mine))

    named = False
    for chosen in parts:
        requests = chosen.trace.requests
        given = GROUP if key is None else key
        if given not in requests:
            continue
        for request, value in requests[given].dropna().items():
            i, named = int(str(request)), True
            join(("said", chosen.labels[i], str(value)), chosen.prompts[i])
    if key is not None and not named:
        raise UsageError(
            f"no request has {key!r}",
            fix="give a key that the lines of the prompts file have, or that requests show",
        )
    n_unknown = 0
    if key is None:
        texts, n_prompt, owners = [], [], []
        for chosen in parts:
            for one in _beginnings(chosen):
                texts.append(one.text)
                n_prompt.append(one.n_prompt)
                owners.append((chosen.prompts[one.request], chosen.labels[one.request]))
                n_unknown += not one.known
        found = text_clusters(texts, n_prompt, [label for _, label in owners])
        for code, (prompt, label) in zip(found.tolist(), owners, strict=True):
            join(("text", label, code), prompt)
    for chosen in parts:
        for prompt in chosen.prompts:
            number.setdefault(prompt, len(number))
    pairs = np.array(same, dtype=np.int64).reshape(-1, 2).T
    graph = sparse.coo_array(
        (np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(len(number), len(number))
    )
    code_of = connected_components(graph, directed=False)[1]
    stands: dict[int, str] = {}
    for prompt in sorted(number):
        stands.setdefault(int(code_of[number[prompt]]), prompt)
    cluster = {prompt: stands[int(code_of[i])] for prompt, i in number.items()}
    named_parts = (replace(chosen, clusters=[cluster[p] for p in chosen.prompts]) for chosen in parts)
    return tuple(named_parts), n_unknown


@dataclass(frozen=True)
class _Beginning:
    """A request's text from the first token on, as far as it is known, and the size of its prompt."""

    request: int
    text: npt.NDArray[np.int32]
    n_prompt: int
    known: bool


def _beginnings(chosen: Chosen) -> Iterator[_Beginning]:
    """Those of all requests. What the prompt cache served is the text that was in the slot before.

    Unless the slot's memory was loaded, copied or moved in between: then it is not known. Of what is not known no two
    tokens are alike.
    """
    trace, order = chosen.trace, Chosen(chosen.trace, chosen.name, "all").order
    ids = np.array(trace.token_ids, dtype=np.int32)[order.rows]
    unknown = np.flatnonzero(ids < 0)
    ids[unknown] = -1 - np.arange(unknown.size)
    n_unknown = unknown.size
    position, phase = np.asarray(trace.positions)[order.rows], np.asarray(trace.phase)[order.rows]
    edges = order.request_starts.tolist()
    requests = trace.requests.reindex(order.requests)
    told = {"n_cached", "slot", "first_serial"} <= set(requests)
    first = requests["first_serial"].tolist() if told else list(range(len(order.requests)))
    slots = requests["slot"].tolist() if told else [-1] * len(first)
    cached = requests["n_cached"].fillna(-1).tolist() if told else [-1] * len(first)
    moved = _moved(trace)
    held: dict[int, tuple[int, npt.NDArray[np.int32]]] = {}  # by each slot: from which serial on, and what
    for i in sorted(range(len(first)), key=first.__getitem__):
        a, b, slot = edges[i], edges[i + 1], slots[i]
        text, n_prompt = ids[a:b], int((phase[a:b] == PHASES["prefill"]).sum())
        start, known = int(position[a]), True
        if start > 0:
            since, before = held.get(slot, (0, text[:0]))
            known = cached[i] == start <= len(before) and not any(
                np.searchsorted(moved[of], since, "right") < np.searchsorted(moved[of], first[i], "right")
                for of in (slot, -1)
                if of in moved
            )
            if not known:
                before = -1 - n_unknown - np.arange(start, dtype=np.int32)
                n_unknown += start
            text, n_prompt = np.concatenate((before[:start], text)), n_prompt + start
        held[slot] = first[i], text
        yield _Beginning(int(order.requests[i]), text, n_prompt or len(text), known)


def _moved(trace: RoutedRows) -> dict[int, Ints]:
    """When a slot's memory came from elsewhere: the serials, ascending, by slot; -1: of all."""
    events = getattr(getattr(trace, "trace", trace), "events", None)
    if events is None:
        return {}
    events = events[events["event"].isin(["restore", "seq_cp", "seq_add", "seq_div", "context", "resume"])]
    slots = np.where(events["event"] == "seq_cp", events["arg"], events["sequence"])
    slots[events["event"].isin(["context", "resume"])] = -1
    serials = events["serial"].to_numpy(dtype=np.int64)
    return {int(slot): np.sort(serials[slots == slot]) for slot in np.unique(slots)}


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


class _Adds(Protocol):
    def __add__(self, other: Any, /) -> Any: ...


A = TypeVar("A", bound=_Adds)


def _sum(parts: list[A]) -> A:
    """All of them, halves first: each is added to ones of its size."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    total: A = _sum(parts[:half]) + _sum(parts[half:])
    return total


def _texts(trace: RoutedRows, column: str) -> list[str]:
    """A text column of the requests, indexed by request number; "" where nothing is known."""
    requests = trace.requests
    out = [""] * (int(requests.index.max()) + 1 if len(requests) else 0)
    if column in requests:
        for number, value in requests[column].items():
            out[int(str(number))] = "" if pd.isna(value) else str(value)
    return out
