"""Interventions as text, as the host's file, and as a trace tells of them."""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rings import Producer, make_layout, random_records
from traces import Context, event, write_trace

import moetrace
from moetrace.__main__ import main
from moetrace.errors import UsageError
from moetrace.host.intervene import in_force, restore, rules_of, switch
from moetrace.trace.intervention import (
    Intervention,
    Kind,
    Router,
    Rule,
    check,
    described,
    encode,
    parse_interventions,
    routers_of,
    store,
)
from moetrace.trace.record import EventCode, RowFlag
from moetrace.trace.ring import Ring, ring_paths

native: Any = importlib.import_module("moetrace._native")
needs_native = pytest.mark.skipif(
    not hasattr(native, "intervention_check"), reason="moetrace's native module is not built here"
)

#: 4 layers of 16 experts, 4 used; layer 3 chooses among groups, layer 5 by something else than scores
ROUTERS: list[Router] = [(0, 16, 4, 0, 0, True), (1, 16, 4, 0, 0, True), (3, 16, 4, 4, 2, True)]


def encoded(*texts: str) -> bytes:
    return encode([rule for text in texts for rule in rules_of(Intervention.parse(text))])


def test_a_range_is_its_experts():
    assert encoded("ablate:1:0-7") == encoded("ablate:1:0,1,2,3,4,5,6,7")


def refusal(*texts: str, routers: list[Router] = ROUTERS) -> str:
    with pytest.raises(UsageError) as e:
        check(encoded(*texts), routers)
    return e.value.why


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ablate:7:3,12", Intervention(Kind.ABLATE, ((7, 7),), (3, 12))),
        ("ablate:1:0-7", Intervention(Kind.ABLATE, ((1, 1),), tuple(range(8)))),
        ("bias:0-3:9,0-2,5=+2@slot=1", Intervention(Kind.BIAS, ((0, 3),), (9, 0, 1, 2, 5), 2.0, slot=1)),
        ("force:*:5", Intervention(Kind.FORCE, (), (5,))),
        ("bias:7:3=+1.5", Intervention(Kind.BIAS, ((7, 7),), (3,), 1.5)),
        ("bias:0-3,9:3,4=-0.25", Intervention(Kind.BIAS, ((0, 3), (9, 9)), (3, 4), -0.25)),
        ("ablate:7:3@slot=1", Intervention(Kind.ABLATE, ((7, 7),), (3,), slot=1)),
        ("ablate:7:3@request=a@b:c", Intervention(Kind.ABLATE, ((7, 7),), (3,), request="a@b:c")),
        ("replay:other.moet", Intervention(Kind.REPLAY, source="other.moet")),
        ("replay:0-5:x/y.moet", Intervention(Kind.REPLAY, ((0, 5),), source="x/y.moet")),
        (
            "replay:c:/x.moet#q-1@slot=0",
            Intervention(Kind.REPLAY, source="c:/x.moet", source_request="q-1", slot=0),
        ),
    ],
)
def test_text_is_read_and_written_back(text, expected):
    assert Intervention.parse(text) == expected
    assert Intervention.parse(str(expected)) == expected
    assert str(expected) == text


ranges = st.tuples(st.integers(0, 99), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1]))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from([Kind.ABLATE, Kind.FORCE, Kind.BIAS]),
    layers=st.lists(ranges, max_size=3).map(tuple),
    experts=st.lists(st.integers(0, 511), min_size=1, max_size=5, unique=True).map(tuple),
    value=st.integers(-999, 999).filter(bool),
    slot=st.none() | st.integers(0, 63),
)
def test_every_intervention_survives_as_text(kind, layers, experts, value, slot):
    one = Intervention(kind, layers, experts, value / 8 if kind is Kind.BIAS else 0.0, slot)
    assert Intervention.parse(str(one)) == one
    assert parse_interventions([str(one), one]) == (one, one)


