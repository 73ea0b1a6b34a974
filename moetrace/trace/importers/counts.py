"""Count tables: CSV with the columns ``domain,layer_id,expert_id,count``, matrices of layers and experts (a CSV whose
header is ``layer`` and the experts, or a ``.npy`` of whole numbers), and importance matrices.

They have no tokens, so they become arrays and not a trace: ``counts[:, l]`` is what
``moetrace.analysis.domain_separation`` takes.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.model.imatrix import read_imatrix
from moetrace.trace.importers.source import MAX_EXPERTS, MAX_LAYERS, integer, lines, malformed

COLUMNS = ("domain", "layer_id", "expert_id", "count")
_FEW = 16  # that a token may use; layers have more
#: what the domain of a table without one is called
ALL = "all"


@dataclass(frozen=True)
class CountTable:
    """How often each expert was chosen, by domain and layer.

    Attributes
    ----------
    domains
        D names, in the order of the file.
    layers
        (L,) int64 layer numbers, ascending.
    counts
        (D, L, E) int64. An expert that the table does not list, for a domain and layer that it does list, was
        never chosen there: 0.
    """

    domains: tuple[str, ...]
    layers: NDArray[np.int64]
    counts: NDArray[np.int64]


def read_counts(path: Path, n_expert: int | None = None) -> CountTable:
    """Read a count table, in which the domain may be left out; memory grows with its cells (D x L x E).

    Parameters
    ----------
    n_expert
        E; by default the highest expert id + 1.

    Raises
    ------
    InputError
        Naming file, line and field: a column is missing, a number is none, a cell comes twice, an expert id
        is not below ``n_expert``; or a domain lacks a layer that another has.
    """
    if path.suffix == ".npy":
        return _of_array(path, n_expert)
    first = next(lines(path), (0, ""))[1]
    if is_matrix(first):
        return _of_matrix(path, n_expert)
    cells: dict[tuple[str, int], dict[int, int]] = {}
    order: list[int] = []
    for line, text in lines(path):
        row = next(csv.reader([text]))
        if not order:
            names = [name.strip() for name in row]
            for name in COLUMNS[1:]:
                if name not in names:
                    raise malformed(path, line, name, f"is missing from the header {text[:80]!r}")
            order = [names.index(name) if name in names else -1 for name in COLUMNS]
            width = len(names)
            continue
        if len(row) != width:
            raise malformed(path, line, "line", f"has {len(row)} fields where the header has {width}")
        row.append(ALL)  # at −1
        domain, layer_text, expert_text, count_text = (row[i].strip() for i in order)
        if not domain:
            raise malformed(path, line, "domain", "is empty")
        layer = integer(path, line, "layer_id", layer_text, MAX_LAYERS)
        expert = integer(path, line, "expert_id", expert_text, n_expert or MAX_EXPERTS)
        count = integer(path, line, "count", count_text, 1 << 62)
        cell = cells.setdefault((domain, layer), {})
        if expert in cell:
            raise malformed(path, line, "expert_id", f"{domain}, layer {layer}, expert {expert} came before")
        cell[expert] = count
    if not cells:
        raise InputError(
            f"{path} holds no counts", fix=f"give a CSV file with the columns {', '.join(COLUMNS)}"
        )
    domains = tuple(dict.fromkeys(domain for domain, _ in cells))
    layers = sorted({layer for _, layer in cells})
    counts = np.zeros(
        (len(domains), len(layers), n_expert or max(max(cell) for cell in cells.values()) + 1), np.int64
    )
    for d, domain in enumerate(domains):
        for i, layer in enumerate(layers):
            found = cells.get((domain, layer))
            if found is None:
                raise InputError(
                    f"{path}: layer_id: {domain} has no counts for layer {layer}, another domain has",
                    fix="complete the table, or leave that layer out",
                )
            counts[d, i, list(found)] = list(found.values())
    return CountTable(domains, np.array(layers, np.int64), counts)


_EXPERT = re.compile(r"(?:expert[ _-]?|e)?([0-9]{1,5})", re.IGNORECASE)


def is_matrix(header: str) -> bool:
    """Whether a CSV's first line is ``layer`` and the experts, from 0 up: ``layer,0,1,2`` or ``,expert_0,expert_1``."""
    first, *names = (name.strip().strip('"') for name in header.split(","))
    found = [_EXPERT.fullmatch(name) for name in names]
    return (
        first.lower() in ("", "layer", "layer_id")
        and bool(found)
        and [m and int(m[1]) for m in found] == list(range(len(found)))
    )


