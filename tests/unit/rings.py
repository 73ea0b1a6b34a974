"""Makes ring files and records for tests: the producer's half, in numpy, on one thread."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.trace.record import (
    RECORD_HEAD,
    RING_FIELD,
    RING_HEADER,
    RING_MAGIC,
    Counter,
    EventCode,
    Field,
    OnFull,
    RecordKind,
    RowFlag,
    field_offset,
    record_dtype,
)
from moetrace.trace.rows import Layout


def make_layout(
    *,
    layers: tuple[int, ...] = (0, 1, 2),
    n_expert: int | tuple[int, ...] = 8,
    k: int | tuple[int, ...] = 2,
    channels: tuple[str, ...] = ("experts", "weights"),
    n_embd: int = 4,
    numbered: bool = False,
) -> Layout:
    """Lay out the fields of a context one after the other, as the host does."""
    n = len(layers)
    n_expert = (n_expert,) * n if isinstance(n_expert, int) else n_expert
    k = (k,) * n if isinstance(k, int) else k
    big, most = max(n_expert), max(k)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "state": ("|u1", (n,)),
        "experts": ("|u1" if big <= 255 else "<u2", (n, most)),
        "weights": ("<f4", (n, most)),
        "logits": ("<f4", (n, big)),
        "scores": ("<f4", (n, big)),
        "gate_input": ("<f4", (n, n_embd)),
    }
    offset, fields = RECORD_HEAD.itemsize, []
    for name in ("state", *channels):
        dtype, shape = shapes.get(name, ("<f4", (n_embd,)))
        offset = -(-offset // 4) * 4
        fields.append(Field(name, dtype, shape, offset))
        offset += fields[-1].nbytes
    return Layout(layers, n_expert, k, tuple(fields), numbered)


def stride_of(layout: Layout) -> int:
    """Give the bytes per record."""
    return -(-max(f.offset + f.nbytes for f in layout.fields) // 64) * 64


def context_of(layout: Layout, **extra: Any) -> dict[str, Any]:
    """Give the keys of context.json that the layout determines, as the ring's JSON text has them."""
    return {
        "name": "ctx0",
        "role": "main",
        "pid": 4711,
        "collector": "tap",
        "channels": [f.name for f in layout.fields if f.name != "state"],
        "model": {
            "name": "toy",
            "architecture": "gpt-oss",
            "description": "toy",
            "n_layer": max(layout.layers) + 1,
            "n_embd": 4,
            "n_expert": max(layout.n_expert),
            "n_expert_used": layout.k,
            "n_ctx": 4096,
            "n_ubatch": 512,
            "n_seq_max": 4,
        },
        "layers": list(layout.layers),
        "n_expert": list(layout.n_expert),
        "n_expert_used": list(layout.n_expert_used),
        "consumers": [["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]] * len(layout.layers),
        "numbered": layout.numbered,
        **extra,
    }


def ring_bytes(
    layout: Layout, capacity: int, on_full: OnFull = OnFull.BLOCK, meta: dict[str, Any] | None = None
) -> bytearray:
    """Give an empty ring file."""
    stride = stride_of(layout)
    text = json.dumps(
        {**context_of(layout), "counter_names": [c.name.lower() for c in Counter], **(meta or {})}
    )
    table = np.zeros(len(layout.fields), RING_FIELD)
    for row, field in zip(table, layout.fields, strict=True):
        row["name"], row["dtype"], row["offset"] = field.name, field.dtype, field.offset
        row["n_dims"] = len(field.shape)
        row["shape"] = [*field.shape, 1, 1][:3]
    header = np.zeros(1, RING_HEADER)
    h = header[0]
    h["magic"], h["version_major"], h["header_size"] = RING_MAGIC, 1, RING_HEADER.itemsize
    h["fields_offset"], h["n_fields"] = RING_HEADER.itemsize, len(table)
    h["meta_offset"] = RING_HEADER.itemsize + table.nbytes
    h["meta_size"] = len(text)
    h["data_offset"] = -(-(int(h["meta_offset"]) + len(text)) // 64) * 64
    h["capacity"], h["stride"], h["on_full"] = capacity, stride, on_full
    h["file_size"] = int(h["data_offset"]) + capacity * stride
    h["epoch_ns"], h["host_pid"], h["ready"] = 1_700_000_000_000_000_000, 2**22 + 7, 1  # no such process
    data = bytearray(int(h["file_size"]))
    data[:640] = header.tobytes()
    data[640 : 640 + table.nbytes] = table.tobytes()
    data[int(h["meta_offset"]) : int(h["meta_offset"]) + len(text)] = text.encode()
    return reseal(data)


def reseal(data: bytearray) -> bytearray:
    """Set the header's checksum right after its numbers were changed."""
    h = np.frombuffer(bytes(data[:640]), RING_HEADER)[0]
    fields = data[int(h["fields_offset"]) : int(h["fields_offset"]) + int(h["n_fields"]) * 72]
    text = data[int(h["meta_offset"]) : int(h["meta_offset"]) + int(h["meta_size"])]
    crc = zlib.crc32(text, zlib.crc32(fields, zlib.crc32(data[: field_offset(RING_HEADER, "crc")])))
    put(data, "crc", crc)
    return data


def put(data: bytearray, name: str, value: int, index: int = 0) -> None:
    """Set one number of a ring's header."""
    dtype = RING_HEADER[name].base
    offset = field_offset(RING_HEADER, name) + index * dtype.itemsize
    data[offset : offset + dtype.itemsize] = np.array(value, dtype).tobytes()


class Producer:
    """Writes records into ring bytes as the host would."""

    def __init__(self, layout: Layout, capacity: int, on_full: OnFull = OnFull.BLOCK, **meta: Any) -> None:
        self.layout = layout
        self.data = ring_bytes(layout, capacity, on_full, meta or None)
        self.dtype = record_dtype(layout.fields, stride_of(layout))
        self.capacity = capacity
        self.head = 0
        self.counts = dict.fromkeys(Counter, 0)
        self._start = int(np.frombuffer(bytes(self.data[:640]), RING_HEADER)[0]["data_offset"])

    def write(self, records: np.ndarray) -> None:
        """Commit records; stamps are set here. No look at the tail: the test sees to it."""
        laid_out = np.zeros(len(records), self.dtype)  # numpy packs structured arrays when it joins them
        for name in self.dtype.names or ():
            laid_out[name] = records[name]
        for record in laid_out:
            self.head += 1
            record["stamp"] = self.head
            offset = self._start + (self.head - 1) % self.capacity * self.dtype.itemsize
            self.data[offset : offset + self.dtype.itemsize] = record.tobytes()
            is_row = record["kind"] == RecordKind.ROW
            self.count(Counter.ROWS_COMMITTED if is_row else Counter.EVENTS_COMMITTED)
            if is_row:
                self.count(Counter.ROWS_PRODUCED)
        put(self.data, "head", self.head)

    def count(self, counter: Counter, n: int = 1) -> None:
        """Raise a counter."""
        self.counts[counter] += n
        put(self.data, "counters", self.counts[counter], int(counter))

    def save(self, path: Path) -> Path:
        """Write the file."""
        path.write_bytes(self.data)
        return path


def random_records(layout: Layout, n: int, rng: np.random.Generator, first_serial: int = 0) -> np.ndarray:
    """Give ``n`` row records of one sequence: a prompt of five tokens, then decoding."""
    records = np.zeros(n, record_dtype(layout.fields, stride_of(layout)))
    records["serial"] = first_serial + np.arange(n)
    records["time_ns"] = 1000 * np.arange(n)
    records["token"] = rng.integers(0, 100, n)
    records["position"] = np.arange(n)
    records["batch"] = records["step"] = np.maximum(0, np.arange(n) - 4)
    records["flags"][4:] = 1
    records["n_sequences"] = 1
    records["state"] = 1
    names = records.dtype.names or ()
    for i, (n_expert, k) in enumerate(zip(layout.n_expert, layout.n_expert_used, strict=True)):
        chosen = rng.random((n, n_expert)).argsort(axis=1)[:, :k]
        if "experts" in names:
            records["experts"][:, i, :k] = chosen
    for name in names:
        if name not in ("experts", "state") and name in [f.name for f in layout.fields]:
            values = rng.random(records[name].shape).astype(np.float32)
            records[name] = values / values.sum(axis=-1, keepdims=True) if name == "weights" else values
    if "scores" in names:  # a router of sigmoids
        if "logits" in names:
            records["scores"] = 1 / (1 + np.exp(-records["logits"]))
        for i, (n_expert, k) in enumerate(zip(layout.n_expert, layout.n_expert_used, strict=True)):
            records["experts"][:, i, :k] = np.argsort(-records["scores"][:, i, :n_expert], axis=1)[:, :k]
    return records


def number_records(records: np.ndarray) -> np.ndarray:
    """Number events and tasks as a host does, and mark rows that follow an output: they were sampled. In place."""
    n_events = 0
    tasks: dict[int, int] = {}
    sampled: dict[int, int] = {}
    for record in records:
        sequence = int(record["sequence"])
        if record["kind"] == RecordKind.EVENT:
            record["row"] = n_events
            n_events += 1
            if record["token"] == EventCode.LAUNCH:
                tasks[sequence] = tasks.get(sequence, 0) + 1
                record["arg1"] = tasks[sequence]
        elif record["kind"] == RecordKind.ROW:
            record["arg0"], record["arg1"] = tasks.get(sequence, 0), n_events
            if sampled.get(sequence) == int(record["position"]) - 1:
                record["flags"] |= RowFlag.GENERATED
            if record["flags"] & RowFlag.OUTPUT:
                sampled[sequence] = int(record["position"])
    return records


def change_ring(path: Path, **numbers: int) -> None:
    data = bytearray(path.read_bytes())
    for name, value in numbers.items():
        put(data, name, value)
    path.write_bytes(reseal(data))