@pytest.mark.parametrize(
    "text",
    [
        "", "ablate", "ablate:", "ablate:7", "ablate:7:", "ablate:7:x", "ablate:x:3", "ablate:7:3,3", "ablate:7:-3",
        "ablate:7:65535", "ablate:9-7:3", "ablate:7:3=1", "bias:7:3", "bias:7:3=", "bias:7:3=0", "bias:7:3=nan",
        "bias:7:3=inf", "burn:7:3", "replay:", "replay", "ablate:7:3@slot=-1", "ablate:7:3@slot=", "ablate:7:3@who=1",
        "ablate:99999999999:3", "ablate:7:7-3", "ablate:7:0-7,5", "ablate:7:0-", "ablate:7:-7", "ablate:7:0-65535",
        "ablate:7:0-9999999999", "ablate:7:0-7-9", "ablate:7:*", "ablate:7:3,", "force:7:0-x",
        "ablate:" + "9" * 5000 + ":3", "ablate:7:" + "9" * 5000, "ablate:7:3@slot=" + "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_none_is_refused(text):
    with pytest.raises(UsageError) as e:
        Intervention.parse(text)
    assert e.value.exit_code == 2
    assert e.value.fix


@needs_native
@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["ablate:2:1"], "layer 2 has no experts"),
        (["ablate:1:16"], "layer 1 has no expert 16"),
        (["ablate:1:8-16"], "layer 1 has no expert 16"),
        (["ablate:2:0-3"], "layer 2 has no experts"),
        (["ablate:1:0-12"], "layer 1: leaves 3 experts, 4 are used"),
        (["force:*:1,2,3,4,5"], "layer 0: 5 forced, 4 are used"),
        (["force:1:1,2,3", "force:1:4,5@slot=2"], "layer 1: 5 forced, 4 are used"),
        (["ablate:1:" + ",".join(map(str, range(13)))], "layer 1: leaves 3 experts, 4 are used"),
        (["ablate:1:0,1,2,3,4,5,6", "ablate:1:7,8,9,10,11,12@slot=3"], "layer 1: leaves 3 experts, 4 are used"),
        # two groups of four are used: three left in the worst two
        (["ablate:3:0,1,2,3,4"], "layer 3: groups may leave 3 experts, 4 are used"),
        (["ablate:1:3", "force:0-1:3"], "layer 1: expert 3 ablated and forced"),
    ],
)  # fmt: skip
def test_what_a_router_cannot_do_is_refused(texts, why):
    assert refusal(*texts) == why


@needs_native
def test_what_a_router_can_do_is_not():
    check(encoded("ablate:1:" + ",".join(map(str, range(12))), "force:3:0,4,8,12", "bias:*:3=2"), ROUTERS)
    check(encoded("ablate:1:1,2,3,4,5,6,7@slot=0", "ablate:1:8,9,10,11,12,13,14@slot=1"), ROUTERS)
    check(encoded("ablate:1:3@slot=0", "force:1:3@slot=1"), ROUTERS)
    check(encoded("ablate:3:0,1,2,4"), ROUTERS)
    check(encode([]), ROUTERS)
    assert "how it chooses is not known" in refusal("ablate:5:1", routers=[(5, 16, 4, 0, 0, False)])


@needs_native
def test_replays_are_checked_row_by_row():
    def why(ids: list[list[int]], layer: int = 1, more: tuple[Rule, ...] = ()) -> str:
        rule = Rule(Kind.REPLAY, np.array(ids, np.uint16), -1, layer, layer)
        answer: str = native.intervention_check(encode([rule, *more]), ROUTERS)
        return answer

    nothing = [0xFFFF] * 4
    assert why([[1, 2, 3, 4], nothing, [4, 3, 2, 1]]) == ""
    assert why([[1, 2, 3, 4], [1, 2, 3, 16]]) == "layer 1 has no expert 16"
    assert why([[1, 2, 3, 3]]) == "layer 1: an expert replayed twice"
    assert why([[1, 2, 3]]) == "layer 1 uses 4 experts, not 3"
    other = Rule(Kind.ABLATE, np.array([[9]], np.uint16))
    assert why([[1, 2, 3, 4]], more=(other,)) == "layer 1: a replay and another rule"


@needs_native
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_hostile_file_is_refused(data):
    """Whatever the bytes say, with a checksum that fits: an answer, and no crash."""
    good = encoded("ablate:*:3", "bias:1:2=+1") + b""
    body = bytearray(good[32:])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for part in (bytes(body), bytes(body[:cut])):
        n_rules = data.draw(st.sampled_from([0, 1, 2, 3, 1 << 20, 0xFFFFFFFF]))
        head = struct.pack("<8sIIQII", b"MOETINTV", 1, n_rules, 32 + len(part), zlib.crc32(part), 0)
        assert isinstance(native.intervention_check(head + part, ROUTERS), str)


@needs_native
@pytest.mark.parametrize(
    ("offset", "value", "why"),
    [
        (0, b"X", "not an intervention"),
        (8, b"\2", "not an intervention"),
        (16, b"\0", "damaged"),
        (40, b"\7", "damaged"),
    ],
)
def test_a_damaged_file_is_refused(offset, value, why):
    file = bytearray(encoded("ablate:1:3"))
    file[offset : offset + 1] = value
    assert why in native.intervention_check(bytes(file), ROUTERS)
    assert native.intervention_check(bytes(file[:20]), ROUTERS) == "it is too short"
    assert "damaged" in native.intervention_check(encoded("ablate:1:3")[:-1], ROUTERS)


def test_numbers_are_given_out_once(tmp_path):
    one = parse_interventions("ablate:1:3@slot=2")
    assert [store(tmp_path, one, b"x"), store(tmp_path, one, b"y")] == [1, 2]
    (tmp_path / "interventions" / "3.bin").write_bytes(b"somebody else's")
    assert store(tmp_path, one, b"z") == 4
    assert (tmp_path / "interventions" / "4.bin").read_bytes() == b"z"
    assert described(tmp_path) == dict.fromkeys((1, 2, 4), "ablate:1:3@slot=2")
    assert described(tmp_path / "none") == {}


