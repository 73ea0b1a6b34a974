"""Does a trace hold what it promises? Every checksum, every sentinel, every count."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, TraceError
from moetrace.trace.choice import ChoiceCheck
from moetrace.trace.columns import Damage, Table
from moetrace.trace.contexts import holds_nothing
from moetrace.trace.intervention import FOLDER, Rule, described, stored_rules
from moetrace.trace.labels import LABELS_NAME, read_labels
from moetrace.trace.loss import LOST_COUNTERS, LOST_EVENT_COUNTERS
from moetrace.trace.naming import same_model
from moetrace.trace.record import EventCode, RowFlag, State
from moetrace.trace.remarks import remarks
from moetrace.trace.requests import Phase
from moetrace.trace.ring import peek_counters, peek_reader, process_alive, ring_is_ready, ring_paths
from moetrace.trace.rows import LAYER_COLUMNS, Layout
from moetrace.trace.storage import is_locked
from moetrace.trace.store import (
    CONTEXT_NAME,
    META_NAME,
    VOCABULARY_NAME,
    ContextStore,
    TraceStore,
    read_vocabulary,
)

_CHUNK = 1 << 14  # rows looked at together
_TRIES = 5  # looks at a trace whose contexts come and go

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes
    ----------
    path
        The trace.
    findings
        What is wrong, in the order in which it was found; empty if nothing is.
    remarks
        What is no fault and yet must be known: see :mod:`moetrace.trace.remarks`.
    live
        True if the trace is being recorded right now: what is not sealed yet is no fault.
    rows
        Rows that were looked at, all contexts together.
    contexts, models
        How many llama contexts there are, and of how many models.
    empty
        Why the trace holds nothing, a sentence; empty if it has a context.
    remarks
        What is no fault and yet must be known: see :mod:`moetrace.trace.remarks`.
    """

    path: Path
    findings: tuple[Damage, ...]
    live: bool
    rows: int
    contexts: int = 1
    models: int = 1
    empty: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 fine, 1 if it holds nothing, 3 if `moetrace recover` can mend all that is wrong, 4 corrupt."""
        if not self.findings:
            return 1 if self.empty else 0
        return 3 if all(finding.recoverable for finding in self.findings) else 4


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> Verification:
    """Read all of a trace and check it.

    Checked are: the checksums of every block, ledger row, JSON file and label; the spelling and length of
    headers; that experts are in range, distinct and as many as the layer uses, and sentinels exactly where
    none are; that experts are those with the highest scores, and scores follow from logits, where these were
    captured; that serials ascend and miss as many rows as the counters say are lost, and the numbers of events
    likewise; that rows are of the tasks that the LAUNCHes say; that each request's counts are those of its rows;
    that the completeness sum is exact.

    Parameters
    ----------
    path
        The trace's folder.
    progress
        Called with the name of each table before it is read.

    Raises
    ------
    TraceError
        If there is no trace at ``path``, or it is newer than this moetrace. Damage is no exception.
    """
    for _ in range(_TRIES):
        before = _life(Path(path))
        result = _verify(path, progress)
        if not result.findings or _life(Path(path)) == before:
            break  # else a context or the trace was closed meanwhile, and what was read does not fit together
    return result


def _life(path: Path) -> tuple[object, ...]:
    """What changes in a trace when a context appears or is closed, be it both at once, or the trace is."""
    rings = [ring.parent.name for ring in ring_paths(path)]
    files = [path / META_NAME, *sorted(path.glob(f"*/{CONTEXT_NAME}"))]
    return rings, [(str(file), _version(file)) for file in files], is_locked(path)


def _version(file: Path) -> tuple[int, int] | None:
    """What differs once a file is replaced by another; None if it is not there."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _verify(path: str | os.PathLike[str], progress: Progress | None) -> Verification:
    findings: list[Damage] = []
    rows = 0
    store = TraceStore(path, check=False)
    live = store.live and is_locked(store.path)
    try:
        TraceStore(path)
    except TraceError as e:
        findings.append(Damage("meta.json", e.why or e.what, recoverable=False))
    with contextlib.suppress(TraceError):  # found below
        _ = (
            store.requests
        )  # before their rows: of what is recorded meanwhile no request is listed whose rows are not here
    contexts: list[ContextStore] = []
    for name in store.context_names:
        try:
            contexts.append(store.context(name))
        except TraceError as e:
            findings.append(Damage(name, f"{e.what}: {e.why}", recoverable=False))
    for context in contexts:
        reader = peek_reader(context.ring)
        live = live or (store.live and reader is not None and process_alive(reader))
    if store.live and not live:
        findings.append(
            Damage(
                "meta.json", "the trace was never closed: its recorder died, or still runs elsewhere", True
            )
        )
    tables: dict[str, Table] = {}
    for name, opened in store.each_table(contexts):
        try:
            tables[name] = opened()
        except TraceError as e:
            findings.append(Damage(name, f"{e.what}: {e.why}", recoverable=False))
    for name, table in tables.items():
        if progress:
            progress(name)
        try:
            found = list(table.verify())
        except (MoetraceError, OSError) as e:
            found = [Damage(name, str(e), recoverable=False)]
        if live:  # a header that lags behind is how a live trace looks
            found = [damage for damage in found if not damage.recoverable]
        findings += [Damage(f"{name}: {damage.where}", damage.what, damage.recoverable) for damage in found]
    findings += _closing(store, tables)
    rules: list[Rule] | None = None
    try:
        rules = stored_rules(store.path)
        known = described(store.path)
    except TraceError as e:
        findings.append(Damage(FOLDER, f"{e.what}: {e.why}", recoverable=False))
    else:
        for context in contexts:
            events = context.events
            number = np.unique(events["arg"][events["code"] == EventCode.INTERVENE])
            gone = [n for n in number.tolist() if n > 0 and n not in known]
            if gone:
                what = f"intervention {gone[0]} was in force in {context.name}, and its file is not there"
                findings.append(Damage(FOLDER, what, recoverable=False))
    for context in contexts:
        if progress:
            progress(f"{context.name}: contents")
        rows += context.rows.n_rows
        for where, what in (*_contents(context, rules), *_numbers(context)):
            findings.append(Damage(f"{context.name}/{where}", what, recoverable=False))
        findings += [
            Damage(context.name, what, live_only) for what, live_only in _completeness(context, store.live)
        ]
        context.rows.close()  # a map holds a file, and there may be a thousand contexts
    if "requests" in tables:
        findings += [Damage("requests", what, recoverable=False) for what in _requests(store, contexts)]
    try:
        findings += [Damage(LABELS_NAME, what, recoverable=False) for what in read_labels(store.path)[1]]
    except TraceError as e:
        findings.append(Damage(LABELS_NAME, e.why or e.what, recoverable=False))
    told = [c.facts.get("vocabulary") for c in contexts]
    named = [file for file in told if isinstance(file, str)]
    for file in dict.fromkeys([VOCABULARY_NAME, *named]):
        try:
            if read_vocabulary(store.path, file) is None and file in named:
                findings.append(Damage(file, "context.json names it, but it is not there", recoverable=False))
        except TraceError as e:
            findings.append(Damage(file, e.why or e.what, recoverable=False))
    models: list[ContextStore] = []
    for context in contexts:
        if not any(same_model(context.facts, other.facts) for other in models):
            models.append(context)
    try:
        said = tuple(remarks(store))
    except MoetraceError:  # what cannot be opened was found above
        said = ()
    return Verification(
        store.path,
        tuple(findings),
        live,
        rows,
        len(store.context_names),
        len(models),
        "" if store.context_names else holds_nothing(store).why,
        said,
    )


