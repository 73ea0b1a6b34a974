"""Routing in long form: one row per token, layer and rank, as frames, in pieces, or as a stream of Arrow batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError
from moetrace.trace.chain import Index
from moetrace.trace.described import Described, describe
from moetrace.trace.record import State
from moetrace.trace.view import PHASES, Rows, categorical

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

CHUNK = 1 << 16  # rows that iterators look at together
_ENTRIES = 1 << 20  # choices of an Arrow batch


class LongForm(Rows):
    """Rows whose routing can be had in long form."""

    def activations(self, *, components: bool = False) -> pd.DataFrame:
        """Give the routing in long form, with the columns of the published notebooks first.

        One row per (token, layer, rank) that is present. Columns: ``domain`` (the request's label),
        ``token_id`` (counts tokens within the request, *not* the vocabulary's id), ``layer_id``,
        ``component``, ``expert_id``, ``position`` (the rank among the chosen, 0 first); then ``request``,
        ``phase``, ``token`` (the vocabulary's id) and ``weight`` (NaN if not captured).

        Parameters
        ----------
        components
            False: each decision once, ``component`` is ``router``. True: once per expert matrix that consumed
            it (``ffn_gate``, ``ffn_up``, ``ffn_down``), as the notebooks count. These rows repeat one
            decision; a test that takes them as independent is wrong.

        Raises
        ------
        ChannelMissingError
            If experts were not captured.
        """
        import pandas as pd

        frames = list(self.iter_activations(components=components))
        return (
            pd.concat(frames, ignore_index=True)
            if frames
            else self._activations(np.arange(0), [], components)
        )

    def iter_activations(self, *, components: bool = False, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """Give :meth:`activations` in pieces of so many tokens: memory does not grow with the trace."""
        seen: dict[int, int] = {}
        for piece, index in self._pieces(rows):
            ordinal = _ordinals(self._trace.chain.take("request", piece), seen)
            if len(index):
                yield self._activations(index, ordinal[index - piece.start], components)

    def to_pandas(self) -> pd.DataFrame:
        """Give the routing in long form under this project's names.

        One row per (token, layer, rank) that is present: request, label, token, position (in the sequence),
        phase, layer, expert, rank, weight (NaN if not captured), serial (of the token: :attr:`serial`, by which
        :attr:`events` and :attr:`attention` know it, too).

        Raises
        ------
        ChannelMissingError
            If experts were not captured.
        """
        import pandas as pd

        frames = list(self.iter_pandas())
        return pd.concat(frames, ignore_index=True) if frames else self._long(np.arange(0))

    def iter_pandas(self, *, rows: int = CHUNK) -> Iterator[pd.DataFrame]:
        """Give :meth:`to_pandas` in pieces of so many tokens."""
        for _, index in self._pieces(rows):
            if len(index):
                yield self._long(index)

    def to_arrow(self) -> pa.Table:
        """Give :meth:`to_pandas` as an Arrow table (needs pyarrow: ``pip install moetrace[arrow]``)."""
        return self.arrow_reader().read_all()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Hand :meth:`to_pandas` to Arrow's consumers (polars, duckdb, ...), a piece at a time."""
        return self.arrow_reader().__arrow_c_stream__(requested_schema)

    def arrow_reader(self) -> pa.RecordBatchReader:
        """Give :meth:`to_pandas` as a stream of Arrow batches (needs pyarrow); label and phase are dictionaries."""
        pa = import_arrow()

        def batch(index: NDArray[np.intp]) -> Any:
            arrays = {}
            for name, values in self._long_columns(index).items():
                if isinstance(values, tuple):
                    codes, names = values
                    codes = pa.array(codes.astype(np.int32), mask=codes < 0)
                    arrays[name] = pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string()))
                else:
                    nothing = values.dtype.kind == "f" and np.isnan(values)
                    arrays[name] = pa.array(values, mask=nothing if np.any(nothing) else None)
            return pa.RecordBatch.from_pydict(arrays)

        schema = batch(np.arange(0)).schema
        each = max(1, _ENTRIES // (len(self.layers) * self._trace.layout.k))
        batches = (batch(index) for _, index in self._pieces(each) if len(index))
        return pa.RecordBatchReader.from_batches(schema, batches)

    def described(self) -> Described:
        """Say what :meth:`to_arrow` leaves out (:mod:`moetrace.trace.described`)."""
        trace = self._trace
        whole = len(self) == trace.chain.n_rows and len(self.layers) == len(trace.layout.layers)
        return describe(
            self,
            trace.facts.get("model", {}),
            trace.requests,
            contexts=len(trace.shown),
            produced=trace.loss.rows_produced if whole else None,
        )

    def _pieces(self, rows: int) -> Iterator[tuple[slice, NDArray[np.intp]]]:
        """Walk through the trace: pieces of so many rows, and the numbers of those that are selected."""
        chain = self._trace.chain
        if "experts" not in chain:
            raise self._no_channel("experts")
        n = chain.n_rows
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            yield slice(start, stop), _within(self._rows, start, stop, n)

    def _entries(self, index: NDArray[np.intp]) -> tuple[NDArray[Any], ...]:
        """Give (row, layer axis, rank, expert, weight) of every choice of these rows that is present."""
        chain, layers = self._trace.chain, self._layer_index
        experts = chain.take("experts", index, layers)
        there = (chain.take("state", index, layers) == State.PRESENT)[:, :, None] & (experts != self.sentinel)
        weights = chain.take("weights", index, layers) if "weights" in chain else None
        if there.all():  # as a rule: nothing is to be looked for
            n, n_layers, k = experts.shape
            row = np.repeat(np.arange(n), n_layers * k)
            layer, rank = np.tile(np.repeat(np.arange(n_layers), k), n), np.tile(np.arange(k), n * n_layers)
            expert, weight = experts.reshape(-1), None if weights is None else weights.reshape(-1)
        else:
            row, layer, rank = np.nonzero(there)
            expert, weight = experts[there], None if weights is None else weights[there]
        if weight is None:
            weight = np.full(len(row), np.nan, np.float32)
        return row, layer, rank, expert, weight

    def _labels_of(self, request: NDArray[np.int64]) -> Any:
        codes, labels = self._trace.label_codes(request)
        return categorical(codes, labels)

    def _activations(self, index: NDArray[np.intp], ordinal: Any, components: bool) -> pd.DataFrame:
        import pandas as pd

        chain = self._trace.chain
        i, layer, rank, expert, weight = self._entries(index)
        names = ["router"]
        code = np.zeros(len(i), np.int8)
        if components:
            consumers = [
                self._trace.consumers[j] for j in np.arange(len(self._trace.layout.layers))[self._layer_index]
            ]
            names = sorted({name for layer_names in consumers for name in layer_names})
            times = np.array([len(c) for c in consumers], np.intp)
            codes = np.array([names.index(name) for c in consumers for name in c], np.int8)
            starts = np.cumsum(times) - times
            repeat = times[layer]
            within = np.arange(repeat.sum()) - np.repeat(np.cumsum(repeat) - repeat, repeat)
            code = codes[np.repeat(starts[layer], repeat) + within]
            i, layer, rank, expert, weight = (np.repeat(a, repeat) for a in (i, layer, rank, expert, weight))
        request = chain.take("request", index)
        return pd.DataFrame(
            {
                "domain": self._labels_of(request[i]),
                "token_id": np.asarray(ordinal, np.int64)[i],
                "layer_id": self.layers[layer],
                "component": categorical(code, names),
                "expert_id": expert.astype(np.int64),
                "position": rank,
                "request": request[i],
                "phase": categorical(chain.take("phase", index)[i], PHASES),
                "token": chain.take("token", index)[i],
                "weight": weight,
            }
        )

    def _long(self, index: NDArray[np.intp]) -> pd.DataFrame:
        import pandas as pd

        columns = self._long_columns(index).items()
        return pd.DataFrame({name: categorical(*v) if isinstance(v, tuple) else v for name, v in columns})

    def _long_columns(self, index: NDArray[np.intp]) -> dict[str, Any]:
        """The columns of :meth:`to_pandas` for these rows: arrays, or codes and names."""
        chain = self._trace.chain
        i, layer, rank, expert, weight = self._entries(index)
        request = chain.take("request", index)
        codes, labels = self._trace.label_codes(request)
        return {
            "request": request[i],
            "label": (codes[i], labels),
            "token": chain.take("token", index)[i],
            "position": chain.take("position", index)[i],
            "phase": (chain.take("phase", index)[i], PHASES),
            "layer": self.layers.astype(np.int32)[layer],
            "expert": expert,
            "rank": rank.astype(np.uint16),
            "weight": weight,
            "serial": chain.take("serial", index)[i],
        }


def import_arrow() -> Any:
    """Import pyarrow, or say how to get it."""
    try:
        import pyarrow
    except ImportError as e:
        raise MoetraceError("this needs pyarrow", why=str(e), fix="pip install 'moetrace[arrow]'") from e
    return pyarrow


def _ordinals(request: NDArray[np.int64], seen: dict[int, int]) -> NDArray[np.int64]:
    """Count each request's rows on from ``seen``, which is brought up to date."""
    order = np.argsort(request, kind="stable")
    numbers, starts, counts = np.unique(request[order], return_index=True, return_counts=True)
    before = np.array([seen.get(number, 0) for number in numbers.tolist()], np.int64)
    ordinal = np.empty(len(request), np.int64)
    ordinal[order] = np.arange(len(request)) - np.repeat(starts - before, counts)
    seen.update(zip(numbers.tolist(), (before + counts).tolist(), strict=True))
    return ordinal


def _within(rows: Index, start: int, stop: int, n: int) -> NDArray[np.intp]:
    """Give those of the selected rows that lie in [start, stop), of n in all."""
    if not isinstance(rows, slice):
        return rows[(rows >= start) & (rows < stop)]
    first, last, step = rows.indices(n)
    first += max(0, -(-(start - first) // step)) * step
    return np.arange(first, min(last, stop), step)
