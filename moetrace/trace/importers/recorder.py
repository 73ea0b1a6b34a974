"""Files of SGLang's expert distribution recorder (``.pt``): of each token, of each pass, or sums.

Of each token (``records`` with ``topk_ids_of_layer``) a trace is made. The file says no request: what a pass computes
of a prompt is one by its lengths (``extend_seq_lens``; the parts of a prompt that was computed in several passes stay
apart), and a generated token goes on from the only text that ended at the position before it. Where several did,
nobody knows whose it is: such tokens are kept together, as of ``unassigned``. Expert ids are those of places
(physical); the file's last map gives the experts.

Sums (``logical_count``) and passes (``global_physical_count``) are counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.importers.counts import ALL, CountTable
from moetrace.trace.importers.source import (
    DECODE,
    LOST,
    MAX_EXPERTS,
    MAX_LAYERS,
    PREFILL,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    malformed,
)
from moetrace.trace.importers.torch_file import read_torch_file

_EXTEND, _DECODE = 1, 2  # SGLang's ForwardMode
TOKENS, SUMS = "topk_ids_of_layer", "logical_count"


@dataclass
class _Text:
    """Tokens of one request as passes add to it: (n, L, k) experts in parts."""

    name: str
    experts: list[NDArray[np.int64]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)

    def add(self, experts: NDArray[np.int64], tokens: list[int], positions: list[int], phase: int) -> None:
        self.experts.append(experts)
        self.tokens += tokens
        self.positions += positions
        self.phase += [phase] * len(tokens)


def has_tokens(path: Path, content: Any) -> bool:
    """Whether it records tokens, and not sums. Raises InputError if it is no recorder's file."""
    if isinstance(content, dict):
        records = content.get("records")
        if isinstance(records, list) and records and all(isinstance(record, dict) for record in records):
            if TOKENS in records[0]:
                return True
            if "global_physical_count" in records[0]:
                return False
        if isinstance(content.get(SUMS), np.ndarray):
            return False
    raise InputError(
        f"{path} is no recorder's file", why=f"it has neither records nor {SUMS}",
        fix="give what SGLang's expert distribution recorder dumped",
    )  # fmt: skip


def _map(path: Path, content: Any, n_layers: int) -> NDArray[np.int64] | None:
    found = content.get("last_physical_to_logical_map")
    if found is None:
        return None
    if not (
        isinstance(found, np.ndarray)
        and found.ndim == 2
        and len(found) == n_layers
        and found.dtype.kind in "iu"
    ):
        raise malformed(path, None, "last_physical_to_logical_map", "is no map of each layer's experts")
    return found.astype(np.int64)


def _texts(path: Path, content: Any) -> list[_Text]:
    texts: list[_Text] = []
    active: list[_Text] = []
    unclear: set[int] = set()  # where texts end of which nobody knows which they are
    unassigned = _Text("unassigned")
    layers: int | None = None
    for number, record in enumerate(content["records"]):
        ids = record.get(TOKENS)
        tokens, positions, mode = (record.get(name) for name in ("input_ids", "positions", "forward_mode"))
        n = len(tokens) if isinstance(tokens, list) else -1
        where = f"record {number}"
        if not (
            isinstance(ids, np.ndarray)
            and ids.ndim == 3
            and ids.dtype.kind in "iu"
            and 1 <= len(ids) < MAX_LAYERS
        ):
            raise malformed(path, None, f"{where}, {TOKENS}", "are no ids (layers, tokens, k)")
        if n != ids.shape[1] or not isinstance(positions, list) or len(positions) != n:
            raise malformed(path, None, where, f"has ids of {ids.shape[1]} tokens and another number of them")
        if layers not in (None, len(ids)):
            raise malformed(path, None, where, f"has {len(ids)} layers where others have {layers}")
        layers = len(ids)
        physical, place = ids.astype(np.int64), _map(path, content, len(ids))
        if physical.size and (
            physical.min() < -1 or physical.max() >= (MAX_EXPERTS if place is None else place.shape[1])
        ):
            raise malformed(path, None, where, "names an expert that there is not")
        if place is not None:
            logical = np.take_along_axis(place, np.maximum(physical, 0).reshape(len(ids), -1), axis=1)
            physical = np.where(physical < 0, -1, logical.reshape(physical.shape))
        experts = physical.transpose(1, 0, 2)
        if mode == _DECODE:
            # every text that goes on has a token in it
            going: list[_Text] = []
            new_unclear: set[int] = set()
            ends = [text.positions[-1] for text in active]
            for i, position in enumerate(int(p) for p in positions):
                fits = [text for text, end in zip(active, ends, strict=True) if end == position - 1]
                sure = len(fits) == 1 and positions.count(position) == 1 and position - 1 not in unclear
                (fits[0] if sure else unassigned).add(
                    experts[i : i + 1], [int(tokens[i])], [position], DECODE
                )
                if sure:
                    going.append(fits[0])
                else:
                    new_unclear.add(position)
            active, unclear = going, new_unclear
            continue
        lengths = record.get("extend_seq_lens")
        if mode != _EXTEND or not isinstance(lengths, list) or sum(lengths) != n:
            raise malformed(
                path, None, where, f"is of forward mode {mode}, or its extend_seq_lens are not its tokens",
                "record prompts and decoding without mixed passes or speculation",
            )  # fmt: skip
        start = 0
        for length in lengths:
            piece = slice(start, start + length)
            if length:
                text = _Text(f"text-{len(texts)}")
                text.add(
                    experts[piece],
                    [int(t) for t in tokens[piece]],
                    [int(p) for p in positions[piece]],
                    PREFILL,
                )
                texts.append(text)
                active.append(text)
            start += length
    return texts + ([unassigned] if unassigned.tokens else [])


