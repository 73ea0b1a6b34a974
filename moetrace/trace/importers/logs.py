"""The text logs of a patched llama-server, and of llama.cpp's ``moe-trace``: chosen experts, and the router's input.

``layer_id,expert_ids`` has a header, then one line per layer and token, ids separated by spaces. ``layer,expert`` has
one line for each expert of each token; it does not say where a token ends, so k must be given.
``gate_input,layer_id,token_id,value value ...`` has no header; ``token_id`` is the row within the ubatch.

Neither log says where an ubatch ends, which sequence a row belongs to, or whether it is prefill. Within an
ubatch the layers ascend and each layer lists all rows, so a layer that falls back begins the next one. The
last layer is computed for output rows only: where it lists fewer rows than the others, the log does not say
which. Those records are counted and their cells marked lost, unless the data are wanted as published; then
they are given to the last rows, which is right when only the end of a prompt asks for logits, and is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.importers.source import (
    LOST,
    MAX_EXPERTS,
    MAX_LAYERS,
    PHASE_UNKNOWN,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    integer,
    lines,
    malformed,
)

EXPERT_HEADER = "layer_id,expert_ids"
SINGLE_HEADER = "layer,expert"
GATE = "gate_input"
RECORD = re.compile(r"[0-9]{1,9},[0-9]{1,9}(?: [0-9]{1,9})*")
MAX_UBATCH = 1 << 16
"""rows; llama.cpp's default is 512"""

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Record = NDArray[Any]  # Ints or Floats


@dataclass
class _Ubatch:
    """Records of one ubatch by layer, in order."""

    records: dict[int, list[Record]] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=dict)
    """layer -> line of its first record"""

    @property
    def layer(self) -> int:
        return next(reversed(self.records), -1)

    def add(self, layer: int, line: int, record: Record) -> None:
        self.begins.setdefault(layer, line)
        self.records.setdefault(layer, []).append(record)


# -- chosen experts --------------------------------------------------------------------------------------


def expert_records(path: Path, tally: Tally) -> Iterator[tuple[int, int, Ints]]:
    """Line, layer and (w,) expert ids of each record."""
    for line, text in lines(path):
        if text.strip() in (EXPERT_HEADER, SINGLE_HEADER):  # logs may have been put one after the other
            continue
        if text.startswith(f"{GATE},"):
            tally.lines_left_out += 1
            continue
        if RECORD.fullmatch(text):  # as it should be; what follows finds out what is wrong
            first, _, rest = text.partition(",")
            words = [int(word) for word in rest.split(" ")]
            if int(first) < MAX_LAYERS and max(words) < MAX_EXPERTS and len(set(words)) == len(words):
                yield line, int(first), np.array(words, np.int64)
                continue
        first, comma, rest = text.partition(",")
        if not comma:
            raise malformed(path, line, "expert_ids", "is missing: a line is `layer_id,expert_ids`")
        layer = integer(path, line, "layer_id", first, MAX_LAYERS)
        ids = [integer(path, line, "expert_ids", word, MAX_EXPERTS) for word in rest.split()]
        if not ids:
            raise malformed(path, line, "expert_ids", "is empty")
        if len(set(ids)) < len(ids):
            raise malformed(path, line, "expert_ids", "names one expert twice")
        yield line, layer, np.array(ids, np.int64)


def expert_shape(path: Path, k: int | None = None) -> Shape:
    """First reading. k, if not given, is the smallest number of ids on a line.

    Raises InputError where lines have one id each and may be either tokens or experts of a token, and k is not given.
    """
    layers: set[int] = set()
    highest, narrowest, widest = -1, MAX_EXPERTS, 0
    previous, again = -1, False
    for _, layer, ids in expert_records(path, Tally()):
        layers.add(layer)
        highest = max(highest, int(ids.max()))
        narrowest, widest = min(narrowest, len(ids)), max(widest, len(ids))
        again |= layer == previous
        previous = layer
    if not layers:
        raise InputError(f"{path} holds no expert ids", fix=f"give a log of `{EXPERT_HEADER}` lines")
    header = next(lines(path), (0, ""))[1].strip()
    single = widest == 1 and (header == SINGLE_HEADER or (again and header != EXPERT_HEADER))
    if single and k is None:
        raise InputError(
            f"{path} has one expert on each line, and does not say how many lines make a token",
            why="of a model with top-4 routing four lines are one token; read as top-1 they would be four",
            fix="give the number of experts per token: --n-expert-used K (1 if the model's routing is top-1)",
        )
    return Shape(tuple(sorted(layers)), k or narrowest, highest + 1, 0, one_per_line=single and k != 1)


