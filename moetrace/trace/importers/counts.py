"""Count tables: CSV with the columns ``domain,layer_id,expert_id,count``, and importance matrices.

They have no tokens, so they become arrays and not a trace: ``counts[:, l]`` is what
``moetrace.analysis.domain_separation`` takes.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.model.imatrix import read_imatrix
from moetrace.trace.importers.source import MAX_EXPERTS, MAX_LAYERS, integer, lines, malformed

COLUMNS = ("domain", "layer_id", "expert_id", "count")
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
