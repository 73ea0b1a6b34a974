"""A lake: Parquet files of many traces, which DuckDB, Spark, Polars and Dask read as they are (docs/lake.md).

Four tables, each a folder of files: ``entries``, one row per token and layer; ``requests``; ``traces``, one row per
llama context; ``files``, what else a trace's folder holds, so that it can be imported back as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.trace import naming
from moetrace.trace.longform import import_arrow
from moetrace.trace.record import State
from moetrace.trace.storage import disk_error
from moetrace.trace.trace import Trace
from moetrace.trace.view import PHASES

PARTITIONS = ("model", "day", "server")
TABLES = ("entries", "requests", "traces", "files")
STATES = [state.name.lower().replace("_", " ") for state in State]
UNKNOWN = "unknown"

#: head columns of the table ``rows`` -> column of ``entries`` and its Arrow type; -1 is missing where marked
HEAD = {
    "serial": ("serial", "uint64", False),
    "step": ("step", "uint32", False),
    "batch": ("batch", "uint32", False),
    "row": ("row", "uint32", False),
    "request": ("request", "int64", True),
    "sequence": ("slot", "int32", True),
    "n_sequences": ("n_sequences", "uint16", False),
    "flags": ("flags", "uint32", False),
    "token": ("token", "int32", True),
    "position": ("position", "int32", True),
    "task": ("task", "int32", True),
    "events_before": ("events_before", "uint32", False),
}
#: columns with a list for each token and layer -> type of an element
LISTS = {
    "experts": "uint16",
    "weights": "float32",
    "logits": "float32",
    "scores": "float32",
    "gate_input": "float32",
    "outputs": "float32",
}

_ENTRIES = 1 << 19  # rows of ``entries`` written together: a row group, of whole tokens
_PIECE = 32 << 20  # bytes of a file in one row of ``files``
_DAY_NS = 86_400 * 10**9
_FIRST_DAY = 12  # clocks that say less do not know the day


@dataclass(frozen=True)
class Written:
    """What was written: how many rows of ``entries``, and the files."""

    trace_id: str
    entries: int
    files: tuple[Path, ...]


def trace_id(trace: Trace) -> str:
    """Give the key of a trace, 16 hexadecimal digits: of when, where, and by which processes it was recorded."""
    meta = trace.meta
    what = [
        meta.get("created_ns"),
        meta.get("host"),
        [trace.in_context(name).facts.get("pid") for name in trace.contexts],
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def write_lake(
    trace: Trace,
    folder: str | os.PathLike[str],
    *,
    partition_by: Sequence[str] = PARTITIONS,
    in_text: Callable[[Trace], NDArray[np.bool_]],
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Add a trace, with all its contexts, to a lake; memory does not grow with the trace.

    Parameters
    ----------
    trace
        The trace.
    folder
        The lake, made if it is not there.
    partition_by
        Which of ``PARTITIONS`` become folders (``model=.../day=.../server=...``); the others are columns.
    in_text
        Gives of a trace of one context which rows, (N,) bool, are tokens of a request's text: no rejected drafts.
    force
        Replace the trace if the lake has it; one that was exported while it was recorded is replaced anyway.
    progress
        Called with (rows done, rows in all).

    Raises
    ------
    UsageError
        If a partition is not known, or the lake has this trace.
    MoetraceError
        If the disk fails, or pyarrow is missing.
    """
    import_arrow()
    if unknown := sorted(set(partition_by) - set(PARTITIONS)):
        raise UsageError(
            f"a lake is not partitioned by {', '.join(unknown)}", fix=f"choose among: {', '.join(PARTITIONS)}"
        )
    lake, key = Path(folder), trace_id(trace)
    _refuse_layout(lake, partition_by)
    old = sorted(lake.glob(f"*/**/{key}-*.parquet"))
    if old and not force and not _was_live(lake, key):
        raise UsageError(f"{lake} has {trace.path.name} already", fix="give --force to replace it")
    writer = _Writer(lake, key, tuple(partition_by))
    with writer:
        total = sum(trace.in_context(name).chain.n_rows for name in trace.contexts)
        done = 0
        for name in trace.contexts:
            part = trace.in_context(name)
            done = _entries(writer, trace, part, in_text(part), lambda n: progress(n, total), done)
            _requests(writer, trace, part)
            _facts(writer, trace, part)
        _files(writer, trace)
    for path in set(old) - set(writer.files):
        path.unlink()
    return Written(key, writer.n_entries, tuple(writer.files))


