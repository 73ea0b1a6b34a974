"""``pos,layer,id0,id1,…``: a line for each token and layer, with the token's position.

Lines may come token by token or layer by layer. A (position, layer) that comes again begins the next request; a token's
layer without a line is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

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

HEADER = ("pos,layer,", "position,layer,")
_MAX_POSITION = 1 << 31


def _requests(path: Path) -> Iterator[dict[tuple[int, int], list[int]]]:
    """(position, layer) -> experts of each request."""
    current: dict[tuple[int, int], list[int]] = {}
    width = 0
    for line, text in lines(path):
        if text.startswith(HEADER):  # files may have been put one after the other
            continue
        words = text.split(",")
        width = width or len(words)
        if len(words) < 3 or len(words) != width:
            raise malformed(
                path, line, "line", f"has {len(words)} values: a line is pos,layer,id0,… with {width}"
            )
        at = (
            integer(path, line, "pos", words[0], _MAX_POSITION),
            integer(path, line, "layer", words[1], MAX_LAYERS),
        )
        ids = [
            -1 if word.strip() == "-1" else integer(path, line, "id", word, MAX_EXPERTS) for word in words[2:]
        ]
        known = [e for e in ids if e >= 0]
        if len(set(known)) < len(known):
            raise malformed(path, line, "id", "names one expert twice")
        if at in current:
            yield current
            current = {}
        current[at] = ids
    if current:
        yield current


def shape(path: Path) -> Shape:
    """First reading."""
    layers: set[int] = set()
    highest, k = -1, 0
    for request in _requests(path):
        layers |= {layer for _, layer in request}
        for ids in request.values():
            highest, k = max(highest, *ids), len(ids)
    if highest < 0:
        raise InputError(f"{path} holds no routing", fix="give lines pos,layer,id0,id1,…")
    return Shape(tuple(sorted(layers)), k, highest + 1, 0, knows=frozenset({"position"}))


def pieces(path: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One piece and one request per run of positions."""
    index = {layer: i for i, layer in enumerate(shape.layers)}
    for number, request in enumerate(_requests(path)):
        positions = sorted({position for position, _ in request})
        row = {position: i for i, position in enumerate(positions)}
        n = len(positions)
        experts = np.full((n, len(shape.layers), shape.n_expert_used), -1, np.int64)
        for (position, layer), ids in request.items():
            experts[row[position], index[layer]] = ids
        yield Piece(
            f"{path.stem}-{number}",
            label,
            np.array(shape.layers, np.int64),
            np.where((experts >= 0).any(axis=2), PRESENT, LOST).astype(np.uint8),
            experts,
            None,
            token=int_array(n, -1),
            position=np.array(positions, np.int64),
            predicted=None,
            time_ns=int_array(n, -1),
            phase=np.full(n, PHASE_UNKNOWN, np.uint8),
            row=np.arange(n, dtype=np.int64),
        )
