"""Foreign recordings as traces: what the columns hold, what is marked missing, what is left behind."""

import gc
import json
from collections import Counter

import numpy as np
import pytest
from recordings import SHARED, WARMUP, olmoe_line, one_pass, real, token_file, write

import moetrace
from moetrace.__main__ import main
from moetrace.errors import ChannelMissingError, InputError, MoetraceError, UsageError
from moetrace.trace.importers import CountTable, detect
from moetrace.trace.importers import import_trace as import_only
from moetrace.trace.verify import verify


def import_trace(source, out, **options):
    """Import, and hold every trace that comes of it to what a trace promises."""
    done = import_only(source, out, **options)
    assert not verify(done.path).findings
    return done


@pytest.fixture
def domains(tmp_path):
    source = tmp_path / "source"
    for domain in ("code", "math"):
        token_file(source, domain, 0, WARMUP, one_pass([[5, 18, 9, 31], [1, 2, 3, 4]], phase="PROMPT"))
        token_file(source, domain, 1, one_pass([[4, 3, 2, 1], [7, 6, 5, 0]]))
        token_file(source, domain, 4, one_pass([[1, 3, 2, 4]]))
    return source


def test_token_json(domains, tmp_path):
    done = import_trace(domains, tmp_path / "t.moet", n_expert=32)
    assert (done.format, done.rows, done.requests) == ("token-json", 6, 2)
    assert done.missing == ("weights", "token", "position")
    with moetrace.open(tmp_path / "t.moet") as trace:
        assert trace.requests["label"].tolist() == ["code", "math"]
        assert trace.requests[["n_prefill", "n_decode", "n_lost"]].values.tolist() == [[1, 2, 2]] * 2
        assert trace.experts[:, 0].tolist() == [[5, 18, 9, 31], [4, 3, 2, 1], [1, 3, 2, 4]] * 2
        assert trace.experts[2, 1].tolist() == [255] * 4  # layer 1 is not in that file
        assert trace.state[:3].tolist() == [[1, 1], [1, 1], [1, 0]]
        assert trace.serial.tolist() == [0, 1, 4, 5, 6, 9]
        assert (trace.token_ids == -1).all()
        assert (trace.positions == -1).all()
        assert (trace.n_expert == 32).all()
        with pytest.raises(ChannelMissingError):
            _ = trace.weights
        loss = trace.loss
        assert (loss.rows_produced, loss.rows, loss.rows_lost) == (10, 6, 4)
        assert (loss.present, loss.lost) == (10, 10)
        assert trace.facts["counters"]["rows_warmup"] == 2
        assert trace.meta["import"]["rows_all_experts"] == 2
        assert trace.meta["import"]["missing"] == ["weights", "token", "position"]


def test_activations_as_published_are_the_notebooks(domains, tmp_path):
    """The notebook's own loop, on the same files, against activations() of the import."""
    expected = []
    for domain in ("code", "math"):
        for number in range(100):
            path = domains / domain / "traces" / f"token-{number:05d}.json"
            if not path.exists():
                continue
            for entry in json.loads(path.read_text())["entries"]:
                if entry["operation_type"] != "MUL_MAT_ID" or not entry["expert_ids"]:
                    continue
                name = entry["dst_name"]
                component = next(
                    c for c in ("ffn_down", "ffn_gate", "ffn_up") if c.replace("_", "_moe_") in name
                )
                expected += [
                    (domain, entry["layer_id"], component, expert, rank)
                    for rank, expert in enumerate(entry["expert_ids"][:4])
                ]
    import_trace(domains, tmp_path / "t.moet", as_published=True)
    frame = moetrace.open(tmp_path / "t.moet").activations(components=True)
    got = frame[["domain", "layer_id", "component", "expert_id", "position"]]
    assert sorted(got.itertuples(index=False, name=None)) == sorted(expected)
    assert len(expected) > 60


def test_one_prompt_per_domain_has_the_notebooks_shape(domains, tmp_path):
    """The warm-up is one row more per domain: 101 for '100 tokens'."""
    import_trace(domains, tmp_path / "sound.moet")
    import_trace(domains, tmp_path / "published.moet", as_published=True)
    sound, published = (len(moetrace.open(tmp_path / f"{n}.moet")) for n in ("sound", "published"))
    assert published == sound + 2