def _counters(context: ContextStore) -> dict[str, Any]:
    stored = context.facts.get("counters")
    return stored if isinstance(stored, dict) else {}


def _closing(store: TraceStore, tables: dict[str, Table]) -> Iterator[Damage]:
    """A closed trace's tables are as long as meta.json says."""
    said = store.meta.get("tables")
    if store.live:
        return
    for ring in ring_paths(store.path):
        what = "a ring was left behind: what it holds may not be in the trace"
        yield Damage(f"{ring.parent.name}/{ring.name}", what, recoverable=ring_is_ready(ring))
    if not isinstance(said, dict):
        yield Damage("meta.json", "it does not say how long the tables are", recoverable=False)
        return
    for name in sorted(said.keys() - tables.keys()):
        if not (store.path / name).is_dir():  # else it was found damaged
            yield Damage(name, "meta.json names this table, but it is not there", recoverable=False)
    summed = store.meta["version"][1] > 0  # what 1.0 wrote there told no two ledgers of a length apart
    for name, table in tables.items():
        entry = said.get(name)
        if not isinstance(entry, dict):
            yield Damage("meta.json", f"it does not name the table {name}", recoverable=False)
        elif entry.get("rows") != table.n_rows or (summed and entry.get("crc") != table.ledger_crc):
            yield Damage(
                name,
                f"meta.json closed it with {entry.get('rows')} rows, its ledger now gives {table.n_rows}"
                if entry.get("rows") != table.n_rows
                else "its ledger is not the one that meta.json closed it with",
                recoverable=False,
            )


