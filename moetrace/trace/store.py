"""A trace's folder: its JSON files and tables, checked, before anything is made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moetrace.errors import TraceError
from moetrace.trace.columns import Table
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.requests import NOT_IN_1_0, REQUEST_TABLE
from moetrace.trace.rows import ColumnSpec, Layout

FORMAT = "moetrace-trace"
VERSION = (1, 1)
META_NAME = "meta.json"
CONTEXT_NAME = "context.json"
RING_NAME = "ring"
VOCABULARY_NAME = "vocabulary.json"


@dataclass(frozen=True)
class ContextStore:
    """One context's folder.

    ``facts`` is context.json; ``rows`` and ``events`` are its tables.
    """

    path: Path
    name: str
    facts: dict[str, Any]
    layout: Layout
    rows: Table
    events: Table

    @property
    def ring(self) -> Path:
        """Where its ring lies while it is recorded."""
        return self.path / RING_NAME


class TraceStore:
    """The folder of a trace, opened read-only: JSON and headers are read, columns are not.

    Raises
    ------
    TraceError
        If it is no trace, newer, or damaged so that its tables cannot be found.
    """

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is no trace" if self.path.exists() else "does not exist"
            raise TraceError(
                f"{self.path} {what}", why="a trace is a folder", fix="give the path of a trace folder"
            )
        if not (self.path / META_NAME).exists():
            if any(self.path.glob(f"ctx*/{RING_NAME}")):
                raise TraceError(
                    f"{self.path} is no trace yet",
                    why="a program writes rings there, and nobody reads them",
                    fix=f"moetrace resume {self.path} while it runs, moetrace recover {self.path} when it has ended",
                )
            raise TraceError(
                f"{self.path} is no trace", why=f"it has no {META_NAME}", fix="give a trace's folder"
            )
        self.meta = read_json(self.path / META_NAME, check=check)
        if self.meta.get("format") != FORMAT:
            raise TraceError(f"{self.path} is no trace", why=f"its format is {self.meta.get('format')!r}")
        version = self.meta.get("version")
        if not (isinstance(version, list) and len(version) == 2 and all(type(v) is int for v in version)):
            raise TraceError(f"{self.path} cannot be read", why=f"its version is {version!r}")
        if version[0] != VERSION[0]:
            raise TraceError(
                f"{self.path} cannot be read",
                why=f"it has format {version[0]}.{version[1]}, this moetrace reads {VERSION[0]}.{VERSION[1]}",
                fix="upgrade moetrace, or read it with the version that wrote it",
            )
        names = self.meta.get("contexts")
        if not (isinstance(names, list) and all(isinstance(n, str) and _is_plain(n) for n in names)):
            raise TraceError(f"{self.path} cannot be read", why=f"its list of contexts is {names!r}")
        self.context_names: list[str] = names
        self._contexts: dict[str, ContextStore] = {}

    def context(self, name: str) -> ContextStore:
        """Open one context's tables; a second call gives the same."""
        if name not in self._contexts:
            path = self.path / name
            facts = read_json(path / CONTEXT_NAME)
            layout = Layout.from_context(facts)
            rows, events = Table(path / "rows"), Table(path / "events")
            _check_columns(rows, layout.row_columns)
            _check_columns(events, layout.event_columns)
            self._contexts[name] = ContextStore(path, name, facts, layout, rows, events)
        return self._contexts[name]

    @property
    def contexts(self) -> list[ContextStore]:
        """All contexts, in the order of meta.json."""
        return [self.context(name) for name in self.context_names]

    @cached_property
    def requests(self) -> Table:
        """The table of ended requests."""
        table = Table(self.path / "requests")
        _check_columns(table, self.request_columns)
        return table

    @property
    def request_columns(self) -> ColumnSpec:
        """The columns of the table ``requests`` in a trace of this version."""
        old = self.meta["version"][1] == 0
        return {name: spec for name, spec in REQUEST_TABLE.items() if not (old and name in NOT_IN_1_0)}

    @property
    def live(self) -> bool:
        """True if nobody has closed the trace: it is being recorded, or its recorder died."""
        return self.meta.get("state") not in ("closed", "recovered")

    def tables(self) -> dict[str, Table]:
        """Every table by its path in the trace, as ``tables`` in meta.json names them."""
        return {name: opened() for name, opened in self.each_table(self.contexts)}

    def each_table(self, contexts: Sequence[ContextStore]) -> Iterator[tuple[str, Callable[[], Table]]]:
        """Give each table's name, and what opens it: that raises TraceError if it is damaged."""
        yield "requests", lambda: self.requests
        for context in contexts:
            yield f"{context.name}/rows", partial(getattr, context, "rows")
            yield f"{context.name}/events", partial(getattr, context, "events")
            for name in ("attention", "attention_values"):
                if (context.path / name).is_dir():
                    yield f"{context.name}/{name}", partial(Table, context.path / name)

    def close(self) -> None:
        """Let go of the maps; arrays given out keep theirs."""
        for context in self._contexts.values():
            context.rows.close()
            context.events.close()
        if "requests" in self.__dict__:
            self.requests.close()

    def close_as(self, state: str, *, exit_code: int | None = None, fsync: bool = False) -> None:
        """Write meta.json with the state (``closed``, ``recovered``) and each table's length and checksum."""
        for table in self.tables().values():
            table.refresh()
        self.meta["state"] = state
        if exit_code is not None:
            self.meta["exit_code"] = exit_code
        self.meta["tables"] = {
            name: {"rows": table.n_rows, "crc": table.ledger_crc} for name, table in self.tables().items()
        }
        write_json(self.path / META_NAME, self.meta, fsync=fsync)


def write_vocabulary(trace: Path, tokens: Sequence[bytes], name: str = VOCABULARY_NAME) -> None:
    """Store the text of each token id in a trace, so that it can be read without the model."""
    text = [token.decode("utf-8", "surrogateescape") for token in tokens]
    write_json(trace / name, {"tokens": text})


def read_vocabulary(trace: Path, name: str = VOCABULARY_NAME) -> list[bytes] | None:
    """Read the text of each token id, or None if the trace does not have it."""
    if not _is_plain(name):
        raise TraceError(f"{trace} cannot be read", why=f"it names {name!r} as a vocabulary")
    path = trace / name
    if not path.exists():
        return None
    tokens = read_json(path).get("tokens")
    if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        raise TraceError(f"{path} cannot be read", why="it has no list of texts under `tokens`")
    try:
        return [token.encode("utf-8", "surrogateescape") for token in tokens]
    except UnicodeEncodeError as e:
        raise TraceError(f"{path} cannot be read", why=str(e)) from None


def _check_columns(table: Table, spec: ColumnSpec) -> None:
    """Refuse a table that lacks a column, or has it in another shape; a newer minor version may add some."""
    odd = [name for name, column in spec.items() if table.spec.get(name) != column]
    if odd:
        raise TraceError(
            f"{table.path} is not as the trace describes it",
            why=f"columns that are missing or of another shape: {', '.join(odd)}",
            fix="run `moetrace verify` on the trace",
        )


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name
