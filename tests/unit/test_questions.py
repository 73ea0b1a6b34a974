"""The questions of domain, layer and time: what they say of traces whose truth is known, and of poor ones."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import notebook
import numpy as np
import pandas as pd
import pytest
import traces
from recordings import WARMUP, olmoe_line, one_pass, token_file, write
from rings import make_layout
from routing import shared_data

import moetrace
from moetrace.__main__ import main
from moetrace.errors import InputError, UsageError
from moetrace.findings import QUESTIONS, Finding, Subject, question
from moetrace.report.text import render
from moetrace.trace.columns import Table

ALL = ("experts", "weights", "logits", "gate_input")
#: what can be asked of a recording alone
ASKED = tuple(name for name, asked in QUESTIONS.items() if not asked.needs_model and not asked.compares)
OF_DOMAINS = (
    "domain-separation", "matched-separation", "specialists", "deep-dive", "depth-contrast", "expert-frequency",
    "domain-entropy",
)  # fmt: skip
#: whose random draws go by the order in which prompts are stored
ORDERED = {"expert-circuits", "generation-dynamics", "task-prediction", "expert-cache"}
#: what a trace without attention and without a vocabulary cannot answer
LACKING = {"token-patterns", "attention-prediction", "context-attention-routing"}
QUICK: dict[str, Any] = {"permutations": 99, "resamples": 50, "max_tokens": 600}


def ask(name: str, subject: Subject, **given: Any) -> Finding:
    """Ask with few permutations, and hold the finding to what every finding must be."""
    asked = question(name)
    fields = set(asked.__dataclass_fields__)
    quick = {k: v for k, v in QUICK.items() if k in fields and name != "persistence"}
    finding = asked(**(quick | given)).ask(subject)
    text = render([finding], "table", max_rows=3)
    said = " ".join(finding.sentences + finding.caveats + ((finding.not_answered or ""),))
    assert not any(word in said.replace("(", " ").split() for word in ("nan", "inf", "nan%", "-0")), said
    assert finding.sentences or finding.not_answered
    assert text
    for table in finding.tables.values():
        numbers = table.select_dtypes("number").to_numpy(dtype=float, na_value=np.nan)
        assert not np.isinf(numbers).any(), finding.name
    again = Finding.from_json(finding.to_json())
    assert list(again.tables) == list(finding.tables)
    return finding


def make(path: Path, layout: Any = None, n_domains: int = 3, **world: Any) -> Path:
    return traces.labelled_trace(
        path, "abcde"[:n_domains], layout=layout or make_layout(channels=ALL), **world
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains that differ, six prompts each."""
    return make(tmp_path_factory.mktemp("planted") / "t.moet", n_prompts=6)


@pytest.mark.parametrize("name", ASKED)
def test_every_question_is_answered_of_a_whole_trace(name: str, planted: Path) -> None:
    with moetrace.open(planted) as trace:
        finding = ask(name, Subject([trace]))
    assert (finding.not_answered is None) == (name not in LACKING)
    assert bool(finding.tables) == (name not in LACKING)


# -- many traces are one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["halves", "odd and even"])
def test_stats_of_many_traces_equal_those_of_their_concatenation(split: str, tmp_path: Path) -> None:
    """To the last digit, for every table of every question; layers may have different numbers of experts."""
    layout = make_layout(layers=(1, 2, 5, 6), n_expert=(8, 8, 6, 8), channels=ALL)
    records, owner = traces.labelled_records(layout, np.random.default_rng(3), n_prompts=5)
    requests = np.arange(15)
    parts = [requests[:7], requests[7:]] if split == "halves" else [requests[::2], requests[1::2]]
    whole = traces.write_labelled(tmp_path / "whole.moet", layout, records, owner)
    paths = [
        traces.write_labelled(tmp_path / f"{i}.moet", layout, records, owner, part)
        for i, part in enumerate(parts)
    ]
    with moetrace.open(whole) as one, moetrace.open(paths[0]) as a, moetrace.open(paths[1]) as b:
        together, apart = Subject([one]), Subject([a, b])
        for name in ASKED if split == "halves" else set(ASKED) - ORDERED:
            left, right = ask(name, together), ask(name, apart)
            assert bool(left.not_answered) == bool(right.not_answered)
            # two recordings are two runs
            of_both = [sentence for sentence in left.sentences if not sentence.startswith("As it ran")]
            assert of_both == list(right.sentences)
            lacks = set(left.tables) - set(right.tables)
            assert lacks <= {"order_test", "run"}
            assert all(any(table in caveat for caveat in right.caveats) for table in lacks)
            for table, frame in left.tables.items():
                if table in lacks:
                    continue
                pd.testing.assert_frame_equal(
                    frame, right.tables[table], check_exact=True, obj=f"{name}/{table}"
                )


