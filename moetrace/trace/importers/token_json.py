"""One JSON file per token: ``DOMAIN/traces/token-NNNNN.json``, the format of the seed notebook.

A file lists every operation of the graph in order. Expert ids stand in the ``MUL_MAT_ID`` entries, the same
three times per layer (``ffn_moe_gate``, ``ffn_moe_up``, ``ffn_moe_down`` in ``dst_name``): they are one
decision and are read once.

**The warm-up trap.** The first file of a run also holds llama.cpp's warm-up, which runs *all* experts. The
recorder kept the first 16 ids of such a row, and ``expert_ids[:4]`` of it, as the notebook takes it, looks
like routing but is not. A pass with an entry of more than k ids is therefore left out and counted, unless the
data are wanted as published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.errors import InputError
from moetrace.trace.importers.source import (
    DECODE,
    LOST,
    MAX_EXPERTS,
    MAX_LAYERS,
    PHASE_UNKNOWN,
    PREFILL,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    is_int,
    malformed,
    parse_object,
)

NAME = re.compile(r"token-(\d+)\.json")
COMPONENTS = ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_down")
PHASES = {"PROMPT": PREFILL, "GENERATE": DECODE}
MAX_FILE = 256 << 20


@dataclass(frozen=True)
class Pass:
    """One evaluation of the graph as a file records it."""

    experts: dict[int, list[int]]
    """layer -> ids as recorded"""
    phase: int
    time_ns: int
    wide: bool
    """some layer has more than k ids"""


def find(source: Path) -> list[tuple[str, list[tuple[int, Path]]]]:
    """Domain and (token number, file) of each run under ``source``; empty if there is none.

    ``source`` may be the folder of all domains, one domain's folder, a ``traces`` folder or one file.
    """
    if source.is_file():
        match = NAME.fullmatch(source.name)
        return [(_domain(source.parent), [(int(match[1]), source)])] if match else []
    if not source.is_dir():
        return []
    for folders in ([source], [source / "traces"], sorted(source.glob("*/traces"))):
        runs = []
        for folder in folders:
            found = ((NAME.fullmatch(p.name), p) for p in folder.iterdir()) if folder.is_dir() else ()
            files = sorted((int(match[1]), p) for match, p in found if match)
            if files:
                runs.append((_domain(folder), files))
        if runs:
            return runs
    return []


def _domain(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "traces" else folder.name


def passes(path: Path, k: int) -> Iterator[Pass]:
    """The passes of one file. Raises InputError naming file, entry and field if it is malformed."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"{path} is larger than 256 MiB", why="one token's trace is about 1 MB")
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"cannot read {path}", why=e.strerror or str(e), fix="give readable files") from e
    entries = parse_object(path, None, data).get("entries")
    if not isinstance(entries, list):
        raise malformed(path, None, "entries", "is missing, or no list")
    experts: dict[int, list[int]] = {}
    seen: set[tuple[int, str]] = set()
    first: dict[str, Any] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise malformed(path, None, f"entries[{i}]", "is no JSON object")
        if entry.get("operation_type") != "MUL_MAT_ID":
            continue
        ids = entry.get("expert_ids")
        if not isinstance(ids, list) or not all(is_int(e, 0, MAX_EXPERTS) for e in ids):
            raise malformed(path, None, f"entries[{i}].expert_ids", "is no list of expert ids")
        if not ids:  # the notebook, too, passes over operations without ids
            continue
        layer, name = entry.get("layer_id"), entry.get("dst_name")
        if not is_int(layer, 0, MAX_LAYERS):
            raise malformed(path, None, f"entries[{i}].layer_id", f"{layer!r} is no layer")
        if not isinstance(name, str) or not name.startswith(COMPONENTS):
            raise malformed(
                path, None, f"entries[{i}].dst_name", f"{name!r} is none of {', '.join(COMPONENTS)}"
            )
        if len(ids) < k:
            raise malformed(
                path,
                None,
                f"entries[{i}].expert_ids",
                f"has {len(ids)} ids where {k} are used",
                "give the number of experts per token with --n-expert-used",
            )
        component = next(c for c in COMPONENTS if name.startswith(c))
        if (layer, component) in seen:  # the layer comes again: another pass
            yield _pass(experts, first, k)
            experts, seen, first = {}, set(), {}
        seen.add((layer, component))
        first = first or entry
        if experts.setdefault(layer, ids) != ids:
            raise malformed(
                path,
                None,
                f"entries[{i}].expert_ids",
                f"differ from those of another component of layer {layer}: one token has one routing",
            )
    if experts:
        yield _pass(experts, first, k)


def _pass(experts: dict[int, list[int]], first: dict[str, Any], k: int) -> Pass:
    time = first.get("timestamp_ns")
    return Pass(
        experts,
        PHASES.get(str(first.get("phase")), PHASE_UNKNOWN),
        time if is_int(time, 0, 1 << 63) else -1,
        any(len(ids) > k for ids in experts.values()),
    )


def shape(source: Path, k: int) -> Shape:
    """First reading: the layers, and the highest expert seen."""
    layers: set[int] = set()
    highest = -1
    for _, files in find(source):
        for _, path in files:
            for one in passes(path, k):
                layers |= one.experts.keys()
                highest = max(highest, *(max(ids) for ids in one.experts.values()))
    if not layers:
        raise InputError(f"{source} holds no expert ids", why="no MUL_MAT_ID entry has any")
    return Shape(tuple(sorted(layers)), k, highest + 1, 0, knows=frozenset({"phase", "time"}))


def pieces(source: Path, shape: Shape, tally: Tally, *, as_published: bool = False) -> Iterator[Piece]:
    """One piece per pass, a request per domain.

    Parameters
    ----------
    as_published
        Keep the passes that ran all experts, cut to their first k ids as the notebook does. The notebook numbers
        tokens by files, so the key ``passes_beside`` of a request says how many of its passes share a file's number.
    """
    layers = np.array(shape.layers, np.int64)
    index = {layer: i for i, layer in enumerate(shape.layers)}
    k = shape.n_expert_used
    for domain, files in find(source):
        expected = files[0][0]
        beside = sum(1 for _ in passes(files[0][1], k)) - 1 if as_published else 0
        for number, path in files:
            skipped, expected = number - expected, number + 1
            for one in passes(path, k):
                if one.wide and not as_published:
                    tally.rows_all_experts += 1
                    continue
                experts = np.full((1, len(layers), k), -1, np.int64)
                state = np.full((1, len(layers)), LOST, np.uint8)
                for layer, ids in one.experts.items():
                    experts[0, index[layer]] = ids[:k]
                    state[0, index[layer]] = PRESENT
                yield Piece(
                    domain,
                    domain,
                    layers,
                    state,
                    experts,
                    None,
                    token=int_array(1, -1),
                    position=int_array(1, -1),
                    predicted=None,
                    time_ns=int_array(1, one.time_ns),
                    phase=np.full(1, one.phase, np.uint8),
                    row=int_array(1, 0),
                    skipped=skipped,
                    extra={"passes_beside": beside} if beside else {},
                )
                skipped = 0