def test_expert_log(tmp_path):
    path = write(
        tmp_path / "story.log", "layer_id,expert_ids", "3,52 300", "3,32 115", "4,1 2", "3,9 8", "4,7 6"
    )
    done = import_trace(path, tmp_path / "t.moet", label="creative")
    assert done.missing == ("weights", "token", "position", "phase", "time", "n_expert")
    assert done.tally.records_unplaced == 1
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.layers.tolist() == [3, 4]
    assert trace.experts.dtype == np.uint16
    assert trace.experts[:, 0].tolist() == [[52, 300], [32, 115], [9, 8]]
    assert trace.experts[0, 1].tolist() == [65535] * 2
    assert trace.step.tolist() == [0, 0, 1]
    assert trace.row.tolist() == [0, 1, 0]
    assert (trace.phase == 2).all()
    assert (trace.time_ns == -1).all()
    assert trace.n_expert.tolist() == [301, 301]
    assert trace.requests["label"].tolist() == ["creative"]


def test_gate_log(tmp_path):
    path = write(
        tmp_path / "g.log",
        "gate_input,20,0,1 2 3",
        "gate_input,20,1,4 5 6",
        "gate_input,21,0,7 8 9",
        "gate_input,21,1,0 0 0.5",
    )
    import_trace(path, tmp_path / "t.moet")
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.gate_input.tolist() == [[[1, 2, 3], [7, 8, 9]], [[4, 5, 6], [0, 0, 0.5]]]
    assert trace.channels == ["gate_input"]
    assert trace.n_expert.tolist() == [0, 0]  # unknown
    with pytest.raises(ChannelMissingError):
        _ = trace.experts


def test_olmoe(tmp_path):
    experts = [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[5, 6], [0, 1]]]
    path = write(tmp_path / "github.jsonl", olmoe_line(experts), olmoe_line(experts[:2]))
    done = import_trace(path, tmp_path / "t.moet", n_expert=64)
    assert done.missing == ("weights", "time")
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.experts[:3].tolist() == experts
    assert trace.token_ids.tolist() == trace.positions.tolist() == [0, 1, 2, 0, 1]
    assert trace.tensor("predicted_token")[:, 0].tolist() == [1, 2, 3, 1, 2]
    assert trace.request.tolist() == [0, 0, 0, 1, 1]
    assert trace.requests["id"].tolist() == ["github-000001", "github-000002"]


def test_many_rows_are_sealed_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("moetrace.trace.importers.writer.BLOCK_BYTES", 1000)
    path = write(tmp_path / "x.log", *(f"{layer},{i % 7} 9" for i in range(300) for layer in (0, 1)))
    seen = []
    import_trace(path, tmp_path / "t.moet", progress=seen.append)
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.experts[:, 1, 0].tolist() == [i % 7 for i in range(300)]
    assert len(trace.store_context.rows.ledger) > 10
    assert seen[-1] == 300
    assert not list(trace.store_context.rows.verify())


@real
def test_real_file_is_refused_unless_as_published(tmp_path):
    path = SHARED / "data" / "tensor_trace_token-00000.json"
    copy = write(tmp_path / "traces" / "token-00000.json", path.read_text())
    with pytest.raises(InputError, match="holds no routing") as error:
        import_trace(copy, tmp_path / "t.moet")
    assert "all 2 rows are of passes that ran every expert" in error.value.why
    assert not (tmp_path / "t.moet").exists()
    import_trace(copy, tmp_path / "t.moet", as_published=True)
    trace = moetrace.open(tmp_path / "t.moet")
    assert trace.experts.shape == (2, 24, 4)
    assert trace.experts[0, 0].tolist() == [9, 5, 24, 3]
    assert trace.n_expert.tolist() == [32] * 24
    assert trace.requests["label"].tolist() == [tmp_path.name]


# -- what is refused -------------------------------------------------------------------------------------


def test_malformed_source_leaves_no_trace(tmp_path):
    path = write(tmp_path / "x.log", "0,1 2", "0,3 4", "1,1 2", "2,1 2", "2,3 4")
    with pytest.raises(InputError, match=r"x\.log:3: layer_id"):
        import_trace(path, tmp_path / "t.moet")
    assert not (tmp_path / "t.moet").exists()


def test_existing_folder_is_kept(tmp_path, domains):
    out = tmp_path / "t.moet"
    import_trace(domains, out)
    before = sorted(p.name for p in out.rglob("*"))
    with pytest.raises(MoetraceError):
        import_trace(domains, out)
    assert sorted(p.name for p in out.rglob("*")) == before
    assert len(moetrace.open(out)) == 6


