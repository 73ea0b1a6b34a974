"""What clients said about requests: ``labels.jsonl``, and which request each line of it speaks of.

A client does not know the recorder's numbers. Its line says when it asked, which slot answered, and which tokens it
sent and got; :func:`resolve_labels` finds the request that has them. Where more than one could be meant, or none has
them, no request gets the label, and that is counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.trace.jsonfile import checksum, parse_json, sealed
from moetrace.trace.record import EventCode, RowFlag
from moetrace.trace.storage import disk_error, write_all

LABELS_NAME = "labels.jsonl"
#: what a line says of its request itself; everything else is what the client's prompt file had beside it
SAID = ("id", "label", "prompt", "n_generated")
_WINDOW = ("from_ns", "to_ns")
_TOKENS = ("n_prompt", "n_cached", "tokens")


class Sent(NamedTuple):
    """The tokens that a client knows of its request.

    Attributes
    ----------
    n_prompt, n_cached
        Tokens of the prompt, and how many of them the server took from its cache.
    end
        Position after the last token that was decoded. The last generated one is not.
    tokens
        int32 (n,): token ids from position ``n_cached`` on: up to ``end``, or only to the prompt's end where the
        server did not say which it generated.
    """

    n_prompt: int
    n_cached: int
    end: int
    tokens: NDArray[np.int32]

    @property
    def key(self) -> tuple[object, ...]:
        """What two requests have in common that cannot be told apart."""
        return (self.n_prompt, self.n_cached, self.end, self.tokens.tobytes())


@dataclass(frozen=True)
class LabelLine:
    """One line: which request it speaks of, and what it says.

    Either ``request`` is set, or the line speaks of a request that ran in ``sequence`` (None: any) between
    ``from_ns`` and ``to_ns`` (monotonic time, both included), with the tokens ``sent``; without these, of the only
    one that began there then.

    Attributes
    ----------
    said
        Those of ``id``, ``label``, ``prompt`` and ``n_generated`` that it has.
    extra
        The client's own keys.
    model
        What the client calls the model; None: any.
    """

    said: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    request: int | None = None
    sequence: int | None = None
    from_ns: int = 0
    to_ns: int = 0
    model: str | None = None
    sent: Sent | None = None


def request_line(
    *,
    sequence: int | None,
    from_ns: int,
    to_ns: int,
    prompt_tokens: Sequence[int],
    tokens: Sequence[int] | None,
    n_generated: int = 0,
    n_cached: int = 0,
    model: str | None = None,
    extra: Mapping[str, Any] | None = None,
    **said: Any,
) -> dict[str, Any]:
    """Give the line of labels.jsonl (docs/format.md) of a request that a client sent.

    Parameters
    ----------
    sequence
        The slot that answered; None if the server does not say.
    from_ns, to_ns
        Monotonic time before it was sent and after the answer was there.
    prompt_tokens, tokens
        Ids sent, and got; None where the server does not say which.
    n_generated, n_cached
        How many were got, and how many of the prompt the server had in its cache.
    model
        What the model is called, if the server has several.
    extra
        Keys of the client's own.
    said
        ``id``, ``label``, ``prompt``.
    """
    decoded = [*prompt_tokens, *([] if tokens is None else tokens[:-1])]
    return {
        **({} if sequence is None else {"sequence": sequence}),
        "from_ns": from_ns,
        "to_ns": to_ns,
        **({} if model is None else {"model": model}),
        "n_prompt": len(prompt_tokens),
        "n_cached": n_cached,
        "n_generated": n_generated,
        "tokens": decoded[n_cached:],
        **said,
        **({"extra": dict(extra)} if extra else {}),
    }


def append_labels(trace: Path, labels: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per label: of :func:`request_line`, or with ``request`` and any of ``id``, ``label``, ``extra``.

    Raises
    ------
    MoetraceError
        If the disk is full or fails: then none of these lines is in the file.
    """
    path = trace / LABELS_NAME
    text = "".join(json.dumps(sealed(label)) + "\n" for label in labels).encode("ascii")
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o644)
        try:
            with contextlib.suppress(OSError):  # some file systems know no locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"  # whoever wrote last was cut off
            try:
                write_all(fd, b"\n" + text if torn else text)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)  # half a line would spoil the next one
                raise
        finally:
            os.close(fd)
    except OSError as e:
        raise disk_error(path, e) from e


