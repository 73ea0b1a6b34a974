"""``routed_experts``, as vLLM and SGLang give them: an array (tokens, layers, experts per token) for each request.

A ``.npy`` file is one request, and so is each array of a ``.npz``, and each ``.npy`` of a folder; −1 is no expert.
Which tokens, and of which phase, is not in it; layers are numbered from 0, as arrays are.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    malformed,
)

_MAX_USED = 256


def find(source: Path) -> list[Path]:
    """The files; empty if there is none."""
    if source.is_dir():
        return sorted(source.glob("*.npy"))
    return [source] if source.suffix in (".npy", ".npz") else []


def requests(source: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and (n, L, k) experts of each request; a pickle is never loaded."""
    for path in find(source):
        try:
            arrays = {path.stem: np.load(path, mmap_mode="r")} if path.suffix == ".npy" else _archive(path)
        except Exception as e:  # whatever numpy and zipfile make of a damaged file
            why = (str(e) or type(e).__name__)[:200]
            raise InputError(f"{path} cannot be read", why=why, fix="give arrays of numbers") from e
        for name, array in arrays.items():
            if (
                array.ndim != 3
                or array.dtype.kind not in "iu"
                or not (1 <= array.shape[1] < MAX_LAYERS and 1 <= array.shape[2] <= _MAX_USED)
            ):
                raise malformed(
                    path, None, name, f"is {array.dtype} of shape {array.shape}, not whole numbers (tokens, layers, k)",
                    "give routed_experts, an array (tokens, layers, experts per token)",
                )  # fmt: skip
            if array.size and (int(array.min()) < -1 or int(array.max()) >= MAX_EXPERTS):
                raise malformed(path, None, name, f"has numbers beyond -1 to {MAX_EXPERTS - 1}")
            in_order = np.sort(array, axis=2)
            if ((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] >= 0)).any():
                raise malformed(path, None, name, "names one expert twice in one layer of one token")
            yield name, array


def _archive(path: Path) -> dict[str, NDArray[Any]]:
    """A .npz file's arrays; a pickle is never loaded."""
    with path.open("rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays}


def shape(source: Path) -> Shape:
    """First reading."""
    found: tuple[int, int] | None = None
    highest = -1
    for name, array in requests(source):
        if found is not None and array.shape[1:] != found:
            raise malformed(
                source, None, name, f"has (layers, k) {array.shape[1:]} where others have {found}"
            )
        found = array.shape[1], array.shape[2]
        highest = max(highest, int(array.max(initial=-1)))
    if found is None or highest < 0:
        raise InputError(f"{source} holds no routing", fix="give arrays (tokens, layers, experts per token)")
    return Shape(tuple(range(found[0])), found[1], highest + 1, 0)


def pieces(source: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One piece and one request per array."""
    for name, array in requests(source):
        n = len(array)
        if n:
            experts = array.astype(np.int64)
            yield Piece(
                name,
                label,
                np.array(shape.layers, np.int64),
                np.where((experts >= 0).any(axis=2), PRESENT, LOST).astype(np.uint8),
                experts,
                None,
                token=int_array(n, -1),
                position=int_array(n, -1),
                predicted=None,
                time_ns=int_array(n, -1),
                phase=np.full(n, PHASE_UNKNOWN, np.uint8),
                row=np.arange(n, dtype=np.int64),
            )
