"""Rows and layers of a trace, all or selected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import ChannelMissingError, MoetraceError, UsageError
from moetrace.trace.chain import Index
from moetrace.trace.record import RowFlag, State
from moetrace.trace.requests import Phase
from moetrace.trace.rows import LAYER_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from moetrace.trace.trace import Trace

CHUNK = 1 << 16  # rows that iterators look at together
_ENTRIES = 1 << 20  # choices of an Arrow batch
_PHASES = [phase.name.lower() for phase in Phase]


class Rows:
    """What :class:`~moetrace.trace.trace.Trace` and :class:`Selection` share.

    Shapes: N rows (tokens that the model computed, in that order), L layers, k experts chosen per token, E
    experts, D the width of the model.
    """

    _trace: Trace
    _rows: Index
    _layer_index: Index

    # -- columns -------------------------------------------------------------------------------------

    def _take(self, name: str) -> NDArray[Any]:
        """Give a column of the selected rows: a view where they are a slice of one context's, else a copy."""
        return self._trace.chain.take(name, self._rows)

    @property
    def column_names(self) -> list[str]:
        """The columns of the table ``rows`` (docs/format.md) that this trace has, and ``context``."""
        return [*self._trace.chain.names, "context"]

    def column(self, name: str, piece: slice | NDArray[np.intp] = slice(None)) -> NDArray[Any]:
        """Give a column under its name in docs/format.md, for a piece of the selected rows, or for some by number.

        Like the properties of the same content, but only ``piece`` of it is looked at: a view where it is a slice
        whose rows are of one context, else a copy of these rows.
        """
        rows = self._numbers(piece)
        if name == "context":
            return self._context_index(rows)
        layers = self._layer_index if name in (*LAYER_COLUMNS, "state") else None
        return self._trace.chain.take(name, rows, layers)

    def _numbers(self, piece: slice | NDArray[np.intp]) -> Index:
        """Give the rows' numbers in the trace."""
        if not isinstance(self._rows, slice):
            return self._rows[piece]
        chosen = range(*self._rows.indices(self._trace.chain.n_rows))
        if isinstance(piece, slice):
            part = chosen[piece]
            stop = None if part.stop < 0 else part.stop
            return slice(part.start, stop, part.step) if part else slice(0, 0)
        numbers = np.asarray(piece)
        if numbers.size and not (-len(chosen) <= numbers.min() and numbers.max() < len(chosen)):
            raise IndexError(f"there are {len(chosen)} rows")
        return chosen.start + chosen.step * np.where(numbers < 0, numbers + len(chosen), numbers)

    def _take_layers(self, name: str) -> NDArray[Any]:
        if name not in self._trace.chain:
            raise self._no_channel(name)
        return self._trace.chain.take(name, self._rows, self._layer_index)

    def _no_channel(self, name: str) -> ChannelMissingError:
        have = self._trace.channels
        source = self._trace.meta.get("import")
        if isinstance(source, dict):
            return ChannelMissingError(
                f"the recording has no {name}",
                why=f"it is of the format {source.get('format')} and holds {', '.join(have) or 'no channel'}",
                fix=f"give one that has it, or capture with moetrace: --capture {name}",
            )
        option = ",".join([*have, name])
        return ChannelMissingError(
            f"{self._trace.path} has no {name}",
            why=f"it was captured with {', '.join(have)}",
            fix=f"capture it again with --capture {option}",
        )

    @property
    def experts(self) -> NDArray[Any]:
        """Expert ids in the router's order, (N, L, k), uint8 or uint16; :attr:`sentinel` where none is."""
        return self._take_layers("experts")

    @property
    def weights(self) -> NDArray[np.float32]:
        """Mixing weights as the model used them, (N, L, k), float32; NaN where there is none."""
        return self._take_layers("weights")

    @property
    def logits(self) -> NDArray[np.float32]:
        """The router's linear output, bias included, (N, L, E), float32; NaN where there is none."""
        return self._take_layers("logits")

    @property
    def scores(self) -> NDArray[np.float32]:
        """What top-k selected on, (N, L, E), float32; masked experts are -inf, NaN where there is none."""
        return self._take_layers("scores")

    @property
    def gate_input(self) -> NDArray[np.float32]:
        """What the router read, (N, L, D), float32; NaN where there is none."""
        return self._take_layers("gate_input")

    def tensor(self, name: str, piece: slice | NDArray[np.intp] = slice(None)) -> NDArray[np.float32]:
        """Give a named tensor that was captured, (N, width), float32; NaN where there is none.

        ``piece`` as in :meth:`column`.

        Raises
        ------
        ChannelMissingError
            If it was not captured.
        """
        if f"tensor.{name}" not in self._trace.chain:
            raise self._no_channel(f"tensor:{name}")
        return self.column(f"tensor.{name}", piece)

    @property
    def state(self) -> NDArray[np.uint8]:
        """What became of each entry, (N, L), uint8: 0 lost, 1 present, 2 not computed by llama.cpp."""
        return self._take_layers("state")

    @property
    def present(self) -> NDArray[np.bool_]:
        """Where there is routing, (N, L), bool; a new array."""
        present: NDArray[np.bool_] = self.state == State.PRESENT
        return present

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, (N,), int32; -1 for a vector input."""
        return self._take("token")

    @property
    def positions(self) -> NDArray[np.int32]:
        """Position of each token in its sequence when it was computed, (N,), int32."""
        return self._take("position")

    @property
    def sequence(self) -> NDArray[np.int32]:
        """Sequence id (in llama-server: the slot), (N,), int32; -1 unknown."""
        return self._take("sequence")

    @property
    def n_sequences(self) -> NDArray[np.uint16]:
        """How many sequences share each token, (N,), uint16."""
        return self._take("n_sequences")

    @property
    def request(self) -> NDArray[np.int64]:
        """Number of each row's request, (N,), int64: the index of :attr:`requests`; -1 for none."""
        return self._take("request")

    @property
    def phase(self) -> NDArray[np.uint8]:
        """0 prefill, 1 decode, 2 unknown, (N,), uint8."""
        return self._take("phase")

    @property
    def step(self) -> NDArray[np.uint32]:
        """Number of the ubatch, (N,), uint32."""
        return self._take("step")

    @property
    def batch(self) -> NDArray[np.uint32]:
        """Number of the decode call, (N,), uint32."""
        return self._take("batch")

    @property
    def row(self) -> NDArray[np.uint32]:
        """Row within the ubatch, (N,), uint32."""
        return self._take("row")

    @property
    def serial(self) -> NDArray[np.uint64]:
        """Number of each row since its context began, lost ones counted, (N,), uint64: unique within a context."""
        return self._take("serial")

    @property
    def context_names(self) -> tuple[str, ...]:
        """Names of all llama contexts of the trace, shown or not."""
        return self._trace.contexts

    @property
    def context_index(self) -> NDArray[np.uint32]:
        """Which of :attr:`context_names` each row is of, (N,), uint32; a new array."""
        return self._context_index(self._rows)

    def _context_index(self, rows: Index) -> NDArray[np.uint32]:
        names = list(self._trace.contexts)
        shown = np.array([names.index(name) for name in self._trace.shown], np.uint32)
        return shown[self._trace.chain.owner(rows)]

    @property
    def time_ns(self) -> NDArray[np.int64]:
        """When each row's ubatch began, monotonic nanoseconds, (N,), int64; see :attr:`Trace.epoch_ns`."""
        return self._take("time_ns")

    @property
    def flags(self) -> NDArray[np.uint32]:
        """Bits of :class:`moetrace.trace.record.RowFlag`, (N,), uint32."""
        return self._take("flags")

    @property
    def output(self) -> NDArray[np.bool_]:
        """Where llama.cpp was asked for the token's logits or embedding, (N,), bool; a new array."""
        output: NDArray[np.bool_] = (self.flags & RowFlag.OUTPUT) != 0
        return output

    @property
    def intervened(self) -> NDArray[np.bool_]:
        """Where an intervention was in force for the token (:attr:`Trace.interventions`), (N,), bool; a new array."""
        intervened: NDArray[np.bool_] = (self.flags & RowFlag.INTERVENED) != 0
        return intervened

    # -- facts ---------------------------------------------------------------------------------------

    @property
    def layers(self) -> NDArray[np.int64]:
        """llama.cpp's number of each index of a layer axis, (L,); dense layers are not among them."""
        return np.array(self._trace.layout.layers)[self._layer_index]

    @property
    def n_expert(self) -> NDArray[np.int64]:
        """Experts of each layer, (L,)."""
        return np.array(self._trace.layout.n_expert)[self._layer_index]

    @property
    def n_expert_used(self) -> NDArray[np.int64]:
        """Experts chosen per token in each layer, (L,)."""
        return np.array(self._trace.layout.n_expert_used)[self._layer_index]

    @property
    def sentinel(self) -> int:
        """The expert id that means none: 255 or 65535."""
        return self._trace.layout.sentinel

    def __len__(self) -> int:
        """Give the number of rows, N."""
        rows = self._rows
        return len(range(*rows.indices(self._trace.chain.n_rows))) if isinstance(rows, slice) else len(rows)

    # -- frames --------------------------------------------------------------------------------------

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token: token_id, position, sequence, request, step, phase, text, context.

        The numbers are views where the columns are; ``text`` is None where the trace has no vocabulary, and
        bytes of a piece that are not UTF-8 show as U+FFFD. With ``context`` and :attr:`serial` a row is found again
        in :attr:`Trace.events` and :attr:`Trace.attention`.
        """
        import pandas as pd

        shown = self._trace.shown

        return pd.DataFrame(
            {
                "token_id": self.token_ids,
                "position": self.positions,
                "sequence": self.sequence,
                "request": self.request,
                "step": self.step,
                "phase": _categorical(np.minimum(self.phase, 2), _PHASES),
                "text": self._trace.text(self.token_ids),
                "context": _categorical(self._trace.chain.owner(self._rows), shown),
            },
            copy=False,
        )

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
        phase, layer, expert, rank, weight (NaN if not captured).

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
        return _categorical(codes, labels)

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
                "component": _categorical(code, names),
                "expert_id": expert.astype(np.int64),
                "position": rank,
                "request": request[i],
                "phase": _categorical(chain.take("phase", index)[i], _PHASES),
                "token": chain.take("token", index)[i],
                "weight": weight,
            }
        )

    def _long(self, index: NDArray[np.intp]) -> pd.DataFrame:
        import pandas as pd

        columns = self._long_columns(index).items()
        return pd.DataFrame({name: _categorical(*v) if isinstance(v, tuple) else v for name, v in columns})

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
            "phase": (chain.take("phase", index)[i], _PHASES),
            "layer": self.layers.astype(np.int32)[layer],
            "expert": expert,
            "rank": rank.astype(np.uint16),
            "weight": weight,
        }

    # -- selecting -----------------------------------------------------------------------------------

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
            if isinstance(phase, str) and phase not in _PHASES:
                raise UsageError(f"there is no phase {phase!r}", fix=f"choose among: {', '.join(_PHASES)}")
            narrow(self.phase == (_PHASES.index(phase) if isinstance(phase, str) else phase))
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


class Selection(Rows):
    """Some rows and layers of a trace; see :meth:`Rows.sel`."""

    def __init__(self, trace: Trace, rows: Index, layers: Index) -> None:
        self._trace = trace
        self._rows = rows
        self._layer_index = layers

    @property
    def trace(self) -> Trace:
        """The trace that this is a selection of."""
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


def import_arrow() -> Any:
    """Import pyarrow, or say how to get it."""
    try:
        import pyarrow
    except ImportError as e:
        raise MoetraceError("this needs pyarrow", why=str(e), fix="pip install 'moetrace[arrow]'") from e
    return pyarrow


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


def _categorical(codes: NDArray[Any], names: Sequence[str]) -> Any:
    import pandas as pd

    return pd.Categorical.from_codes(codes.astype(np.int32), categories=list(names))  # type: ignore[call-overload]
