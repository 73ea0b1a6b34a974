"""Our own Parquet, Arrow and CSV files, read back: a row for each choice, as :mod:`moetrace.trace.longform` has them.

What the rows do not say (layers and experts that were never chosen, clients' ids, which entries were not computed and
which lost) stands in the schema's metadata. CSV has none, and a file whose metadata another program dropped is read
without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.described import Described
from moetrace.trace.importers.source import LOST, MAX_EXPERTS, MAX_LAYERS, PHASE_UNKNOWN, PRESENT, Shape
from moetrace.trace.longform import import_arrow
from moetrace.trace.view import PHASES

_OF_TOKEN = ("request", "token", "position", "phase")
_NUMBERS = ("request", "token", "position", "layer", "expert", "rank", "serial")
NAMES = (*_NUMBERS, "label", "phase", "weight")
#: columns that count from 0, and how many there can be
_BELOW = {"layer": MAX_LAYERS, "expert": MAX_EXPERTS, "rank": 256}
_BATCH = 1 << 19  # choices read together
_PARQUET, _FILE, _STREAM, _CSV = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"csv"
_AGAIN = "export it again"

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Tokens:
    """n consecutive tokens of a file.

    Attributes
    ----------
    serial, request, token, position, phase
        (n,) int64.
    state
        (n, L) uint8: 0 lost, 1 present, 2 not computed.
    experts
        (n, L, k) int64; −1 where none is.
    weights
        (n, L, k) float32; NaN where none is.
    """

    serial: NDArray[np.int64]
    request: NDArray[np.int64]
    token: NDArray[np.int64]
    position: NDArray[np.int64]
    phase: NDArray[np.int64]
    state: NDArray[np.uint8]
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class LongFormFile:
    """A file, and what a first reading found.

    Attributes
    ----------
    shape
        Layers, experts, k.
    described
        What the metadata says; None where there is none.
    labels
        Request number -> label, or None, in the order of their first row.
    """

    path: Path
    shape: Shape
    described: Described | None
    labels: dict[int, str | None] = field(default_factory=dict)

    def tokens(self) -> Iterator[Tokens]:
        """Give the tokens, in pieces. Raises InputError where the rows contradict each other."""
        left: Columns = {}
        last = -1
        several = self.described is not None and self.described.contexts > 1
        for columns, _ in _pieces(self.path):
            columns = {name: np.concatenate([left[name], a]) if left else a for name, a in columns.items()}
            serial = columns["serial"]
            if not several and (serial[0] < last or (serial[1:] < serial[:-1]).any()):
                raise InputError(
                    f"{self.path}: its rows are not in the order of the recording",
                    why="serials do not ascend",
                    fix=f"sort them by serial, layer and rank; or {_AGAIN}",
                )
            last = int(serial[-1])
            # the last token may go on in the next piece
            whole = int(np.flatnonzero(serial != last)[-1]) + 1 if (serial != last).any() else 0
            left = {name: a[whole:] for name, a in columns.items()}
            if whole:
                yield self._tokens({name: a[:whole] for name, a in columns.items()})
        yield self._tokens(left)

    def _tokens(self, columns: Columns) -> Tokens:
        serial = columns["serial"]
        starts = np.flatnonzero(np.append(True, serial[1:] != serial[:-1]))
        row = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(serial))))
        for name in _OF_TOKEN:
            if (columns[name] != columns[name][starts][row]).any():
                raise InputError(f"{self.path}: rows of one serial differ in {name}", fix=_AGAIN)
        layers = np.asarray(self.shape.layers)
        layer = np.searchsorted(layers, columns["layer"])
        shape = (len(starts), len(layers), self.shape.n_expert_used)
        place = np.ravel_multi_index((row, layer, columns["rank"]), shape)
        if len(np.unique(place)) != len(place):
            why = "a serial, layer and rank comes again"
            raise InputError(f"{self.path} has a choice twice", why=why, fix=_AGAIN)
        experts, weights = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)
        experts.reshape(-1)[place] = columns["expert"]
        weights.reshape(-1)[place] = columns["weight"]
        state = np.full(shape[:2], LOST, np.uint8)
        if self.described is not None:
            self.described.mark(serial[starts], state)
        state[row, layer] = PRESENT
        request, token, position, phase = (columns[name][starts] for name in _OF_TOKEN)
        return Tokens(serial[starts], request, token, position, phase, state, experts, weights)


def is_long_form(source: Path) -> bool:
    """Whether a file is Parquet, Arrow or CSV with our columns."""
    with contextlib.suppress(Exception):  # damaged, or something else: who reads it says so
        kind = _kind(source)
        return kind == _CSV or (kind != b"" and set(NAMES) <= set(_schema(source).names))
    return False


def read_long_form(source: Path) -> LongFormFile:
    """Read a file's shape and labels. Raises InputError if it is malformed, and MoetraceError without pyarrow."""
    import_arrow()
    described = None if _kind(source) == _CSV else Described.of(_schema(source).metadata)
    labels: dict[int, str | None] = {}
    layers: set[int] = set()
    k = seen = entries = 0
    weights = False
    for columns, names in _pieces(source):
        layers |= set(np.unique(columns["layer"]).tolist())
        k, seen = max(k, int(columns["rank"].max()) + 1), max(seen, int(columns["expert"].max()) + 1)
        entries += int((columns["rank"] == 0).sum())
        weights = weights or not np.isnan(columns["weight"]).all()
        numbers, first = np.unique(columns["request"], return_index=True)
        for number, at in sorted(
            zip(numbers.tolist(), first.tolist(), strict=True), key=lambda pair: pair[1]
        ):
            labels.setdefault(number, names[at])
    if not layers:
        raise InputError(f"{source} holds no routing", fix="give a file that has rows")
    labels.pop(-1, None)
    if described is not None and described.entries != entries:
        described = replace(described, produced=None)  # rows were left out since: that is no loss
    said = described or Described(tuple(sorted(layers)), (0,), (k,))
    if not layers <= set(said.layers) or k > max(said.n_expert_used):
        raise InputError(f"{source}: its rows are not what its metadata says", fix=_AGAIN)
    shape = Shape(
        layers=tuple(said.layers),
        n_expert_used=max(said.n_expert_used),
        n_expert_seen=seen,
        n_embd=0,
        weights=weights,
        knows=frozenset({"token", "position", "phase"}),
        n_expert=max(said.n_expert),
        model=said.model,
        says_loss=said.produced is not None,
    )
    return LongFormFile(source, shape, described, labels)


