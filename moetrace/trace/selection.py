"""Choosing rows and layers of a trace by what they are of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.trace.chain import Index
from moetrace.trace.longform import LongForm
from moetrace.trace.view import PHASES, Recording

if TYPE_CHECKING:
    import pandas as pd


class Selectable(LongForm):
    """Rows of which some can be selected."""

    def sel(
        self,
        *,
        layer: int | slice | Sequence[int] | None = None,
        label: str | Sequence[str] | None = None,
        request: int | str | Sequence[int | str] | None = None,
        phase: str | int | None = None,
        sequence: int | Sequence[int] | None = None,
        output: bool | None = None,
    ) -> Selection:
        """Select rows and layers; what is given must hold together.

        Parameters
        ----------
        layer
            llama.cpp's layer number, several of them, or a slice of numbers (``slice(0, 6)``: 0 to 5). The
            layer axis stays, even for a single one.
        label
            Of the requests: one, or several.
        request
            The requests: a number (the index of :attr:`Trace.requests`; -1: rows of none), or the id that the client
            gave, as text; or several.
        phase
            ``prefill`` or ``decode``.
        sequence
            Sequences (slots).
        output
            True: only tokens whose logits or embedding llama.cpp was asked for.

        Returns
        -------
        Selection
            Its columns are views of the trace's as long as the selected rows follow each other without gaps
            and the layers are evenly spaced; otherwise each access copies.

        Raises
        ------
        UsageError
            If the trace has no such layer, label, request or phase.
        """
        chain = self._trace.chain
        mask: NDArray[np.bool_] | None = None

        def narrow(new: NDArray[np.bool_]) -> None:
            nonlocal mask
            mask = new if mask is None else mask & new

        if label is not None:
            wanted = [label] if isinstance(label, str) else list(label)
            labels = self._trace.requests["label"]
            unknown = sorted(set(wanted) - set(labels.dropna()))
            if unknown:
                have = ", ".join(sorted(set(map(str, labels.dropna())))) or "none at all"
                raise UsageError(
                    f"no request has the label {', '.join(unknown)}", fix=f"choose among: {have}"
                )
            narrow(np.isin(self.request, labels.index[labels.isin(wanted)].to_numpy()))
        if request is not None:
            narrow(np.isin(self.request, self._find_requests(request)))
        if phase is not None:
            if isinstance(phase, str) and phase not in PHASES:
                raise UsageError(f"there is no phase {phase!r}", fix=f"choose among: {', '.join(PHASES)}")
            narrow(self.phase == (PHASES.index(phase) if isinstance(phase, str) else phase))
        if sequence is not None:
            narrow(np.isin(self.sequence, sequence))
        if output is not None:
            narrow(self.output == output)

        chosen = self._rows
        if mask is not None:
            numbers = np.arange(chain.n_rows)[self._rows][mask]
            chosen = _as_slice(numbers)
        layers = self._layer_index
        if layer is not None:
            layers = self._find_layers(layer)
        return Selection(self._trace, chosen, layers)

    def _find_requests(self, request: int | str | Sequence[int | str]) -> list[int]:
        """Give the numbers of the requests that are meant by number or id. Raises UsageError if one is unknown."""
        given = [request] if isinstance(request, int | np.integer | str) else list(request)
        requests = self._trace.requests
        ids = requests["id"].dropna().astype(str)
        found: list[int] = []
        for each in given:
            if isinstance(each, str):
                mine = ids.index[ids == each].tolist()
            else:
                mine = [int(each)] if each == -1 or int(each) in requests.index else []
            if not mine:
                raise UsageError(
                    f"there is no request {each!r}", fix=_nearest(each, requests.index.tolist(), ids)
                )
            found += mine
        return found

    def _find_layers(self, layer: int | slice | Sequence[int]) -> Index:
        numbers = np.arange(len(self._trace.layout.layers))[self._layer_index]
        have = self.layers.tolist()
        if isinstance(layer, slice):
            wanted = [n for n in have if n in range(*layer.indices(max(have) + 1))]
        else:
            wanted = [int(layer)] if isinstance(layer, int | np.integer) else [int(n) for n in layer]
        unknown = sorted(set(wanted) - set(have))
        if unknown or not wanted:
            raise UsageError(
                f"there is no layer {', '.join(map(str, unknown)) or layer}",
                why="layers are numbered as in llama.cpp; dense ones have no experts",
                fix=f"choose among: {', '.join(map(str, have))}",
            )
        return _as_slice(numbers[[have.index(n) for n in wanted]])


class Selection(Selectable):
    """Some rows and layers of a trace; see :meth:`Selectable.sel`."""

    def __init__(self, trace: Recording, rows: Index, layers: Index) -> None:
        self._trace = trace
        self._rows = rows
        self._layer_index = layers

    @property
    def trace(self) -> Recording:
        """The :class:`~moetrace.trace.trace.Trace` that this is a selection of."""
        return self._trace

    @property
    def parts(self) -> tuple[Selection, ...]:
        """The selection context by context (:attr:`Trace.parts`), whose columns are views where slices are selected."""
        rows = self._trace.chain.split(self._rows)
        return tuple(
            Selection(part, mine, self._layer_index)
            for part, mine in zip(self._trace.parts, rows, strict=True)
        )

    @property
    def requests(self) -> pd.DataFrame:
        """The requests of the whole trace, as :attr:`Trace.requests`: selected rows carry their numbers."""
        return self._trace.requests

    @property
    def consumers(self) -> list[list[str]]:
        """:attr:`Trace.consumers` of the selected layers."""
        every = self._trace.consumers
        return [every[i] for i in np.arange(len(every))[self._layer_index].tolist()]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, a selection is its trace, opened again, and numbers of rows and layers."""
        return Selection, (self._trace, self._rows, self._layer_index)

    def __repr__(self) -> str:
        return f"<Selection of {self._trace.path}: {len(self):,} tokens × {len(self.layers)} layers>"


def _nearest(asked: int | str, numbers: Sequence[int], ids: Iterable[str]) -> str:
    """Say which requests there are that are like the one asked for."""
    if not numbers:
        return "the trace has no requests"
    if isinstance(asked, str):
        known = list(dict.fromkeys(ids))
        near = difflib.get_close_matches(asked, known, 5, 0.5) or known[:5]
        if near:
            more = f" (of {len(known):,} ids)" if len(known) > len(near) else ""
            return f"choose among: {', '.join(near)}{more}"
        return f"no request has an id; choose by number: {min(numbers)} to {max(numbers)}"
    near_numbers = sorted(numbers, key=lambda n: abs(n - int(asked)))[:3]
    return f"its numbers are {min(numbers)} to {max(numbers)}, near it {', '.join(map(str, sorted(near_numbers)))}"


def _as_slice(numbers: NDArray[np.intp]) -> Index:
    """Give evenly spaced ascending numbers as a slice, so that indexing makes views."""
    if len(numbers) == 0:
        return slice(0, 0)
    if len(numbers) == 1:
        return slice(int(numbers[0]), int(numbers[0]) + 1)
    step = int(numbers[1] - numbers[0])
    if step > 0 and (np.diff(numbers) == step).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1, step)
    return numbers
