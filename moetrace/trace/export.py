"""Traces for other programs: csv, jsonl, npz, parquet, arrow. Memory does not grow with the trace."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from moetrace.errors import UsageError
from moetrace.printable import printable
from moetrace.trace.longform import LongForm, import_arrow
from moetrace.trace.profiles import write_profile
from moetrace.trace.routed import RoutedExperts, routed_experts
from moetrace.trace.storage import disk_error
from moetrace.trace.timeline import timeline
from moetrace.trace.trace import Trace
from moetrace.trace.view import Rows

FORMATS = ("csv", "jsonl", "npz", "parquet", "arrow")
_CHUNK = 1 << 11  # rows written together


def export(rows: LongForm, output: str | os.PathLike[str], format: str) -> None:  # noqa: A002
    """Write a trace, or a selection of it, to one file.

    csv, jsonl, parquet and arrow (the IPC stream) hold the long form of :meth:`LongForm.to_pandas`: one row per
    (token, layer, rank). npz holds the columns as they are, one array each, with ``layers``, ``n_expert``,
    ``n_expert_used``, ``contexts`` (names) and ``context`` (for each row, which of them).

    Parameters
    ----------
    rows
        The trace or selection.
    output
        The file; ``-`` is stdout. It is replaced as a whole, or not at all.
    format
        One of ``FORMATS``.

    Raises
    ------
    UsageError
        If there is no such format, or npz or parquet is to go to a terminal or pipe.
    MoetraceError
        If the disk is full or fails, or pyarrow is missing.
    """
    if format not in FORMATS:
        raise UsageError(f"there is no format {format}", fix=f"choose among: {', '.join(FORMATS)}")
    write = {"csv": _csv, "jsonl": _jsonl, "npz": _npz, "parquet": _parquet, "arrow": _arrow}[format]
    if str(output) == "-":
        if format in ("npz", "parquet"):
            raise UsageError(f"{format} cannot be written to stdout", fix="give a file with -o")
        terminal = sys.stdout.isatty() and format in ("csv", "jsonl")
        write(rows, _Terminal() if terminal else sys.stdout.buffer)
        sys.stdout.flush()
        return
    with _replacing(Path(output)) as f:
        write(rows, f)


#: what :func:`export_routed` writes
ROUTED = "routed-experts"


def export_routed(trace: Trace, output: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """Write the routed experts of every request (:func:`~moetrace.trace.routed.routed_experts`).

    A name that ends in .npz: an array (tokens, layers, k), int32, of each request, called by its id, or by its number
    where it has none or another has the same. Else JSON lines, with base64, ids and labels; ``-`` is stdout.

    Returns the requests that are not in it, and why: shifted contexts, unknown positions.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    left: list[tuple[int, str]] = []
    table = trace.requests

    def found() -> Iterator[tuple[int, RoutedExperts]]:
        for number in table.index.tolist():
            try:
                yield number, routed_experts(trace, number)
            except UsageError as e:
                left.append((number, e.what))

    if str(output).endswith(".npz"):
        ids = table["id"].tolist()
        names = [
            str(said) if isinstance(said, str) and ids.count(said) == 1 else str(number)
            for number, said in zip(table.index.tolist(), ids, strict=True)
        ]
        name_of = dict(zip(table.index.tolist(), names, strict=True))
        with _replacing(Path(output)) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, routed in found():
                archive.writestr(f"{name_of[number].replace('/', '_')}.npy", routed.npy())
        return left
    with contextlib.ExitStack() as stack:
        out: IO[Any] = (
            sys.stdout.buffer if str(output) == "-" else stack.enter_context(_replacing(Path(output)))
        )
        for number, routed in found():
            said = {name: _text(table.at[number, name]) for name in ("id", "label")}
            out.write(json.dumps({**said, **routed.to_json()}).encode() + b"\n")
    return left


#: what :func:`export_timeline` writes
TIMELINE = "timeline"


def export_timeline(trace: Trace, output: str | os.PathLike[str]) -> None:
    """Write :func:`~moetrace.trace.timeline.timeline` as JSON; ``-`` is stdout.

    Raises MoetraceError if the disk is full or fails.
    """
    with contextlib.ExitStack() as stack:
        out: IO[Any] = (
            sys.stdout.buffer if str(output) == "-" else stack.enter_context(_replacing(Path(output)))
        )
        between = b'{"displayTimeUnit":"ms","traceEvents":[\n'
        for event in timeline(trace):
            out.write(between + json.dumps(event).encode())
            between = b",\n"
        out.write(b"\n]}\n" if between == b",\n" else between + b"]}\n")


