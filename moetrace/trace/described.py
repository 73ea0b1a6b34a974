"""What rows in long form do not say of their trace: it stands in the metadata of Parquet and Arrow files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.record import State
from moetrace.trace.view import Rows

#: what is known of a request beside its rows
OF_REQUEST = (
    "slot", "n_cached", "n_lost", "n_rejected", "n_shifts", "n_recomputed", "n_undecided", "n_unrecorded",
    "n_events_lost",
)  # fmt: skip
_KEY = b"moetrace"
_CHUNK = 1 << 16  # rows looked at together
Run = tuple[int, int, int, int]


@dataclass(frozen=True)
class Described:
    """What there is beside the rows.

    Attributes
    ----------
    layers, n_expert, n_expert_used
        As the trace has them, for each layer.
    contexts
        How many the rows are of: serials ascend within each.
    entries
        Entries (token, layer) that are present: a file with other than these was changed since.
    produced
        Rows that the model computed, if these are all of a trace of one context: what is missing was lost. Else None.
    model
        Its name, architecture and the like.
    requests
        Columns of the table of requests: ``request``, ``id`` and those of ``OF_REQUEST``; None is not known.
    absent
        Entries that are not present, of one context's rows: (layer axis, first serial, last serial, state).
    """

    layers: tuple[int, ...]
    n_expert: tuple[int, ...]
    n_expert_used: tuple[int, ...]
    contexts: int = 1
    entries: int = 0
    produced: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=dict)
    absent: tuple[Run, ...] = ()

    @classmethod
    def of(cls, metadata: Mapping[bytes, bytes] | None) -> Described | None:
        """Read it from a schema's metadata; None where it is not there. Raises InputError if it is damaged."""
        text = (metadata or {}).get(_KEY)
        if text is None:
            return None
        try:
            said = json.loads(text)
            for name in ("layers", "n_expert", "n_expert_used"):
                said[name] = tuple(int(n) for n in said[name])
            said["absent"] = tuple(tuple(int(n) for n in run) for run in said["absent"])
            found = cls(**said)
            n = len(found.layers)
            whole = n == len(found.n_expert) == len(found.n_expert_used) and n > 0
            columns = found.requests.values()
            whole &= len({len(column) for column in columns}) <= 1
            if not whole or any(len(run) != 4 or not 0 <= run[0] < n for run in found.absent):
                raise ValueError("it contradicts itself")
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError("the file's metadata is damaged", why=str(e)[:200], fix="export it again") from e
        return found

    def metadata(self) -> dict[bytes, bytes]:
        """As a schema's metadata."""
        return {_KEY: json.dumps(asdict(self)).encode()}

    def mark(self, serial: NDArray[np.int64], state: NDArray[np.uint8]) -> None:
        """Set what is absent in ``state`` (n, L), in place, of the rows of these serials (n,)."""
        runs = np.array(self.absent, np.int64).reshape(-1, 4)
        for layer in range(state.shape[1]):
            first, last, what = runs[runs[:, 0] == layer].T[1:]
            if len(first):
                at = np.searchsorted(first, serial, side="right") - 1
                inside = (at >= 0) & (serial <= last[at])
                state[inside, layer] = what[at[inside]]


def describe(
    rows: Rows, model: Mapping[str, Any], requests: pd.DataFrame, *, contexts: int, produced: int | None
) -> Described:
    """Describe rows of a trace: ``produced`` if they are all there is of it."""
    entries, absent = _entries(rows)
    columns = requests.reset_index()[["request", "id", *OF_REQUEST]]
    told = {str(name): [None if x is pd.NA else x for x in columns[name].tolist()] for name in columns}
    return Described(
        tuple(rows.layers.tolist()),
        tuple(rows.n_expert.tolist()),
        tuple(rows.n_expert_used.tolist()),
        contexts,
        entries,
        produced if contexts == 1 else None,
        dict(model),
        told,
        absent if contexts == 1 else (),
    )


def _entries(rows: Rows) -> tuple[int, tuple[Run, ...]]:
    """How many entries are present, and runs of rows that lack a layer in the same way."""
    n = 0
    runs: list[list[int]] = []
    last: dict[int, int] = {}  # layer -> its run that goes on
    for start in range(0, len(rows), _CHUNK):
        piece = slice(start, start + _CHUNK)
        state, serial = rows.column("state", piece), rows.column("serial", piece)
        n += int((state == State.PRESENT).sum())
        for layer in range(state.shape[1]):
            mine = state[:, layer]
            if (mine == State.PRESENT).all():
                last.pop(layer, None)
                continue
            edges = np.flatnonzero(np.append(True, mine[1:] != mine[:-1]))
            ends = np.append(edges[1:], len(mine)) - 1
            for a, b in zip(edges.tolist(), ends.tolist(), strict=True):
                what = int(mine[a])
                if a == 0 and layer in last and runs[last[layer]][3] == what:
                    runs[last[layer]][2] = int(serial[b])
                    continue
                last.pop(layer, None)
                if what != State.PRESENT:
                    last[layer] = len(runs)
                    runs.append([layer, int(serial[a]), int(serial[b]), what])
    return n, tuple((run[0], run[1], run[2], run[3]) for run in sorted(runs))