class LabelFile:
    """The labels of a trace: lines that were read before are not read again, while the file only grows."""

    def __init__(self, trace: Path) -> None:
        self._path = trace / LABELS_NAME
        self._forget()

    def _forget(self) -> None:
        self._file: tuple[int, int] | None = None
        self._end = self._number = 0  # of whole lines that were read
        self._last = b""
        self._lines: list[LabelLine] = []
        self._damage: list[str] = []

    def read(self) -> tuple[list[LabelLine], list[str]]:
        """Read what is new.

        Returns
        -------
        lines
            In the order of the file; empty if there is none.
        damage
            One sentence per line that does not count.

        Raises TraceError if it cannot be read.
        """
        try:
            with self._path.open("rb") as f:
                self._seek(f)
                for text in f:
                    line, what = _parsed(text, f"{LABELS_NAME}, line {self._number + 1}")
                    lines, damage = [] if line is None else [line], [] if what is None else [what]
                    if not text.endswith(b"\n"):  # it may be written on
                        return [*self._lines, *lines], [*self._damage, *damage]
                    self._lines += lines
                    self._damage += damage
                    self._end, self._last, self._number = self._end + len(text), text, self._number + 1
        except FileNotFoundError:
            self._forget()
        except OSError as e:
            raise TraceError(f"cannot read {self._path}", why=e.strerror or str(e)) from e
        return list(self._lines), list(self._damage)

    def _seek(self, f: BinaryIO) -> None:
        """Go to where reading ended; to the beginning if that was another file, or its last line another one."""
        is_now = os.fstat(f.fileno())
        if self._file == (is_now.st_dev, is_now.st_ino):
            f.seek(self._end - len(self._last))
            if f.read(len(self._last)) == self._last:
                return
            f.seek(0)
        self._forget()
        self._file = is_now.st_dev, is_now.st_ino


def read_labels(trace: Path) -> tuple[list[LabelLine], list[str]]:
    """Read the labels of a trace: :meth:`LabelFile.read`."""
    return LabelFile(trace).read()


def _parsed(text: bytes, where: str) -> tuple[LabelLine | None, str | None]:
    """A line if it counts, and what is wrong with it if something is."""
    try:
        obj = parse_json(text, where)
    except TraceError as e:
        return None, f"{where}: {e.what} ({e.why})" if e.why else f"{where}: {e.what}"
    if "crc" in obj and obj["crc"] != checksum(obj):
        return None, f"{where}: does not fit its checksum"
    line = _line(obj)
    if isinstance(line, str):
        return None, f"{where}: {line}"
    if "crc" not in obj:  # counts, but one flipped bit can take a line's checksum away
        return line, f"{where}: has no checksum; it was written by hand, or is damaged"
    return line, None


def _line(obj: dict[str, Any]) -> LabelLine | str:
    """Read one line; a sentence if it says nothing."""
    request, sequence = obj.get("request"), obj.get("sequence")
    from_ns, to_ns = (obj.get(name) for name in _WINDOW)
    extra = obj.get("extra")
    # a client's own keys once stood among the others, and could be called `request`
    placed = is_number(from_ns) and is_number(to_ns) and (is_number(sequence) or "tokens" in obj)
    ours = ["crc", *SAID]
    if placed:
        ours += ["sequence", *_WINDOW, *(["model", *_TOKENS] if "tokens" in obj else [])]
    else:
        ours.append("request")
    flat = {name: value for name, value in obj.items() if name not in ours}
    keys: dict[str, Any] = {
        "said": {name: obj[name] for name in SAID if name in obj},
        "extra": extra if isinstance(extra, dict) else flat,
    }
    if not placed:
        if is_number(request):
            return LabelLine(**keys, request=request)
        return "neither `request` nor `sequence`, `from_ns` and `to_ns`"
    keys |= {"sequence": sequence, "from_ns": from_ns, "to_ns": to_ns}
    if "tokens" not in obj:
        return LabelLine(**keys)
    sent, model = _sent(obj), obj.get("model")
    if sent is None or not isinstance(model, str | None) or not (sequence is None or is_number(sequence)):
        return "what it says of its tokens does not fit together"
    return LabelLine(**keys, model=model, sent=sent)


