"""Rows of a trace that analyses look at, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.counting import PRESENT, ReadingOrder, last_rows, reading_order
from moetrace.analysis.statistics.shapes import Ints
from moetrace.errors import ChannelMissingError

Phase = Literal["prefill", "decode", "unknown", "all"]
PHASES = {"prefill": 0, "decode": 1, "unknown": 2}

CHUNK = 1 << 13  # rows looked at together


class RoutedRows(Protocol):
    """What the analyses need of a trace; shapes and dtypes as in docs/format.md, table ``rows``.

    Channels beyond ``experts`` (``weights``, ``scores``, ``logits``, ``gate_input``, ``outputs``) are asked for where
    they are of use; a trace without one raises ChannelMissingError.
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
    def numbers(self) -> list[int]:
        """The requests that have rows here."""
        request = np.asarray(self.trace.request)[self.keep]
        numbers: list[int] = np.flatnonzero(np.bincount(request, minlength=len(self.prompts))).tolist()
        return numbers

    @cached_property
    def prompts(self) -> list[str]:
        """The prompt of each request, by its number."""
        return [given or f"{self.name}#{n:06d}" for n, given in enumerate(request_texts(self.trace, "id"))]

    @cached_property
    def labels(self) -> list[str]:
        """The domain of each request, by its number; "" where it has none."""
        return request_texts(self.trace, "label")

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


def request_texts(trace: RoutedRows, column: str) -> list[str]:
    """A text column of the requests, indexed by request number; "" where nothing is known."""
    requests = trace.requests
    out = [""] * (int(requests.index.max()) + 1 if len(requests) else 0)
    if column in requests:
        for number, value in requests[column].items():
            out[int(str(number))] = "" if pd.isna(value) else str(value)
    return out
