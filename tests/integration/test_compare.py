"""Captures of one model at several precisions, compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from running import TEXT, capture

import moetrace
from moetrace.__main__ import main
from moetrace.findings import Finding, Subject, question

pytestmark = pytest.mark.runtime

SIZES = {"n_layer": 4, "n_embd": 256, "n_ff_expert": 256, "n_expert": 16, "n_expert_used": 4}


@pytest.fixture(scope="module")
def precisions(runtime, model_file, tmp_path_factory) -> dict[str, Path]:
    """The same generated OLMoE in F16, Q8_0 and Q4_K, each run over the same prompts."""
    folder = tmp_path_factory.mktemp("precisions")
    prompts = [
        {"id": f"p{i}", "label": "ab"[i % 2], "prompt": TEXT[60 * i : 60 * i + 200], "n_predict": 12}
        for i in range(6)
    ]
    paths = {}
    for name in ("F16", "Q8_0", "Q4_K"):
        model = model_file("olmoe", quantization=name, **SIZES)
        paths[name] = folder / f"{name}.moet"
        options = ["--capture", "experts,weights,logits", "--all-outputs"]
        capture(model, paths[name], prompts, *options)
    return paths


def compared(a: Path, b: Path) -> Finding:
    with moetrace.open(a) as one, moetrace.open(b) as two:
        return question("compare")().answer(Subject([one, two]))


def overall(finding: Finding, metric: str) -> pd.Series:
    table = finding.tables["by_depth"]
    return table[(table["depth"] == "all") & (table["metric"] == metric)].iloc[0]


def test_a_coarser_model_agrees_less_and_still_more_than_chance(precisions: dict[str, Path]) -> None:
    itself = compared(precisions["F16"], precisions["F16"])
    fine = compared(precisions["F16"], precisions["Q8_0"])
    coarse = compared(precisions["F16"], precisions["Q4_K"])
    for metric in ("overlap", "exact", "top1"):
        values = [overall(f, metric) for f in (itself, fine, coarse)]
        assert values[0]["mean"] == 1
        assert values[0]["mean"] > values[1]["mean"] > values[2]["mean"]
        assert values[2]["low"] > values[2]["chance"]
        assert values[1]["low"] > values[2]["high"]
    assert overall(coarse, "coverage_k")["mean"] > overall(fine, "coverage_k")["mean"] > 4
    assert len(itself.tables["texts"]) == 6
    assert "as_published_aggregate" in coarse.tables


def test_the_numbers_are_those_of_a_plain_count(precisions: dict[str, Path]) -> None:
    """Prompt tokens only, whose texts are alike: sets, first experts and coverage, token by token."""
    table = compared(precisions["F16"], precisions["Q4_K"]).tables["by_phase"].set_index(["phase", "metric"])
    with moetrace.open(precisions["F16"]) as one, moetrace.open(precisions["Q4_K"]) as two:
        a, b = (trace.sel(phase="prefill") for trace in (one, two))
        assert np.array_equal(a.token_ids, b.token_ids)
        overlap, top1, coverage = [], [], []
        logits = np.asarray(b.logits)
        for x, y, score in zip(
            np.asarray(a.experts).reshape(-1, 4),
            np.asarray(b.experts).reshape(-1, 4),
            logits.reshape(-1, 16),
            strict=True,
        ):
            overlap.append(len(set(x.tolist()) & set(y.tolist())) / 4)
            top1.append(x[0] == y[0])
            place = np.argsort(np.argsort(-score))
            coverage.append(place[x].max() + 1)
    assert table.loc[("prefill", "overlap"), "mean"] == pytest.approx(np.mean(overlap))
    assert table.loc[("prefill", "top1"), "mean"] == pytest.approx(np.mean(top1))
    assert table.loc[("prefill", "coverage_k"), "mean"] == pytest.approx(np.mean(coverage))


def test_compare_from_the_command_line(
    precisions: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(precisions["F16"]), str(precisions["Q4_K"])
    assert main(["compare", a, b, "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Q4_K.moet uses" in out
    assert "chance would be 25.0%" in out
    saved = Finding.from_json((tmp_path / "compare.json").read_text())
    assert saved.tables["summary"]["layer"].nunique() == 4
    assert main(["compare", a, b, "--layers", "0,2", "--phase", "prefill", "--format", "json"]) == 0
    chosen = Finding.from_json(json.dumps(json.loads(capsys.readouterr().out)[0]))
    assert chosen.tables["summary"]["layer"].unique().tolist() == [0, 2]
    assert chosen.tables["by_phase"]["phase"].unique().tolist() == ["prefill"]
