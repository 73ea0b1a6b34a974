"""A reader of traces and rings from docs/format.md alone: numpy, the standard library, nothing of moetrace."""

import ast
import json
import struct
import zlib
from pathlib import Path

import numpy as np


def read_json(path):
    """Give a JSON object whose `crc` fits."""
    obj = json.loads(Path(path).read_text())
    crc = obj.pop("crc")
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    if crc != zlib.crc32(text.encode()):
        raise ValueError(f"{path} does not fit its checksum")
    return obj


def read_npy(path):
    """Give (dtype, shape, data) as an .npy file's header has them; the shape may lag behind."""
    data = Path(path).read_bytes()
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError(f"{path} is no version-1.0 .npy file")
    end = 10 + struct.unpack_from("<H", data, 8)[0]
    header = ast.literal_eval(data[10:end].decode())
    descr = header["descr"]
    dtype = np.dtype(descr if isinstance(descr, str) else [_as_tuple(field) for field in descr])
    return dtype, header["shape"], data[end:]


def _as_tuple(field):
    name, descr = field[0], field[1]
    return (name, descr if isinstance(descr, str) else [_as_tuple(f) for f in descr])


def read_table(folder):
    """Give a table's columns, as far as the ledger vouches for them; every block's checksum is checked."""
    dtype, _, data = read_npy(folder / "blocks.npy")
    blocks, end = [], 0
    for block in np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype):
        if zlib.crc32(block.tobytes()[:-4]) != block["self"] or block["start"] != end:
            break
        blocks.append(block)
        end += int(block["rows"])
    columns = {}
    for name in dtype["crc"].names:
        kind, shape, data = read_npy(folder / f"{name}.npy")
        column = np.frombuffer(data[: end * kind.itemsize * int(np.prod(shape[1:]))], kind).reshape(
            end, *shape[1:]
        )
        for i, block in enumerate(blocks):
            part = column[int(block["start"]) : int(block["start"] + block["rows"])]
            if zlib.crc32(part.tobytes()) != block["crc"][name]:
                raise ValueError(f"block {i} of {folder}/{name}.npy does not fit its checksum")
        columns[name] = column
    return columns


def read_labels(path):
    """Give request -> what was said about it."""
    labels = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        obj = json.loads(line)
        obj.pop("crc", None)
        labels.setdefault(obj.pop("request"), {}).update(obj)
    return labels


def read_trace(path):
    """Give everything in a trace: meta, requests, labels, and per context its facts, rows and events."""
    path = Path(path)
    meta = read_json(path / "meta.json")
    if meta["format"] != "moetrace-trace" or meta["version"][0] != 1:
        raise ValueError(f"{path} is no trace of major version 1")
    contexts = {}
    for name in meta["contexts"]:
        folder = path / name
        contexts[name] = {
            "facts": read_json(folder / "context.json"),
            "rows": read_table(folder / "rows"),
            "events": read_table(folder / "events"),
            "ring": read_ring(folder / "ring") if (folder / "ring").exists() else None,
        }
    vocabulary = path / "vocabulary.json"
    return {
        "meta": meta,
        "requests": read_table(path / "requests"),
        "labels": read_labels(path / "labels.jsonl"),
        "vocabulary": [t.encode("utf-8", "surrogateescape") for t in read_json(vocabulary)["tokens"]]
        if vocabulary.exists()
        else None,
        "contexts": contexts,
    }


HEAD_NAMES = (
    ["stamp", "serial", "time_ns", "step", "batch", "token", "position", "sequence", "kind", "n_sequences", "flags", "row", "arg0", "arg1"]
)
HEAD_TYPES = ["<u8", "<u8", "<i8", "<u4", "<u4", "<i4", "<i4", "<i4", "<u2", "<u2", "<u4", "<u4", "<i4", "<i4"]
HEAD = np.dtype(list(zip(HEAD_NAMES, HEAD_TYPES, strict=True)))


def read_ring(path):
    """Give (meta, committed and unreleased records) of a ring file, the records as a structured array."""
    data = Path(path).read_bytes()
    if data[:8] != b"MOETRING" or struct.unpack_from("<H", data, 8)[0] != 1:
        raise ValueError(f"{path} is no ring of major version 1")
    data_offset, capacity, stride, n_fields, fields_offset, meta_offset, meta_size = struct.unpack_from(
        "<QQIIIII", data, 24
    )
    crc = struct.unpack_from("<I", data, 84)[0]
    fields_end = fields_offset + 72 * n_fields
    constants = data[:84] + data[fields_offset:fields_end] + data[meta_offset : meta_offset + meta_size]
    if zlib.crc32(constants) != crc:
        raise ValueError(f"the header of {path} does not fit its checksum")
    names, formats, offsets = (
        list(HEAD.names),
        [HEAD[n] for n in HEAD.names],
        [HEAD.fields[n][1] for n in HEAD.names],
    )
    for i in range(n_fields):
        name, dtype, offset, n_dims, *shape = struct.unpack_from("<40s8sIIIII", data, fields_offset + 72 * i)
        names.append(name.rstrip(b"\0").decode())
        formats.append((dtype.rstrip(b"\0").decode(), tuple(shape[:n_dims])))
        offsets.append(offset)
    record = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": stride})
    slots = np.frombuffer(data, record, count=capacity, offset=data_offset)
    head, tail = struct.unpack_from("<Q", data, 128)[0], struct.unpack_from("<Q", data, 512)[0]
    numbers = np.arange(max(tail, head - capacity, 0), head, dtype=np.uint64)
    records = slots[numbers % np.uint64(capacity)]
    return json.loads(data[meta_offset : meta_offset + meta_size]), records[records["stamp"] == numbers + 1]
