"""Columns of a trace for the tokens of a text: what predictions take beside which experts they got."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrace.analysis.counts.attention import AttentionRows
from moetrace.analysis.counts.routed import RoutedText
from moetrace.errors import MoetraceError, UsageError


class TokenColumns:
    """Tokens, and what their traces hold of them.

    Parameters
    ----------
    traces
        Of one model.
    text
        The chosen tokens; ``sources`` numbers the traces that they are from.
    """

    def __init__(self, traces: Sequence[Any], text: RoutedText) -> None:
        self._traces, self.text = traces, text

    def wanted(self, layers: Iterable[int] | None) -> list[int]:
        """These layers, ascending; all if not given. Raises UsageError for one that there is not."""
        have = self.text.layers.tolist()
        wanted = have if layers is None else sorted(set(layers))
        unknown = sorted(set(wanted) - set(have))
        if unknown:
            raise UsageError(
                f"there is no MoE layer {unknown[0]}", fix=f"choose among: {', '.join(map(str, have))}"
            )
        return wanted

    def index(self, layer: int) -> int:
        """The place of a layer, by its number, on the layer axis."""
        have: list[int] = self.text.layers.tolist()
        return have.index(layer)

    def column(self, name: str, text: RoutedText, index: int) -> npt.NDArray[np.float32] | None:
        """A column's entries of one layer, (n, ...); None if a trace lacks it."""
        try:
            return self.need(name, text, index)
        except (AttributeError, MoetraceError):
            return None

    def need(self, name: str, text: RoutedText, index: int) -> npt.NDArray[np.float32]:
        """A column's entries of one layer, (n, ...) f4, a copy. Raises ChannelMissingError if a trace lacks it."""
        out: npt.NDArray[np.float32] | None = None
        for source in np.unique(text.sources):
            mine = text.sources == source
            column = getattr(self._traces[source], name)
            values = np.asarray(column[text.rows[mine], index], dtype=np.float32)
            if out is None:
                out = np.empty((len(text), *values.shape[1:]), dtype=values.dtype)
            out[mine] = values
        return np.empty((0,), dtype=np.float32) if out is None else out

    def attention(self, text: RoutedText, layer: int) -> AttentionRows:
        """Attention of tokens in a layer. Raises ChannelMissingError if it was not captured."""
        sources = np.unique(text.sources).tolist() or [0]
        names = ("offset", "n_keys", "first_position", "n_heads")
        columns = {name: np.full(len(text), -1, dtype=np.int64) for name in names}
        values = []
        for source in sources:
            trace = self._traces[source]
            attention = getattr(trace, "trace", trace).attention  # a selection's trace
            values.append(attention.values)
            mine = np.flatnonzero(text.sources == source)
            at = attention.find(np.asarray(trace.serial)[text.rows[mine]], layer)
            there = at >= 0
            for name, column in columns.items():
                column[mine[there]] = np.asarray(attention.index[name])[at[there]]
        heads = np.unique(columns["n_heads"][columns["n_heads"] >= 0])
        if heads.size > 1:
            raise MoetraceError(f"layer {layer} has rows of {heads[0]} and of {heads[-1]} heads")
        return AttentionRows(
            values,
            columns["offset"],
            columns["n_keys"],
            columns["first_position"],
            int(heads[0]) if heads.size else 1,
            text.positions,
            np.searchsorted(sources, text.sources),
        )