def is_number(value: object) -> bool:
    """Whether it is an integer that fits into 64 bits."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _sent(obj: Mapping[str, Any]) -> Sent | None:
    n_prompt, n_cached, tokens = (obj.get(name) for name in _TOKENS)
    n_generated = obj.get("n_generated", 0)
    if type(n_prompt) is not int or type(n_cached) is not int or type(n_generated) is not int:
        return None
    if not isinstance(tokens, list):
        return None
    end = n_prompt + max(n_generated - 1, 0)
    if not (0 <= n_cached <= n_prompt and n_cached + len(tokens) in (n_prompt, end)):
        return None
    if not all(type(t) is int and 0 <= t < 1 << 31 for t in tokens):
        return None
    return Sent(n_prompt, n_cached, end, np.array(tokens, np.int32))


# -- which request a line speaks of ------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What labels are matched with: one llama context.

    Attributes
    ----------
    requests
        Columns ``request``, ``sequence``, ``start_ns``, ``end_ns``, ``first_serial`` and ``last_serial``, each (n,).
    rows
        Columns ``serial`` (ascending), ``request``, ``token``, ``position``, ``batch`` and ``flags``, each (N,).
    events
        Columns ``serial``, ``code``, ``sequence`` and ``arg``, each (M,).
    main
        False for a draft model's or multi-token prediction's context: its requests are those of the main one.
    host
        The process that computed it.
    called
        Tells whether its model may be the one that a client calls so.
    """

    requests: Mapping[str, NDArray[Any]]
    rows: Mapping[str, NDArray[Any]]
    events: Mapping[str, NDArray[Any]]
    main: bool = True
    host: object = None
    called: Callable[[str], bool] = lambda name: True


@dataclass(frozen=True)
class Labelling:
    """Which request got what.

    Attributes
    ----------
    said, extra
        Request number -> what is said of it, and the client's own keys.
    unsure
        Requests without a label of which a line may speak; but it may speak of another.
    n_lines
        Requests that lines speak of; a request's several lines count once.
    n_unsure
        How many of them could not be told from others, or fit none of those that ran then.
    n_missing
        How many of them were not recorded at all.
    """

    said: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    extra: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    unsure: frozenset[int] = frozenset()
    n_lines: int = 0
    n_unsure: int = 0
    n_missing: int = 0

    @property
    def lack(self) -> str:
        """Say what did not find its request; empty if all did."""
        parts = []
        if self.n_unsure:
            parts.append(f"{self.n_unsure:,} could not be told from other requests of the time")
        if self.n_missing:
            parts.append(f"{self.n_missing:,} speak of requests that are not here")
        return f"{' and '.join(parts)} (of {self.n_lines:,})" if parts else ""


_Found = tuple[int, int]  # index of the context, index of the request in it


@dataclass(eq=False)
class _Claim:
    """Lines about one request of a client, and the requests that it may be."""

    line: LabelLine
    found: set[_Found]
    around: list[_Found]  # all that ran in the slot meanwhile
    settled: _Found | None = None


def resolve_labels(lines: Sequence[LabelLine], recorded: Sequence[Recorded]) -> Labelling:
    """Find the request that each line speaks of; later lines win over earlier ones, key by key.

    A line with tokens speaks of a request that ran wholly within its time and in its slot, and has its tokens
    (:func:`_fit`). If several have, each that another client's line alone fits is not it. Requests that are alike in
    everything are given to as many lines that are alike in everything but the id. What then is not one request is none.

    Parameters
    ----------
    recorded
        The trace's contexts.
    """
    said: dict[int, dict[str, Any]] = {}
    extra: dict[int, dict[str, Any]] = {}
    unsure: set[int] = set()
    n_missing = n_unsure = 0
    index = [_Index(one) for one in recorded]
    claims: dict[tuple[object, ...], _Claim] = {}  # by what makes it the same request of a client
    of_line: list[_Claim | None] = []
    for line in lines:
        if line.request is not None:
            of_line.append(None)
            continue
        key: tuple[object, ...] = (
            line.sequence,
            line.from_ns,
            line.to_ns,
            line.model,
            str(line.said.get("id")),
        )
        key += () if line.sent is None else line.sent.key
        if key not in claims:
            claims[key] = _claim(line, index)
        of_line.append(claims[key])
    _settle([claim for claim in claims.values() if claim.line.sent is not None])

    def tell(number: int, line: LabelLine) -> None:
        said.setdefault(number, {}).update(line.said)
        extra.setdefault(number, {}).update(line.extra)

    for line, claim in zip(lines, of_line, strict=True):
        if line.request is not None:
            tell(line.request, line)
        elif claim is not None and claim.settled is not None:
            tell(index[claim.settled[0]].number(claim.settled[1]), line)
    for claim in claims.values():
        if claim.settled is None:
            n_unsure += bool(claim.around)
            n_missing += not claim.around
            unsure |= {index[c].number(i) for c, i in claim.found or claim.around}
    unsure -= said.keys()
    for number, main in _drafted(index):
        if main in said:
            said[number], extra[number] = said[main], extra[main]
        elif main in unsure:
            unsure.add(number)
    n_lines = len(claims) + len({line.request for line in lines if line.request is not None})
    return Labelling(said, extra, frozenset(unsure), n_lines, n_unsure, n_missing)


