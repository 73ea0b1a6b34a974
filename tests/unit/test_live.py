"""A recording watched while it goes on: counts, metrics, HTTP, lines for a terminal."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traces
from numpy.typing import NDArray
from rings import context_of, make_layout

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.demo import unpack
from moetrace.commands.serve import address
from moetrace.errors import MoetraceError, UsageError
from moetrace.host.record import new_rows
from moetrace.live.screen import lines
from moetrace.live.tail import BUCKET_S, Tail, Tails, served_by_hottest
from moetrace.trace.columns import TableWriter
from moetrace.trace.record import RowFlag
from moetrace.trace.routed import routed_experts
from moetrace.trace.store import TraceStore

pytest.importorskip("uvicorn")
parser = pytest.importorskip("prometheus_client.openmetrics.parser")
service = pytest.importorskip("moetrace.live.service")
from serving import Served  # noqa: E402 what it needs may not be there


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(data.recorded_demo(), tmp_path_factory.mktemp("live"))


def test_counts_are_those_of_the_trace(recorded: Path) -> None:
    with moetrace.open(recorded) as trace:
        now = Tail(recorded).look()
        real = (trace.flags & RowFlag.TRIAL) == 0  # llama.cpp's own warm-up is nobody's token
        for i, n in enumerate(trace.n_expert.tolist()):
            ids = trace.experts[real, i]
            expected = np.bincount(ids[ids != trace.sentinel], minlength=n)
            np.testing.assert_array_equal(now.counts[i], expected)
        assert sum(now.tokens.values()) == real.sum()
        state = trace.state[real]
        assert now.entries == {"lost": 0, "present": (state == 1).sum(), "not_computed": (state == 2).sum()}
        assert now.cached == trace.loss.cached
        assert sum(now.by_domain.values()) == sum(trace.requests["n_prefill"] + trace.requests["n_decode"])
    assert not now.live
    # what was there before anybody looked came in no known second
    assert now.recent.sum() == now.hour.sum() == 0
    assert now.per_second == {}


def test_what_is_new_is_counted_once_and_when(tmp_path: Path) -> None:
    """A trace that grows between looks; seconds by a clock of our own."""
    now = [0.0]
    layout = make_layout()
    context = traces.Context(layout, traces.server_records(layout, np.random.default_rng(3)))
    path = traces.write_trace(tmp_path / "t.moet", [context], close=False, sealed=20)
    tail = Tail(path, clock=lambda: now[0])
    first = tail.look()
    assert first.live
    assert first.hour.sum() == 0
    now[0] = 5.0
    more = {name: np.asarray(column[-3:]) for name, column in tail.trace.store_context.rows.items()}
    with TableWriter.resume(path / "ctx0" / "rows") as writer:
        writer.append(more)
        writer.seal()
    second = tail.look()
    new = second.counts.sum() - first.counts.sum()
    assert new > 0
    assert second.recent.sum() == second.hour.sum() == new
    assert sum(second.tokens.values()) - sum(first.tokens.values()) == 3
    assert sum(second.per_second.values()) == pytest.approx(3 / 5)
    for _ in range(3):
        now[0] += BUCKET_S
        later = tail.look()
    assert later.recent.sum() == 0
    assert later.hour.sum() == new
    for _ in range(12):  # older buckets become one
        now[0] += BUCKET_S
        later = tail.look()
    assert later.hour.sum() == new
    now[0] = 4000.0
    assert tail.look().hour.sum() == 0
    np.testing.assert_array_equal(tail.look().counts, second.counts)
    # nobody looked for long: what came then is counted, and of no known second
    with TableWriter.resume(path / "ctx0" / "rows") as writer:
        writer.append(more)
        writer.seal()
    now[0] += 5 * BUCKET_S
    last = tail.look()
    assert last.counts.sum() > second.counts.sum()
    assert last.recent.sum() == last.hour.sum() == 0
    assert last.per_second == {}


def test_tables_of_all_requests_are_made_as_seldom_as_they_are_slow(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10,000 labelled requests each look took half a second, twice a second."""
    now, taken = [0.0], []
    tail = Tail(recorded, clock=lambda: now[0])

    def slowly(trace: Any, until: Any) -> Any:
        taken.append(now[0])
        time.sleep(0.4)
        return {"code": len(taken)}, 0

    monkeypatch.setattr("moetrace.live.tail._of_requests", slowly)
    seen = []
    for _ in range(60):
        seen.append(tail.look().by_domain["code"])
        now[0] += 1.0
    assert 2 <= len(taken) <= 3  # 0.4 s are 2 % of 20 s
    assert taken[1] - taken[0] >= 20
    assert seen == sorted(seen)


