"""csrc/record.h and moetrace/trace/record.py say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from moetrace.errors import TraceError
from moetrace.trace import record
from moetrace.trace.loss import LOST_COUNTERS, LOST_EVENT_COUNTERS
from moetrace.trace.record import (
    COUNTERS,
    RECORD_HEAD,
    RING_FIELD,
    RING_HEADER,
    Counter,
    EventCode,
    Field,
    OnFull,
    RecordKind,
    RowFlag,
    State,
    record_dtype,
)

RECORD_H = Path(__file__).parents[2] / "csrc" / "record.h"
CONSTANTS = ("RING_VERSION_MAJOR", "RING_VERSION_MINOR", "ATTENTION_PIECE")
STRUCTS = {"record_head": RECORD_HEAD, "ring_field": RING_FIELD, "ring_header": RING_HEADER}
ENUMS = {
    "ring_on_full": ("RING_", OnFull),
    "record_kind": ("RECORD_", RecordKind),
    "record_flag": ("ROW_", RowFlag),
    "event_code": ("EVENT_", EventCode),
    "row_state": ("STATE_", State),
    "ring_counter": ("COUNT_", Counter),
}


def text_of(kind: str, name: str) -> str:
    """Give the body of a struct or enum of record.h, without comments."""
    text = re.sub(r"//[^\n]*", "", RECORD_H.read_text())
    found = re.search(rf"{kind} {name}\b[^{{;]*\{{(.*?)\n\}};", text, re.S)
    assert found, f"record.h has no {kind} {name}"
    return found[1]


def members(struct: str) -> list[str]:
    return re.findall(r"(\w+)(?:\[\d+\])?\s*;", text_of("struct", struct))


def values(enum: str) -> list[str]:
    return re.findall(r"^\s*([A-Z]\w+)\s*(?:=[^,]*)?,", text_of("enum", enum), re.M)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a compiler makes of record.h: every size, offset and value by name."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler here to ask about record.h")
    lines = []
    for struct in STRUCTS:
        lines.append(f'p("{struct}", sizeof(moetrace::{struct}));')
        for name in members(struct):
            lines.append(f'p("{struct}.{name}", offsetof(moetrace::{struct}, {name}));')
            lines.append(f'p("{struct}.{name}.size", sizeof(moetrace::{struct}::{name}));')
    for enum in ENUMS:
        lines += [f'p("{name}", moetrace::{name});' for name in values(enum)]
    lines += [f'p("{n}", moetrace::{n});' for n in CONSTANTS]
    lines.append('for (char c : moetrace::RING_MAGIC) p("RING_MAGIC", c);')
    folder = tmp_path_factory.mktemp("record")
    source = folder / "facts.cpp"
    source.write_text(
        f'#include "{RECORD_H}"\n#include <cstdio>\n'
        'static void p(const char * name, long long value) { printf("%s %lld\\n", name, value); }\n'
        "int main() {\n" + "\n".join(lines) + "\n}\n"
    )
    subprocess.run(
        [compiler, "-std=c++17", "-Wno-invalid-offsetof", str(source), "-o", str(folder / "facts")],
        check=True,
    )
    out = subprocess.run([str(folder / "facts")], check=True, capture_output=True, text=True).stdout.split()
    pairs = list(zip(out[::2], map(int, out[1::2]), strict=True))
    facts = dict(pairs)
    facts["magic"] = int.from_bytes(bytes(v for name, v in pairs if name == "RING_MAGIC"), "little")
    return facts


def test_every_member_of_every_struct(compiled: dict[str, int]) -> None:
    for struct, dtype in STRUCTS.items():
        assert dtype.itemsize == compiled[struct]
        assert list(dtype.names or ()) == members(struct)
        for name in members(struct):
            assert record.field_offset(dtype, name) == compiled[f"{struct}.{name}"], name
            assert dtype[name].itemsize == compiled[f"{struct}.{name}.size"], name


def test_every_value_of_every_enum(compiled: dict[str, int]) -> None:
    for name, (prefix, enum) in ENUMS.items():
        mine = {prefix + member.name: int(member) for member in enum}
        theirs = {v: compiled[v] for v in values(name)}
        if enum is Counter:
            assert theirs.pop("COUNT_N") == len(Counter)
        assert mine == theirs


def test_counters_have_one_list_of_names() -> None:
    """What the host writes into a ring, and what Python counts by, are the names of the enum."""
    text = "".join(path.read_text() for path in sorted(RECORD_H.parent.glob("*.cpp")))
    listed = re.search(r"COUNTERS\[\w*\] = \{(.*?)\}", text, re.S)
    assert listed
    assert tuple(re.findall(r'"(\w+)"', listed[1])) == COUNTERS
    assert {*LOST_COUNTERS, *LOST_EVENT_COUNTERS} < set(COUNTERS)


def test_constants_and_magic(compiled: dict[str, int]) -> None:
    written = re.findall(r"^constexpr \w+\s+(\w+)", RECORD_H.read_text(), re.M)
    assert set(written) == {*CONSTANTS, "RING_MAGIC"}
    assert compiled["ATTENTION_PIECE"] == record.ATTENTION_PIECE
    assert compiled["RING_VERSION_MAJOR"] == record.RING_VERSION_MAJOR
    assert compiled["RING_VERSION_MINOR"] == record.RING_VERSION_MINOR
    assert compiled["magic"].to_bytes(8, "little") == record.RING_MAGIC


def test_record_dtype_places_fields_where_the_table_says() -> None:
    fields = [Field("experts", "|u1", (3, 2), 70), Field("state", "|u1", (3,), 64)]
    dtype = record_dtype(fields, 128)
    assert dtype.itemsize == 128
    assert record.field_offset(dtype, "experts") == 70
    assert dtype["experts"].shape == (3, 2)
    assert record.field_offset(dtype, "serial") == 8
    assert np.zeros(2, dtype)["state"].shape == (2, 3)


@pytest.mark.parametrize(
    ("fields", "stride"),
    [
        ([Field("a", "|u1", (4,), 60)], 128),  # in the head
        ([Field("a", "|u1", (65,), 64)], 128),  # past the end
        ([Field("a", "<f4", (4,), 64), Field("b", "<f4", (1,), 76)], 128),  # overlapping
        ([Field("a", "<f4", (2**31, 2**31, 2**31), 64)], 128),
        ([Field("a", "|O", (1,), 64)], 128),
        ([Field("a", "<f4", (), 64)], 128),
        ([Field("a", "<f4", (1, 0), 64)], 128),
        ([Field("serial", "<f4", (1,), 64)], 128),  # a name of the head
        ([Field("a", "<f4", (1,), 64), Field("a", "<f4", (1,), 68)], 128),
        ([], 100),
        ([], 0),
    ],
)
def test_record_dtype_refuses(fields: list[Field], stride: int) -> None:
    with pytest.raises(TraceError):
        record_dtype(fields, stride)