def expert_pieces(
    path: Path, shape: Shape, tally: Tally, *, label: str = "", as_published: bool = False
) -> Iterator[Piece]:
    """One piece per ubatch, all of one request.

    Lines with more than k ids are rows of llama.cpp's warm-up, which runs all experts, if they name every
    expert from 0 up; they are left out and counted (as published: kept, cut to k). Any other number of ids is
    an error.
    """
    k = shape.n_expert_used
    found = expert_records(path, tally)

    def wanted() -> Iterator[tuple[int, int, Ints, bool]]:
        previous = -1
        for line, layer, ids in _together(path, found, shape) if shape.one_per_line else found:
            if len(ids) != k:
                if len(ids) < k or not np.array_equal(np.sort(ids), np.arange(len(ids))):
                    raise malformed(path, line, "expert_ids", f"has {len(ids)} ids where others have {k}")
                if not as_published:
                    # a row has a record in each layer: count it in the first
                    tally.rows_all_experts += layer == shape.layers[0]
                    previous = MAX_LAYERS  # what follows is another ubatch
                    continue
            yield line, layer, ids[:k], layer < previous or len(shape.layers) == 1
            previous = layer

    for ubatch, last in _ubatches(path, wanted()):
        n, table, state = _placed(path, shape, ubatch, last, tally, as_published)
        experts = np.full((n, len(shape.layers), k), -1, np.int64)
        for i, rows, records in table:
            experts[rows, i] = records
        yield _piece(path, label, shape, state, experts, None)


def _together(
    path: Path, records: Iterator[tuple[int, int, Ints]], shape: Shape
) -> Iterator[tuple[int, int, Ints]]:
    """Records of one id each as records of k; of every expert, where a run names each once, as the warm-up does."""
    k, every = shape.n_expert_used, shape.n_expert_seen
    for layer, group in groupby(records, key=lambda record: record[1]):
        run = list(group)
        line, ids = run[0][0], np.array([int(record[2][0]) for record in run])
        whole = ids.reshape(-1, every) if every > k and ids.size % every == 0 else ids[:0].reshape(0, 1)
        if whole.size and (np.sort(whole, axis=1) == np.arange(every)).all():
            yield from ((line, layer, row) for row in whole)
            continue
        if ids.size % k:
            raise malformed(
                path, line, "expert", f"begins {ids.size} lines of layer {layer}, which are no tokens of {k} experts",
                "give the model's number of experts per token: --n-expert-used",
            )  # fmt: skip
        for i, row in enumerate(ids.reshape(-1, k)):
            if np.unique(row).size < k:
                raise malformed(
                    path, run[i * k][0], "expert", f"begins {k} lines that name one expert twice",
                    "give the model's number of experts per token: --n-expert-used",
                )  # fmt: skip
            yield run[i * k][0], layer, row


# -- gate inputs -----------------------------------------------------------------------------------------


def gate_records(path: Path, tally: Tally) -> Iterator[tuple[int, int, int, Floats]]:
    """Line, layer, row and (D,) values of each record."""
    for line, text in lines(path):
        parts = text.split(",", 3)
        if parts[0] != GATE:
            tally.lines_left_out += 1
            if text.strip() != EXPERT_HEADER and not parts[0].strip().isdigit():
                raise malformed(
                    path, line, GATE, f"a line begins with `{GATE},` and not with {parts[0][:40]!r}"
                )
            continue
        if len(parts) < 4:
            missing = ("layer_id", "token_id", "values")[len(parts) - 1]
            raise malformed(path, line, missing, f"is missing: a line is `{GATE},layer_id,token_id,values`")
        layer = integer(path, line, "layer_id", parts[1], MAX_LAYERS)
        row = integer(path, line, "token_id", parts[2], MAX_UBATCH)
        try:
            values = np.array(parts[3].split(), dtype=np.float32)
        except ValueError as e:
            raise malformed(path, line, "values", str(e)) from None
        if not values.size:
            raise malformed(path, line, "values", "is empty")
        yield line, layer, row, values


