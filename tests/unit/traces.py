"""Makes traces for tests: what the drain does, without a host and in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rings import Producer, context_of, make_layout, number_records, random_records

from moetrace.model.file import ModelFile
from moetrace.trace.columns import TableWriter
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.labels import append_labels
from moetrace.trace.record import Counter, EventCode, OnFull, RecordKind
from moetrace.trace.requests import REQUEST_TABLE, RequestAssigner
from moetrace.trace.rows import Layout, events_from_records, rows_from_records
from moetrace.trace.store import VERSION, TraceStore, write_vocabulary


@dataclass
class Context:
    """What one context recorded: its layout, records (rows and events), and how many serials and events were lost."""

    layout: Layout
    records: np.ndarray
    lost: int = 0
    events_lost: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def counters(self) -> dict[str, int]:
        """What its ring would have counted."""
        n_rows = int((self.records["kind"] == RecordKind.ROW).sum())
        counters = {c.name.lower(): 0 for c in Counter}
        counters["rows_produced"] = n_rows + self.lost
        counters["rows_committed"] = n_rows
        counters["rows_lost_full"] = self.lost
        counters["events_committed"] = len(self.records) - n_rows
        counters["events_lost"] = self.events_lost
        return counters


def event(
    layout: Layout, serial: int, code: EventCode, sequence: int, p0: int = -1, p1: int = -1, arg: int = 0
) -> np.ndarray:
    """Give one event record."""
    record = random_records(layout, 1, np.random.default_rng(0))
    record["kind"], record["serial"], record["token"], record["sequence"] = (
        RecordKind.EVENT,
        serial,
        code,
        sequence,
    )
    record["position"], record["arg0"], record["arg1"], record["flags"], record["state"] = p0, p1, arg, 0, 0
    return record


def server_records(
    layout: Layout,
    rng: np.random.Generator,
    *,
    n_requests: int = 3,
    lose: tuple[int, ...] = (),
    slots: int = 2,
) -> np.ndarray:
    """Tell of a server: requests in turn over its slots, six prompt tokens each and four decoded ones.

    The last layer of prompt rows that are no output is not computed; serials in ``lose`` are missing.
    """
    parts: list[np.ndarray] = []
    serial = batch = 0
    for request in range(n_requests):
        slot = request % slots
        parts.append(event(layout, serial, EventCode.LAUNCH, slot))
        parts.append(event(layout, serial, EventCode.SEQ_RM, slot, 0))
        rows = random_records(layout, 10, rng, serial)
        rows["sequence"] = slot
        rows["batch"] = rows["step"] = batch + np.maximum(0, np.arange(10) - 5)
        rows["flags"] = np.arange(10) >= 5
        rows["state"][:5, -1] = 2
        rows["time_ns"] = 1000 * rows["serial"].astype(np.int64)
        parts.append(rows)
        serial, batch = serial + 10, int(rows["batch"][-1]) + 1
        parts.append(event(layout, serial, EventCode.LAUNCH, slot))
    records = np.concatenate(parts)
    if layout.numbered:
        number_records(records)
    return records[~((records["kind"] == 0) & np.isin(records["serial"], lose))]


def write_trace(
    path: Path,
    contexts: list[Context],
    *,
    block: int = 8,
    labels: list[dict[str, Any]] | None = None,
    vocabulary: list[bytes] | None = None,
    close: bool = True,
    sealed: int | None = None,
) -> Path:
    """Write a trace, a block per ``block`` records; ``sealed``: leave the records after these in a ring."""
    path.mkdir(parents=True)
    names = [f"ctx{i}" for i in range(len(contexts))]
    meta = {
        "format": "moetrace-trace", "version": list(VERSION), "created_ns": 17 * 10**17, "moetrace": "0.1.0",
        "command": ["llama-server", "-m", "toy.gguf"], "host": "here", "state": "live", "exit_code": None,
        "contexts": names, "model_path": None,
    }  # fmt: skip
    write_json(path / "meta.json", meta)
    numbers = iter(range(10**6))
    requests = TableWriter.create(path / "requests", REQUEST_TABLE)
    for i, (name, context) in enumerate(zip(names, contexts, strict=True)):
        layout, folder = context.layout, path / name
        facts = {
            **context_of(layout),
            "name": name,
            "fields": [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in layout.fields],
            "epoch_ns": 1_700_000_000_000_000_000,
            "status": "",
            **context.facts,
        }
        if close:
            facts["counters"] = context.counters
        folder.mkdir()
        write_json(folder / "context.json", facts)
        assigner = RequestAssigner(i, numbers.__next__)
        rows, events = (
            TableWriter.create(folder / "rows", layout.row_columns),
            TableWriter.create(folder / "events", layout.event_columns),
        )
        stop = len(context.records) if sealed is None else sealed
        for start in range(0, stop, block):
            piece = context.records[start : min(start + block, stop)]
            new, happened = rows_from_records(piece, layout), events_from_records(piece, layout)
            new["request"], new["phase"] = assigner.feed(new, happened)
            events.append(happened)
            events.seal()
            rows.append(new)
            rows.seal()
            requests.append(assigner.take_ended())
            requests.seal()
        if close:
            requests.append(assigner.finish())
            requests.seal()
        rows.close()
        events.close()
        if sealed is not None:
            producer = Producer(layout, 256, OnFull.BLOCK)
            producer.write(context.records)
            producer.count(Counter.ROWS_PRODUCED, context.lost)
            producer.count(Counter.ROWS_LOST_FULL, context.lost)
            producer.count(Counter.EVENTS_LOST, context.events_lost)
            producer.data[512:520] = sealed.to_bytes(8, "little")
            producer.save(folder / "ring")
    requests.close()
    if labels:
        append_labels(path, labels)
    if vocabulary:
        write_vocabulary(path, vocabulary)
    if close:
        TraceStore(path).close_as("closed", exit_code=0)
    return path


def tiny_trace(path: Path) -> Path:
    """Write a trace of 12 KB: one request, one block, only experts; small enough to damage everywhere."""
    layout = make_layout(channels=("experts",))
    context = Context(layout, server_records(layout, np.random.default_rng(1), n_requests=1))
    return write_trace(
        path, [context], block=64, labels=[{"request": 0, "label": "x"}], vocabulary=[b"a", b"\xff"]
    )


def small_trace(path: Path, **options: Any) -> Path:
    """Write a trace of one context, three requests on two slots, nothing lost."""
    layout = make_layout()
    context = Context(layout, server_records(layout, np.random.default_rng(7)))
    labels = [
        {"request": i, "id": f"p{i}", "label": label} for i, label in enumerate(["code", "math", "code"])
    ]
    return write_trace(path, [context], **{"labels": labels, **options})


def labelled_records(
    layout: Layout,
    rng: np.random.Generator,
    *,
    n_domains: int = 3,
    n_prompts: int = 4,
    effect: float = 1.5,
    n_prompt: int = 6,
    n_decode: tuple[int, int] = (8, 20),
    all_outputs: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Tell of requests of several domains whose experts differ, two at a time in turn over two slots.

    Gives the records and, for each, the number of its request. Request r is of domain r % n_domains. Each token
    uses its domain's favourites more, by ``effect`` in logits; prompts differ by a normal 0.5. Without
    ``all_outputs`` the last layer of a prompt is computed for its last row only.
    """
    n_layers, big = len(layout.layers), max(layout.n_expert)
    taste = rng.normal(0, effect, (n_domains, n_layers, big))
    parts: list[tuple[np.ndarray, int]] = []
    batch = 0
    for first in range(0, n_domains * n_prompts, 2):
        pair = [r for r in (first, first + 1) if r < n_domains * n_prompts]
        rows = []
        for slot, request in enumerate(pair):
            for code in (EventCode.LAUNCH, EventCode.SEQ_RM):
                parts.append((event(layout, 0, code, slot, 0 if code == EventCode.SEQ_RM else -1), request))
            n = n_prompt + int(rng.integers(*n_decode))
            made = random_records(layout, n, rng)
            made["kind"], made["sequence"], made["position"] = 0, slot, np.arange(n)
            made["token"], made["flags"], made["state"] = (
                rng.integers(0, 12, n),
                np.arange(n) >= n_prompt - 1,
                1,
            )
            if not all_outputs:
                made["state"][: n_prompt - 1, -1] = 2
            logits = taste[request % n_domains] + rng.normal(0, 0.5, (n_layers, big))
            logits = logits + rng.normal(0, 1, (n, n_layers, big))
            for layer, e in enumerate(layout.n_expert):
                logits[:, layer, e:] = -np.inf
            if "experts" in made.dtype.names:
                k = made["experts"].shape[2]
                made["experts"] = np.argsort(-logits, axis=2)[:, :, :k]
                for layer, own in enumerate(layout.n_expert_used):
                    made["experts"][:, layer, own:] = layout.sentinel
                made["experts"][made["state"] == 2] = layout.sentinel
            if "weights" in made.dtype.names:
                made["weights"] = -np.sort(-rng.random(made["weights"].shape), axis=2)
            rows.append(made)
        for t in range(max(len(made) for made in rows)):
            for slot, made in enumerate(rows):
                if t < len(made):
                    one = made[t : t + 1].copy()
                    one["batch"] = one["step"] = batch + max(0, t - n_prompt + 1)
                    one["row"] = slot + len(rows) * t * (t < n_prompt)
                    parts.append((one, pair[slot]))
        batch += max(len(made) for made in rows)
        parts += [(event(layout, 0, EventCode.LAUNCH, slot), request) for slot, request in enumerate(pair)]
    records = np.concatenate([part for part, _ in parts])
    owner = np.concatenate([np.full(len(part), request) for part, request in parts])
    return records, owner