def _contents(context: ContextStore, rules: Sequence[Rule] | None) -> Iterator[tuple[str, str]]:
    """Go through the rows: (column, what is wrong) with the first row it is wrong in."""
    rows, layout = context.rows, context.layout
    choice = ChoiceCheck(layout, rules)
    told: set[tuple[str, str]] = set()
    last = -1
    for start in range(0, rows.n_rows, _CHUNK):
        piece = {name: rows[name][start : start + _CHUNK] for name in rows}
        checks = [*_piece(piece, layout), *choice.feed(start, piece)]
        if context.facts.get("collector") != "import":  # which need not know sequences and phases
            checks += _assigned(piece)
        serial = piece["serial"]
        ascends = np.ones(len(serial), bool)
        ascends[1:] = serial[1:] > serial[:-1]
        ascends[0] = int(serial[0]) > last
        last = int(serial[-1])
        checks.append(("serial", "serials do not ascend", ~ascends))
        for column, what, wrong in checks:
            if wrong.any() and (column, what) not in told:
                told.add((column, what))
                yield f"rows/{column}", f"{what} (first in row {start + int(np.flatnonzero(wrong)[0])})"
    for column, what in choice.finish():
        yield f"rows/{column}", what


def _piece(piece: dict[str, NDArray[Any]], layout: Layout) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Give (column, what would be wrong, where it is) for some rows."""
    state = piece["state"]
    present = state == State.PRESENT
    strange = np.any(state > max(State), axis=1)
    yield "state", "a state is none of 0, 1, 2", strange
    yield "phase", "a phase is none of 0, 1, 2", piece["phase"] > max(Phase)
    used = np.array(layout.n_expert_used)
    chosen = present[:, :, None] & (np.arange(layout.k) < used[:, None])
    if "experts" in piece:
        experts = piece["experts"]
        none: NDArray[np.bool_] = experts == layout.sentinel
        odd = np.any(none == chosen, axis=(1, 2))
        yield "experts", "an expert stands where nothing is present, or none where something is", odd
        outside = ~none & (experts >= np.array(layout.n_expert)[:, None])
        yield (
            "experts",
            "an expert's id is not below its layer's number of experts",
            np.any(outside, axis=(1, 2)),
        )
        ordered = np.sort(experts, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != layout.sentinel)
        yield "experts", "an expert is chosen twice for one token", np.any(twice, axis=(1, 2))
    for name in LAYER_COLUMNS[1:]:
        if name not in piece:
            continue
        holds = ~np.isnan(piece[name])
        if name in ("weights", "outputs"):
            wrong = holds & ~chosen
        elif name == "gate_input":
            wrong = holds & ~present[:, :, None]
        else:
            wrong = holds & ~(
                present[:, :, None] & (np.arange(holds.shape[2]) < np.array(layout.n_expert)[:, None])
            )
        yield name, "a number stands where nothing is present", np.any(wrong, axis=(1, 2))


def _assigned(piece: dict[str, NDArray[Any]]) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Hold request, sequence and phase of recorded rows against each other, as :func:`_piece` does."""
    phase, request = piece["phase"], piece["request"]
    owned = (piece["sequence"] >= 0) & ((piece["flags"] & RowFlag.TRIAL) == 0)
    yield (
        "request",
        "a row of a sequence has no request, or one without has one",
        (request >= 0) != owned,
    )
    yield "phase", "phase and request contradict each other", (phase == Phase.UNKNOWN) != (request < 0)


