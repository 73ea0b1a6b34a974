"""The columns and facts of a trace's rows and layers, all or some of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import ChannelMissingError, MoetraceError
from moetrace.trace.chain import Chain, Index
from moetrace.trace.loss import Loss
from moetrace.trace.record import RowFlag, State
from moetrace.trace.requests import Phase
from moetrace.trace.rows import LAYER_COLUMNS, Layout

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

PHASES = [phase.name.lower() for phase in Phase]


class Recording(Protocol):
    """What rows are of: as :class:`moetrace.trace.trace.Trace` says it."""

    chain: Chain

    @property
    def path(self) -> Path: ...
    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def contexts(self) -> tuple[str, ...]: ...
    @property
    def shown(self) -> tuple[str, ...]: ...
    @property
    def channels(self) -> list[str]: ...
    @property
    def consumers(self) -> list[list[str]]: ...
    @property
    def requests(self) -> pd.DataFrame: ...
    @property
    def parts(self) -> tuple[Recording, ...]: ...
    def label_codes(self, request: NDArray[np.int64]) -> tuple[NDArray[np.int32], list[str]]: ...
    def text(self, tokens: NDArray[np.int32]) -> NDArray[np.object_]: ...


class Rows:
    """What a :class:`~moetrace.trace.trace.Trace` and a :class:`~moetrace.trace.trace.Selection` have in common.

    Shapes: N rows (tokens that the model computed, in that order), L layers, k experts chosen per token, E
    experts, D the width of the model.
    """

    _trace: Recording
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

    @property
    def outputs(self) -> NDArray[np.float32]:
        """Norms of what each chosen expert made, (N, L, k), float32; NaN where there is none.

        Before it is multiplied with the mixing weight, unless the model multiplies what the experts take (llama4).
        """
        return self._take_layers("outputs")

    def masked(self, name: str = "experts") -> np.ma.MaskedArray[Any, Any]:
        """Give a column over layers with what is not there masked, so that it is never counted.

        Parameters
        ----------
        name
            ``experts``, ``weights``, ``logits``, ``scores``, ``gate_input`` or ``outputs``.

        Returns
        -------
        numpy.ma.MaskedArray
            The values are the column itself (a view where that is one), the mask is new: True where the layer was not
            computed or lost (:attr:`state`), where it has fewer experts, or uses fewer, than the widest layer, and
            where a value is NaN. Count with ``numpy.ma``'s functions, or with ``.compressed()``:
            ``np.bincount(trace.masked().compressed())``.

        Raises
        ------
        ChannelMissingError
            If it was not captured.
        """
        values = self._take_layers(name)
        missing = values == self.sentinel if name == "experts" else np.isnan(values)
        missing |= ~self.present[:, :, None]
        return np.ma.MaskedArray(values, missing)

    def to_xarray(self) -> xr.Dataset:
        """Give rows and layers as an xarray.Dataset with named dimensions (needs ``pip install moetrace[xarray]``).

        Dimensions: ``serial``, ``layer``, ``rank``, ``expert``, ``width``, as the channels have them. Variables: the
        channels and ``state``. Coordinates: each row's ``serial``, ``request``, ``context``, ``token``, ``position``
        and ``phase``; each layer's number. Arrays are views where the columns are; ids of no expert are -1 (so
        ``experts`` is a copy, int32), values that are missing NaN.

        Raises
        ------
        MoetraceError
            If xarray is not installed.
        """
        try:
            import xarray as xr
        except ImportError as e:
            raise MoetraceError("this needs xarray", why=str(e), fix="pip install 'moetrace[xarray]'") from e
        axes = {
            "experts": "rank",
            "weights": "rank",
            "logits": "expert",
            "scores": "expert",
            "gate_input": "width",
            "outputs": "rank",
        }
        found: dict[str, Any] = {"state": (("serial", "layer"), self.state)}
        for name, axis in axes.items():
            if name in self._trace.chain:
                values = self._take_layers(name)
                if name == "experts":
                    values = np.where(self.masked().mask, np.int32(-1), values.astype(np.int32))
                found[name] = (("serial", "layer", axis), values)
        names = self._trace.shown
        on_rows = {
            "serial": self.serial,
            "request": ("serial", self.request),
            "token": ("serial", self.token_ids),
            "position": ("serial", self.positions),
            "phase": ("serial", np.array(PHASES, object)[np.minimum(self.phase, 2)]),
            "context": ("serial", np.array(names, object)[self._trace.chain.owner(self._rows)]),
            "layer": self.layers,
        }
        return xr.Dataset(found, on_rows, {"trace": str(self._trace.path)})

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
        """One row per token: token_id, position, sequence, request, step, phase, text, context, serial.

        The numbers are views where the columns are; ``text`` is None where the trace has no vocabulary, and
        bytes of a piece that are not UTF-8 show as U+FFFD. With ``context`` and ``serial`` a row is found again in
        :meth:`to_pandas`, :attr:`Trace.events` and :attr:`Trace.attention`.
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
                "phase": categorical(np.minimum(self.phase, 2), PHASES),
                "text": self._trace.text(self.token_ids),
                "context": categorical(self._trace.chain.owner(self._rows), shown),
                "serial": self.serial,
            },
            copy=False,
        )


def categorical(codes: NDArray[Any], names: Sequence[str]) -> Any:
    """Give names by code as a pandas categorical; -1 is missing."""
    import pandas as pd

    return pd.Categorical.from_codes(codes.astype(np.int32), categories=list(names))  # type: ignore[call-overload]
