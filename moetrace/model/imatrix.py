"""Importance matrices of llama-imatrix: which experts the calibration text reached, and how often."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.weight")
# what reads a token's embedding: as wide as it is
_ATTENTION = re.compile(r"blk\.\d+\.(?:attn_q|attn_qkv|attn_q_a|ffn_gate_inp)\.weight")
_MAX_NAME = 1 << 10


@dataclass(frozen=True)
class Imatrix:
    """What a file says of experts.

    Attributes
    ----------
    path
        The file.
    layers
        (L,) int64 numbers of the layers that have experts.
    tokens
        (L, E) float64 how many tokens each expert got; NaN in a file of the old format, which does not say.
    missing
        (L, E) whether an expert got none.
    chunks, chunk_size
        How many chunks the text had, of how many tokens; −1 unknown.
    """

    path: Path
    layers: NDArray[np.int64]
    tokens: NDArray[np.float64]
    missing: NDArray[np.bool_]
    chunks: int = -1
    chunk_size: int = -1


def is_imatrix(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a GGUF imatrix does, or is one of the old format."""
    try:
        with Path(path).open("rb") as file:
            begins = file.read(1 << 16)
    except OSError:
        return False
    if begins[:4] == b"GGUF":
        return b"general.type\x08\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00imatrix" in begins
    return _legacy_name(begins) is not None


def read_imatrix(path: str | os.PathLike[str], n_expert: int | None = None) -> Imatrix:
    """Read a file of llama-imatrix, GGUF or of the old format.

    Parameters
    ----------
    n_expert
        E; a file of the old format does not say it, so that it is found from what attention reads if not given.

    Raises
    ------
    InputError
        If it is no imatrix, holds no experts, is damaged, or its matrices of one layer disagree.
    """
    source = Path(path)
    try:
        with source.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(source) if is_gguf else _read_legacy(source, n_expert)
    except OSError as e:
        raise InputError(f"{path} cannot be read", why=e.strerror or str(e)) from e
    except InputError:
        raise
    except Exception as e:  # whatever readers make of a damaged file
        raise InputError(f"{path} is damaged", why=str(e)) from e
    if not found.layers.size:
        raise InputError(
            f"{path} holds no experts",
            why="its model is dense, or it is no imatrix",
            fix="give a file of llama-imatrix",
        )
    return found


def _read_gguf(path: Path) -> Imatrix:
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    if field("general.type") != "imatrix":
        raise InputError(
            f"{path} is no imatrix", why=f"it is a GGUF file of type {field('general.type') or 'model'}"
        )
    by_layer: dict[int, NDArray[np.float64]] = {}
    for tensor in reader.tensors:
        name = _EXPERTS.fullmatch(tensor.name.removesuffix(".counts"))
        if name is None or not tensor.name.endswith(".counts"):
            continue
        _same(path, by_layer, int(name[1]), np.asarray(tensor.data, dtype=np.float64).ravel())
    layers, tokens = _stacked(path, by_layer)
    return Imatrix(
        path,
        layers,
        tokens,
        tokens == 0,
        int(field("imatrix.chunk_count") or -1),
        int(field("imatrix.chunk_size") or -1),
    )


def _same(
    path: Path, by_layer: dict[int, NDArray[np.float64]], layer: int, counts: NDArray[np.float64]
) -> None:
    """Keep a layer's counts; all of its matrices got the same tokens."""
    if not np.array_equal(by_layer.setdefault(layer, counts), counts):
        raise InputError(
            f"{path} is damaged", why=f"the expert matrices of layer {layer} have different counts"
        )


def _stacked(
    path: Path, by_layer: dict[int, NDArray[np.float64]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    layers = sorted(by_layer)
    if len({by_layer[layer].size for layer in layers}) > 1:
        raise InputError(f"{path} has layers of different numbers of experts")
    stacked = np.stack([by_layer[layer] for layer in layers]) if layers else np.empty((0, 0))
    return np.array(layers, dtype=np.int64), stacked


def _legacy_name(data: bytes) -> str | None:
    """The first entry's name, if this is how a file of the old format begins."""
    if len(data) < 8:
        return None
    entries, length = struct.unpack_from("<ii", data)
    if not (0 < entries < 1 << 20 and 0 < length < _MAX_NAME and len(data) >= 8 + length):
        return None
    name = data[8 : 8 + length]
    return name.decode() if re.fullmatch(rb"[\w.]+\.weight", name) else None


def _read_legacy(path: Path, n_expert: int | None) -> Imatrix:
    """Entries of (name, calls, values): means of squares times calls; an expert without data has ones times calls."""
    data = path.read_bytes()
    if _legacy_name(data) is None:
        raise InputError(f"{path} is no imatrix", fix="give a file of llama-imatrix")
    (n_entries,) = struct.unpack_from("<i", data)
    at = 4
    values: dict[str, tuple[int, NDArray[np.float32]]] = {}
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", data, at)
        if not 0 < length < _MAX_NAME:
            raise ValueError(f"a name of {length} bytes")
        name = data[at + 4 : at + 4 + length].decode()
        calls, n = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        if n < 0 or at + 4 * n > len(data):
            raise ValueError(f"the entry {name} goes beyond the file's end")
        values[name] = calls, np.frombuffer(data, "<f4", n, at)
        at += 4 * n
    widths = {v.size for name, (_, v) in values.items() if _ATTENTION.fullmatch(name)}
    missing: dict[int, NDArray[np.float64]] = {}
    for name, (calls, v) in values.items():
        found = _EXPERTS.fullmatch(name)
        if found is None or "_down_" in name:
            continue  # the down projection reads hidden neurons, whose number is not known
        e = n_expert or (v.size // next(iter(widths)) if len(widths) == 1 else 0)
        if e < 1 or v.size % e:
            raise InputError(
                f"how many experts {path} is of cannot be said",
                why="a file of the old format does not say it",
                fix="give the model with -m, or make the file anew with a llama-imatrix that writes GGUF",
            )
        _same(path, missing, int(found[1]), (v.reshape(e, -1) == calls).all(axis=1).astype(np.float64))
    layers, none = _stacked(path, missing)
    is_missing = none > 0
    return Imatrix(path, layers, np.where(is_missing, 0.0, np.nan), is_missing, *_legacy_end(data, at))


def _legacy_end(data: bytes, at: int) -> tuple[int]:
    """How many chunks, where the file says it."""
    return (struct.unpack_from("<i", data, at)[0],) if len(data) >= at + 4 else (-1,)