def _completeness(context: ContextStore, live: bool) -> Iterator[tuple[str, bool]]:
    """Hold serials and counters against each other: (what is wrong, whether recovering may mend it)."""
    serial = context.rows["serial"]
    n_rows = context.rows.n_rows
    counters = _counters(context)
    if live:
        peeked = peek_counters(context.ring)
        if peeked is not None and not counters:
            return  # the ring still counts; nothing is final
    names = ["rows_produced", "rows_committed", *LOST_COUNTERS]
    if not all(type(counters.get(name)) is int and 0 <= counters[name] < 1 << 63 for name in names):
        yield "context.json has no counters: how much was lost cannot be said", live
        return
    lost = sum(counters[name] for name in LOST_COUNTERS)
    if counters["rows_produced"] != n_rows + lost:
        yield f"{counters['rows_produced']} rows were computed, but {n_rows} are here and {lost} lost", live
    elif counters["rows_committed"] != n_rows + counters["rows_overwritten"]:
        here = f"{n_rows} are here and {counters['rows_overwritten']} overwritten"
        yield f"{counters['rows_committed']} rows were written, but {here}", live
    if n_rows and int(serial[-1]) >= counters["rows_produced"]:
        yield f"a row has serial {serial[-1]}, but only {counters['rows_produced']} were computed", False
    if context.layout.numbered:
        yield from ((what, live) for what in _events_complete(context, counters))


def _events_complete(context: ContextStore, counters: dict[str, Any]) -> Iterator[str]:
    """The numbers missing among events are as many as were lost."""
    names = ["events_committed", *LOST_EVENT_COUNTERS]
    if not all(type(counters.get(name)) is int and 0 <= counters[name] < 1 << 63 for name in names):
        yield "context.json does not count its events: how many were lost cannot be said"
        return
    n_events = context.events.n_rows
    committed, refused, overwritten = (counters[name] for name in names)
    if committed != n_events + overwritten:
        yield f"{committed} events were written, but {n_events} are here and {overwritten} overwritten"
    # numbers wrap around: count from how many there were
    total = committed + refused
    for what, column in (("an event", context.events["number"]), ("a row", context.rows["events_before"])):
        if len(column):
            behind = (total - int(column[-1]) - (what == "an event") + (1 << 31)) % (1 << 32) - (1 << 31)
            if behind < 0:
                yield f"{what} says that {-behind} events more happened than were counted"