def test_memory_of_an_hour_is_that_of_a_bucket_a_minute(recorded: Path) -> None:
    now = [0.0]
    tail = Tail(recorded, clock=lambda: now[0], replay=1e-9)
    for _ in range(3 * 3600):
        now[0] += 1.0
        tail._begin(now[0], (2, 3), keep=2)
        tail._buckets[-1].counts += np.uint32(1)
    assert len(tail._old) <= 61
    seen = sum(int(bucket.counts[0, 0]) for bucket in (*tail._old, *tail._buckets))
    assert 3600 <= seen <= 3700


def test_a_recording_is_replayed_as_it_went(recorded: Path) -> None:
    now = [100.0]
    whole = Tail(recorded).look()
    tail = Tail(recorded, clock=lambda: now[0], replay=2.0)
    with moetrace.open(recorded) as trace:
        times, real = np.asarray(trace.time_ns), (trace.flags & RowFlag.TRIAL) == 0
        seconds = (times[-1] - times[0]) / 1e9
        ends = trace.requests["end_ns"]
    first = tail.look()
    assert first.live
    assert sum(first.tokens.values()) <= 2
    for part in (0.25, 0.5, 0.75):
        now[0] = 100 + part * seconds / 2
        seen = tail.look()
        until = times[0] + int(part * seconds * 1e9)
        assert sum(seen.tokens.values()) == pytest.approx((real & (times <= until)).sum(), abs=2)
        assert len(seen.by_domain) == 0 or sum(seen.by_domain.values()) <= sum(seen.tokens.values())
        assert bool(seen.by_domain) == bool((ends <= until).any())
        assert {context.state for context in seen.contexts} == {"replayed"}
    now[0] = 101 + seconds
    last = tail.look()
    assert not last.live
    np.testing.assert_array_equal(last.counts, whole.counts)
    assert last.by_domain == whole.by_domain
    assert last.hour.sum() == whole.counts.sum()  # unlike what nobody watched


def test_a_factor_is_a_factor(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["live", str(recorded), "--replay", "1000x", "--every", "0.01"]) == 0
    assert "6,076 tokens recorded" in capsys.readouterr().out
    for wrong in (["--replay", "x"], ["--replay", "-1x"], ["--replay", "2x", "--once"]):
        assert main(["live", str(recorded), *wrong]) == 2
    layout = make_layout()
    context = traces.Context(layout, traces.server_records(layout, np.random.default_rng(3)))
    growing = traces.write_trace(tmp_path / "t.moet", [context], close=False, sealed=20)
    assert main(["live", str(growing), "--replay", "1x"]) == 2
    assert "is being recorded" in capsys.readouterr().err


def test_rows_are_followed_as_they_come(tmp_path: Path) -> None:
    layout = make_layout()
    context = traces.Context(layout, traces.server_records(layout, np.random.default_rng(3)))
    path = traces.write_trace(tmp_path / "t.moet", [context], close=False, sealed=20)

    def more() -> None:
        with moetrace.open(path) as now:
            last = {name: np.asarray(column[-3:]) for name, column in now.store_context.rows.items()}
        with TableWriter.resume(path / "ctx0" / "rows") as writer:
            writer.append(last)
            writer.seal()

    with moetrace.open(path) as trace:
        rows = trace.follow(every=0.01)
        first = next(rows)
        n_first = len(trace)
        assert len(first) == n_first > 10
        kept = first.experts.copy()
        more()
        second = next(rows)
        assert len(second) == 3
        np.testing.assert_array_equal(first.experts, kept)
        with new_rows(trace) as found:
            more()
        assert [len(each) for each in found] == [3]
        with new_rows(trace) as nothing:
            pass
        assert nothing == []
        TraceStore(path).close_as("closed", exit_code=0)
        assert [len(each) for each in rows] == [3]
    with moetrace.open(path) as ended:
        assert [len(each) for each in ended.follow()] == [n_first + 6]
        with pytest.raises(UsageError, match="has ended"), new_rows(ended):
            pass