def test_traces_of_one_name_keep_their_prompts_apart(tmp_path: Path) -> None:
    """Requests without ids are named after their trace; two folders may have the same name."""
    layout = make_layout()
    records, owner = traces.labelled_records(layout, np.random.default_rng(0), n_prompts=2)
    paths = [traces.write_labelled(tmp_path / x / "t.moet", layout, records, owner) for x in "ab"]
    for path in paths:
        lines = [json.loads(line) for line in (path / "labels.jsonl").read_text().splitlines()]
        bare = [{k: v for k, v in line.items() if k != "id"} for line in lines]
        (path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    with moetrace.open(paths[0]) as a, moetrace.open(paths[1]) as b:
        assert Subject([a, b], names=["t", "t"], group_key="id").counts.prompts.size == 12
        assert Subject([a, b], names=["t", "t"]).counts.prompts.size == 6  # they are copies


# -- what they say ---------------------------------------------------------------------------------------


def test_planted_domains_are_found_and_said(planted: Path) -> None:
    with moetrace.open(planted) as trace:
        subject = Subject([trace])
        separation = ask("domain-separation", subject)
        special = ask("specialists", subject)
        matched = ask("matched-separation", subject)
    table = separation.tables["domain_test"]
    assert (table["q_value"] <= 0.05).all()
    assert (table["jsd_low"] > 0).all()
    assert separation.sentences[0].startswith("Domains differ in which experts they use in all 3 layers")
    assert "domain differ" in matched.sentences[0] or "domains differ in all" in matched.sentences[0]
    kinds = special.tables["specialists"]
    chosen = kinds[kinds["kind"] == "specialist"]
    assert len(chosen)
    assert (chosen["lift"] > 1).all()
    assert f"{len(chosen)} of 24 experts are specialists" in special.sentences[0]


def test_without_an_effect_nothing_is_claimed(tmp_path: Path) -> None:
    path = make(tmp_path / "t.moet", effect=0.0, n_prompts=6, seed=1)
    with moetrace.open(path) as trace:
        subject = Subject([trace])
        separation, special = ask("domain-separation", subject), ask("specialists", subject)
    assert separation.sentences[0].startswith("No layer shows that domains differ")
    assert special.sentences[0].startswith("0 of 24 experts are specialists")


def test_one_prompt_per_domain_gets_no_p_value(tmp_path: Path) -> None:
    path = make(tmp_path / "t.moet", n_prompts=1)
    with moetrace.open(path) as trace:
        subject = Subject([trace])
        findings = {name: ask(name, subject) for name in ASKED}
    sentence = "cannot be tested: domain and prompt are the same thing"
    for name in ("domain-separation", "specialists", "matched-separation", "domain-entropy"):
        assert sentence in findings[name].sentences[0], name
    assert "several prompts of each domain" in findings["depth-contrast"].sentences[0]
    for question_name in OF_DOMAINS:
        for name, table in findings[question_name].tables.items():
            if not name.startswith("as_published"):
                for column in table.columns.intersection(["p_value", "q_value", "p_family", "jsd_low"]):
                    assert table[column].isna().all(), (name, column)
    # the published test claims something of the very same rows
    assert findings["domain-separation"].tables["as_published_layers"]["p_value"].notna().all()


def test_layers_of_different_sizes_have_no_experts_that_are_not_there(tmp_path: Path) -> None:
    layout = make_layout(layers=(1, 2, 5), n_expert=(8, 4, 6), k=(2, 1, 2), channels=ALL)
    path = make(tmp_path / "t.moet", layout, n_prompts=4)
    with moetrace.open(path) as trace:
        subject = Subject([trace])
        found = {name: ask(name, subject) for name in ASKED}
    assert {name for name, finding in found.items() if finding.not_answered} == LACKING
    for name, table in (("expert-frequency", "usage"), ("specialists", "specialists")):
        assert found[name].tables[table].groupby("layer")["expert"].max().to_dict() == {1: 7, 2: 3, 5: 5}
    balance = found["load-balance"].tables["load_balance"].set_index("layer")
    assert balance.loc[2, "peak"] <= 4
    assert balance.loc[2, "unused"] == 0
    entropy = found["domain-entropy"].tables["domain_entropy"].set_index("layer")
    assert entropy.loc[2, "max_bits"].tolist() == [2.0] * 3
    assert set(found["deep-dive"].tables["deep_dive"]["layer"]) <= {1, 2, 5}


@pytest.mark.parametrize(
    "world",
    [
        {"labels": False},
        {"n_domains": 1},
        {"n_prompts": 1},
        {"n_decode": (1, 2)},
        {"n_decode": (2, 4), "n_prompts": 2},
        {"layout": make_layout(layers=(4,), channels=ALL)},
        {"layout": make_layout(channels=("experts",))},
    ],
    ids=[
        "unlabelled",
        "one domain",
        "one prompt each",
        "one token",
        "few tokens",
        "one layer",
        "experts only",
    ],
)
def test_poor_traces_are_answered_or_refused_with_a_reason(world: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "t.moet", **world)
    with moetrace.open(path) as trace:
        for name in ASKED:
            finding = ask(name, Subject([trace]))
            if finding.not_answered:
                assert "fix:" in finding.not_answered, name


def test_a_lost_layer_is_missing_and_not_zero(tmp_path: Path) -> None:
    layout = make_layout(channels=ALL)
    records, owner = traces.labelled_records(layout, np.random.default_rng(0))
    records["state"][:, 1] = 0
    records["experts"][:, 1] = layout.sentinel
    some = np.flatnonzero((owner % 3 == 0) & (records["kind"] == 0))
    records["state"][some, 2] = 2
    records["experts"][some, 2] = layout.sentinel
    path = traces.write_labelled(tmp_path / "t.moet", layout, records, owner)
    with moetrace.open(path) as trace:
        found = {name: ask(name, Subject([trace])) for name in ASKED}
    test = found["domain-separation"].tables["domain_test"].set_index("layer")
    assert test.loc[1].isna().sum() > 10
    assert "1 of 3" not in found["domain-separation"].sentences[0]
    usage = found["expert-frequency"].tables["usage"].set_index("layer")
    assert usage.loc[1, "percent_of_tokens"].isna().all()
    assert "lost" in found["overview"].sentences[0]


def test_the_phase_is_chosen_and_said(planted: Path, tmp_path: Path) -> None:
    with moetrace.open(planted) as trace:
        decode, prefill = (ask("expert-frequency", Subject([trace], phase=p)) for p in ("decode", "prefill"))
    assert decode.phase_note == "These are generated tokens (decode)."
    assert prefill.phase_note == "These are prompt tokens (prefill)."
    assert not decode.tables["usage"].equals(prefill.tables["usage"])


def test_chosen_layers_are_a_family_of_their_own(planted: Path) -> None:
    with moetrace.open(planted) as trace:
        finding = ask("domain-separation", Subject([trace], layers=[0, 2]))
        assert finding.tables["domain_test"]["layer"].tolist() == [0, 2]
        assert "in all 2 layers" in finding.sentences[0]
        with pytest.raises(UsageError, match="no layer 9"):
            _ = Subject([trace], layers=[9]).counts


# -- as published ----------------------------------------------------------------------------------------


def test_published_tables_are_the_notebook_s_own(tmp_path: Path) -> None:
    """Parts 2 to 9, pandas alone, on the trace's long table; one prompt per domain, as the notebook has it."""
    path = make(tmp_path / "t.moet", n_prompts=1, n_domains=5, n_decode=(40, 41))
    with moetrace.open(path) as trace:
        df = trace.sel(phase="decode").activations(components=True)
        subject = Subject([trace])
        found = {name: ask(name, subject).tables for name in ASKED}
    told = notebook.run_all(df, range(3))
    facts = found["overview"]["as_published_overview"]
    assert facts.set_index("what").loc["activations", "value"] == len(df)
    assert (
        found["overview"]["as_published_per_domain"]["activations"].tolist() == told["overview"][0].tolist()
    )
    layer0 = found["expert-frequency"]["as_published_percent"].query("layer_id == 0")
    assert layer0.pivot(index="domain", columns="expert_id", values="percent").to_numpy() == pytest.approx(
        told["percent"].to_numpy()
    )
    top = found["expert-frequency"]["as_published_top5"].query("layer_id == 0")
    assert list(zip(top["domain"], top["experts"], strict=True)) == [(d, e) for d, e, _ in told["top"]]
    tables = found["domain-separation"]
    for component in ("ffn_gate", "ffn_up", "ffn_down"):
        layers = tables["as_published_layers"]
        mine = layers[layers["component"] == component].drop(columns="component")
        pd.testing.assert_frame_equal(mine.reset_index(drop=True), told["separation"], check_dtype=False)
    chi = tables["as_published_chi_square"].query("layer_id == 0 and component == 'ffn_down'").iloc[0]
    assert (chi["chi2"], chi["p_value"], chi["dof"]) == pytest.approx(told["chi2"][:3])
    best = tables["as_published_most_specific"].query("component == 'ffn_down'")["layer_id"].tolist()
    assert best == told["best"]
    variation, special, general, preferred = told["classes"]
    classes = found["specialists"]["as_published_classes"].query("layer_id == 0").set_index("expert_id")
    assert classes["variation"].to_numpy() == pytest.approx(variation.to_numpy())
    assert classes.index[classes["class"] == "specialist"].tolist() == special
    assert classes.index[classes["class"] == "generalist"].tolist() == general
    mine = found["specialists"]["as_published_preferred"].query("layer_id == 0")
    assert mine[["expert_id", "domain"]].values.tolist() == [[e, d] for e, d, _ in preferred]
    dive = found["deep-dive"]["as_published_components"]
    for component, frame in told["dive"].items():
        mine = dive[dive["component"] == component].pivot(
            index="domain", columns="expert_id", values="percent"
        )
        assert mine.to_numpy() == pytest.approx(frame.to_numpy())
    entropy = found["domain-entropy"]["as_published_entropy"].query("layer_id == 0")
    assert dict(zip(entropy["domain"], entropy["entropy_bits"], strict=True)) == pytest.approx(
        told["entropy"]
    )
    lag = found["persistence"]["as_published_lag1"].query("layer_id == 0").iloc[0]
    assert (lag["same"], lag["pairs"]) == told["lag1"][1:]


def test_published_frequency_is_the_script_s_counter(tmp_path: Path) -> None:
    """Ties in order of first appearance, through the importer and the stats of an imported log."""
    rng = np.random.default_rng(0)
    lines, layers, ids = ["layer_id,expert_ids"], [], []
    for n in (3, 1, 1, 2, 1):
        for layer in (3, 4):
            for _ in range(n):
                chosen = rng.permutation(12)[:3].tolist()
                lines.append(f"{layer},{' '.join(map(str, chosen))}")
                layers.append(layer)
                ids.append(chosen)
    told = notebook.frequency_script(layers, ids)
    with moetrace.open(write(tmp_path / "e.log", *lines)) as trace:
        found = ask("expert-frequency", Subject([trace])).tables
    for layer in (3, 4):
        mine = found["as_published_top"].query("layer_id == @layer")
        assert list(zip(mine["expert_id"], mine["count"], strict=True)) == told[layer][:10]
        mine = found["as_published_bottom"].query("layer_id == @layer")
        assert list(zip(mine["expert_id"], mine["count"], strict=True)) == told[layer][-5:]
    mine = found["as_published_world"]
    assert list(zip(mine["expert_id"], mine["count"], strict=True)) == told["all"][:10]


def test_published_gate_distances_are_the_script_s(planted: Path) -> None:
    from moetrace.analysis.published import notebook as published

    with moetrace.open(planted) as trace:
        found = ask("gate-distances", Subject([trace])).tables
        rows = np.flatnonzero(np.asarray(trace.row) == 0)
        order = rows[np.argsort(np.asarray(trace.request)[rows], kind="stable")]
        x = np.asarray(trace.gate_input)[order]
    n, layers = x.shape[:2]
    told = published.gate_input_analysis(
        np.tile(np.arange(layers), n), np.zeros(n * layers, int), x.reshape(n * layers, -1), range(layers)
    )
    mine = found["as_published_aggregate"].sort_values(["layer", "metric"], ignore_index=True)
    frame = told.aggregate.sort_values(["layer", "metric"], ignore_index=True)
    assert mine["metric"].tolist() == frame["metric"].tolist()
    assert mine[["mean", "std"]].to_numpy() == pytest.approx(frame[["mean", "std"]].to_numpy(), abs=1e-9)
    steps = told.steps[told.steps["step"] <= 200].reset_index(drop=True)
    pd.testing.assert_frame_equal(found["as_published_steps"], steps, check_dtype=False)


# -- recordings of others --------------------------------------------------------------------------------


def recordings(folder: Path) -> dict[str, Path]:
    """One small source of every format."""
    source = folder / "json"
    for domain in ("code", "math"):
        token_file(source, domain, 0, WARMUP, one_pass([[5, 18, 9, 31], [1, 2, 3, 4]], phase="PROMPT"))
        for number in range(1, 5):
            token_file(source, domain, number, one_pass([[4, 3, 2, number + 4], [7, 6, 5, number % 4]]))
    log = [f"{layer},{t % 5} {5 + t % 3}" for t in range(20) for layer in (3, 4)]
    gates = [f"gate_input,{layer},0,{t} {layer} 1.5 {t * t}" for t in range(6) for layer in (20, 21, 22)]
    rng = np.random.default_rng(0)
    texts = [
        olmoe_line(rng.permuted(np.tile(np.arange(6), (9, 2, 1)), axis=2)[:, :, :2], label="ab"[i % 2])
        for i in range(6)
    ]
    counts = ["domain,layer_id,expert_id,count"]
    counts += [
        f"{d},{n},{e},{5 + 3 * e + i * n}" for i, d in enumerate("ab") for n in (0, 7) for e in range(6)
    ]
    return {
        "token-json": source,
        "expert-log": write(folder / "experts.log", "layer_id,expert_ids", *log),
        "gate-log": write(folder / "gates.log", *gates),
        "olmoe": write(folder / "olmoe.jsonl", *texts),
        "counts": write(folder / "counts.csv", *counts),
    }


ANSWERED = {
    "token-json": set(ASKED) - LACKING - {"matched-separation", "gate-distances"},
    # one request, and no labels
    "expert-log": set(ASKED) - LACKING - {"matched-separation", "gate-distances", "task-prediction"},
    "gate-log": {"overview", "gate-distances"},
    "olmoe": set(ASKED) - LACKING - {"gate-distances"},
    "counts": {"overview", "load-balance", *OF_DOMAINS} - {"matched-separation"},
}


@pytest.mark.parametrize("form", ANSWERED)
def test_every_question_runs_on_every_recording(form: str, tmp_path: Path) -> None:
    opened = moetrace.open(recordings(tmp_path)[form])
    subject = Subject([opened])
    found = {name: ask(name, subject) for name in ASKED}
    assert {name for name in ASKED if found[name].not_answered is None} == ANSWERED[form]
    assert all("fix:" in f.not_answered for f in found.values() if f.not_answered)
    if form in ("expert-log", "gate-log"):
        assert subject.phase == "unknown"
        said = " ".join(found["overview"].caveats)
        assert "does not say which tokens are of the prompt" in found["overview"].phase_note
        assert "the source does not say" in said


def test_olmoe_s_published_counts_through_stats(capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data("olmoe_domain_expert_counts.csv")
    assert main(["stats", str(path), "--only", "domain-separation,persistence", "--format", "json"]) == 0
    told, refused = (Finding.from_json(json.dumps(f)) for f in json.loads(capsys.readouterr().out))
    table = told.tables["domain_test"]
    assert table["jsd_bits"].tolist() == pytest.approx([0.167, 0.401, 0.501], abs=6e-4)
    assert table["cramers_v"].tolist() == pytest.approx([0.256, 0.380, 0.416], abs=6e-4)
    assert table["p_value"].isna().all()
    assert "counts do not tell the prompts of a domain apart" in told.sentences[0]
    assert "does not say which token" in str(refused.not_answered)


def test_the_real_token_file_is_all_warm_up_unless_read_as_published(tmp_path: Path) -> None:
    real = shared_data("tensor_trace_token-00000.json")
    folder = tmp_path / "code" / "traces"
    folder.mkdir(parents=True)
    shutil.copy(real, folder / "token-00000.json")
    with pytest.raises(InputError, match="no routing"):
        moetrace.open(tmp_path)
    assert main(["import", str(tmp_path), "-o", str(tmp_path / "t.moet"), "--as-published"]) == 0
    with moetrace.open(tmp_path / "t.moet") as trace:
        found = {name: ask(name, Subject([trace], phase="all")) for name in ASKED}
    frame = notebook.load(real, "code", 0)
    counts = found["expert-frequency"].tables["as_published_percent"]
    assert found["expert-frequency"].not_answered is None
    assert 3 * counts["count"].sum() == len(frame)


# -- the commands ----------------------------------------------------------------------------------------


def test_stats_prints_and_writes_everything(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "overview,load-balance,transitions"
    for form in ("table", "md", "csv", "json"):
        assert main(["stats", str(planted), "--only", only, "--format", form]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in ("load_balance", "transitions"))
        if form == "csv":  # one table, which names those that it is made of; whole numbers stay whole
            together = pd.read_csv(io.StringIO(out), dtype=str)
            assert {*together["question"]} == set(only.split(","))
            mine = together[(together["question"] == "load-balance") & (together["table"] == "load_balance")]
            expected = moetrace.ask("load-balance", moetrace.open(planted)).tables["load_balance"]
            text = pd.read_csv(io.StringIO(expected.to_csv(index=False)), dtype=str)
            pd.testing.assert_frame_equal(mine[list(text)].reset_index(drop=True), text)
    assert main(["stats", str(planted), "--only", only, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "overview.json").is_file()
    assert (tmp_path / "out" / "tables" / "transitions-as_published_transitions.csv").is_file()


def test_stats_asks_every_question_that_needs_no_model(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(planted), "--layers", "0,2", "--phase", "prefill", "--format", "json"]) == 0
    found = [Finding.from_json(json.dumps(f)) for f in json.loads(capsys.readouterr().out)]
    told = [n for n in QUESTIONS if not question(n).compares]
    assert [finding.name for finding in found] == told
    assert set(ASKED) <= set(told)
    balance = next(f for f in found if f.name == "load-balance").tables["load_balance"]
    assert balance["layer"].tolist() == [0, 2]
    assert balance["tokens"].tolist() == [108, 108]


def test_stats_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = recordings(tmp_path)["gate-log"]
    assert main(["stats", str(gates), "--only", "persistence"]) == 1
    assert "Not answered: the recording has no experts" in capsys.readouterr().out
    assert main(["stats", str(gates), "--only", "nope"]) == 2
    assert main(["stats", str(gates), "--only", ","]) == 2
    csv = recordings(tmp_path / "more")["counts"]
    assert main(["stats", str(csv), str(csv)]) == 2
    assert "stands alone" in capsys.readouterr().err


# -- two captures ----------------------------------------------------------------------------------------


def pair(folder: Path, change: Any) -> tuple[Path, Path]:
    """Two captures of one text; the second's records are changed."""
    layout = make_layout(layers=(0, 1, 2, 3), channels=ALL)
    records, owner = traces.labelled_records(layout, np.random.default_rng(0))
    a = traces.write_labelled(folder / "a.moet", layout, records, owner)
    other = records.copy()
    change(other, owner)
    return a, traces.write_labelled(folder / "b.moet", layout, other, owner)


def test_captures_that_are_alike_agree_and_are_told_from_chance(tmp_path: Path) -> None:
    def swap(records: np.ndarray, owner: np.ndarray) -> None:
        records["experts"][:, 3] = records["experts"][:, 3, ::-1]  # the same sets, in another order
        records["experts"][:, 2] = (records["experts"][:, 2] + 1) % 8

    a, b = pair(tmp_path, swap)
    with moetrace.open(a) as one, moetrace.open(b) as two:
        finding = ask("compare", Subject([one, two]))
        with pytest.raises(UsageError, match="two traces, not 1"):
            question("compare")().answer(Subject([one]))
    table = finding.tables["summary"].pivot(index="layer", columns="metric", values="mean")
    assert table.loc[[0, 1], ["overlap", "exact", "top1"]].to_numpy().tolist() == [[1, 1, 1]] * 2
    assert table.loc[3, ["overlap", "exact", "top1", "kendall_tau"]].tolist() == [1, 1, 0, -1]
    assert table.loc[2, "exact"] == 0
    levels = finding.tables["summary"].set_index(["layer", "metric"])["chance"]
    assert levels[(0, "overlap")] == 2 / 8
    assert levels[(0, "exact")] == pytest.approx(1 / 28)
    assert levels[(0, "coverage_k")] == pytest.approx(2 * 9 / 3)
    depth = finding.tables["by_depth"].set_index(["depth", "metric"])
    assert depth.loc[("early", "overlap"), "mean"] == 1
    assert depth.loc[("all", "overlap"), "mean"] == pytest.approx(table["overlap"].mean())
    assert set(finding.tables["by_phase"]["phase"]) == {"prefill", "decode"}
    usage = finding.tables["usage"].set_index("layer")
    assert usage.loc[0, "jsd_bits"] == pytest.approx(0, abs=1e-12)
    assert usage.loc[2, "jsd_low"] > 0
    assert "as_published_aggregate" in finding.tables
    assert any("The texts are the same throughout" in s for s in finding.sentences)


def test_where_texts_part_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other_text(records: np.ndarray, owner: np.ndarray) -> None:
        mine = np.flatnonzero((owner == 0) & (records["kind"] == 0))
        records["token"][mine[10]] += 1

    a, b = pair(tmp_path, other_text)
    assert main(["compare", str(a), str(b), "--format", "json"]) == 0
    finding = Finding.from_json(json.dumps(json.loads(capsys.readouterr().out)[0]))
    texts = finding.tables["texts"].set_index("prompt")
    assert texts.loc["p00"].tolist() == [10, 10]
    assert (texts["stopped_at"].drop("p00") == -1).all()
    assert any("The texts part in 1 prompt" in s for s in finding.sentences)


def test_captures_of_other_models_or_texts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make(tmp_path / "one.moet")
    two = make(tmp_path / "two.moet", make_layout(layers=(0, 1)))
    assert main(["compare", str(one), str(two)]) == 2
    assert "layers differ" in capsys.readouterr().err
    three = make(tmp_path / "three.moet")
    text = (three / "labels.jsonl").read_text().replace('"p', '"q')
    (three / "labels.jsonl").write_text(text)
    assert main(["compare", str(one), str(three)]) == 2
    assert "no prompt in common" in capsys.readouterr().err


def test_a_comparison_reads_in_pieces(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["moetrace.analysis.counts.compare"]
    tables = []
    for chunk in (1 << 13, 7):
        monkeypatch.setattr(module, "CHUNK", chunk)
        with moetrace.open(planted) as one, moetrace.open(planted) as two:
            tables.append(ask("compare", Subject([one, two])).tables)
    for name, table in tables[0].items():
        pd.testing.assert_frame_equal(table, tables[1][name], obj=name)
    assert len(Table(planted / "ctx0" / "rows")["serial"]) > 7