def _numbers(context: ContextStore) -> Iterator[tuple[str, str]]:
    """Numbers of events and tasks fit each other: (column, what is wrong), each once."""
    if not context.layout.numbered:
        return
    rows, events = context.rows, {name: np.asarray(column) for name, column in context.events.items()}
    if np.any(np.diff(events["number"]).view(np.int32) <= 0):
        yield "events/number", "numbers of events do not ascend"
    launch = events["code"] == EventCode.LAUNCH
    launches = {
        int(s): (events["serial"][mine].astype(np.int64), events["arg"][mine].astype(np.int64))
        for s in np.unique(events["sequence"][launch])
        for mine in [launch & (events["sequence"] == s)]
    }
    if any(np.any(np.diff(task) <= 0) for _, task in launches.values()):
        yield "events/arg", "the tasks of a sequence's LAUNCHes do not ascend"
    told: set[str] = set()
    last = np.zeros(1, np.uint32)
    task_of: dict[int, int] = {}
    for start in range(0, rows.n_rows, _CHUNK):
        piece = {
            name: rows[name][start : start + _CHUNK]
            for name in ("serial", "sequence", "task", "events_before")
        }
        before = np.concatenate([last, piece["events_before"]])
        last = before[-1:]
        seen = np.searchsorted(events["serial"], piece["serial"], side="right").astype(np.uint32)
        checks = [
            ("events_before", "the number of events before a row falls", np.diff(before).view(np.int32) < 0),
            (
                "events_before",
                "a row says that fewer events came before it than are here",
                (piece["events_before"] - seen).view(np.int32) < 0,
            ),
        ]
        for sequence in np.unique(piece["sequence"]).tolist():
            mine = piece["sequence"] == sequence
            task = piece["task"][mine].astype(np.int64)
            serial, tasks = launches.get(sequence, (np.empty(0, np.int64), np.empty(0, np.int64)))
            if sequence < 0:
                continue
            at = np.searchsorted(serial, piece["serial"][mine].astype(np.int64), side="right")
            least, most = np.append(0, tasks)[at], np.append(tasks - 1, np.iinfo(np.int64).max)[at]
            strange = np.zeros(len(mine), bool)
            strange[mine] = (task < least) | (task > most)
            checks.append(("task", "a row's task is not the one that its sequence's LAUNCHes say", strange))
            falls = np.zeros(len(mine), bool)
            falls[mine] = np.diff(task, prepend=task_of.get(sequence, 0)) < 0
            task_of[sequence] = int(task[-1])
            checks.append(("task", "the task of a sequence falls", falls))
        for column, what, wrong in checks:
            if wrong.any() and what not in told:
                told.add(what)
                yield f"rows/{column}", f"{what} (first in row {start + int(np.flatnonzero(wrong)[0])})"


def _requests(store: TraceStore, contexts: list[ContextStore]) -> Iterator[str]:
    """Each ended request's counts are those of its rows, and each row's request is known."""
    table = store.requests
    numbers = np.asarray(table["request"])
    if len(np.unique(numbers)) != len(numbers):
        yield "a request is listed twice"
        return
    order = np.argsort(numbers)
    for context in contexts:
        index = store.context_names.index(context.name)
        counts: dict[tuple[int, int], int] = {}
        for start in range(0, context.rows.n_rows, _CHUNK):
            request = context.rows["request"][start : start + _CHUNK].astype(np.int64)
            phase = context.rows["phase"][start : start + _CHUNK]
            pairs, n = np.unique(np.stack([request, phase]), axis=1, return_counts=True)
            for r, p, m in zip(*pairs.tolist(), n.tolist(), strict=True):
                counts[r, p] = counts.get((r, p), 0) + m
        context.rows.close()
        mine = order[np.asarray(table["context"])[order] == index]
        listed = set(numbers[mine].tolist())
        if not store.live:
            unknown = sorted({r for r, _ in counts if r >= 0} - listed)
            if unknown:
                yield f"{context.name}: request {unknown[0]} has rows, but is not listed"
        for i in mine.tolist():
            number = int(numbers[i])
            for name, p in (("n_prefill", Phase.PREFILL), ("n_decode", Phase.DECODE)):
                if int(table[name][i]) != counts.get((number, p), 0):
                    yield (
                        f"request {number} says {name} = {table[name][i]}, "
                        f"its rows are {counts.get((number, p), 0)}"
                    )
