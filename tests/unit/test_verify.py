"""Verifying and recovering: damage is found, and what can be saved is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import read_trace
from rings import make_layout, put, random_records, reseal
from traces import Context, event, server_records, small_trace, write_trace

import moetrace
from moetrace.__main__ import main
from moetrace.errors import MoetraceError, TraceError
from moetrace.host.intervene import rules_of
from moetrace.trace.columns import TableWriter
from moetrace.trace.intervention import Intervention, Kind, Rule, decode, encode, store
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.ledger import row_crc
from moetrace.trace.record import EventCode, RowFlag
from moetrace.trace.recover import recover
from moetrace.trace.rows import Layout
from moetrace.trace.store import TraceStore
from moetrace.trace.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def rewrite(trace: Path, column: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a column and seal it anew, checksums and all: only its meaning is wrong then."""
    folder = trace / "ctx0" / "rows"
    store = TraceStore(trace)
    columns = {name: np.array(c) for name, c in store.context("ctx0").rows.items()}
    spec = store.context("ctx0").rows.spec
    change(columns[column])
    shutil.rmtree(folder)
    with TableWriter.create(folder, spec) as writer:
        writer.append(columns)
        writer.seal()
    TraceStore(trace).close_as("closed")


def test_fine(tmp_path: Path) -> None:
    result = verify(small_trace(tmp_path / "t"))
    assert result.findings == ()
    assert result.exit_code == 0
    assert result.rows == 30


def test_the_golden_ones() -> None:
    assert verify(GOLDEN / "two-contexts").exit_code == 0
    assert verify(GOLDEN / "killed").exit_code == 3


def set_at(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], None]:
    def change(column: np.ndarray) -> None:
        column[index] = value

    return change


@pytest.mark.parametrize(
    ("column", "change", "finding"),
    [
        ("experts", set_at((0, 0, 0), 8), "not below"),
        ("experts", set_at((0, 0, 0), 255), "none where something is"),
        ("experts", set_at((0, 2, 0), 1), "where nothing is present"),
        ("weights", set_at((0, 2, 0), 1.0), "where nothing is present"),
        ("state", set_at((0, 0), 3), "none of 0, 1, 2"),
        ("serial", set_at((4,), 1), "do not ascend"),
        ("serial", set_at((29,), 99), "only 30 were computed"),
        ("phase", set_at((0,), 1), "says n_prefill"),
        ("phase", set_at((0,), 2), "contradict"),
        ("request", set_at((0,), -1), "no request"),
        ("request", set_at((0,), 77), "not listed"),
    ],
)
def test_contents_that_contradict(
    tmp_path: Path, column: str, change: Callable[[np.ndarray], None], finding: str
) -> None:
    path = small_trace(tmp_path / "t")
    rewrite(path, column, change)
    result = verify(path)
    assert result.exit_code == 4
    assert any(finding in f.what for f in result.findings), result.findings


