"""The rules of moetrace/trace/requests.py, one row at a time, with plain lists: slow and obvious.

:class:`Oracle` has those of contexts that do not number, :class:`NumberedOracle` of those that do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

END = 1 << 60


@dataclass
class Seq:
    number: int
    request: dict[str, Any] | None = None
    positions: list[int] = field(default_factory=list)  # of the request's rows that still stand
    last: int = -1
    top: int = -1
    last_output: bool = False
    missing: int = 0
    cuts: int = 0
    batch: int = -2
    batch_first: int = -1
    batch_output: bool = False
    copied: bool = False
    emptied: bool = False
    waiting: int = 0


def feed(
    oracle: Any, rows: list[dict[str, int]], events: list[dict[str, int]]
) -> tuple[list[int], list[int]]:
    """Tell an oracle rows and events in the order of their serials; gives what it says of the rows: ids, phases."""
    ids, phases = [], []
    waiting = list(events)
    for row in rows:
        while waiting and waiting[0]["serial"] <= row["serial"]:
            oracle.event(waiting.pop(0))
        request, phase = oracle.row(row)
        ids.append(request)
        phases.append(phase)
    for event in waiting:
        oracle.event(event)
    return ids, phases


class Oracle:
    """Feed it everything in one go: ``run(rows, events)``."""

    def __init__(self) -> None:
        self.seqs: dict[int, Seq] = {}
        self.launches = False
        self.seen = 0
        self.requests: list[dict[str, Any]] = []

    def run(self, rows: list[dict[str, int]], events: list[dict[str, int]]) -> tuple[list[int], list[int]]:
        found = feed(self, rows, events)
        for seq in self.seqs.values():
            self.end(seq, self.launches and not seq.emptied)
        return found

    def end(self, seq: Seq, rejected: bool) -> None:
        if seq.request is not None and rejected:
            seq.request["n_rejected"] += seq.waiting
        seq.request, seq.positions, seq.waiting = None, [], 0

    def event(self, e: dict[str, int]) -> None:
        code, s = e["code"], e["sequence"]
        p0, p1 = max(e["p0"], 0), e["p1"] if e["p1"] >= 0 else END
        if p0 >= p1 and code in (1, 2, 5):
            return
        if code == 8:
            self.launches = True
            if s >= 0:
                self.seqs.setdefault(s, Seq(s))
        if code == 3 and e["arg"] >= 0:
            self.seqs.setdefault(e["arg"], Seq(e["arg"]))
        for seq in list(self.seqs.values()):
            if code == 3:
                if seq.number == e["arg"]:
                    seq.copied = True
                continue
            if code == 4:
                if seq.number == s:
                    continue
            elif code != 6 and s >= 0 and seq.number != s:
                continue
            if code == 8:
                self.end(seq, not seq.emptied)
                if s >= 0:
                    seq.missing = e["serial"] - self.seen
            elif code in (4, 6) or (code == 1 and p0 == 0 and p1 == END):
                seq.waiting += len(seq.positions)
                seq.positions, seq.top, seq.emptied = [], -1, True
                seq.cuts += 1
                if not self.launches:
                    self.end(seq, False)
            elif code == 1 and p1 > seq.top:
                seq.waiting += sum(p >= p0 for p in seq.positions)
                seq.positions = [p for p in seq.positions if p < p0]
                seq.top = min(seq.top, p0 - 1)
                seq.cuts += 1
            elif code == 1:
                seq.positions = [p for p in seq.positions if not p0 <= p < p1]
            elif code in (2, 5):
                if code == 5 and e["arg"] < 1:
                    continue

                def moved(p: int) -> int:
                    if not p0 <= p < p1:
                        return p
                    return p + e["arg"] if code == 2 else p // e["arg"]

                seq.positions = [moved(p) for p in seq.positions]
                seq.last, seq.top, seq.batch_first = moved(seq.last), moved(seq.top), moved(seq.batch_first)
                if code == 2 and e["arg"] < 0 and seq.request is not None:
                    seq.request["n_shifts"] += 1
            elif code == 7:
                seq.cuts += 2

    def row(self, r: dict[str, int]) -> tuple[int, int]:
        missing = r["serial"] - self.seen
        self.seen += 1
        if r["sequence"] < 0 or r["flags"] & 64:
            return -1, 2
        seq = self.seqs.setdefault(r["sequence"], Seq(r["sequence"]))
        p, output = r["position"], bool(r["flags"] & 1)
        gap = missing - seq.missing
        begins = seq.request is None
        if not begins and not self.launches:
            fell = seq.cuts > 0 or p < seq.last
            begins = fell and (p <= seq.last or (seq.last_output and not output))
            drafted = seq.batch_output and seq.request["output"] is not None
            if drafted and seq.batch > seq.request["output"] and output and seq.cuts < 2:
                begins = begins and not seq.batch_first < p <= seq.last
        if begins:
            self.end(seq, False)
            cached = -1 if p < 0 or (p > 0 and gap > 0) else p
            seq.request = {
                "request": len(self.requests), "context": 0, "sequence": seq.number,
                "first_serial": r["serial"], "start_ns": r["time_ns"], "n_cached": cached,
                "n_prefill": 0, "n_decode": 0, "n_lost": 0, "n_rejected": 0, "n_shifts": 0, "n_recomputed": -1,
                "n_undecided": -1, "n_unrecorded": -1, "n_events_lost": -1, "output": None,
            }  # fmt: skip
            if seq.copied and p > 0 and output:
                seq.request["output"] = r["batch"] - 1
            self.requests.append(seq.request)
        else:
            assert seq.request is not None
            seq.request["n_rejected"] += seq.waiting
            if p < seq.top:
                seq.request["n_rejected"] += sum(q >= p for q in seq.positions)
                seq.positions = [q for q in seq.positions if q < p]
            elif not seq.copied:
                seq.request["n_lost"] += max(0, min(p - seq.top - 1, gap))
        request = seq.request
        seq.positions.append(p)
        if output and request["output"] is None:
            request["output"] = r["batch"]
        phase = int(request["output"] is not None and r["batch"] > request["output"])
        request["n_decode" if phase else "n_prefill"] += 1
        request["last_serial"], request["end_ns"] = r["serial"], r["time_ns"]
        seq.last = seq.top = p
        seq.last_output, seq.missing, seq.waiting = output, missing, 0
        if r["batch"] != seq.batch:
            seq.batch, seq.batch_first, seq.batch_output = r["batch"], p, True
        seq.batch_output = seq.batch_output and output
        seq.cuts = 0
        seq.copied = seq.emptied = False
        return request["request"], phase


@dataclass
class NumberedSeq:
    number: int
    request: dict[str, Any] | None = None
    standing: list[tuple[int, int]] = field(default_factory=list)  # (position, token) of the request's rows
    removed: list[tuple[int, int]] = field(default_factory=list)  # from the end, not judged yet
    removed_before_emptied: int = 0
    task: int = 0
    last: int = -1
    top: int = -1
    last_output: bool = False
    rows_missing: int = 0  # in the context, up to the last row or LAUNCH
    rows_unrecorded: int = 0
    events_lost: int = 0  # in the context, up to the last row
    shifts: int = 0
    cuts: int = 0
    batch: int = -2
    batch_first: int = -1
    batch_output: bool = False
    batch_decode: bool = False
    copied: bool = False
    emptied: bool = False


class NumberedOracle:
    """The rules of contexts that number their events and tasks. Feed it everything in one go."""

    def __init__(self) -> None:
        self.seqs: dict[int, NumberedSeq] = {}
        self.launches = False
        self.rows_seen = 0
        self.events_seen = 0
        self.unrecorded = 0
        self.lost = 0
        self.requests: list[dict[str, Any]] = []

    def run(self, rows: list[dict[str, int]], events: list[dict[str, int]]) -> tuple[list[int], list[int]]:
        found = feed(self, rows, events)
        for seq in self.seqs.values():
            sure = seq.events_lost == self.lost
            self.end(seq, (seq.removed_before_emptied if sure else None) if self.launches else 0)
        return found

    def end(self, seq: NumberedSeq, undecided: int | None) -> None:
        if seq.request is not None:
            if undecided is None:
                seq.request["n_undecided"] = -1
            else:
                seq.request["n_undecided"] += undecided
        seq.request, seq.standing, seq.removed = None, [], []
        seq.removed_before_emptied = seq.shifts = 0

    def event(self, e: dict[str, int]) -> None:
        lost = self.lost = (e["number"] - self.events_seen) % (1 << 32)
        self.events_seen += 1
        code, s = e["code"], e["sequence"]
        p0, p1 = max(e["p0"], 0), e["p1"] if e["p1"] >= 0 else END
        if code == 8:
            self.launches = True
            if s >= 0:
                self.seqs.setdefault(s, NumberedSeq(s))
        if code == 10:
            self.unrecorded += max(e["p1"], 0)
        if code == 3:
            if e["arg"] >= 0:
                self.seqs.setdefault(e["arg"], NumberedSeq(e["arg"])).copied = True
            return
        for seq in list(self.seqs.values()):
            about = s < 0 or seq.number == s
            if code == 4:
                about = seq.number != s
            if code in (6, 13):
                about = True
            if not about:
                continue
            if code == 8:
                sure = lost == seq.events_lost and e["arg"] == seq.task + 1
                self.end(seq, seq.removed_before_emptied if sure else None)
                if s >= 0:
                    seq.rows_missing = e["serial"] - self.rows_seen
                    seq.rows_unrecorded = self.unrecorded
            elif code == 13:
                self.end(seq, seq.removed_before_emptied if lost == seq.events_lost else None)
                seq.last = seq.top = -1
                seq.batch, seq.cuts, seq.copied, seq.emptied = -2, 0, False, False
            elif code in (4, 6) or (code == 1 and p0 == 0 and p1 == END):
                seq.removed = seq.standing + seq.removed
                seq.standing, seq.top, seq.emptied = [], -1, True
                seq.cuts += 1
                if not self.launches:
                    self.end(seq, 0)
            elif code == 1 and p0 < p1:
                if p1 > seq.top:
                    self.remove(seq, p0)
                    seq.top = min(seq.top, p0 - 1)
                    seq.cuts += 1
                else:
                    seq.standing = [(p, t) for p, t in seq.standing if not p0 <= p < p1]
            elif code == 2 or (code == 5 and e["arg"] >= 1):
                if p0 >= p1:
                    continue

                def moved(p: int) -> int:
                    if not p0 <= p < p1:
                        return p
                    return p + e["arg"] if code == 2 else p // e["arg"]

                by = moved(seq.top) - seq.top
                seq.removed = [(p + by, t) for p, t in seq.removed]
                seq.standing = [(moved(p), t) for p, t in seq.standing]
                seq.last, seq.top, seq.batch_first = moved(seq.last), moved(seq.top), moved(seq.batch_first)
                if code == 2 and e["arg"] < 0 and seq.request is not None:
                    seq.shifts += 1
            elif code == 7:
                seq.cuts += 2

    def remove(self, seq: NumberedSeq, p0: int) -> None:
        gone = [(p, t) for p, t in seq.standing if p >= p0]
        seq.standing = [(p, t) for p, t in seq.standing if p < p0]
        seq.removed = gone + seq.removed
        seq.removed_before_emptied += len(gone)

    def begins(self, seq: NumberedSeq, r: dict[str, int]) -> bool:
        p, output = r["position"], bool(r["flags"] & 1)
        if seq.request is None or r["task"] != seq.task:
            return True
        if self.launches or not (seq.cuts > 0 or p < seq.last):
            return False
        rejected = seq.batch_decode and seq.batch_output and output and seq.cuts < 2
        if rejected and seq.batch_first < p <= seq.last:
            return False
        return p <= seq.last or (seq.last_output and not output)

    def row(self, r: dict[str, int]) -> tuple[int, int]:
        missing = r["serial"] - self.rows_seen
        self.rows_seen += 1
        lost = self.lost = (r["events_before"] - self.events_seen) % (1 << 32)
        if r["sequence"] < 0 or r["flags"] & 64:
            return -1, 2
        self.launches = self.launches or r["task"] > 0
        seq = self.seqs.setdefault(r["sequence"], NumberedSeq(r["sequence"]))
        p, token, output = r["position"], r["token"], bool(r["flags"] & 1)
        lost_rows, unrecorded = missing - seq.rows_missing, self.unrecorded - seq.rows_unrecorded
        if self.begins(seq, r):
            self.end(seq, None if r["task"] != seq.task else 0)
            unknown = p < 0 or (p > 0 and (lost_rows > 0 or unrecorded > 0))
            seq.request = {
                "request": len(self.requests), "context": 0, "sequence": seq.number,
                "first_serial": r["serial"], "start_ns": r["time_ns"], "n_cached": -1 if unknown else p,
                "n_prefill": 0, "n_decode": 0, "n_lost": 0, "n_rejected": 0, "n_shifts": 0, "n_recomputed": 0,
                "n_undecided": 0, "n_unrecorded": 0, "decode": seq.copied and p > 0 and output,
                "lost_before": seq.events_lost,
            }  # fmt: skip
            self.requests.append(seq.request)
        else:
            assert seq.request is not None
            if p < seq.top:
                self.remove(seq, p)
            elif not seq.copied:
                gap = max(0, p - seq.top - 1)
                of_lost = min(gap, lost_rows)
                seq.request["n_lost"] += of_lost
                seq.request["n_unrecorded"] += min(gap - of_lost, unrecorded)
            seq.request["n_shifts"] += seq.shifts
            if seq.removed:
                where, what = seq.removed[0]
                if (where, what) == (p, token):
                    seq.request["n_recomputed"] += 1
                    seq.removed = seq.removed[1:]
                else:
                    seq.request["n_rejected" if where == p else "n_undecided"] += len(seq.removed)
                    seq.removed = []
            seq.removed_before_emptied = len(seq.removed)
        request = seq.request
        seq.standing.append((p, token))
        request["decode"] = request["decode"] or bool(r["flags"] & 128)
        request["n_decode" if request["decode"] else "n_prefill"] += 1
        request["last_serial"], request["end_ns"] = r["serial"], r["time_ns"]
        request["n_events_lost"] = lost - request["lost_before"]
        seq.last = seq.top = p
        seq.last_output, seq.task = output, r["task"]
        seq.rows_missing, seq.rows_unrecorded, seq.events_lost = missing, self.unrecorded, lost
        if r["batch"] != seq.batch:
            seq.batch, seq.batch_first, seq.batch_output = r["batch"], p, True
            seq.batch_decode = request["decode"]
        seq.batch_output = seq.batch_output and output
        seq.cuts = seq.shifts = 0
        seq.copied = seq.emptied = False
        return request["request"], int(request["decode"])
