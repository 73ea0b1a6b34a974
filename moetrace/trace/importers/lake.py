"""A trace out of a lake (:mod:`moetrace.trace.lake`), as it was when it was exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError, UsageError
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import read_json
from moetrace.trace.lake import HEAD, LISTS, STATES
from moetrace.trace.longform import import_arrow
from moetrace.trace.record import State
from moetrace.trace.rows import Columns, Layout
from moetrace.trace.store import CONTEXT_NAME, META_NAME, TraceStore
from moetrace.trace.view import PHASES

_BLOCK_BYTES = 32 << 20


def is_lake(source: Path) -> bool:
    """Whether a folder is a lake."""
    return (source / "traces").is_dir() and any((source / "files").glob("*.parquet"))


def traces_of(lake: Path) -> dict[str, str]:
    """Give the traces of a lake: key -> name. Raises MoetraceError if pyarrow is missing."""
    import_arrow()
    import pyarrow.parquet as pq

    out: dict[str, str] = {}
    for file in sorted((lake / "traces").glob("**/*.parquet")):
        table = pq.ParquetFile(file).read(["trace_id", "trace"])
        out |= dict(zip(table["trace_id"].to_pylist(), table["trace"].to_pylist(), strict=True))
    return out


def choose(lake: Path, trace: str | None) -> str:
    """Give the key of the trace that is meant by key or name; None: the only one.

    Raises UsageError if it is not one.
    """
    have = traces_of(lake)
    found = [key for key, name in have.items() if trace in (None, key, name)]
    if len(found) == 1:
        return found[0]
    what = (
        f"no trace {trace}" if not found else f"{len(found):,} traces" + (f" called {trace}" if trace else "")
    )
    some = ", ".join(f"{name} ({key})" for key, name in list(have.items())[:10])
    raise UsageError(f"{lake} has {what}", fix=f"choose with --trace: {some}")


def write_from_lake(lake: Path, key: str, out: Path) -> tuple[int, int]:
    """Write the trace of this key into the folder ``out``; gives how many rows and requests it has.

    Raises InputError if the lake lacks a part of it.
    """
    _other_files(lake, key, out)
    meta = read_json(out / META_NAME)
    n_rows = 0
    for name in meta["contexts"]:
        layout = Layout.from_context(read_json(out / name / CONTEXT_NAME))
        n_rows += _rows(lake, key, name, layout, out / name / "rows")
    store = TraceStore(out)
    for name, sealed in meta.get("tables", {}).items():
        if store.tables()[name].n_rows != sealed["rows"]:
            raise InputError(
                f"{lake} lacks a part of {key}",
                why=f"the table {name} has {store.tables()[name].n_rows:,} rows, not {sealed['rows']:,}",
                fix="export it again with --force",
            )
    if not store.live:
        store.close_as(store.meta["state"])
    return n_rows, store.requests.n_rows


def _other_files(lake: Path, key: str, out: Path) -> None:
    import pyarrow.parquet as pq

    for file in sorted((lake / "files").glob(f"{key}-*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(1):
            (row,) = batch.to_pylist()
            path = out / row["path"]
            if not path.resolve().is_relative_to(out.resolve()):
                raise InputError(f"{lake} cannot be read", why=f"{row['path']} lies outside of the trace")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb" if row["part"] == 0 else "ab") as f:
                f.write(row["content"])
    if not (out / META_NAME).exists():
        raise InputError(
            f"{lake} lacks a part of {key}", why=f"it has no {META_NAME} of it", fix="export it again"
        )


def _rows(lake: Path, key: str, context: str, layout: Layout, out: Path) -> int:
    last = -1
    row_bytes = sum(np.dtype(d).itemsize * int(np.prod(s)) for d, s in layout.row_columns.values())
    with TableWriter.create(out, layout.row_columns) as rows:
        for table in _groups(lake, key, context):
            columns = _columns(table, layout)
            if (
                columns["serial"].size
                and (np.diff(columns["serial"].astype(np.int64), prepend=last) <= 0).any()
            ):
                raise InputError(
                    f"{lake} has rows of {key} twice, or out of order",
                    why=f"{context}: after serial {last} comes {int(columns['serial'][0])}",
                    fix="export it again with --force",
                )
            last = int(columns["serial"][-1])
            rows.append(columns)
            if rows.unsealed * row_bytes >= _BLOCK_BYTES:
                rows.seal()
        rows.seal()
        return len(rows)


def _groups(lake: Path, key: str, context: str) -> Iterator[Any]:
    """Tables of whole tokens, in the order of their serials."""
    from urllib.parse import quote

    import pyarrow.parquet as pq

    files = [
        pq.ParquetFile(path)
        for path in (lake / "entries").glob(f"**/{key}-{quote(context, safe='')}.parquet")
    ]
    for file in sorted(files, key=lambda f: f.read_row_group(0, ["serial"])["serial"][0].as_py()):
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def _columns(table: Any, layout: Layout) -> Columns:
    """The columns of the table ``rows``: :func:`moetrace.trace.lake.write_lake` the other way round."""

    import pyarrow as pa

    n_layers = len(layout.layers)
    n = table.num_rows // n_layers

    def numbers(name: str, fill: int) -> NDArray[Any]:
        column = table[name].combine_chunks()
        return np.asarray(
            (column.fill_null(fill) if column.null_count else column).to_numpy(zero_copy_only=False)
        )

    def codes(name: str, names: list[str]) -> NDArray[Any]:
        column = table[name].combine_chunks()
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        of = np.array([names.index(text) for text in column.dictionary.to_pylist()], np.uint8)
        return np.asarray(of[np.asarray(column.indices)])

    state = codes("state", STATES).reshape(n, n_layers)
    out: dict[str, NDArray[Any]] = {"phase": codes("phase", PHASES)[::n_layers], "state": state}
    for name, (_, shape) in layout.row_columns.items():
        if name in HEAD:
            out[name] = numbers(HEAD[name][0], -1)[::n_layers]
        elif name == "time_ns":
            out[name] = numbers("time_ns", 0)[::n_layers]
        elif name in LISTS:
            fill = layout.sentinel if name == "experts" else np.nan
            values = _values(table[name], shape[-1], fill).reshape(n, *shape)
            values[state != State.PRESENT] = fill
            out[name] = values
        elif name.startswith("tensor."):
            out[name] = _values(table[name], shape[-1], np.nan).reshape(n, n_layers, *shape)[:, 0]
    return {
        name: np.ascontiguousarray(out[name].astype(dtype)) for name, (dtype, _) in layout.row_columns.items()
    }


def _values(column: Any, width: int, fill: float) -> NDArray[Any]:
    """Elements of lists of one length, (n × width,), a copy; ``fill`` where one, or the whole list, is missing."""
    array = column.combine_chunks()
    flat = array.values.slice(array.offset * width, len(array) * width)
    return np.array((flat.fill_null(fill) if flat.null_count else flat).to_numpy(zero_copy_only=False))