def test_an_expert_chosen_twice(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")

    def twice(experts: np.ndarray) -> None:
        experts[3, 0, 1] = experts[3, 0, 0]

    rewrite(path, "experts", twice)
    assert any("twice" in f.what and "row 3" in f.what for f in verify(path).findings)


@pytest.mark.parametrize(
    ("counter", "what"),
    [
        ("rows_produced", "31 rows were computed, but 30 are here and 0 lost"),
        ("rows_committed", "31 rows were written, but 30 are here and 0 overwritten"),
    ],
)
def test_counts_that_do_not_add_up(counter: str, what: str, tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    facts = read_json(path / "ctx0" / "context.json")
    facts["counters"][counter] += 1
    write_json(path / "ctx0" / "context.json", facts)
    result = verify(path)
    assert result.exit_code == 4
    assert what in result.findings[0].what


def test_a_ledger_cut_short_is_noticed(tmp_path: Path) -> None:
    """GIVEN a closed trace whose last block is gone without a trace WHEN verified THEN meta.json tells."""
    path = small_trace(tmp_path / "t")
    for folder in ("rows", "events"):
        ledger = path / "ctx0" / folder / "blocks.npy"
        width = np.load(ledger).dtype.itemsize
        os.truncate(ledger, ledger.stat().st_size - width)
    assert verify(path).exit_code == 4
    with pytest.raises(TraceError, match="damaged"):
        recover(path)
    recover(path, cut=True)
    assert len(moetrace.open(path)) < 30


@pytest.mark.parametrize("version", [[1, 0], [1, 1]])
def test_a_ledger_in_the_place_of_another_is_noticed(tmp_path: Path, version: list[int]) -> None:
    """GIVEN a closed trace with a whole block of equal length put in a block's place WHEN verified THEN it tells.

    In format 1.0 meta.json holds nothing that could tell.
    """
    path = small_trace(tmp_path / "t")
    ledger = path / "ctx0" / "rows" / "blocks.npy"
    blocks = np.load(ledger, mmap_mode="r+")
    blocks["time_ns"][-1] += 1
    blocks["self"][-1] = row_crc(blocks[-1])
    blocks.flush()
    meta = read_json(path / "meta.json")
    write_json(path / "meta.json", meta | {"version": version})
    noticed = [f.what for f in verify(path).findings if "not the one that meta.json closed it with" in f.what]
    assert len(noticed) == (version == [1, 1])


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


# -- recovering ------------------------------------------------------------------------------------------


def same(a: Path, b: Path) -> None:
    """Two traces hold the same rows, events and requests."""
    one, two = read_trace(a), read_trace(b)
    for table in ("rows", "events"):
        for name, column in one["contexts"]["ctx0"][table].items():
            np.testing.assert_array_equal(column, two["contexts"]["ctx0"][table][name], err_msg=name)
    first, second = moetrace.open(a).requests, moetrace.open(b).requests
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize("sealed", range(0, 40, 3))
def test_recovering_gives_what_closing_would_have(tmp_path: Path, sealed: int) -> None:
    """GIVEN a recorder killed anywhere WHEN recovered THEN the trace is the one it would have closed."""
    layout = make_layout()
    records = server_records(layout, np.random.default_rng(2), lose=(5,))
    context = Context(layout, records, lost=1)
    whole = write_trace(tmp_path / "whole", [context])
    killed = write_trace(tmp_path / "killed", [context], close=False, sealed=min(sealed, len(records)))
    assert verify(killed).exit_code == 3
    result = recover(killed)
    (done,) = result.contexts
    assert done.sealed + done.recovered == 29
    assert (done.lost, done.torn) == (1, 0)
    same(whole, killed)
    assert verify(killed).findings == ()
    assert not (killed / "ctx0" / "ring").exists()
    assert moetrace.open(killed).meta["state"] == "recovered"
    again = recover(killed)
    assert again.contexts[0].recovered == 0


def test_recovering_twice_over_the_same_ring_changes_nothing(tmp_path: Path) -> None:
    """GIVEN a recovery killed just before it deletes the ring WHEN repeated THEN no row comes twice."""
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = (path / "ctx0" / "ring").read_bytes()
    recover(path)
    before = read_trace(path)["contexts"]["ctx0"]["rows"]["serial"].copy()
    (path / "ctx0" / "ring").write_bytes(ring)
    recover(path)
    np.testing.assert_array_equal(read_trace(path)["contexts"]["ctx0"]["rows"]["serial"], before)
    assert verify(path).findings == ()


def test_events_sealed_before_their_rows_come_once(tmp_path: Path) -> None:
    """GIVEN a recorder killed between sealing events and rows WHEN recovered THEN each event stands once."""
    layout = make_layout()
    records = server_records(layout, np.random.default_rng(2))
    context = Context(layout, records)
    whole = write_trace(tmp_path / "whole", [context])
    killed = write_trace(tmp_path / "killed", [context], close=False, sealed=16)
    events = TraceStore(whole).context("ctx0").events
    have = TraceStore(killed).context("ctx0").events.n_rows
    with TableWriter.resume(killed / "ctx0" / "events") as writer:
        writer.append({name: np.array(column[have : have + 2]) for name, column in events.items()})
        writer.seal()
    recover(killed)
    same(whole, killed)


def test_torn_records_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = path / "ctx0" / "ring"
    data = bytearray(ring.read_bytes())
    from moetrace.trace.ring import Ring

    with Ring(ring) as r:
        stride, start, head = r.dtype.itemsize, len(data) - r.capacity * r.dtype.itemsize, r.head
    data[start + (head - 2) * stride : start + (head - 2) * stride + 8] = bytes(8)
    ring.write_bytes(data)
    assert recover(path).contexts[0].torn == 1


def test_a_ring_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    flip(path / "ctx0" / "ring", 8 * 33)
    (done,) = recover(path).contexts
    assert "left alone" in done.note
    assert (path / "ctx0" / "ring").exists()
    assert len(moetrace.open(path)) == done.sealed


def test_broken_headers_are_written_again(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    before = read_trace(path)["contexts"]["ctx0"]["rows"]
    for name in ("experts", "blocks"):
        with (path / "ctx0" / "rows" / f"{name}.npy").open("r+b") as f:
            f.write(b"garbage" * 10)
    with pytest.raises(TraceError):
        moetrace.open(path)
    assert recover(path).headers == ("ctx0/rows/experts.npy", "ctx0/rows/blocks.npy")
    assert verify(path).findings == ()
    np.testing.assert_array_equal(moetrace.open(path).experts, before["experts"])


def test_damage_inside_is_not_cut_off_unasked(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    flip(path / "ctx0" / "rows" / "blocks.npy", 8 * 1030)
    size = (path / "ctx0" / "rows" / "experts.npy").stat().st_size
    with pytest.raises(TraceError) as e:
        recover(path)
    assert "--cut" in e.value.fix
    assert (path / "ctx0" / "rows" / "experts.npy").stat().st_size == size


def test_a_trace_being_recorded_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "killed", path)
    ring = path / "ctx0" / "ring"
    data = bytearray(ring.read_bytes())
    put(data, "reader_pid", os.getppid())
    ring.write_bytes(data)
    with pytest.raises(TraceError, match="is being recorded"):
        recover(path)
    assert verify(path).live
    put(data, "reader_pid", 0)
    put(data, "host_pid", os.getppid())
    ring.write_bytes(reseal(data))
    with pytest.raises(MoetraceError, match="still runs"):
        recover(path)


def test_labels_count_only_if_whole(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    with (path / "labels.jsonl").open("a") as f:
        f.write('{"request": 0, "label": "tampered", "crc": 1}\nnot json\n{"label": "whose?"}\n')
        f.write(json.dumps({"request": 2, "label": "by hand"}) + "\n")
    assert moetrace.open(path).requests["label"].tolist() == ["code", "math", "by hand"]
    assert len(verify(path).findings) == 4  # the last counts, but cannot be checked


# -- ids, scores and logits


def routed(
    gate: str = "sigmoid",
    *,
    bias: bool = False,
    groups: bool = False,
    rules: Sequence[str] = (),
    n: int = 300,
    seed: int = 0,
) -> tuple[Layout, np.ndarray]:
    """Give rows that were routed as llama.cpp does it, in float32; with rules every third row is intervened on."""
    layout = make_layout(n_expert=16, k=4, channels=("experts", "weights", "logits", "scores"))
    rng = np.random.default_rng(seed)
    records = random_records(layout, n, rng)
    logits = rng.normal(0, 3, (n, 3, 16)).astype(np.float32)
    if gate == "softmax":
        raised = np.exp(logits - logits.max(axis=2, keepdims=True))
        scores = raised / raised.sum(axis=2, keepdims=True)
    elif gate == "sqrt-softplus":
        scores = np.sqrt(np.log(1 + np.exp(logits)))
    else:
        scores = 1 / (1 + np.exp(-logits)) if gate == "sigmoid" else logits.copy()
    if bias:
        scores = scores + rng.normal(0, 0.3, (3, 16)).astype(np.float32)
    intervened = np.arange(n) % 3 == 1 if rules else np.zeros(n, bool)
    for rule in map(Intervention.parse, rules):
        rows = np.flatnonzero(intervened & ((rule.slot is None) | (records["sequence"] == rule.slot)))
        for layer in range(3):
            if not rule.layers or any(a <= layer <= b for a, b in rule.layers):
                if rule.kind is Kind.BIAS:
                    scores[np.ix_(rows, [layer], rule.experts)] += np.float32(rule.value)
                else:
                    value = -np.inf if rule.kind is Kind.ABLATE else np.float32(2.0**100)
                    scores[np.ix_(rows, [layer], rule.experts)] = value
    if groups:  # the better half of four groups of four
        best = np.sort(scores.reshape(n, 3, 4, 4), axis=3)[..., -2:].sum(axis=3)
        out = np.argsort(best, axis=2)[..., :2]
        mask = np.zeros((n, 3, 4), bool)
        np.put_along_axis(mask, out, True, axis=2)
        scores[np.repeat(mask, 4, axis=2)] = -np.inf
    records["logits"], records["scores"] = logits, scores
    records["experts"] = np.argsort(-scores, axis=2, kind="stable")[..., :4]
    records["flags"][intervened] |= np.uint32(RowFlag.INTERVENED)
    return layout, records


def found(path: Path, layout: Layout, records: np.ndarray, rules: Sequence[str] = ()) -> list[str]:
    write_trace(path, [Context(layout, records)])
    if rules:
        interventions = [Intervention.parse(rule) for rule in rules]
        store(path, interventions, encode([r for i in interventions for r in rules_of(i)]))
    return [f"{finding.where}: {finding.what}" for finding in verify(path).findings]


GATES = [
    {"gate": "softmax"},
    {"gate": "sigmoid"},
    {"gate": "identity"},
    {"gate": "sqrt-softplus"},
    {"gate": "sigmoid", "bias": True},
    {"gate": "softmax", "bias": True},
    {"gate": "sigmoid", "bias": True, "groups": True},
]


@pytest.mark.parametrize("form", GATES, ids=str)
def test_every_way_to_choose_is_known(tmp_path: Path, form: dict[str, Any]) -> None:
    assert found(tmp_path / "t", *routed(**form)) == []


@pytest.mark.parametrize("form", GATES, ids=str)
@pytest.mark.parametrize("row", [0, 1, 123, 299])
def test_one_wrong_id_is_found(tmp_path: Path, form: dict[str, Any], row: int) -> None:
    """GIVEN a trace in which one token's last expert is the next best one WHEN verified THEN its row is named."""
    layout, records = routed(**form)
    fifth = np.argsort(-records["scores"][row, 1], kind="stable")[4]
    records["experts"][row, 1, 3] = fifth
    (one,) = found(tmp_path / "t", layout, records)
    assert one.startswith("ctx0/rows/experts: layer 1: they are not those with the highest scores")
    assert f"(first in row {row})" in one


@pytest.mark.parametrize("form", GATES, ids=str)
@pytest.mark.parametrize("row", [0, 1, 123, 299])
def test_logits_of_another_row_are_found(tmp_path: Path, form: dict[str, Any], row: int) -> None:
    layout, records = routed(**form)
    records["logits"][row, 2] = records["logits"][row - 1, 2]
    (one,) = found(tmp_path / "t", layout, records)
    assert one.startswith("ctx0/rows/scores: layer 2: they do not follow from the logits")
    assert f"(first in row {row})" in one


def test_experts_in_the_wrong_order_are_found(tmp_path: Path) -> None:
    layout, records = routed()
    records["experts"][7, 0] = records["experts"][7, 0, ::-1]
    (one,) = found(tmp_path / "t", layout, records)
    assert "layer 0" in one
    assert "row 7" in one


def test_experts_of_equal_scores_stand_in_any_order(tmp_path: Path) -> None:
    layout, records = routed("identity")
    ids = records["experts"][5, 0].astype(int)
    records["logits"][5, 0, ids[1:3]] = records["scores"][5, 0, ids[1:3]] = records["scores"][5, 0, ids[1]]
    records["experts"][5, 0, 1:3] = ids[2], ids[1]
    assert found(tmp_path / "t", layout, records) == []


def test_logits_without_what_an_adapter_adds_are_found(tmp_path: Path) -> None:
    for i, form in enumerate(GATES):
        layout, records = routed(**form)
        rng = np.random.default_rng(1)
        delta = rng.normal(0, 0.3, (300, 1)) * rng.normal(0, 0.3, (1, 16))
        records["logits"][:, 1] -= delta.astype(np.float32)
        (one,) = found(tmp_path / str(i), layout, records)
        assert "layer 1" in one


def test_a_gate_that_is_not_known_is_said(tmp_path: Path) -> None:
    layout, records = routed()
    records["scores"] = np.tanh(records["logits"])
    records["experts"] = np.argsort(-records["scores"], axis=2)[..., :4]
    assert len(found(tmp_path / "t", layout, records)) == 3


def test_a_layer_without_scores_and_a_model_that_broke_say_nothing(tmp_path: Path) -> None:
    layout, records = routed()
    records["scores"][:, 0] = np.nan
    records["logits"][:, 1] = np.nan
    records["scores"][9, 2], records["logits"][9, 2] = np.nan, np.nan
    records["logits"][:, 2, 3] = -np.inf  # a router's bias that excludes an expert
    records["scores"][:, 2, 3] = np.where(np.arange(300) == 9, np.nan, 0)
    scores = np.nan_to_num(records["scores"][:, 2], nan=0)
    records["experts"][:, 2] = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    assert found(tmp_path / "t", layout, records) == []


RULES = ["ablate:1:3,12", "force:*:5", "bias:0-1:2,7=+1.5"]


@pytest.mark.parametrize("form", GATES[:6], ids=str)
def test_interventions_excuse_what_they_change_and_no_more(tmp_path: Path, form: dict[str, Any]) -> None:
    layout, records = routed(**form, rules=RULES)
    assert found(tmp_path / "fine", layout, records, RULES) == []
    assert found(tmp_path / "unknown", layout, records) == []  # which rules is not known
    for number, (row, expert) in enumerate([(4, 9), (4, 0), (3, 2)]):
        wrong = records.copy()  # not named by a rule, twice; named, in a row that was not intervened on
        wrong["logits"][row, 0, expert] += 2
        (one,) = found(tmp_path / str(number), layout, wrong, RULES)
        assert f"(first in row {row})" in one
    wrong = records.copy()  # the choice follows from the scores in every row
    wrong["experts"][4, 0, 3] = np.argsort(-records["scores"][4, 0])[4]
    (one,) = found(tmp_path / "id", layout, wrong, RULES)
    assert "highest scores" in one


def test_a_damaged_intervention_is_said(tmp_path: Path) -> None:
    layout, records = routed(rules=RULES)
    found(tmp_path / "t", layout, records, RULES)
    flip(tmp_path / "t" / "interventions" / "1.bin", 8 * 50)
    (finding,) = verify(tmp_path / "t").findings
    assert (finding.where, finding.recoverable) == ("interventions", False)
    (tmp_path / "t" / "interventions" / "1.bin").unlink()
    assert len(verify(tmp_path / "t").findings) == 1


def test_what_an_intervention_is_said_to_be_is_checked(tmp_path: Path) -> None:
    """GIVEN text of an intervention that was edited, or is gone THEN verify says so: rows' flags hang on it."""
    layout = make_layout()
    records = np.concatenate(
        [server_records(layout, np.random.default_rng(3)), event(layout, 30, EventCode.INTERVENE, -1, arg=1)]
    )
    path = write_trace(tmp_path / "t", [Context(layout, records)])
    (finding,) = verify(path).findings
    assert "intervention 1 was in force in ctx0" in finding.what
    interventions = [Intervention.parse("ablate:1:3")]
    assert store(path, interventions, encode([r for i in interventions for r in rules_of(i)])) == 1
    assert verify(path).findings == ()
    text = path / "interventions" / "1.json"
    text.write_text(text.read_text(encoding="ascii").replace("ablate:1:3", "ablate:1:4"), encoding="ascii")
    (finding,) = verify(path).findings
    assert "checksum" in finding.what


def test_damage_of_one_part_says_nothing_of_others(tmp_path: Path) -> None:
    """GIVEN a context that cannot be opened THEN the other's requests, and all tables that are sound, are fine."""
    path = tmp_path / "t"
    shutil.copytree(GOLDEN / "two-contexts", path)
    (path / "ctx0" / "context.json").write_text("{", encoding="ascii")
    assert {finding.where for finding in verify(path).findings} == {"ctx0"}
    shutil.rmtree(path)
    shutil.copytree(GOLDEN / "two-contexts", path)
    (path / "requests" / "blocks.npy").write_bytes(b"")
    assert {finding.where for finding in verify(path).findings} == {"requests"}


def test_labels_that_cannot_be_read_are_damage(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "t")
    (path / "labels.jsonl").unlink(missing_ok=True)
    (path / "labels.jsonl").mkdir()
    (finding,) = verify(path).findings
    assert finding.where == "labels.jsonl"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_hostile_intervention_is_an_error(data: st.DataObject) -> None:
    """Whatever the bytes say, with a checksum that fits: rules, or the error that verify tells."""
    body = bytearray(encode([r for text in RULES for r in rules_of(Intervention.parse(text))])[32:])
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    n_rules = data.draw(st.sampled_from([0, 3, 4, 1 << 31]))
    head = struct.pack("<8sIIQII", b"MOETINTV", 1, n_rules, 32 + len(body), zlib.crc32(bytes(body)), 0)
    with contextlib.suppress(TraceError):
        assert len(decode(head + bytes(body))) == n_rules


def test_rules_are_read_back_as_they_were_written() -> None:
    rules = [r for text in RULES for r in rules_of(Intervention.parse(text))]
    rules.append(Rule(Kind.REPLAY, np.arange(12, dtype=np.uint16).reshape(3, 4), 2, 1, 1, 0.0, 7))
    back = decode(encode(rules))
    for old, new in zip(rules, back, strict=True):
        assert (old.ids == new.ids).all()
        assert dataclasses.replace(old, ids=new.ids) == new


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_trace(tmp_path / "t.moet")
    assert main(["verify", "--json", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["exit_code"], told["findings"], told["live"]) == (0, [], False)
    assert told["rows"] == len(moetrace.open(path))
    (path / "ctx0" / "rows" / "token.npy").write_bytes(b"nothing")
    assert main(["verify", "--json", str(path)]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["findings"][0].keys() == {"where", "what", "recoverable"}
