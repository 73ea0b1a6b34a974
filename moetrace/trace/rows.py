"""From ring records to columns: a pure transposition, shared by the drain and by recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.trace.record import FIELD_DTYPES, Field, RecordKind, State

Columns = dict[str, NDArray[Any]]
ColumnSpec = dict[str, tuple[str, tuple[int, ...]]]

#: columns of ``rows`` that come from the record's head: name -> dtype
HEAD_COLUMNS = {
    "serial": "<u8",
    "time_ns": "<i8",
    "step": "<u4",
    "batch": "<u4",
    "token": "<i4",
    "position": "<i4",
    "sequence": "<i4",
    "n_sequences": "<u2",
    "flags": "<u4",
    "row": "<u4",
}
#: the same of contexts that number their events and tasks: name -> (dtype, field of the head)
NUMBER_COLUMNS = {"task": ("<i4", "arg0"), "events_before": ("<u4", "arg1")}
#: columns of ``rows`` that the request assigner adds
REQUEST_COLUMNS = {"phase": "|u1", "request": "<i8"}
#: columns of ``events``, and the field of the record's head that each comes from
EVENT_COLUMNS: ColumnSpec = {
    "serial": ("<u8", ()),
    "time_ns": ("<i8", ()),
    "code": ("<i4", ()),
    "sequence": ("<i4", ()),
    "p0": ("<i4", ()),
    "p1": ("<i4", ()),
    "arg": ("<i4", ()),
}
_EVENT_SOURCES = {"code": "token", "p0": "position", "p1": "arg0", "arg": "arg1", "number": "row"}
#: payload columns with a layer axis, filled where a layer is not present
LAYER_COLUMNS = ("experts", "weights", "logits", "scores", "gate_input", "outputs")

#: a field of the ring that only attention records use; it is no column
ATTENTION_FIELD = "attention"

MAX_LAYERS = 1 << 16
MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Layout:
    """What the columns of one context mean.

    Attributes
    ----------
    layers
        llama.cpp's number of each index of a layer axis, ascending; L of them.
    n_expert, n_expert_used
        Experts, and experts chosen per token, of each layer.
    fields
        The payload columns, ``state`` among them.
    numbered
        Events are numbered, and every row says how many came before it and which task of its sequence it is of:
        what was lost of them shows.
    """

    layers: tuple[int, ...]
    n_expert: tuple[int, ...]
    n_expert_used: tuple[int, ...]
    fields: tuple[Field, ...]
    numbered: bool = False

    @classmethod
    def from_context(cls, context: Mapping[str, Any], fields: Sequence[Field] | None = None) -> Layout:
        """Read a layout out of context.json, or out of a ring's JSON text and its field table.

        Raises
        ------
        TraceError
            If a key is missing or impossible, or if the fields do not fit the layers.
        """

        def ints(key: str, low: int, high: int) -> tuple[int, ...]:
            value = context.get(key)
            if not (isinstance(value, list) and all(type(v) is int and low <= v <= high for v in value)):
                raise _bad(f"its key {key!r} is no list of numbers from {low} to {high}")
            return tuple(value)

        layers = ints("layers", 0, MAX_LAYERS)
        least = 0 if context.get("collector") == "import" else 1  # an import may not know
        n_expert = ints("n_expert", least, MAX_EXPERTS)
        n_used = ints("n_expert_used", least, MAX_EXPERTS)
        if not 1 <= len(layers) <= MAX_LAYERS or not len(layers) == len(n_expert) == len(n_used):
            raise _bad("layers, n_expert and n_expert_used differ in length, or are empty")
        if list(layers) != sorted(set(layers)):
            raise _bad("its layers do not ascend")
        if any(k > n for k, n in zip(n_used, n_expert, strict=True)):
            raise _bad("a layer uses more experts than it has")
        if fields is None:
            raw = context.get("fields")
            if not isinstance(raw, list):
                raise _bad("it lists no fields")
            fields = [_field(f) for f in raw]
        columns = tuple(f for f in fields if f.name != ATTENTION_FIELD)
        layout = cls(layers, n_expert, n_used, columns, context.get("numbered") is True)
        layout._check()
        return layout

    def _check(self) -> None:
        n_layers, k, n_experts = len(self.layers), max(self.n_expert_used), max(self.n_expert)
        expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            "state": (("|u1",), (n_layers,)),
            "experts": (("|u1",) if n_experts <= 255 else ("<u2",), (n_layers, k)),
            "weights": (("<f4",), (n_layers, k)),
            "logits": (("<f4",), (n_layers, n_experts)),
            "scores": (("<f4",), (n_layers, n_experts)),
            "outputs": (("<f4",), (n_layers, k)),
        }
        names = [field.name for field in self.fields]
        taken = {*HEAD_COLUMNS, *NUMBER_COLUMNS, *REQUEST_COLUMNS}
        if "state" not in names or len(set(names)) != len(names) or taken & set(names):
            raise _bad("its fields lack `state`, or two columns have one name")
        for field in self.fields:
            if field.name == "gate_input" and (len(field.shape) != 2 or field.shape[0] != n_layers):
                raise _bad(f"its field 'gate_input' has the shape {field.shape}")
            dtypes, shape = expected.get(field.name, ((field.dtype,), field.shape))
            if field.dtype not in dtypes or field.shape != shape:
                raise _bad(
                    f"its field {field.name!r} is {field.dtype} {field.shape}, not {dtypes[0]} {shape}"
                )

    @property
    def k(self) -> int:
        """The largest number of experts chosen per token and layer."""
        return max(self.n_expert_used)

    @cached_property
    def sentinel(self) -> int:
        """The expert id that means none: 255 or 65535."""
        dtypes = [field.dtype for field in self.fields if field.name == "experts"]
        return 65535 if dtypes == ["<u2"] else 255

    @property
    def row_columns(self) -> ColumnSpec:
        """The columns of the table ``rows``: name -> (dtype, shape per row)."""
        numbers = {name: dtype for name, (dtype, _) in NUMBER_COLUMNS.items() if self.numbered}
        head = {name: (dtype, ()) for name, dtype in {**HEAD_COLUMNS, **numbers, **REQUEST_COLUMNS}.items()}
        return {**head, **{field.name: (field.dtype, field.shape) for field in self.fields}}

    @property
    def event_columns(self) -> ColumnSpec:
        """The columns of the table ``events``: name -> (dtype, shape per row)."""
        return {**EVENT_COLUMNS, "number": ("<u4", ())} if self.numbered else EVENT_COLUMNS


def _bad(why: str) -> TraceError:
    return TraceError("the layout of a context does not make sense", why=why, fix="capture the trace again")


def _field(raw: Any) -> Field:
    if not isinstance(raw, dict):
        raise _bad("a field is no object")
    name, dtype, shape = raw.get("name"), raw.get("dtype"), raw.get("shape")
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name.startswith("."):
        raise _bad(f"a field has the name {name!r}")
    if dtype not in FIELD_DTYPES:
        raise _bad(f"field {name!r} has the type {dtype!r}")
    if not (
        isinstance(shape, list)
        and 1 <= len(shape) <= 3
        and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    ):
        raise _bad(f"field {name!r} has the shape {shape!r}")
    return Field(name, dtype, tuple(shape))


def _copy(column: NDArray[Any]) -> NDArray[Any]:
    # not ascontiguousarray: that hands a single record through as a view of the ring
    return np.array(column, order="C", copy=True)


def rows_from_records(records: NDArray[np.void], layout: Layout) -> Columns:
    """Transpose the row records into the columns of the table ``rows``, all but ``phase`` and ``request``.

    Parameters
    ----------
    records
        Structured array (n,), one segment of a ring; other kinds of records among it are left out.
    layout
        Of the ring's context.

    Returns
    -------
    dict of arrays
        Contiguous copies, first axis the rows. Where ``state`` is not PRESENT, and past a layer's own
        ``n_expert_used`` or ``n_expert``, experts hold the sentinel and floats hold NaN, whatever the record
        held there.
    """
    is_row = records["kind"] == RecordKind.ROW
    if not is_row.all():
        records = records[is_row]
    columns: Columns = {name: _copy(records[name]) for name in HEAD_COLUMNS}
    for name, (dtype, source) in NUMBER_COLUMNS.items() if layout.numbered else ():
        columns[name] = _copy(records[source]).view(dtype)
    for field in layout.fields:
        columns[field.name] = _copy(records[field.name])
    absent = columns["state"] != State.PRESENT
    some_absent = bool(absent.any())
    uneven = {
        "experts": layout.n_expert_used,
        "weights": layout.n_expert_used,
        "logits": layout.n_expert,
        "scores": layout.n_expert,
        "outputs": layout.n_expert_used,
    }
    for name in LAYER_COLUMNS:
        if name not in columns:
            continue
        column = columns[name]
        fill = layout.sentinel if name == "experts" else np.nan
        if some_absent:
            column[absent] = fill
        for i, n in enumerate(uneven.get(name, ())):
            if n < column.shape[2]:
                column[:, i, n:] = fill
    return columns


def events_from_records(records: NDArray[np.void], layout: Layout) -> Columns:
    """Transpose the event records into the columns of the table ``events``, as contiguous copies."""
    events = records[records["kind"] == RecordKind.EVENT]
    return {name: _copy(events[_EVENT_SOURCES.get(name, name)]) for name in layout.event_columns}
