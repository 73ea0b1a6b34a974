"""``routed_experts``, as vLLM and SGLang give them: an array (tokens, layers, experts per token) for each request.

A ``.npy`` file is one request, and so is each array of a ``.npz``, and each ``.npy`` of a folder; −1 is no expert.
Which tokens, and of which phase, is not in it; layers are numbered from 0, as arrays are.

JSON lines have one request each, ``routed_experts`` at the top, in ``meta_info`` or in ``choices``: nested lists, or
base64 of a .npy file or of int32 with ``shape`` beside it; ``tokens``, ``layers`` and ``id`` are read if there, as
moetrace's own export writes them.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    is_int,
    lines,
    malformed,
    parse_object,
)

_MAX_USED = 256
KEY = "routed_experts"


@dataclass(frozen=True)
class Routed:
    """One request: (n, L, k) experts, and what else its source says; ``line`` is None of an array's file."""

    name: str
    experts: NDArray[Any]
    layers: tuple[int, ...]
    tokens: NDArray[np.int64] | None
    path: Path
    line: int | None


def find(source: Path) -> list[Path]:
    """The files; empty if there is none."""
    if source.is_dir():
        return sorted(source.glob("*.npy"))
    return [source] if source.suffix in (".npy", ".npz") else []


def requests(source: Path) -> Iterator[Routed]:
    """The requests; a pickle is never loaded."""
    for one in _of_arrays(source) if find(source) else _of_lines(source):
        array, (path, line) = one.experts, (one.path, one.line)
        if (
            array.ndim != 3
            or array.dtype.kind not in "iu"
            or not (1 <= array.shape[1] < MAX_LAYERS and 1 <= array.shape[2] <= _MAX_USED)
        ):
            raise malformed(
                path, line, one.name, f"is {array.dtype} of shape {array.shape}, not whole numbers (tokens, layers, k)",
                "give routed_experts, an array (tokens, layers, experts per token)",
            )  # fmt: skip
        if array.size and (int(array.min()) < -1 or int(array.max()) >= MAX_EXPERTS):
            raise malformed(path, line, one.name, f"has numbers beyond -1 to {MAX_EXPERTS - 1}")
        in_order = np.sort(array, axis=2)
        if ((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] >= 0)).any():
            raise malformed(path, line, one.name, "names one expert twice in one layer of one token")
        if one.layers and len(one.layers) != array.shape[1]:
            raise malformed(
                path, line, "layers", f"are {len(one.layers)}, and the array has {array.shape[1]}"
            )
        if one.tokens is not None and len(one.tokens) != len(array):
            raise malformed(path, line, "tokens", f"are {len(one.tokens)}, and the array has {len(array)}")
        yield one


def _of_arrays(source: Path) -> Iterator[Routed]:
    for path in find(source):
        try:
            arrays = {path.stem: np.load(path, mmap_mode="r")} if path.suffix == ".npy" else _archive(path)
        except Exception as e:  # whatever numpy and zipfile make of a damaged file
            why = (str(e) or type(e).__name__)[:200]
            raise InputError(f"{path} cannot be read", why=why, fix="give arrays of numbers") from e
        for name, array in arrays.items():
            yield Routed(name, array, (), None, path, None)


def _of_lines(source: Path) -> Iterator[Routed]:
    for line, text in lines(source):
        said = parse_object(source, line, text)
        name = next((str(said[key]) for key in ("id", "request") if said.get(key) is not None), str(line))
        choices = said.get("choices")
        places = [said, said.get("meta_info"), *(choices if isinstance(choices, list) else [])]
        found = [place for place in places if isinstance(place, dict) and place.get(KEY) is not None]
        if not found:
            raise malformed(source, line, KEY, "is missing")
        for i, place in enumerate(found):
            yield Routed(
                name if len(found) == 1 else f"{name}-{i}",
                _decoded(source, line, place),
                _numbers(source, line, "layers", said.get("layers"), 0, MAX_LAYERS),
                np.array(_numbers(source, line, "tokens", said["tokens"], -1, 1 << 31), np.int64)
                if said.get("tokens") is not None
                else None,
                source,
                line,
            )


def _numbers(path: Path, line: int, name: str, value: object, low: int, below: int) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(is_int(each, low, below) for each in value):
        raise malformed(path, line, name, "is no list of whole numbers")
    if name == "layers" and list(value) != sorted(set(value)):
        raise malformed(path, line, name, "do not ascend")
    return tuple(value)


def _decoded(path: Path, line: int, place: Mapping[str, Any]) -> NDArray[Any]:
    value = place[KEY]
    if isinstance(value, list):
        try:
            return np.array(value)
        except ValueError as e:
            raise malformed(path, line, KEY, f"is no array: {str(e)[:100]}") from None
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise malformed(path, line, KEY, "is neither lists of numbers nor base64") from None
    if data.startswith(b"\x93NUMPY"):
        try:
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        except Exception as e:  # whatever numpy makes of a damaged file
            raise malformed(path, line, KEY, (str(e) or type(e).__name__)[:200]) from None
    shape = place.get("shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(is_int(n, 0, 1 << 40) for n in shape)):
        raise malformed(
            path, line, "shape", "is missing, and the bytes do not say where a token ends",
            'give "shape": [tokens, layers, experts per token] beside routed_experts',
        )  # fmt: skip
    if place.get("dtype", "int32") != "int32" or len(data) != 4 * int(np.prod(shape, dtype=object)):
        raise malformed(path, line, KEY, f"has {len(data)} bytes, not int32 of shape {shape}")
    return np.frombuffer(data, "<i4").reshape(shape)


def _archive(path: Path) -> dict[str, NDArray[Any]]:
    """A .npz file's arrays; a pickle is never loaded."""
    with path.open("rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays}


def shape(source: Path) -> Shape:
    """First reading."""
    found: tuple[tuple[int, ...], int] | None = None
    highest = -1
    told: list[bool] = []
    for one in requests(source):
        layers, k = one.layers or tuple(range(one.experts.shape[1])), one.experts.shape[2]
        if found is not None and (layers, k) != found:
            raise malformed(
                one.path, one.line, one.name,
                f"has {len(layers)} layers and {k} experts per token where others have {len(found[0])} and {found[1]}",
            )  # fmt: skip
        found = layers, k
        highest = max(highest, int(one.experts.max(initial=-1)))
        told.append(one.tokens is not None)
    if found is None or highest < 0:
        raise InputError(f"{source} holds no routing", fix="give arrays (tokens, layers, experts per token)")
    return Shape(found[0], found[1], highest + 1, 0, knows=frozenset({"token"} if all(told) else ()))


def pieces(source: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One piece and one request per array."""
    for one in requests(source):
        n = len(one.experts)
        if n:
            experts = one.experts.astype(np.int64)
            yield Piece(
                one.name,
                label,
                np.array(shape.layers, np.int64),
                np.where((experts >= 0).any(axis=2), PRESENT, LOST).astype(np.uint8),
                experts,
                None,
                token=int_array(n, -1) if one.tokens is None else one.tokens,
                position=int_array(n, -1),
                predicted=None,
                time_ns=int_array(n, -1),
                phase=np.full(n, PHASE_UNKNOWN, np.uint8),
                row=np.arange(n, dtype=np.int64),
            )