class _Index:
    """One context's requests by slot and time, and their rows."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        columns = recorded.requests
        self.start = np.asarray(columns["start_ns"])
        self.end = np.asarray(columns["end_ns"])
        self.slots: dict[int, NDArray[np.intp]] = {}  # in the order in which they began
        self.starts: dict[int, NDArray[np.int64]] = {}
        for sequence in np.unique(columns["sequence"]).tolist():
            mine = np.flatnonzero(columns["sequence"] == sequence)
            self.slots[sequence] = mine = mine[np.argsort(self.start[mine], kind="stable")]
            self.starts[sequence] = self.start[mine]
        code = np.asarray(recorded.events["code"])
        moved = np.isin(code, (EventCode.SEQ_ADD, EventCode.SEQ_DIV))
        names = ("serial", "code", "sequence", "arg")
        self._moved = {n: np.asarray(recorded.events[n])[moved].astype(np.int64) for n in names}
        self._rows: dict[int, _Standing | None] = {}

    def number(self, i: int) -> int:
        return int(self.recorded.requests["request"][i])

    def began(self, line: LabelLine) -> list[int]:
        """Give the requests that began within a line's time in its slot."""
        asked = self.slots if line.sequence is None else [line.sequence]
        found = []
        for sequence in asked:
            if sequence in self.slots:
                first = np.searchsorted(self.starts[sequence], line.from_ns)
                last = np.searchsorted(self.starts[sequence], line.to_ns, side="right")
                found += self.slots[sequence][first:last].tolist()
        return found

    def standing(self, i: int) -> _Standing | None:
        if i not in self._rows:
            self._rows[i] = _standing(self.recorded, i, self._moved)
        return self._rows[i]


def _claim(line: LabelLine, index: Sequence[_Index]) -> _Claim:
    around: list[_Found] = []
    for c, one in enumerate(index):
        if one.recorded.main and (line.model is None or one.recorded.called(line.model)):
            around += [(c, i) for i in one.began(line)]
    if line.sent is None:  # nothing but the time: who began then, if it was only one
        return _Claim(line, set(around), around, around[0] if len(around) == 1 else None)
    # whoever has not ended when the answer is there is another one, which came next
    around = [(c, i) for c, i in around if index[c].end[i] <= line.to_ns]
    fits: dict[int, set[_Found]] = {_WHOLE: set(), _GAPS: set()}
    for c, i in around:
        if fit := _fit(line.sent, index[c].standing(i)):
            fits[fit].add((c, i))
    return _Claim(line, fits[_WHOLE] or fits[_GAPS], around)


def _settle(claims: Sequence[_Claim]) -> None:
    """Give each claim its request where there is no doubt which it is."""
    waiting = [claim for claim in claims if claim.found]
    while True:
        sole: dict[_Found, list[_Claim]] = {}
        for claim in waiting:
            if len(claim.found) == 1:
                sole.setdefault(next(iter(claim.found)), []).append(claim)
        taken = set()
        for found, its in sole.items():
            # two answers, one request: the other's was not recorded, and either may be the other
            if len(its) == 1 or _alike(its, but=()):
                taken.add(found)
                for claim in its:
                    claim.settled = found
        waiting = [claim for claim in waiting if claim.settled is None]
        if not taken or not waiting:
            break
        for claim in waiting:
            claim.found -= taken
    same: dict[frozenset[_Found], list[_Claim]] = {}
    for claim in waiting:
        same.setdefault(frozenset(claim.found), []).append(claim)
    for found_all, its in same.items():
        others = [claim for claim in waiting if claim not in its]
        apart = all(found_all.isdisjoint(claim.found) for claim in others)
        if apart and len(its) == len(found_all) and _alike(its, but=("id",)):
            its.sort(key=lambda claim: claim.line.to_ns)
            for claim, found in zip(its, sorted(found_all), strict=True):
                claim.settled = found


def _alike(claims: Sequence[_Claim], *, but: Sequence[str]) -> bool:
    """Whether lines say the same, but for some keys."""

    def rest(claim: _Claim) -> tuple[object, object]:
        return {k: v for k, v in claim.line.said.items() if k not in but}, claim.line.extra

    return all(rest(claim) == rest(claims[0]) for claim in claims)


