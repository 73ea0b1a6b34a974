"""The numbers behind the page's interactive figures, packed small.

One block of bytes: the length of a JSON header (uint32, little-endian), the header, then arrays. The header's
``arrays`` gives each one's dtype, shape and offset; bytes of a number stand in planes (all first bytes, then
all second ones, …), which compresses better. The whole is zlib-compressed. templates/data.mjs reads it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis import transitions
from moetrace.errors import MoetraceError
from moetrace.findings import Finding, Subject
from moetrace.plot.names import shortened
from moetrace.report.files import widget_tables

Arrays = dict[str, npt.NDArray[Any]]


def explorer(
    subject: Subject, findings: Sequence[Finding], *, max_experts: int = 64, max_p: float = 1.0
) -> tuple[dict[str, Any], Arrays]:
    """Gather header and arrays of the interactive figures.

    Counts come from the subject, whatever needed permutations or a bootstrap from the findings'
    tables, so that the page shows the very numbers of its sentences. ``max_experts`` bounds the transition
    matrices: the most used first experts of a layer. Of lifts whose p is above ``max_p`` neither interval nor p is
    given.

    Arrays, with D domains, L layers, E experts: ``count`` (D + 1, L, E) and ``tokens`` (D + 1, L), u4, first
    all prompts, then each domain; ``low``, ``high``, ``p`` (D, L, E) f2, of the lift; ``persistence`` (10, L,
    lags) f4; ``separation`` (6, L) f4; ``steps``, (L, T, T) u4, ``steps_lift`` (L, T, T) f2 and
    ``steps_expert`` (L, T) u2, first experts of neighbours.
    """
    counts = subject.counts
    domains = sorted({str(label) for label in counts.labels.tolist()} - {""})
    labels = np.asarray(counts.labels).astype(str)
    groups = [np.ones(labels.size, bool), *(labels == name for name in domains)]
    tokens = counts.tokens
    k = counts.n_expert_used
    if not tokens.any():  # a count table: shares are of picks
        tokens, k = counts.included.sum(axis=2), np.ones_like(k)
    arrays: Arrays = {
        "count": np.stack([counts.included[g].sum(axis=0) for g in groups]).astype("<u4"),
        "tokens": np.stack([tokens[g].sum(axis=0) for g in groups]).astype("<u4"),
    }
    head: dict[str, Any] = {
        "domains": domains,
        "names": list(shortened(domains, 16).values()),
        "layers": counts.layers.tolist(),
        "start": 0,
        "n_expert": np.asarray(subject.n_expert).tolist(),
        "k": k.tolist(),
        "unit": "tokens" if k is counts.n_expert_used else "picks",
    }
    tables = widget_tables(findings)
    if (lift := tables.get("forest")) is not None and domains:
        if max_p < 1:
            lift = lift[lift["p_family"] <= max_p]
            head["sure"] = max_p
        arrays |= _lift_arrays(lift, domains, counts.layers.tolist(), counts.n_expert)
    if (table := tables.get("persistence")) is not None:
        names = [
            f"{f}{part}"
            for f in ("overlap", "top1")
            for part in ("", "_shuffle", "_marginal", "_low", "_high")
        ]
        lags = sorted(set(table["lag"].tolist()))
        shape = (len(names), counts.layers.size, len(lags))
        ordered = table.sort_values(["layer", "lag"])
        if len(ordered) == shape[1] * shape[2]:
            head["lags"] = lags
            arrays["persistence"] = _numbers(ordered[names]).T.reshape(shape).astype("<f4")
    if (table := tables.get("separation")) is not None and len(table) == counts.layers.size:
        names = ["jsd_bits", "jsd_null_q95", "jsd_jackknife", "jsd_low", "jsd_high", "q_value"]
        arrays["separation"] = _numbers(table.sort_values("layer")[names]).T.astype("<f4")
        strongest = np.nan_to_num(arrays["separation"][[2, 0]], nan=-1.0)
        head["start"] = int(strongest[0 if (strongest[0] >= 0).any() else 1].argmax())
    counts = subject.prompt_counts
    if counts.max_lag and counts.transitions.shape[1] and counts.transitions.any():
        arrays |= _step_arrays(counts, max_experts)
    return head, arrays


def _lift_arrays(lift: pd.DataFrame, domains: list[str], layers: list[int], n_expert: int) -> Arrays:
    place = (
        pd.Categorical(lift["domain"], categories=domains).codes.astype(np.int64),
        pd.Categorical(lift["layer"], categories=layers).codes.astype(np.int64),
        lift["expert"].to_numpy(dtype=np.int64),
    )
    known = (place[0] >= 0) & (place[1] >= 0) & (place[2] < n_expert)
    out: Arrays = {}
    for name, column in (("low", "low"), ("high", "high"), ("p", "p_family")):
        values = np.full((len(domains), len(layers), n_expert), np.nan)
        values[tuple(p[known] for p in place)] = _numbers(lift[[column]])[known, 0]
        out[name] = np.minimum(values, 60000.0).astype("<f2")
    return out


def _step_arrays(counts: Any, max_experts: int) -> Arrays:
    size = min(max_experts, counts.n_expert)
    seen, lifts, chosen = [], [], []
    for layer in counts.layers.tolist():
        try:
            found = transitions(counts, layer)
        except MoetraceError:
            return {}
        used = counts.top1[:, counts.layers.tolist().index(layer)].sum(axis=0)
        best = np.sort(np.argsort(-used, kind="stable")[:size])
        few = found.expected.to_numpy() < 1.0
        lift = np.where(few, np.nan, found.lift.to_numpy())
        seen.append(found.counts.to_numpy()[np.ix_(best, best)])
        lifts.append(np.minimum(lift[np.ix_(best, best)], 60000.0))
        chosen.append(best)
    return {
        "steps": np.stack(seen).astype("<u4"),
        "steps_lift": np.stack(lifts).astype("<f2"),
        "steps_expert": np.stack(chosen).astype("<u2"),
        "steps_from": counts.transitions.sum(axis=2).astype("<u4"),
    }


def table_json(table: pd.DataFrame, max_rows: int) -> dict[str, Any]:
    """A table as JSON values, column by column: five significant digits; NaN and missing become None."""
    shown = table.head(max_rows)
    return {
        "columns": [str(c) for c in table.columns],
        "rows": len(table),
        "values": [[_value(v) for v in shown[c].tolist()] for c in table.columns],
    }


def pack(head: Mapping[str, Any], arrays: Arrays) -> bytes:
    """Pack header and arrays; see above."""
    listed: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array)
        planes = flat.reshape(-1).view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()
        listed[name] = {"dtype": flat.dtype.str[1:], "shape": list(flat.shape), "offset": offset}
        parts.append(planes)
        offset += len(planes)
    text = json.dumps({**head, "arrays": listed}, separators=(",", ":"), allow_nan=False).encode()
    return zlib.compress(b"".join([len(text).to_bytes(4, "little"), text, *parts]), 9)


def unpack(data: bytes) -> tuple[dict[str, Any], Arrays]:
    """Read what :func:`pack` gave."""
    raw = zlib.decompress(data)
    n = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + n])
    arrays: Arrays = {}
    for name, spec in head.pop("arrays").items():
        kind, start = np.dtype("<" + spec["dtype"]), 4 + n + spec["offset"]
        size = int(np.prod(spec["shape"]))
        planes = np.frombuffer(raw, np.uint8, size * kind.itemsize, start).reshape(kind.itemsize, size)
        arrays[name] = np.ascontiguousarray(planes.T).reshape(-1).view(kind).reshape(spec["shape"])
    return head, arrays


def _numbers(table: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Numbers of a table; what JSON made None is NaN."""
    return np.stack([pd.to_numeric(table[c]).to_numpy(dtype=np.float64) for c in table], axis=1)


def _value(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return None
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, bool | int | str):
        return value
    return json.loads(json.dumps(value, default=str))