def export_profile(rows: Rows, output: str | os.PathLike[str], profile: str, *, n_layer: int = 0) -> str:
    """Write :func:`~moetrace.trace.profiles.write_profile`'s file, and give what it says; ``-`` is stdout.

    Raises MoetraceError if the disk is full or fails.
    """
    if str(output) == "-":
        return write_profile(rows, sys.stdout.buffer, profile, n_layer=n_layer)
    with _replacing(Path(output)) as f:
        return write_profile(rows, f, profile, n_layer=n_layer)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


class _Terminal(io.BytesIO):
    """A terminal, which labels that others chose must not steer."""

    def write(self, data: Any) -> int:
        sys.stdout.write(printable(bytes(data).decode("utf-8", "replace"), keep="\n"))
        return len(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("xb") as f:
            yield f
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, e) from e
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _csv(rows: LongForm, f: IO[bytes]) -> None:
    header = True
    for frame in rows.iter_pandas(rows=_CHUNK):
        f.write(frame.to_csv(index=False, header=header).encode())
        header = False
    if header:
        f.write((",".join(rows.to_pandas().columns) + "\n").encode())


def _jsonl(rows: LongForm, f: IO[bytes]) -> None:
    for frame in rows.iter_pandas(rows=_CHUNK):
        f.write(frame.to_json(orient="records", lines=True, double_precision=15).encode())


def _npz(rows: LongForm, f: IO[bytes]) -> None:
    facts = {
        "layers": rows.layers,
        "n_expert": rows.n_expert,
        "n_expert_used": rows.n_expert_used,
        "contexts": np.array(rows.context_names),
    }
    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in facts.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
        for name in rows.column_names:
            first = rows.column(name, slice(0, 0))
            shape = (len(rows), *first.shape[1:])
            spec = {
                "descr": np.lib.format.dtype_to_descr(first.dtype),
                "fortran_order": False,
                "shape": shape,
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, spec)
                for start in range(0, len(rows), _CHUNK):
                    entry.write(
                        np.ascontiguousarray(rows.column(name, slice(start, start + _CHUNK))).tobytes()
                    )


def _parquet(rows: LongForm, f: IO[bytes]) -> None:
    import_arrow()
    import pyarrow.parquet as pq

    reader = rows.arrow_reader()
    # weights hardly repeat; what a reader leaves out whole row groups by
    repeating, told = [name for name in reader.schema.names if name != "weight"], ["request", "layer"]
    schema = reader.schema.with_metadata(rows.described().metadata())
    with pq.ParquetWriter(f, schema, use_dictionary=repeating, write_statistics=told) as writer:
        for batch in _ahead(reader):
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def _arrow(rows: LongForm, f: IO[bytes]) -> None:
    pa = import_arrow()
    reader = rows.arrow_reader()
    schema = reader.schema.with_metadata(rows.described().metadata())
    with pa.ipc.new_stream(f, schema) as writer:
        for batch in _ahead(reader):
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


T = TypeVar("T")


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """Give items while the next one is made on another thread."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item


def dump(rows: LongForm, f: IO[str]) -> None:
    """Write text, one line per token and layer: what a reader of the trace can be held against.

    Columns: context, serial, request, sequence, position, token, phase, layer, state, then ``expert:weight`` for each
    rank (``expert`` alone if weights were not captured), ``-`` where there is none.
    """
    phases, states = ("prefill", "decode", "unknown"), ("lost", "present", "not-computed")
    names = rows.column_names
    layers = rows.layers.tolist()
    f.write("context\tserial\trequest\tsequence\tposition\ttoken\tphase\tlayer\tstate\texperts\n")
    heads = ("context", "serial", "request", "sequence", "position", "token", "phase", "state")
    for start in range(0, len(rows), _CHUNK):
        piece = slice(start, start + _CHUNK)
        columns = {name: rows.column(name, piece).tolist() for name in heads}
        experts = rows.column("experts", piece).tolist() if "experts" in names else None
        weights = rows.column("weights", piece).tolist() if "weights" in names else None
        for i, serial in enumerate(columns["serial"]):
            head = (
                f"{rows.context_names[columns['context'][i]]}\t{serial}\t{columns['request'][i]}\t{columns['sequence'][i]}\t{columns['position'][i]}\t"
                f"{columns['token'][i]}\t{phases[columns['phase'][i]]}"
            )
            for j, layer in enumerate(layers):
                chosen = "-"
                if experts is not None:
                    ids = [e for e in experts[i][j] if e != rows.sentinel]
                    if ids and weights is not None:
                        chosen = " ".join(f"{e}:{w:.6g}" for e, w in zip(ids, weights[i][j], strict=False))
                    elif ids:
                        chosen = " ".join(map(str, ids))
                f.write(f"{head}\t{layer}\t{states[columns['state'][i][j]]}\t{chosen}\n")