def gate_shape(path: Path) -> Shape:
    """First reading."""
    layers: set[int] = set()
    width = 0
    for line, layer, _, values in gate_records(path, Tally()):
        layers.add(layer)
        width = width or len(values)
        if len(values) != width:
            raise malformed(
                path, line, "values", f"has {len(values)} numbers where the lines before have {width}"
            )
    if not layers:
        raise InputError(
            f"{path} holds no gate inputs", fix=f"give a log of `{GATE},layer_id,token_id,values` lines"
        )
    return Shape(tuple(sorted(layers)), 0, 0, width)


def gate_pieces(
    path: Path, shape: Shape, tally: Tally, *, label: str = "", as_published: bool = False
) -> Iterator[Piece]:
    """One piece per ubatch, all of one request; there are no experts."""

    def wanted() -> Iterator[tuple[int, int, Floats, bool]]:
        previous = (-1, -1)
        for line, layer, row, values in gate_records(path, tally):
            new = layer < previous[0] or (layer == previous[0] and row <= previous[1])
            expected = 0 if new or layer != previous[0] else previous[1] + 1
            if row != expected:
                raise malformed(path, line, "token_id", f"is {row} where {expected} follows in layer {layer}")
            yield line, layer, values, new
            previous = (layer, row)

    for ubatch, last in _ubatches(path, wanted()):
        n, table, state = _placed(path, shape, ubatch, last, tally, as_published)
        vectors = np.full((n, len(shape.layers), shape.n_embd), np.nan, np.float32)
        for i, rows, records in table:
            vectors[rows, i] = records
        yield _piece(path, label, shape, state, None, vectors)


# -- both ------------------------------------------------------------------------------------------------


def _ubatches(
    path: Path, records: Iterator[tuple[int, int, Ints, bool]] | Iterator[tuple[int, int, Floats, bool]]
) -> Iterator[tuple[_Ubatch, bool]]:
    """Group records; the bool says that the log ends with this ubatch."""
    current = _Ubatch()
    for line, layer, record, new in records:
        if new and current.records:
            yield current, False
            current = _Ubatch()
        current.add(layer, line, record)
        if len(current.records[layer]) > MAX_UBATCH:
            raise malformed(
                path,
                line,
                "layer_id",
                f"layer {layer} has more than {MAX_UBATCH} rows in one ubatch",
                "is the log sorted by layer? Give it in the order written",
            )
    if current.records:
        yield current, True


def _placed(
    path: Path, shape: Shape, ubatch: _Ubatch, at_end: bool, tally: Tally, as_published: bool
) -> tuple[int, list[tuple[int, slice, Record]], NDArray[np.uint8]]:
    """Which rows each layer's records belong to: n, (layer index, rows, records) and the state (n, L)."""
    n = max(len(r) for r in ubatch.records.values())
    state = np.full((n, len(shape.layers)), LOST, np.uint8)
    table = []
    for layer, records in ubatch.records.items():
        i, m = shape.layers.index(layer), len(records)
        if m == n:
            rows = slice(0, n)
        elif layer == shape.layers[-1]:
            if not as_published:
                tally.records_unplaced += m
                continue
            rows = slice(n - m, n)
        elif at_end and layer == ubatch.layer:  # the log was cut off within this layer
            rows = slice(0, m)
        else:
            raise malformed(
                path,
                ubatch.begins[layer],
                "layer_id",
                f"layer {layer} has {m} rows in an ubatch where another layer has {n}",
            )
        state[rows, i] = PRESENT
        table.append((i, rows, np.stack(records)))
    return n, table, state


def _piece(
    path: Path,
    label: str,
    shape: Shape,
    state: NDArray[np.uint8],
    experts: Ints | None,
    gate_input: Floats | None,
) -> Piece:
    n = len(state)
    return Piece(
        path.stem,
        label or path.stem,
        np.array(shape.layers, np.int64),
        state,
        experts,
        gate_input,
        token=int_array(n, -1),
        position=int_array(n, -1),
        predicted=None,
        time_ns=int_array(n, -1),
        phase=np.full(n, PHASE_UNKNOWN, np.uint8),
        row=np.arange(n, dtype=np.int64),
    )