def test_too_few_experts(tmp_path, domains):
    with pytest.raises(InputError, match="expert_ids: 31 is no expert of 16"):
        import_trace(domains, tmp_path / "t.moet", n_expert=16)


def test_count_table_is_no_trace(tmp_path):
    path = write(tmp_path / "c.csv", "domain,layer_id,expert_id,count", "a,1,0,3", "b,1,1,2")
    with pytest.raises(UsageError, match="has no tokens and cannot become a trace"):
        import_trace(path, tmp_path / "t.moet")
    table = moetrace.open(path)
    assert isinstance(table, CountTable)
    assert table.counts.tolist() == [[[3, 0]], [[0, 2]]]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.log", "layer_id,expert_ids\n0,1 2\n", "expert-log"),
        ("b.log", "3,52 40\n", "expert-log"),
        ("c.log", "gate_input,3,0,1 2\n", "gate-log"),
        ("d.jsonl", '{"input_ids": [1], "exp_ids": [[[1]]]}\n', "olmoe"),
        ("e.csv", "count,domain,expert_id,layer_id\n", "counts"),
        ("token-00003.json", "{}\n", "token-json"),
    ],
)
def test_detect(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    assert detect(tmp_path / name) == kind


def test_detect_refuses(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        detect(tmp_path / "none")
    for name, text in (("a.txt", "hello\n"), ("b.json", "{}\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="neither a trace nor a recording"):
            detect(tmp_path / name)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        detect(tmp_path / "empty")
    with pytest.raises(InputError, match="neither"):
        moetrace.open(tmp_path / "a.txt")


# -- reading directly ------------------------------------------------------------------------------------


def test_open_reads_a_recording_and_tidies_up(domains):
    trace = moetrace.open(domains)
    folder = trace.path.parent
    experts = trace.experts
    assert folder.exists()
    del trace
    gc.collect()
    assert not folder.exists()
    assert experts[0, 0].tolist() == [5, 18, 9, 31]  # views held stay good


def test_open_of_a_malformed_recording_tidies_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write(tmp_path / "x.log", "0,1 2", "0,1 x")
    with pytest.raises(InputError, match=r"x\.log:2: expert_ids"):
        moetrace.open(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.log"]


@pytest.mark.slow
def test_stats_as_published_counts_what_the_notebook_counts(domains, tmp_path, capsys):
    """All phases, the warm-up's rows cut to k, and tokens numbered by files, of the recording as it is."""
    assert (
        main(["stats", str(domains), "--as-published", "--format", "json", "-o", str(tmp_path / "out")]) == 0
    )
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert all(name.startswith("as_published_") for one in found.values() for name in one["tables"])
    overview = found["overview"]["tables"]
    facts = dict(overview["as_published_overview"]["data"])
    # 2 domains x 3 components x (2 layers x 3 passes + 1 layer) x 4
    assert facts["activations"] == 2 * 3 * 7 * 4
    assert facts["tokens per domain"] == 3
    percent = found["expert-frequency"]["tables"]["as_published_percent"]
    rows = [dict(zip(percent["columns"], row, strict=True)) for row in percent["data"]]
    first = {
        row["expert_id"]: row["percent"] for row in rows if row["layer_id"] == 0 and row["domain"] == "code"
    }
    assert first == {
        e: 100 * n / 16 for e, n in Counter([15, 14, 13, 12, 5, 18, 9, 31, 4, 3, 2, 1, 1, 3, 2, 4]).items()
    }
    assert (tmp_path / "out" / "overview.json").exists()
    assert main(["stats", str(domains), "--format", "json", "--only", "overview"]) == 0
    (plain,) = json.loads(capsys.readouterr().out)
    assert dict(plain["tables"]["as_published_overview"]["data"])["activations"] < facts["activations"]
    import_trace(domains, tmp_path / "kept.moet", as_published=True)
    assert (
        main(["stats", str(tmp_path / "kept.moet"), "--format", "json", "--only", "overview", "--no-keep"])
        == 0
    )
    (generated,) = json.loads(capsys.readouterr().out)
    assert (
        dict(generated["tables"]["as_published_overview"]["data"])["tokens per domain"] == 2
    )  # the first is a prompt's
