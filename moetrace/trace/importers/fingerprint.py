"""Expert fingerprints (AmanPriyanshu's of gpt-oss): JSON of what a model generated, token by token, with its experts.

An object has ``router_data``, a list of one-entry objects ``token_N: {layer_L: {selected_experts, selected_probs}}``,
and beside it ``generated_only`` (texts of the tokens), ``dataset``, ``category``, ``row_index``. A file holds one such
object or a list of them; so does a folder of ``*.json``. Token ids are not in it, only texts, so that ids stay unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.errors import InputError
from moetrace.trace.importers.source import (
    DECODE,
    LOST,
    MAX_EXPERTS,
    MAX_LAYERS,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    is_int,
    malformed,
)

KEY = "router_data"


def find(source: Path) -> list[Path]:
    """The files; empty if there is none."""
    files = sorted(source.glob("*.json")) if source.is_dir() else [source] if source.suffix == ".json" else []
    return [path for path in files if _has_key(path)]


def _has_key(path: Path) -> bool:
    """Whether the file mentions the key; long ones are not read whole for that."""
    try:
        with path.open("rb") as file:
            before = b""
            while block := file.read(1 << 20):
                if f'"{KEY}"'.encode() in before + block:
                    return True
                before = block[-32:]
    except OSError:
        pass
    return False


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each object of a file."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise malformed(path, getattr(e, "lineno", None), "file", str(e)[:200]) from None
    every = value if isinstance(value, list) else [value]
    for i, one in enumerate(every):
        if not isinstance(one, dict) or not isinstance(one.get(KEY), list):
            raise malformed(
                path, None, f"[{i}].{KEY}" if isinstance(value, list) else KEY, "is no list of tokens"
            )
        name = one.get("row_index")
        yield f"{path.stem}-{name if is_int(name, 0, 1 << 62) else i}", one


def tokens(
    path: Path, name: str, one: dict[str, Any]
) -> Iterator[tuple[int, dict[int, tuple[list[int], list[float]]]]]:
    """Number of each token, and by layer its experts and their weights."""
    for i, entry in enumerate(one[KEY]):
        where = f"{name}.{KEY}[{i}]"
        if not isinstance(entry, dict) or len(entry) != 1:
            raise malformed(path, None, where, "is no object of one token")
        ((key, layers),) = entry.items()
        number = key.removeprefix("token_")
        if not (number.isascii() and number.isdigit()) or not isinstance(layers, dict):
            raise malformed(path, None, where, f"{key[:40]!r} is no token_N with layers")
        found = {}
        for layer, chosen in layers.items():
            digits = layer.removeprefix("layer_")
            ids = chosen.get("selected_experts") if isinstance(chosen, dict) else None
            probs = chosen.get("selected_probs") if isinstance(chosen, dict) else None
            if not (digits.isascii() and digits.isdigit() and int(digits) < MAX_LAYERS):
                raise malformed(path, None, where, f"{layer[:40]!r} is no layer_N")
            if not isinstance(ids, list) or not ids or not all(is_int(e, 0, MAX_EXPERTS) for e in ids):
                raise malformed(path, None, f"{where}.{layer}.selected_experts", "is no list of experts")
            if len(set(ids)) < len(ids):
                raise malformed(path, None, f"{where}.{layer}.selected_experts", "names one expert twice")
            numbers = (
                probs if isinstance(probs, list) and len(probs) == len(ids) else [float("nan")] * len(ids)
            )
            if not all(isinstance(p, int | float) for p in numbers):
                raise malformed(path, None, f"{where}.{layer}.selected_probs", "is no list of numbers")
            found[int(digits)] = ids, numbers
        yield int(number), found


def shape(source: Path) -> Shape:
    """First reading."""
    layers: set[int] = set()
    highest = k = -1
    for path in find(source):
        for name, one in objects(path):
            for _, found in tokens(path, name, one):
                layers |= found.keys()
                for ids, _ in found.values():
                    highest, k = max(highest, *ids), max(k, len(ids))
    if not layers:
        raise InputError(f"{source} holds no routing", fix=f"give JSON whose {KEY} has tokens")
    return Shape(
        tuple(sorted(layers)), k, highest + 1, 0, weights=True, knows=frozenset({"position", "phase"})
    )


def pieces(source: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One piece and one request per object; its label is its category, else its data set's name."""
    index = {layer: i for i, layer in enumerate(shape.layers)}
    for path in find(source):
        for name, one in objects(path):
            every = list(tokens(path, name, one))
            n, k = len(every), shape.n_expert_used
            if not n:
                continue
            experts = np.full((n, len(index), k), -1, np.int64)
            weights = np.full((n, len(index), k), np.nan, np.float32)
            for t, (_, found) in enumerate(every):
                for layer, (ids, probs) in found.items():
                    experts[t, index[layer], : len(ids)] = ids
                    weights[t, index[layer], : len(ids)] = probs
            own = [one[key] for key in ("category", "dataset") if isinstance(one.get(key), str)]
            yield Piece(
                name,
                label or (own[0] if own else path.stem),
                np.array(shape.layers, np.int64),
                np.where((experts >= 0).any(axis=2), PRESENT, LOST).astype(np.uint8),
                experts,
                None,
                token=int_array(n, -1),
                position=np.array([number for number, _ in every], np.int64),
                predicted=None,
                time_ns=int_array(n, -1),
                phase=np.full(n, DECODE, np.uint8),
                row=int_array(n, 0),
                extra={
                    key: value
                    for key in ("dataset", "category", "row_index", "finished_successfully")
                    if isinstance(value := one.get(key), str | int | float)
                },
                weights=weights,
            )