class _Standing(NamedTuple):
    """A request's rows in order; positions as if the context had not been shifted."""

    position: NDArray[np.int64]
    token: NDArray[np.int64]
    batch: NDArray[np.int64]
    output: NDArray[np.bool_]


def _standing(recorded: Recorded, i: int, moved: Mapping[str, NDArray[np.int64]]) -> _Standing | None:
    """Give the rows of a request; None where its positions cannot be followed."""
    requests, columns = recorded.requests, recorded.rows
    first, last = int(requests["first_serial"][i]), int(requests["last_serial"][i])
    a = np.searchsorted(columns["serial"], np.uint64(first))
    b = np.searchsorted(columns["serial"], np.uint64(last), side="right")
    rows = a + np.flatnonzero(columns["request"][a:b] == requests["request"][i])
    position = np.asarray(columns["position"][rows]).astype(np.int64)
    if len(rows) == 0 or position.min() < 0:
        return None
    mine = (moved["sequence"] == requests["sequence"][i]) | (moved["sequence"] < 0)
    mine &= (moved["serial"] > first) & (moved["serial"] <= last)
    if mine.any():
        by = moved["arg"][mine]
        if (moved["code"][mine] == EventCode.SEQ_DIV).any() or (by > 0).any():
            return None
        before = np.searchsorted(
            moved["serial"][mine], columns["serial"][rows].astype(np.int64), side="right"
        )
        position -= np.append(0, np.cumsum(by))[before]
    return _Standing(
        position,
        np.asarray(columns["token"][rows]).astype(np.int64),
        np.asarray(columns["batch"][rows]).astype(np.int64),
        (np.asarray(columns["flags"][rows]) & RowFlag.OUTPUT) != 0,
    )


_WHOLE, _GAPS = 2, 1


def _fit(sent: Sent, rows: _Standing | None) -> int:
    """Say whether a request's rows are those of the tokens sent: _WHOLE, with _GAPS, or not (0).

    They begin where the cache ended. At each position the last row counts: of drafts that were rejected an earlier one
    remains. Beyond the end there are only drafts, computed no later than the last token that counts. What was generated
    was computed after the prompt, and llama.cpp was asked for its logits: a prompt that is this prompt and its answer
    is another request. Where rows are missing it must at least begin and end like this, and have half of them.
    """
    if rows is None or rows.position.min() != sent.n_cached or rows.position.max() < sent.end - 1:
        return 0
    if not 0 < sent.end - sent.n_cached <= 2 * len(rows.position):
        return 0
    inside = rows.position < sent.end
    at = np.full(sent.end - sent.n_cached, -1, np.int64)
    at[rows.position[inside] - sent.n_cached] = np.flatnonzero(inside)  # the last one stays
    have = at >= 0
    known = np.flatnonzero(have[: len(sent.tokens)])
    if not have[-1] or (rows.token[at[known]] != sent.tokens[known]).any():
        return 0
    answer = rows.position >= sent.n_prompt
    if answer.any():
        late, early = rows.batch[answer], rows.batch[~answer]
        if early.max(initial=-1) >= late.min() or (rows.batch[~inside] > rows.batch[at[-1]]).any():
            return 0
    asked = np.zeros(len(at), bool)
    asked[rows.position[inside & rows.output] - sent.n_cached] = True
    if not asked[have][np.flatnonzero(have) >= sent.n_prompt - 1 - sent.n_cached].all():
        return 0
    if have.all():
        return _WHOLE
    return _GAPS if 2 * np.count_nonzero(have) >= len(have) else 0


def _drafted(index: Sequence[_Index]) -> Iterable[tuple[int, int]]:
    """Pair the requests of draft contexts with those of the main one that they drafted for.

    A slot's draft begins no earlier than what it drafts for, and before the slot's next request.
    """
    for one in index:
        if one.recorded.main:
            continue
        for sequence, mine in one.slots.items():
            mains = sorted(
                (int(other.start[i]), other.number(i))
                for other in index
                if other.recorded.main and other.recorded.host == one.recorded.host
                for i in other.slots.get(sequence, np.empty(0, np.intp)).tolist()
            )
            starts = [start for start, _ in mains]
            at = np.searchsorted(starts, one.start[mine], side="right") - 1
            alone = np.bincount(at + 1) == 1
            for i, k in zip(mine.tolist(), at.tolist(), strict=True):
                if k >= 0 and alone[k + 1]:
                    yield one.number(i), mains[k][1]