def write_labelled(
    path: Path,
    layout: Layout,
    records: np.ndarray,
    owner: np.ndarray,
    requests: Any = None,
    *,
    domains: Sequence[str] = ("a", "b", "c"),
    labels: bool = True,
    lose: Sequence[int] = (),
) -> Path:
    """Write a trace of some of the requests of :func:`labelled_records`; rows with serials in ``lose`` are lost."""
    chosen = sorted(set(owner.tolist())) if requests is None else sorted(requests)
    mine = records[np.isin(owner, chosen)].copy()
    is_row = mine["kind"] == RecordKind.ROW
    mine["serial"] = np.cumsum(is_row) - is_row
    mine["time_ns"][is_row] = 1000 * mine["serial"][is_row].astype(np.int64)
    lost = is_row & np.isin(mine["serial"], lose)
    said = [
        {"request": i, "id": f"p{r:02d}", **({"label": domains[r % len(domains)]} if labels else {})}
        for i, r in enumerate(chosen)
    ]
    return write_trace(path, [Context(layout, mine[~lost], lost=int(lost.sum()))], block=64, labels=said)


def labelled_trace(
    path: Path,
    domains: Sequence[str] = ("a", "b", "c"),
    *,
    layout: Layout | None = None,
    labels: bool = True,
    lose: Sequence[int] = (),
    seed: int = 0,
    **world: Any,
) -> Path:
    """Write a trace of :func:`labelled_records` of these domains; by default of three layers."""
    layout = layout or make_layout()
    records, owner = labelled_records(layout, np.random.default_rng(seed), n_domains=len(domains), **world)
    return write_labelled(path, layout, records, owner, domains=domains, labels=labels, lose=lose)


def model_facts(model: Path) -> dict[str, Any]:
    """Give what a host says of a model that it loaded: the keys of context.json that tell models apart."""
    with ModelFile(model) as file:
        return {
            "model": {
                "name": file.name,
                "architecture": file.architecture,
                "n_layer": file.n_layer,
                "n_embd": file.n_embd,
            },
            "layers": file.moe_layers,
            "n_expert": [file.n_expert] * len(file.moe_layers),
        }


def say_model(trace: Path, model: Path, model_path: Path | None = None) -> Path:
    """Have a trace's context say that it is of ``model``, and the trace that it was read from ``model_path``."""
    facts = read_json(trace / "ctx0" / "context.json")
    write_json(trace / "ctx0" / "context.json", {**facts, "model": model_facts(model)["model"]})
    meta = read_json(trace / "meta.json")
    write_json(trace / "meta.json", {**meta, "model_path": model_path and str(model_path)})
    return trace