def _refuse_layout(lake: Path, partition_by: Sequence[str]) -> None:
    """Refuse to mix files partitioned one way with files partitioned another: no reader could read both."""
    for file in (lake / "entries").glob("**/*.parquet"):
        names = [part.split("=")[0] for part in file.relative_to(lake / "entries").parts[:-1]]
        if names != list(partition_by):
            how = ",".join(names)
            raise UsageError(
                f"{lake} is partitioned by {how or 'nothing'}",
                fix=f"give --partition-by {how}" if how else "give --partition-by ''",
            )
        return


def _was_live(lake: Path, key: str) -> bool:
    import pyarrow.parquet as pq

    return any(
        any(pq.ParquetFile(file).read(["live"])["live"].to_pylist())
        for file in (lake / "traces").glob(f"**/{key}-*.parquet")
    )


class _Writer:
    """Files of one trace, under names that no reader sees before all are whole."""

    def __init__(self, lake: Path, key: str, partition_by: tuple[str, ...]) -> None:
        self.lake, self.key, self.partition_by = lake, key, partition_by
        self.n_entries = 0
        self.files: list[Path] = []
        self._open: dict[Path, Any] = {}

    def write(self, table: str, name: str, batch: Any, place: dict[str, str]) -> None:
        """Append a record batch, whose ``place`` are its values of ``PARTITIONS``, to the table's file of ``name``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for column in PARTITIONS:
            if column in place and column not in self.partition_by:
                batch = batch.append_column(column, _same(place[column], batch.num_rows))
        folders = [
            f"{column}={quote(place[column], safe='')}" for column in self.partition_by if column in place
        ]
        path = Path(self.lake, table, *folders, f"{self.key}-{quote(name, safe='')}.parquet")
        try:
            if path not in self._open:
                path.parent.mkdir(parents=True, exist_ok=True)
                repeating = [
                    f.name
                    for f in batch.schema
                    if not (pa.types.is_fixed_size_list(f.type) or f.name == "content")
                ]
                self._open[path] = pq.ParquetWriter(
                    _hidden(path),
                    batch.schema,
                    use_dictionary=repeating,
                    compression="zstd",
                    compression_level=1,
                )
            self._open[path].write_batch(batch)
        except OSError as e:
            raise disk_error(path, e) from e
        if table == "entries":
            self.n_entries += batch.num_rows

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for path, writer in self._open.items():
                try:
                    writer.close()
                except OSError as e:
                    if kind is None:
                        raise disk_error(path, e) from e
            if kind is None:
                for path in self._open:
                    _hidden(path).replace(path)
                    self.files.append(path)
        finally:
            for path in self._open:
                _hidden(path).unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _same(text: str | None, n: int) -> Any:
    import pyarrow as pa

    return _coded(np.full(n, -1 if text is None else 0, np.int32), pa.array([text or ""], pa.string()))


def _coded(codes: NDArray[np.int32], names: Any) -> Any:
    import pyarrow as pa

    names = names if isinstance(names, pa.Array) else pa.array(names, pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), names)


@dataclass
class _Names:
    """Texts of requests, by code: the code of each request number, and the texts."""

    code: NDArray[np.int32]
    texts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, texts: dict[int, str]) -> _Names:
        known = {text: i for i, text in enumerate(dict.fromkeys(texts.values()))}
        code = np.full(max(texts, default=-1) + 2, -1, np.int32)  # the last one: of none
        for number, text in texts.items():
            code[number] = known[text]
        return cls(code, list(known))

    def array(self, request: NDArray[np.int64]) -> Any:
        there = (request >= 0) & (request < len(self.code) - 1)
        return _coded(self.code[np.where(there, request, -1)], self.texts)


def prompts(trace: Trace, key: str) -> dict[int, str]:
    """Give the unit that each request of a trace is of: its id, or what no other request of the lake is called."""
    ids = trace.requests["id"]
    numbers = ids.index.tolist()
    return {
        n: f"{key}#{n:06d}" if given is None else str(given)
        for n, given in zip(numbers, ids.tolist(), strict=True)
    }


def _place(trace: Trace, part: Trace) -> dict[str, str]:
    return {"model": naming.called(part.facts) or UNKNOWN, "server": str(trace.meta.get("host") or UNKNOWN)}


def _days(time_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    days = time_ns // _DAY_NS
    return np.where(days < _FIRST_DAY, -1, days)


def _day(number: int) -> str:
    return UNKNOWN if number < 0 else datetime.fromtimestamp(number * 86400, UTC).strftime("%Y-%m-%d")


def _entries(
    writer: _Writer,
    trace: Trace,
    part: Trace,
    in_text: NDArray[np.bool_],
    progress: Callable[[int], None],
    done: int,
) -> int:
    named = _Names.of(prompts(part, writer.key))
    label = part.requests["label"]
    said = zip(label.index.tolist(), label.tolist(), strict=True)
    labels = _Names.of({n: str(x) for n, x in said if x is not None})
    place, each = _place(trace, part), max(1, _ENTRIES // len(part.layers))
    for start in range(0, len(part), each):
        piece = slice(start, min(start + each, len(part)))
        time_ns = part.column("time_ns", piece) + np.int64(part.epoch_ns)
        days = _days(time_ns)
        edges = [0, *(np.flatnonzero(np.diff(days)) + 1).tolist(), len(days)]
        for first, last in pairwise(edges):
            rows = slice(start + first, start + last)
            batch = _batch(writer.key, trace, part, rows, time_ns[first:last], in_text[rows], named, labels)
            writer.write("entries", part.shown[0], batch, {**place, "day": _day(int(days[first]))})
        done += piece.stop - start
        progress(done)
    return done


def _batch(
    key: str,
    trace: Trace,
    part: Trace,
    rows: slice,
    time_ns: NDArray[np.int64],
    in_text: NDArray[np.bool_],
    named: _Names,
    labels: _Names,
) -> Any:
    import pyarrow as pa

    layers, n = part.layers, rows.stop - rows.start
    n_layers = len(layers)

    def repeated(values: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(values, n_layers)

    def tiled(values: NDArray[Any]) -> NDArray[Any]:
        return np.tile(values, n)

    request = repeated(part.column("request", rows))
    out: dict[str, Any] = {
        "trace_id": _same(key, n * n_layers),
        "trace": _same(trace.path.name, n * n_layers),
        "context": _same(part.shown[0], n * n_layers),
    }
    for name in part.column_names:
        if name in HEAD:
            column, kind, may_miss = HEAD[name]
            values = repeated(part.column(name, rows))
            out[column] = pa.array(values, kind, mask=values == -1 if may_miss else None)
    state = part.column("state", rows).reshape(-1)
    out |= {
        "prompt": named.array(request),
        "label": labels.array(request),
        "phase": _coded(np.minimum(repeated(part.column("phase", rows)), 2).astype(np.int32), PHASES),
        "in_text": pa.array(repeated(in_text)),
        "time": pa.array(repeated(time_ns // 1000), pa.timestamp("us", "UTC")),
        "time_ns": pa.array(repeated(time_ns - np.int64(part.epoch_ns))),
        "layer": pa.array(tiled(layers.astype(np.int32))),
        "n_expert": pa.array(tiled(part.n_expert.astype(np.int32))),
        "n_expert_used": pa.array(tiled(part.n_expert_used.astype(np.int32))),
        "state": _coded(state.astype(np.int32), STATES),
    }
    sizes = {
        "experts": part.n_expert_used,
        "weights": part.n_expert_used,
        "logits": part.n_expert,
        "scores": part.n_expert,
        "outputs": part.n_expert_used,
    }
    absent = state != State.PRESENT
    for name, kind in LISTS.items():
        if name in part.column_names:
            values = part.column(name, rows)
            width = values.shape[2]
            beyond = np.arange(width) >= sizes[name][:, None] if name in sizes else np.zeros(1, bool)
            none = np.broadcast_to(beyond, (n, n_layers, width)).reshape(-1) if beyond.any() else None
            flat = pa.array(values.reshape(-1).astype(kind, copy=False), mask=none)
            out[name] = pa.FixedSizeListArray.from_arrays(
                flat, width, mask=pa.array(absent) if absent.any() else None
            )
    for name in part.column_names:
        if name.startswith("tensor."):
            # of a token, not of its layers: beside the first
            values = part.column(name, rows)
            wide = np.zeros((n, n_layers, values.shape[1]), np.float32)
            wide[:, 0] = values
            there = tiled(np.arange(n_layers) > 0)
            out[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(wide.reshape(-1)), values.shape[1], mask=pa.array(there)
            )
    return pa.RecordBatch.from_pydict(out)


def _requests(writer: _Writer, trace: Trace, part: Trace) -> None:
    """One row per request, as :attr:`Trace.requests` has them."""
    import pyarrow as pa

    frame = part.requests
    if frame.empty:
        return
    units = prompts(part, writer.key)
    own = [name for name in frame.columns if name in _REQUEST_TYPES]
    extra = [name for name in frame.columns if name not in _REQUEST_TYPES]
    said = [
        json.dumps(known, default=str) if (known := {k: v for k, v in row.items() if v is not None}) else None
        for row in frame[extra].to_dict("records")
    ]
    days = _days(frame["start_ns"].to_numpy(np.int64) + part.epoch_ns)
    columns: dict[str, Any] = {
        "trace_id": _same(writer.key, len(frame)),
        "trace": _same(trace.path.name, len(frame)),
        "request": pa.array(frame.index.to_numpy(np.int64)),
        "prompt": pa.array([units[int(n)] for n in frame.index], pa.string()),
    }
    for name in own:
        values = frame[name]
        if name in ("start_ns", "end_ns"):
            at = (values.to_numpy(np.int64) + part.epoch_ns) // 1000
            columns[name[:-3]] = pa.array(at, pa.timestamp("us", "UTC"))
        elif name == "prompt":
            columns["text"] = pa.array([None if v is None else str(v) for v in values], pa.string())
        else:
            plain = values.astype(object).where(values.notna(), None).tolist()
            columns[name] = pa.array(plain, _REQUEST_TYPES[name])
    columns["extra"] = pa.array(said, pa.string())
    batch = pa.RecordBatch.from_pydict(columns)
    for day in np.unique(days).tolist():
        mine = batch.filter(pa.array(days == day))
        writer.write("requests", part.shown[0], mine, {**_place(trace, part), "day": _day(day)})


_REQUEST_TYPES = {
    "id": "string", "label": "string", "prompt": "string", "slot": "int32", "context": "string",
    **dict.fromkeys(
        ("n_prompt", "n_generated", "n_cached", "n_prefill", "n_decode", "n_lost", "n_rejected", "n_recomputed",
         "n_undecided", "n_shifts", "n_unrecorded", "n_events_lost"),
        "int64",
    ),
    "first_serial": "uint64", "last_serial": "uint64", "start_ns": "int64", "end_ns": "int64", "running": "bool",
    "label_unsure": "bool",
}  # fmt: skip


def _facts(writer: _Writer, trace: Trace, part: Trace) -> None:
    """One row: what the context is, and what became of everything that it computed."""
    import pyarrow as pa

    model, loss = part.facts.get("model"), part.loss
    model = model if isinstance(model, dict) else {}
    created = trace.meta.get("created_ns")
    row = {
        "trace_id": writer.key,
        "trace": trace.path.name,
        "context": part.shown[0],
        "role": naming.role(part.facts),
        "architecture": str(model.get("architecture") or "") or None,
        "description": str(model.get("description") or "") or None,
        "moetrace": str(trace.meta.get("moetrace") or "") or None,
        "live": trace.live,
        "channels": part.channels,
        "layers": part.layers.tolist(),
        "n_expert": part.n_expert.tolist(),
        "n_expert_used": part.n_expert_used.tolist(),
        **{name: getattr(loss, name) for name in loss.__dataclass_fields__},
    }
    kinds = {
        **dict.fromkeys(
            ("trace_id", "trace", "context", "role", "architecture", "description", "moetrace"), pa.string()
        ),
        "live": pa.bool_(),
        "channels": pa.list_(pa.string()),
        **dict.fromkeys(("layers", "n_expert", "n_expert_used"), pa.list_(pa.int32())),
        **dict.fromkeys(loss.__dataclass_fields__, pa.int64()),
    }
    columns = {name: pa.array([value], kinds[name]) for name, value in row.items()}
    columns["created"] = pa.array([created and created // 1000], pa.timestamp("us", "UTC"))
    day = _day(int(_days(np.array([created or 0]))[0]))
    writer.write(
        "traces", part.shown[0], pa.RecordBatch.from_pydict(columns), {**_place(trace, part), "day": day}
    )


def other_files(folder: Path) -> Iterator[Path]:
    """The files of a trace that its rows do not tell: descriptions, labels, vocabularies, its other tables."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        ours = parts[0] == "answers" or "rows" in parts[1:-1] or parts[-1] == "ring"
        if (
            path.is_file()
            and not path.is_symlink()
            and not ours
            and not any(p.startswith(".") for p in parts)
        ):
            yield path


def _files(writer: _Writer, trace: Trace) -> None:
    import pyarrow as pa

    for path in other_files(trace.path):
        with path.open("rb") as f:
            for number in range(max(1, -(-path.stat().st_size // _PIECE))):
                content = f.read(_PIECE)
                columns = {
                    "trace_id": pa.array([writer.key]),
                    "trace": pa.array([trace.path.name]),
                    "path": pa.array([str(path.relative_to(trace.path))]),
                    "part": pa.array([number], pa.int32()),
                    "content": pa.array([content], pa.binary()),
                }
                writer.write("files", "all", pa.RecordBatch.from_pydict(columns), {})