def is_array(path: Path) -> bool:
    """Whether a file is a ``.npy`` of two axes; only its header is read."""
    try:
        return bool(np.load(path, mmap_mode="r", allow_pickle=False).ndim == 2)
    except Exception:  # damaged, or something else: who reads it says so
        return False


def _of_array(path: Path, n_expert: int | None) -> CountTable:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as e:  # whatever numpy makes of a damaged file
        raise InputError(f"{path} cannot be read", why=str(e)[:200], fix="give an array of numbers") from e
    if array.ndim == 2 and array.shape[1] <= _FEW:
        raise malformed(
            path, None, "array", f"of shape {array.shape} may be the experts of tokens, or counts of layers",
            "give experts as (tokens, layers, experts per token), counts as CSV with the header layer,0,1,2,…",
        )  # fmt: skip
    whole = array.astype(np.int64) if array.dtype.kind in "iuf" and np.isfinite(array).all() else None
    if whole is None or array.ndim != 2 or not array.size or (whole != array).any() or (whole < 0).any():
        raise malformed(
            path, None, "array", f"is {array.dtype} of shape {array.shape}, not whole numbers (layers, experts)",
            "give counts: of shares nobody can say how many tokens they rest on",
        )  # fmt: skip
    return _one_domain(path, np.arange(len(whole), dtype=np.int64), whole, n_expert)


def _of_matrix(path: Path, n_expert: int | None) -> CountTable:
    rows: dict[int, list[int]] = {}
    width = 0
    for line, text in lines(path):
        words = text.split(",")
        if not width:
            width = len(words)
            continue
        if len(words) != width:
            raise malformed(path, line, "line", f"has {len(words)} fields where the header has {width}")
        layer = integer(path, line, "layer", words[0].strip().removeprefix("layer_"), MAX_LAYERS)
        if layer in rows:
            raise malformed(path, line, "layer", f"{layer} came before")
        rows[layer] = [
            integer(path, line, f"expert {i}", word.strip().removesuffix(".0"), 1 << 62)
            for i, word in enumerate(words[1:])
        ]
    if not rows:
        raise InputError(f"{path} holds no counts", fix="give a line for each layer")
    ordered = sorted(rows)
    return _one_domain(
        path, np.array(ordered, np.int64), np.array([rows[layer] for layer in ordered], np.int64), n_expert
    )


def _one_domain(
    path: Path, layers: NDArray[np.int64], counts: NDArray[np.int64], n_expert: int | None
) -> CountTable:
    if n_expert is not None and n_expert != counts.shape[1]:
        raise InputError(
            f"{path} has {counts.shape[1]} experts, not {n_expert}",
            fix="leave out --n-expert: a matrix says it",
        )
    return CountTable((ALL,), layers, counts[None])


def imatrix_counts(path: Path) -> CountTable:
    """What a file of llama-imatrix counted, as one domain.

    Raises InputError if it is damaged, or of the old format, which has no counts.
    """
    found = read_imatrix(path)
    if np.isnan(found.tokens).any():
        raise InputError(
            f"{path} holds no counts",
            why="it is of the old format, which tells only which experts got nothing",
            fix=f"ask for these: moetrace coverage {path}; or make it anew as GGUF",
        )
    return CountTable((ALL,), found.layers, found.tokens[None].astype(np.int64))