def test_routers_of_a_text_that_says_something_else():
    assert routers_of({"routers": [[0, 16, 4, 0, 0, 1]]}) == [(0, 16, 4, 0, 0, True)]
    for odd in (None, 3, [[1]], [[0, 16, 4, 0, 0, -1]], [["a"] * 6], [[0, 1 << 40, 4, 0, 0, 1]]):
        assert routers_of({"routers": odd}) == []


def test_a_trace_tells_which_was_in_force_when(tmp_path: Path) -> None:
    layout = make_layout()
    rows = random_records(layout, 10, np.random.default_rng(1))
    rows["flags"] = 0
    rows["flags"][3:6] = int(RowFlag.INTERVENED)
    parts = []
    for serial, number in [(3, 1), (6, 0), (8, 2)]:
        switch = event(layout, serial, EventCode.INTERVENE, -1)
        switch["arg1"], switch["time_ns"] = number, 1000 + serial
        parts.append((serial, switch))
    records = np.concatenate(
        [rows[:3], parts[0][1], rows[3:6], parts[1][1], rows[6:8], parts[2][1], rows[8:]]
    )
    path = write_trace(tmp_path / "t.moet", [Context(layout, records)])
    store(path, parse_interventions(["ablate:0:1", "force:1:2"]), b"")
    trace = moetrace.open(path)
    np.testing.assert_array_equal(trace.intervened, np.isin(np.arange(10), [3, 4, 5]))
    table = trace.interventions
    assert table[["number", "first_serial", "end_serial"]].to_numpy().tolist() == [[1, 3, 6], [2, 8, -1]]
    assert table["rules"][0] == "ablate:0:1 force:1:2"
    assert table["rules"].isna()[1]
    assert (table["from_ns"] - trace.epoch_ns).tolist() == [1003, 1008]
    assert table["to_ns"].tolist() == [1006 + trace.epoch_ns, -1]


# -- several models in one recording -----------------------------------------------------------------


@pytest.fixture
def two_models(tmp_path):
    """Live rings of two models; one of them has two contexts and a draft model's."""
    layout = make_layout()
    routers = [[layer, 8, 2, 0, 0, 1] for layer in layout.layers]
    model = {"architecture": "olmoe", "n_layer": 3, "n_embd": 4}
    contexts = [
        {"model": {**model, "name": "A"}, "alias": "a"},
        {"model": {**model, "name": "B"}, "alias": "b"},
        {"model": {**model, "name": "A"}, "alias": "a"},
        {"model": {**model, "name": "D"}, "role": "draft", "alias": "a"},
    ]
    for i, facts in enumerate(contexts):
        folder = tmp_path / "t.moet" / f"ctx{i}"
        folder.mkdir(parents=True)
        Producer(layout, 8, routers=routers, **{"name": f"ctx{i}", "role": "main", **facts}).save(
            folder / "ring"
        )
    return tmp_path / "t.moet"


def asked(trace: Path) -> list[int]:
    out = []
    for path in ring_paths(trace):
        with Ring(path) as ring:
            out.append(ring.intervention)
    return out


@needs_native
def test_of_several_models_one_has_to_be_named(two_models):
    with pytest.raises(UsageError, match="records several models") as e:
        switch(two_models, "ablate:1:0-3")
    assert all(f"ctx{i}: {name}" in e.value.why for i, name in enumerate("ABA"))
    assert asked(two_models) == [0, 0, 0, 0]
    assert switch(two_models, "ablate:1:0-3", model="a") == 1
    assert asked(two_models) == [1, 0, 1, 0]
    before = in_force(two_models)
    assert switch(two_models, "ablate:1:3", context="ctx1") == 2
    assert asked(two_models) == [1, 2, 1, 0]
    restore(before)
    assert asked(two_models) == [1, 0, 1, 0]
    assert switch(two_models, None) == 0
    assert asked(two_models) == [0, 0, 0, 0]


@needs_native
@pytest.mark.parametrize(
    "which", [{"model": "c"}, {"context": "ctx9"}, {"context": "ctx1", "model": "a"}, {"context": "ctx3"}]
)
def test_what_is_not_recorded_is_refused(two_models, which):
    with pytest.raises(UsageError) as e:
        switch(two_models, "ablate:1:0", **which)
    assert e.value.fix
    assert asked(two_models) == [0, 0, 0, 0]


@needs_native
@pytest.mark.parametrize(
    ("options", "paused"),
    [([], [1, 1, 1, 1]), (["--model", "b"], [0, 1, 0, 0]), (["--context", "ctx2"], [0, 0, 1, 0])],
)
def test_start_and_stop_are_for_all_or_for_those_that_are_named(two_models, options, paused, capsys):
    assert main(["stop", str(two_models), *options]) == 0
    assert capsys.readouterr().out.count("paused") == sum(paused)
    states = []
    for path in ring_paths(two_models):
        with Ring(path) as ring:
            states.append(ring.paused)
    assert states == [bool(p) for p in paused]
    assert main(["start", str(two_models), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(one["context"], one["state"]) for one in said] == [(f"ctx{i}", "recording") for i in range(4)]
    assert main(["stop", str(two_models), "--model", "c"]) == 2
    assert "A, a (main)" in capsys.readouterr().err