def shape(path: Path) -> Shape:
    """First reading."""
    content = read_torch_file(path)
    if not has_tokens(path, content):
        raise InputError(f"{path} has sums, not tokens", fix="read it with moetrace stats")
    highest, used = -1, 0
    layers: NDArray[np.bool_] = np.zeros(0, bool)
    for text in _texts(path, content):
        experts = np.concatenate(text.experts)
        there = np.asarray((experts >= 0).any(axis=(0, 2)))
        layers = there if not layers.size else layers | there
        highest = max(highest, int(experts.max()))
        used = max(used, int((experts >= 0).sum(axis=2).max()))
    if highest < 0:
        raise InputError(f"{path} holds no routing", fix="record with tokens")
    known = frozenset({"token", "position", "phase"})
    place = content.get("last_physical_to_logical_map")
    n_expert = 0 if place is None else int(np.max(place)) + 1
    return Shape(tuple(np.flatnonzero(layers).tolist()), used, highest + 1, 0, knows=known, n_expert=n_expert)


def pieces(path: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One request per text, and one of the tokens of nobody knows which."""
    for text in _texts(path, read_torch_file(path)):
        n = len(text.tokens)
        experts = np.concatenate(text.experts)[:, list(shape.layers)]
        experts = np.take_along_axis(experts, np.argsort(experts < 0, axis=2, kind="stable"), axis=2)
        experts = experts[:, :, : shape.n_expert_used]
        yield Piece(
            text.name,
            label,
            np.array(shape.layers, np.int64),
            np.where((experts >= 0).any(axis=2), PRESENT, LOST).astype(np.uint8),
            experts,
            None,
            token=np.array(text.tokens, np.int64),
            position=np.array(text.positions, np.int64),
            predicted=None,
            time_ns=int_array(n, -1),
            phase=np.array(text.phase, np.uint8),
            row=np.arange(n, dtype=np.int64) * (np.array(text.phase) == PREFILL),
        )


def recorder_counts(path: Path) -> CountTable:
    """What a recorder summed, as one domain; layers without a count are left out.

    Raises InputError if it is none, or damaged.
    """
    content = read_torch_file(path)
    if has_tokens(path, content):
        raise InputError(f"{path} has tokens", fix="moetrace import makes a trace of it")
    sums = content.get(SUMS)
    if isinstance(sums, np.ndarray):
        total = sums.sum(axis=0) if sums.ndim == 3 else sums
    else:
        parts = [record.get("global_physical_count") for record in content["records"]]
        if not all(isinstance(p, np.ndarray) and p.ndim == 2 and p.shape == parts[0].shape for p in parts):
            raise malformed(path, None, "global_physical_count", "are not alike in all records")
        physical = np.sum(parts, axis=0)
        place = _map(path, content, len(physical))
        total = physical
        if place is not None:
            if place.shape != physical.shape:
                raise malformed(
                    path, None, "last_physical_to_logical_map", "has another shape than the counts"
                )
            total = np.zeros((len(place), int(place.max()) + 1), physical.dtype)
            for layer, to in enumerate(place):
                np.add.at(total[layer], to, physical[layer])
    if (
        total.ndim != 2
        or total.dtype.kind not in "iu"
        or not total.size
        or (total < 0).any()
        or not total.any()
    ):
        raise malformed(
            path, None, SUMS, f"is {total.dtype} of shape {total.shape}, not counts (layers, experts)"
        )
    layers = np.flatnonzero(total.any(axis=1))
    return CountTable((ALL,), layers.astype(np.int64), total[layers].astype(np.int64)[None])