def _kind(source: Path) -> bytes:
    """What kind of file it is; empty for others."""
    with source.open("rb") as file:
        line = file.readline(1 << 10)
    if set(NAMES) <= set(line.decode("ascii", "replace").strip().split(",")):
        return _CSV
    return next((magic for magic in (_PARQUET, _FILE, _STREAM) if line.startswith(magic)), b"")


def _schema(source: Path) -> Any:
    import_arrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = _kind(source)
    if kind == _PARQUET:
        return pq.read_schema(source)
    with pa.memory_map(str(source)) as mapped:
        return (pa.ipc.open_file if kind == _FILE else pa.ipc.open_stream)(mapped).schema


def _csv(source: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    # what is empty has no type that could be guessed
    types = {
        **dict.fromkeys(_NUMBERS, pa.int64()),
        "label": pa.string(),
        "phase": pa.string(),
        "weight": pa.float64(),
    }
    options = csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""])
    return csv.open_csv(source, convert_options=options)


def _batches(source: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = _kind(source)
    if kind == _PARQUET:
        yield from pq.ParquetFile(source).iter_batches(_BATCH, columns=list(NAMES))
        return
    if kind == _CSV:
        yield from _csv(source)
        return
    with pa.memory_map(str(source)) as mapped:
        if kind == _FILE:
            whole = pa.ipc.open_file(mapped)
            yield from (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            yield from pa.ipc.open_stream(mapped)


def _pieces(source: Path) -> Iterator[tuple[Columns, NDArray[np.object_]]]:
    """The columns that are numbers, phase among them, and the labels, of each batch; they are checked."""
    import pyarrow as pa

    def refuse(name: str, why: str) -> InputError:
        return InputError(f"{source}: {name}: {why}", fix=_AGAIN)

    try:
        for batch in _batches(source):
            if not batch.num_rows:
                continue
            out: Columns = {}
            for name in _NUMBERS:
                column = batch.column(name)
                if not pa.types.is_integer(column.type) or column.null_count:
                    raise refuse(name, "is not all whole numbers")
                out[name] = np.asarray(column).astype(np.int64)
                most = _BELOW.get(name)
                if most and not 0 <= out[name].min() <= out[name].max() < most:
                    raise refuse(name, f"is not from 0 to {most - 1}")
            weight = batch.column("weight").cast(pa.float32()).fill_null(np.nan)
            out["weight"] = np.asarray(weight)
            codes, said = _coded(batch.column("phase"))
            if unknown := [text for text in said if text not in PHASES]:
                raise refuse("phase", f"{unknown[0]!r} is none")
            numbers = np.array([*(PHASES.index(text) for text in said), PHASE_UNKNOWN])
            out["phase"] = numbers[codes]
            codes, said = _coded(batch.column("label"))
            yield out, np.array([*said, None], object)[codes]
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{source} cannot be read", why=str(e)[:200], fix=_AGAIN) from e


def _coded(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    """Codes of texts, −1 where there is none, and the texts."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    return np.asarray(column.indices.fill_null(-1)).astype(np.int64), [
        str(t) for t in column.dictionary.to_pylist()
    ]