# -- the routed experts of a request


def test_routed_experts_are_the_rows_by_position(recorded: Path) -> None:
    with moetrace.open(recorded) as trace:
        for number in trace.requests.index[:8].tolist():
            found = routed_experts(trace, number)
            rows = trace.sel(request=number)
            expected = np.full(found.experts.shape, -1)
            for position, ids in zip(rows.positions.tolist(), rows.experts, strict=True):
                expected[position] = np.where(ids == trace.sentinel, -1, ids.astype(int))
            cached = int(trace.requests.loc[number, "n_cached"])
            np.testing.assert_array_equal(found.experts[cached:], expected[cached:])
            assert found.from_cache + found.cached == cached
            said = trace.requests.loc[number]
            assert len(found.experts) == said["n_prompt"] + said["n_generated"] - 1
            assert found.complete == (found.cached == 0)
            assert (found.experts < 0).any(axis=2).sum() == found.not_computed + found.cached * len(
                found.layers
            )
            told = found.to_json()
            raw = np.frombuffer(base64.b64decode(told["routed_experts"]), "<i4")
            np.testing.assert_array_equal(raw.reshape(told["shape"]), found.experts)
        with pytest.raises(UsageError, match="there is no request 999"):
            routed_experts(trace, 999)


def test_routed_experts_as_files(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An array or a line for each request; arrays are read back as recordings of vLLM's are."""
    line = ["export", str(recorded), "--format", "routed-experts", "-o"]
    assert main([*line, str(tmp_path / "r.npz")]) == 0
    assert main([*line, str(tmp_path / "r.jsonl")]) == 0
    assert main([*line, str(tmp_path / "x.npz"), "--phase", "decode"]) == 2
    assert "holds whole requests" in capsys.readouterr().err
    told = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    with moetrace.open(recorded) as trace, np.load(tmp_path / "r.npz") as arrays:
        assert len(told) == len(arrays.files) == len(trace.requests)
        for number, name in zip(trace.requests.index.tolist(), trace.requests["id"], strict=True):
            expected = routed_experts(trace, number)
            np.testing.assert_array_equal(arrays[name], expected.experts)
            assert told[number]["id"] == name
            assert told[number]["complete"] == expected.complete
    with moetrace.open(tmp_path / "r.npz") as again:
        assert len(again.requests) == len(told)
        assert len(again.experts) == sum(one["shape"][0] for one in told)


def test_a_timeline_for_perfetto(recorded: Path, tmp_path: Path) -> None:
    """Every request is a slice of its slot, between its first and last row; slices of one slot do not overlap."""
    out = tmp_path / "t.json"
    assert main(["export", str(recorded), "--format", "timeline", "-o", str(out)]) == 0
    events = json.loads(out.read_text())["traceEvents"]
    with moetrace.open(recorded) as trace:
        slices = {e["args"]["request"]: e for e in events if e["ph"] == "X" and "request" in e["args"]}
        assert set(slices) == set(trace.requests.index)
        for number, said in trace.requests.iterrows():
            mine = slices[number]
            assert mine["name"] == said["id"]
            assert mine["tid"] == said["slot"]
            assert mine["dur"] == pytest.approx((said["end_ns"] - said["start_ns"]) / 1000, abs=0.002)
        tokens = sum(e["args"]["tokens"] for e in events if e["ph"] == "X" and "tokens" in e["args"])
        assert tokens == (trace.requests["n_prefill"] + trace.requests["n_decode"]).sum()
        real = (trace.flags & RowFlag.TRIAL) == 0
        assert sum(e["args"]["in a ubatch"] for e in events if e["ph"] == "C") == real.sum()
        assert len([e for e in events if e["ph"] == "i"]) == len(trace.events)
    for slot in {e["tid"] for e in slices.values()}:
        ordered = sorted((e for e in slices.values() if e["tid"] == slot), key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(ordered))
    assert min(e["ts"] for e in events if e["ph"] == "X") >= 0


# -- over HTTP


@pytest.fixture(scope="module")
def served(recorded: Path) -> Iterator[Served]:
    served = Served(recorded, experts=True, domains=True)
    yield served
    served.close()


def families(text: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    return {
        family.name: {tuple(v for _, v in sorted(s.labels.items())): s.value for s in family.samples}
        for family in parser.text_string_to_metric_families(text.decode())
    }


def test_metrics_are_what_a_real_parser_reads(served: Served, recorded: Path) -> None:
    status, body, headers = served.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert "openmetrics" in headers["content-type"]
    found = families(body)
    with moetrace.open(recorded) as trace:
        real = (trace.flags & RowFlag.TRIAL) == 0
        assert sum(found["moetrace_tokens"].values()) == real.sum()
        ids = trace.experts[real, 2]
        counts = np.bincount(ids[ids != trace.sentinel], minlength=int(trace.n_expert[2]))
        layer = str(trace.layers[2])
        assert [found["moetrace_expert_tokens"][str(e), layer] for e in range(len(counts))] == counts.tolist()
        even = counts.sum() ** 2 / (len(counts) * (counts**2).sum())
        assert found["moetrace_layer_jain"][(layer,)] == pytest.approx(even)
        assert found["moetrace_layer_unused_experts"][(layer,)] == (counts == 0).sum()
        assert set(found["moetrace_domain_tokens"]) == {(label,) for label in trace.requests["label"]}
        prompts = [str(text)[:20] for text in trace.requests["prompt"]]
    assert not any(prompt in body.decode() for prompt in prompts)
    # the old text format, too
    assert b"moetrace_tokens_total" in served.get("/metrics")[1]


def test_requests_and_their_experts(served: Served, recorded: Path) -> None:
    listed = json.loads(served.get("/requests")[1])
    with moetrace.open(recorded) as trace:
        assert len(listed) == len(trace.requests)
        assert listed[0]["request"] == trace.requests.index[-1]
        name = trace.requests["id"].iloc[3]
        expected = routed_experts(trace, int(trace.requests.index[3]))
    status, body, headers = served.get(f"/requests/{name}/experts?format=npy")
    assert (status, headers["x-moetrace-complete"]) == (200, "true")
    array: NDArray[np.int32] = np.load(io.BytesIO(body), allow_pickle=False)
    np.testing.assert_array_equal(array, expected.experts)
    assert json.loads(served.get(f"/requests/{name}/experts")[1]) == expected.to_json()
    begun = time.monotonic()
    late = json.loads(served.get(f"/requests/{name}/experts?tokens=100000&wait=1")[1])
    assert late["running"]
    assert not late["complete"]
    assert time.monotonic() - begun > 0.9
    assert served.get("/requests/nobody/experts")[0] == 404
    assert served.get("/requests/nobody/experts?tokens=x")[0] == 400
    assert json.loads(served.get(f"/requests?id={name}")[1])[0]["id"] == name


def test_a_requests_text_in_a_layer(served: Served, recorded: Path) -> None:
    with moetrace.open(recorded) as trace:
        number = int(trace.requests.index[3])
        name, layer = trace.requests.loc[number, "id"], int(trace.layers[2])
        rows = trace.sel(request=number, layer=layer)
        order = np.argsort(rows.positions, kind="stable")
        said = json.loads(served.get(f"/requests/{name}/text?layer={layer}")[1])
        assert said["positions"] == rows.positions[order].tolist()
        assert said["experts"] == rows.experts[order, 0].tolist()
        np.testing.assert_allclose(said["weights"], rows.weights[order, 0], atol=6e-5)
        assert "".join(said["pieces"]).startswith("<|bos|>" + trace.requests.loc[number, "prompt"])
        last = int(trace.layers[-1])
        lacking = json.loads(served.get(f"/requests/{number}/text?layer={last}")[1])
        absent = ~trace.sel(request=number, layer=last).present[order, 0]
        assert absent.any()
        assert [row == [-1] * len(row) for row in lacking["experts"]] == absent.tolist()
        assert [row == [None] * len(row) for row in lacking["weights"]] == absent.tolist()
        assert lacking["generated"] == (rows.phase[order] == 1).tolist()
    assert served.get("/requests/nobody/text")[0] == 404
    assert served.get(f"/requests/{name}/text?layer=99")[0] == 400


def test_the_page_takes_nothing_from_elsewhere(served: Served) -> None:
    for path in ("/", "/page.js", "/page.css", "/text.mjs"):
        status, body, headers = served.get(path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert b"http://" not in body.replace(b"http://www.w3.org", b"")
        assert b"innerHTML" not in body
    asked = urllib.request.urlopen(f"http://127.0.0.1:{served.port}/events", timeout=10)
    told = json.loads(asked.readline().decode().removeprefix("data: "))
    asked.close()
    assert told["live"] is False
    assert len(told["all"]) == len(told["layers"])


def test_who_may_ask(served: Served, recorded: Path) -> None:
    assert served.get("/metrics", Host="evil.example")[0] == 400  # a name that was made to lead here
    assert served.get("/interventions", {"specs": []})[0] == 403  # no token, no change
    kept = Served(recorded, token="s3cret")
    try:
        for path in (
            "/metrics",
            "/requests",
            "/requests/0/experts",
            "/requests/0/text",
            "/interventions",
            "/events",
        ):
            assert kept.get(path)[0] == 403, path
            assert kept.get(path, Authorization="Bearer wrong")[0] == 403, path
        assert kept.get("/metrics", Authorization="Bearer s3cret")[0] == 200
        assert kept.get("/")[0] == 200  # the page holds nothing of anybody
        status, body, _ = kept.get("/interventions", {"specs": "x"}, Authorization="Bearer s3cret")
        assert status == 400
        status, body, _ = kept.get("/interventions", {"specs": ["ablate:0:1"]}, Authorization="Bearer s3cret")
        assert status == 400  # of a recording that has ended
        assert b"error" in body
    finally:
        kept.close()


def test_tokens_and_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str], recorded: Path) -> None:
    (tmp_path / "t").write_text("abc\nmore\n")
    assert service.secret(str(tmp_path / "t"), lambda name: None) == "abc"
    assert service.secret(None, lambda name: "env" if name == "MOETRACE_TOKEN" else None) == "env"
    assert service.secret(None, lambda name: None) is None
    (tmp_path / "t").write_text("\n")
    with pytest.raises(MoetraceError, match="holds no token"):
        service.secret(str(tmp_path / "t"), lambda name: None)
    assert address("127.0.0.1:80") == ("127.0.0.1", 80)
    for wrong in ("9464", "localhost", "localhost:x", ":1", "h:0", "h:70000"):
        with pytest.raises(UsageError, match="is no address"):
            address(wrong)
    assert main(["serve", str(recorded), "--listen", "0.0.0.0:9464"]) == 2
    assert "give a token" in capsys.readouterr().err


# -- in a terminal


def test_lines_fit_and_say_what_is_there(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = Tail(recorded).look()
    for width, height in ((40, 12), (80, 24), (200, 60)):
        said = lines(now, "counts", width=width, height=height)
        assert len(said) <= height
        assert max(len(line) for line in said) <= width
    assert any("more layers" in line for line in lines(now, "counts", width=80, height=12))
    text = "\n".join(lines(now, "counts", width=100, height=60))
    assert f"{sum(now.tokens.values()):,} tokens recorded" in text
    assert "hottest: L" in text
    assert main(["live", str(recorded), "--once"]) == 0
    assert "layers by experts, all of it" in capsys.readouterr().out
    assert main(["live", str(recorded.parent / "nothing")]) != 0


def test_one_layer_lists_its_experts(recorded: Path) -> None:
    now = Tail(recorded).look()
    for width, height in ((60, 50), (100, 30), (30, 8)):
        said = lines(now, "counts", layer=6, width=width, height=height)
        assert len(said) <= height
        assert max(len(line) for line in said) <= width
        assert not any("layers by experts" in line for line in said)
    text = "\n".join(lines(now, "counts", layer=6, width=100, height=60))
    shares = {int(e): float(share) for e, share in re.findall(r"E(\d+) +([\d.]+)%", text)}
    with moetrace.open(recorded) as trace:
        real = (np.asarray(trace.column("flags")) & RowFlag.TRIAL) == 0
        uses = np.bincount(trace.masked()[real, 6].compressed(), minlength=32)
    np.testing.assert_allclose([shares[e] for e in range(32)], 100 * uses / uses.sum(), atol=0.051)


def test_a_labels_experts_are_counted_apart(recorded: Path) -> None:
    tail = Tail(recorded, label="code")
    counted = tail.look().of_label
    assert counted is not None
    with moetrace.open(recorded) as trace:
        mine = trace.sel(label="code").masked()
        for layer in range(8):
            expected = np.bincount(mine[:, layer].compressed(), minlength=32)
            np.testing.assert_array_equal(counted[layer], expected)
    said = lines(tail.look(), "counts", label="code", width=100, height=40)
    assert any("layers by experts, code, the latest" in line for line in said)
    tail.label = None
    assert tail.look().of_label is None


def test_what_a_hot_set_served() -> None:
    before = np.array([[9, 1, 0, 0, 0, 0, 0, 5], [0, 0, 0, 0, 0, 0, 0, 0]], np.uint64)
    now = np.array([[3, 7, 0, 0, 0, 0, 0, 1], [4, 4, 0, 0, 0, 0, 0, 0]], np.uint64)
    n_expert = np.array([8, 8])
    assert served_by_hottest(before, now, n_expert) == 4 / 11, (
        "of two of eight; a layer that was not seen says nothing"
    )
    assert served_by_hottest(before, now, n_expert, share=1.0) == 1.0
    assert np.isnan(served_by_hottest(before * 0, now, n_expert))
    assert np.isnan(served_by_hottest(before, now * 0, n_expert))


def test_requests_that_get_tokens_are_named(recorded: Path) -> None:
    """GIVEN a recording that is replayed THEN each slot shows the latest request that had rows."""
    clock = [0.0]
    tail = Tail(recorded, clock=lambda: clock[0], replay=1.0)
    tail.look()
    with moetrace.open(recorded) as trace:
        times = np.asarray(trace.time_ns)
        span = (times[-1] - times[0]) / 1e9
        tail.replay = span / 20  # twenty looks in all
        said = trace.requests["label"]
        seen: set[int] = set()
        for second in range(1, 21):
            clock[0] = float(second)
            now = tail.look()
            if now.active:
                assert f"slot {now.active[0].slot}: request" in "\n".join(lines(now, "recent", width=100))
            assert [one.slot for one in now.active] == sorted({one.slot for one in now.active})
            for one in now.active:
                assert said[one.request] in one.name
                assert one.slot in range(4)
                assert one.phase in ("prefill", "decode")
                seen.add(one.request)
        assert seen <= set(said.index)
        assert len(seen) > 10


def test_names_of_others_do_not_steer_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\r\n</script>\u202e"
    path = traces.labelled_trace(tmp_path / "t.moet", (hostile, "math"))
    said = lines(Tail(path).look(), "counts", width=200, height=40)
    assert any("</script>" in line for line in said)
    assert all(line.isprintable() for line in said)


def test_every_model_of_a_recording_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_layout()
    contexts = [
        traces.Context(
            layout,
            traces.server_records(layout, np.random.default_rng(i), n_requests=i + 1),
            facts={"alias": name, "model": {**context_of(layout)["model"], "name": name}},
        )
        for i, name in enumerate(("one", "two\x1b[2J", "one"))
    ]
    path = traces.write_trace(tmp_path / "t.moet", contexts)
    tails = Tails(path)
    seen = tails.look()
    assert list(seen) == ["one", "two\x1b[2J"]
    for name, now in seen.items():
        with moetrace.open(path, model=name) as trace:
            real = (trace.flags & RowFlag.TRIAL) == 0
            assert sum(now.tokens.values()) == real.sum()
    tails.close()
    assert main(["live", str(path), "--once"]) == 0
    said = capsys.readouterr().out
    assert "── one ──" in said
    assert "\x1b" not in said
    assert said.count("tokens recorded") == 2
    assert main(["live", str(path), "--once", "--model", "one"]) == 0
    assert capsys.readouterr().out.count("tokens recorded") == 1
    assert list(Tails(path, "one").look()) == [""]
    # the first of one model, and then another comes
    alone = traces.write_trace(tmp_path / "alone.moet", contexts[:1], close=False)
    now = [0.0]
    growing = Tails(alone, clock=lambda: now[0])
    assert list(growing.look()) == [""]


def test_the_dashboard_asks_for_metrics_that_there_are(served: Served) -> None:
    names = set()
    for family in parser.text_string_to_metric_families(
        served.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")[1].decode()
    ):
        names |= {family.name, f"{family.name}_total"}
    folder = Path(__file__).resolve().parents[2] / "examples" / "grafana"
    asked = set()
    for file in folder.iterdir():
        asked |= set(re.findall(r"moetrace_\w+", file.read_text(encoding="utf-8")))
    assert len(asked) >= 10
    assert asked <= names
