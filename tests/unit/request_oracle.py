"""The rules of moetrace/trace/requests.py, one row at a time, with plain lists: slow and obvious."""

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


class Oracle:
    """Feed it everything in one go: ``run(rows, events)``."""

    def __init__(self) -> None:
        self.seqs: dict[int, Seq] = {}
        self.launches = False
        self.seen = 0
        self.requests: list[dict[str, Any]] = []

    def run(self, rows: list[dict[str, int]], events: list[dict[str, int]]) -> tuple[list[int], list[int]]:
        ids, phases = [], []
        waiting = list(events)
        for row in rows:
            while waiting and waiting[0]["serial"] <= row["serial"]:
                self.event(waiting.pop(0))
            request, phase = self.row(row)
            ids.append(request)
            phases.append(phase)
        for event in waiting:
            self.event(event)
        for seq in self.seqs.values():
            self.end(seq, self.launches and not seq.emptied)
        return ids, phases

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
                "n_prefill": 0, "n_decode": 0, "n_lost": 0, "n_rejected": 0, "n_shifts": 0, "n_unrecorded": 0,
                "n_events_lost": 0, "output": None,
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
