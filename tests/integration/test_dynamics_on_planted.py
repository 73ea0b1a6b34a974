"""The questions about patterns, cold experts, circuits and dynamics find what was planted, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from running import capture

import moetrace
from moetrace import data
from moetrace.findings import Finding, Subject, question
from moetrace.synthetic import Planted, digit_tokens, distinct_tokens, write_planted

pytestmark = pytest.mark.runtime

Ask = Callable[..., tuple[Planted, Callable[..., Finding]]]

CIRCUIT = [(0, 2), (1, 5), (3, 7)]


@pytest.fixture
def planted(runtime: Any, tmp_path: Path) -> Ask:
    """``planted(prompts, n_predict, **what)``: the model, and ``ask(question, phase, **parameters)`` of its trace."""

    def make(
        prompts: list[dict[str, Any]], n_predict: int = 0, **what: Any
    ) -> tuple[Planted, Callable[..., Finding]]:
        model = write_planted(tmp_path / "m.gguf", **what)
        path = tmp_path / "t.moet"
        capture(model.path, path, prompts, "--all-outputs", "-n", str(n_predict), "-np", "4")

        def ask(name: str, phase: Any = None, **parameters: Any) -> Finding:
            with moetrace.open(path) as trace:
                return question(name)(**parameters).answer(Subject([trace], phase=phase))

        return model, ask

    return make


def texts(n: int | None = None) -> list[dict[str, Any]]:
    lines = data.prompts("domains").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:n]]


def pairs(table: pd.DataFrame, *columns: str) -> set[tuple[Any, ...]]:
    return set(table[list(columns)].itertuples(index=False, name=None))


def test_the_expert_of_digits_is_found_and_is_the_only_one_beyond_words(planted: Ask) -> None:
    _, ask = planted(texts(), fires_on={(1, 3): digit_tokens()})
    found = ask("token-patterns", analyses="pattern_summary").tables
    special = found["specialists"]
    beyond = special[(special["kind"] == "type")]
    assert pairs(beyond, "layer", "expert", "pattern") == {(1, 3, "NUM")}
    row = beyond.iloc[0]
    assert row["concentration"] > 0.9
    assert row["lift"] == pytest.approx(row["concentration"] / row["corpus_share"])
    assert row["words"] > 10
    # Routing follows from the token id, so experts do have words, and that is said as such.
    assert (special["kind"] == "word").sum() > 0
    assert set(special.loc[special["of"] == "type", "kind"]) <= {"type", "word", "undecided"}


def test_the_circuit_is_found_link_by_link_and_holds_on_other_prompts(planted: Ask) -> None:
    _, ask = planted(distinct_tokens(12, 50, seed=1), circuit=CIRCUIT, seed=1)
    found = ask("expert-circuits", max_gap=2)
    edges = found.tables["edges"]
    sure = edges[edges["p_family"] <= 0.05]
    assert pairs(sure, "layer", "expert", "to_layer", "to_expert") == {(0, 2, 1, 5), (1, 5, 3, 7)}
    assert (sure["tokens"] > 100).all()
    paths = found.tables["paths"]
    assert paths["path"].tolist() == ["L0-E2 → L1-E5 → L3-E7"]
    assert paths["replicated"].all()
    layers = found.tables["layers"]
    assert pairs(layers[layers["p_family"] <= 0.05], "layer", "to_layer") == {(0, 1), (1, 3)}


def test_the_dead_experts_are_cold_and_no_other_is(planted: Ask) -> None:
    dead = [(2, 4), (0, 1)]
    _, ask = planted(texts(), dead=dead)
    found = ask("cold-experts")
    table = found.tables["experts"]
    assert pairs(table[table["verdict"] == "cold"], "layer", "expert") >= set(dead)
    unused = table[table["used"] == 0]
    assert pairs(unused, "layer", "expert") == set(dead)
    assert table["cold"].sum() == len(dead)
    assert (found.tables["triggers"]["token_share"] > 0).all()


def test_too_little_text_makes_no_expert_cold_though_the_published_rule_says_so(planted: Ask) -> None:
    _, ask = planted(distinct_tokens(2, 20), n_expert=32)
    found = ask("cold-experts")
    assert found.tables["as_published_rates"]["prune"].sum() > 3
    assert not found.tables["experts"]["cold"].any()


def test_routing_by_position_is_a_place_and_not_a_pattern(planted: Ask) -> None:
    _, ask = planted(texts(), by_position=True)
    found = ask("token-patterns", analyses="pattern_summary,sequence_patterns").tables
    assert found["specialists"].empty
    places = found["sequence_patterns"]
    sure = places[(places["p_family"] <= 0.05) & (places["low"] > 1)]
    assert set(sure["pattern"]) >= {"first", "start"}
    first = sure[sure["pattern"] == "first"]
    assert (first["tokens"] == 60).all()


def test_the_change_of_phase_is_found_at_its_step(planted: Ask) -> None:
    # BOS and 9 tokens stand before the first generated one
    _, ask = planted(distinct_tokens(8, 9, begin=True), 50, phase_at=40)
    found = ask("generation-dynamics", "decode")
    phases = found.tables["phases"]
    assert phases["change"].iloc[0] == 30
    assert phases["p_value"].iloc[0] <= 0.02
    assert phases["jsd_bits"].iloc[0] > 0.9


def test_a_random_router_shows_nothing(planted: Ask) -> None:
    _, ask = planted(distinct_tokens(20, 50, 1500), n_vocab=1500)
    patterns = ask("token-patterns", analyses="pattern_summary,sequence_patterns", min_support=5).tables
    assert patterns["specialists"].empty
    assert (patterns["sequence_patterns"]["p_family"] > 0.05).all()
    assert not ask("cold-experts").tables["experts"]["cold"].any()
    found = ask("expert-circuits").tables
    assert (found["edges"]["p_family"] > 0.05).all()
    assert (found["layers"]["p_family"] > 0.05).all()
    assert found["paths"].empty
    dynamics = ask("generation-dynamics").tables
    assert (dynamics["phases"]["p_value"] > 0.05).all()
    assert (dynamics["order_test"][["top1_p_family", "overlap_p_family"]] > 0.05).all(axis=None)
    # what the published definitions make of the same recording
    assert dynamics["as_published_summary"]["phase_boundaries_per_step"].min() == 1.0


def test_five_tokens_make_pipelines_as_published_and_nothing_else(planted: Ask) -> None:
    _, ask = planted(distinct_tokens(1, 5), n_expert=32, n_expert_used=4, n_layer=8)
    found = ask("expert-circuits", min_support=1).tables
    assert len(found["as_published_pipelines"]) >= 10
    assert found["as_published_summary"]["global_consistency"].iloc[0] > 0.8
    assert (found["edges"]["p_family"] > 0.05).all()
    assert (found["layers"]["p_family"] > 0.05).all()
    assert found["paths"].empty


def test_answers_are_read_from_the_prompts_lines(runtime: Any, tmp_path: Path) -> None:
    lines = data.prompts("questions").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    capture(data.demo_model(), tmp_path / "t.moet", prompts, "--all-outputs", "-n", "24", "-np", "8")
    with moetrace.open(tmp_path / "t.moet") as trace:
        found = question("generation-dynamics")().answer(Subject([trace]))
    answers = found.tables["answers"]
    assert len(answers) == 48
    assert 0 < answers["right"].sum() < 48
    assert set(found.tables["right_wrong"]["feature"]) == {"persistence", "overlap", "entropy_bits", "tokens"}
    assert any("hold the expected answer" in sentence for sentence in found.sentences)


def test_cold_experts_are_woken_and_ablated_in_the_model(runtime: Any, tmp_path: Path) -> None:
    """One expert fires on a single rare token: the search finds that token; and masking it changes what it did."""
    rare = 300
    model = write_planted(tmp_path / "m.gguf", fires_on={(1, 3): [rare]})
    capture(model.path, tmp_path / "t.moet", texts(20), "--all-outputs")
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"tokens": p["tokens"]}) + "\n" for p in distinct_tokens(6, 60)), encoding="utf-8"
    )
    code = """
        import sys
        from pathlib import Path
        import moetrace
        from moetrace.findings import Subject, question
        path, model, texts = sys.argv[1:]
        with moetrace.open(path) as trace:
            subject = Subject([trace], phase="prefill", model=Path(model), model_options={"n_threads": 1})
            print(question("cold-experts")(wake=1, ablate=1, texts=texts).answer(subject).to_json())
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), tmp_path / "t.moet", model.path]
    run = subprocess.run([*command, held_out], capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr
    found = Finding.from_json(run.stdout)
    table = found.tables["experts"]
    coldest = table.iloc[0]
    assert (coldest["layer"], coldest["expert"]) == (1, 3)
    wake = found.tables["wake"]
    best = wake.iloc[0]
    assert best["token"] == rare
    assert best["rate"] == 1.0
    assert best["base_rate"] < 0.2
    ablation = found.tables["ablation"].iloc[0]
    uses = sum(p["tokens"].count(rare) for p in distinct_tokens(6, 60))
    assert (ablation["tokens_changed"] > 0) == (uses > 0)
    assert ablation["change"] == pytest.approx(ablation["nll_without"] - ablation["nll"])
