"""Experts in llama.cpp: what they compute against numpy, model files with fewer of them, other k, the probe."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
import pytest
from running import python

import moetrace
from moetrace.analysis import chosen_outputs, from_trace, linearity, merge_candidates, weight_similarity
from moetrace.analysis.experts.merging import drop_experts, merge
from moetrace.analysis.experts.outputs import layer_rows
from moetrace.data import demo_model, prompts
from moetrace.model import merged as model_merged
from moetrace.model.experts import LayerExperts
from moetrace.model.file import ModelFile
from moetrace.model.grouping import Grouping
from moetrace.synthetic import digit_tokens, distinct_tokens, write_planted

pytestmark = pytest.mark.runtime

write_merged = partial(model_merged.write_merged, merge=merge)

TEXTS = [
    "The old man looked at the sea and said nothing for a long while.",
    "def total(values):\n    return sum(value for value in values if value > 3)",
    "12 + 7 = 19, and 19 + 4 = 23; what comes next?",
    "A letter came in the morning, but nobody opened it before the evening.",
]


def ran(code: str, *arguments: str | Path) -> Any:
    """Run code in a fresh interpreter; gives what it prints as JSON."""
    result = python(code, *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


NLL = """
    import sys, json
    from moetrace.host.evaluate import Evaluator
    texts, k, *models = [json.loads(a) for a in sys.argv[1:3]] + sys.argv[3:]
    out = []
    for model in models:
        with Evaluator(model, n_expert_used=k, n_threads=1) as evaluator:
            out.append(evaluator.evaluate(texts).nll.tolist())
    print(json.dumps(out))
"""


def nll(*models: Path, texts: Any = TEXTS, k: int | None = None) -> np.ndarray:
    """(models, tokens) negative log-likelihoods by llama.cpp."""
    return np.array(ran(NLL, json.dumps(texts), json.dumps(k), *models))


# -- an independent referee for what experts compute


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("olmoe", {}),
        ("gpt-oss", {}),
        ("gpt-oss", {"quantization": "MXFP4"}),
        ("qwen3moe", {"quantization": "Q8_0"}),
        ("qwen3moe", {"n_embd": 256, "n_ff_expert": 256, "quantization": "Q4_K"}),
        ("llama4", {}),
        ("deepseek2-v2-fused", {}),
        ("deepseek2-v3", {}),
        ("glm4moe", {}),
        ("nomic-bert-moe", {}),
    ],
)
def test_numpy_computes_what_llama_cpp_computes(architecture, options, runtime, model_file, tmp_path):
    """Σ weight · expert(gate input) from dequantised weights is the captured ffn_moe_out of every layer.

    And the norms of the terms are the captured outputs.
    """
    model = model_file(architecture, **options)
    code = """
        import sys, json, moetrace
        moetrace.capture(sys.argv[1], json.loads(sys.argv[3]), sys.argv[2], n_threads=1, all_outputs=True,
                         channels=["experts", "weights", "gate_input", "outputs", "tensor:ffn_moe_out-*"])
        print(1)
    """
    ran(code, model, tmp_path / "t.moet", json.dumps(TEXTS[:2]))
    # llama.cpp rounds activations to 8 bits before it multiplies with quantised matrices
    tolerance = {"Q8_0": 0.02, "MXFP4": 0.02, "Q4_K": 0.02}.get(options.get("quantization"), 2e-3)
    phase = "all" if architecture == "nomic-bert-moe" else "prefill"
    with moetrace.open(tmp_path / "t.moet") as trace, ModelFile(model) as file:
        routing = from_trace(trace, phase=phase)
        for index, layer in enumerate(trace.layers.tolist()):
            rows = layer_rows(routing, index)
            assert len(rows.rows) > 40
            experts = LayerExperts(file, layer)
            assert experts.reads_gate_input
            parts = chosen_outputs(
                experts,
                rows.gate_input,
                rows.experts,
                rows.weights,
                experts.activation,
                weights_before=experts.weights_before,
            )
            error = linearity(parts, trace.tensor(f"ffn_moe_out-{layer}")[rows.rows])
            assert np.median(error) < tolerance, (layer, np.median(error))
            norms = np.linalg.norm(parts, axis=2)
            if not experts.weights_before:
                norms = norms / np.abs(rows.weights)
            apart = np.abs(trace.outputs[rows.rows, index] / norms - 1)
            assert np.median(apart) < tolerance, (layer, np.median(apart))
            assert np.quantile(apart, 0.9) < 10 * tolerance


# -- files with fewer experts


def group(path: Path, groups: list[int], use: list[float]) -> dict[int, Grouping]:
    with ModelFile(path) as model:
        return {layer: Grouping(np.array(groups), np.array(use, float)) for layer in model.moe_layers}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("olmoe", {}),
        ("gpt-oss", {"quantization": "MXFP4"}),
        ("qwen3moe", {"quantization": "Q8_0"}),
        ("qwen3moe", {"n_embd": 256, "n_ff_expert": 256, "quantization": "Q4_K"}),
        ("llama4", {}),
        ("deepseek2-v2-fused", {"quantization": "F16"}),
        ("glm4moe", {}),
        ("granitehybrid", {}),
        ("smallthinker", {}),
    ],
)
def test_llama_cpp_runs_files_with_fewer_experts(architecture, options, runtime, model_file, tmp_path):
    source = model_file(
        architecture, n_expert=6, n_expert_used=1 if architecture == "llama4" else 2, **options
    )
    merged = write_merged(source, tmp_path / "m.gguf", group(source, [0, 1, 0, 2, 3, 1], [5, 1, 1, 2, 3, 4]))
    pruned = write_merged(
        source, tmp_path / "p.gguf", group(source, [0, -1, 1, 2, 3, -1], [5, 1, 1, 2, 3, 4])
    )
    whole = write_merged(source, tmp_path / "w.gguf", group(source, list(range(6)), [1] * 6))
    before, after, without, same = nll(source, merged.path, pruned.path, whole.path)
    assert (merged.n_expert, pruned.n_expert, whole.n_expert) == (4, 4, 6)
    assert np.array_equal(before, same)  # nothing grouped, nothing changed
    for changed in (after, without):
        assert np.isfinite(changed).all()
        assert not np.array_equal(before, changed)


def test_expert_groups_keep_their_sizes(runtime, model_file, tmp_path):
    source = model_file("deepseek2-v3")
    with ModelFile(source) as model:
        groups = {layer: drop_experts(np.arange(16), 12, n_blocks=4) for layer in model.moe_layers}
    made = write_merged(source, tmp_path / "m.gguf", groups)
    assert np.isfinite(nll(made.path)).all()


def numbered(group: list[int]) -> np.ndarray:
    return np.unique(group, return_inverse=True)[1]


def test_twins_merge_for_nothing_and_a_dead_expert_is_spared_for_nothing(runtime, tmp_path):
    dead = {0: 6, 1: 7, 2: 1, 3: 3}
    made = write_planted(tmp_path / "p.gguf", n_expert=8, twins=[(1, 2, 5)], dead=list(dead.items()))
    with ModelFile(made.path) as model:
        tables = {
            layer: weight_similarity(LayerExperts(model, layer), n_null=19) for layer in model.moe_layers
        }
    best = tables[1].iloc[int(tables[1]["cosine_aligned"].argmax())]
    assert (best["expert_a"], best["expert_b"]) == (2, 5)
    assert best["cosine_aligned"] == pytest.approx(1)
    assert abs(best["cosine"]) < 0.5  # not before the neurons are matched
    found = {layer: merge_candidates(table) for layer, table in tables.items()}
    assert found[1][["expert_a", "expert_b"]].to_numpy().tolist() == [[2, 5]]
    assert all(len(found[layer]) == 0 for layer in (0, 2, 3))

    def written(name: str, groups: Any, **options: Any) -> Path:
        chosen = {layer: Grouping(np.array(groups(layer)), np.ones(8)) for layer in range(4)}
        return write_merged(made.path, tmp_path / name, chosen, **options).path

    every = list(range(8))
    twins = written(
        "t.gguf", lambda n: numbered([0, 1, 2, 3, 4, 2, 6, 7]) if n == 1 else every, keep_count=True
    )
    others = written(
        "o.gguf", lambda n: numbered([0, 1, 2, 3, 4, 1, 6, 7]) if n == 1 else every, keep_count=True
    )
    spared = written("d.gguf", lambda n: [-1 if e == dead[n] else e - (e > dead[n]) for e in every])
    used = written("u.gguf", lambda n: [-1 if e == 4 else e - (e > 4) for e in every])
    texts = distinct_tokens(8, 60, 768)
    before, same, other, free, costly = nll(made.path, twins, others, spared, used, texts=texts)
    assert np.abs(same - before).max() < 1e-3
    assert np.abs(other - before).max() > 0.01
    assert np.abs(free - before).max() < 1e-3
    assert np.abs(costly - before).max() > 0.01


# -- other k


def test_the_override_of_k_is_a_file_with_that_k(runtime, tmp_path):
    """Against a GGUF whose own expert_used_count is that number."""
    for k in (1, 8):
        path = tmp_path / f"k{k}.gguf"
        shutil.copyfile(demo_model(), path)
        field = gguf.GGUFReader(path, "r+").fields["olmoe.expert_used_count"]
        field.parts[field.data[0]][0] = k
        with ModelFile(path) as model:
            assert model.n_expert_used == k
        assert np.array_equal(nll(path)[0], nll(demo_model(), k=k)[0])


# -- the probe


PROBE = """
    import sys, json, numpy as np, moetrace
    from moetrace.host.probe import RoutingProbe
    model, folder, sequences = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    trace = moetrace.capture(model, [{"tokens": s, "id": str(i)} for i, s in enumerate(sequences)], folder + "/t.moet",
                             channels=["experts", "weights", "scores"], n_threads=1, all_outputs=True)
    by_id = {r.id: n for n, r in trace.requests.iterrows()}
    agree = []
    with RoutingProbe(model, n_tokens=40, n_parallel=3, n_threads=1) as probe:
        layers = list(probe.layout.layers)
        twice = [probe.route(sequences), probe.route(sequences[::-1])[::-1]]
        for routed in twice:
            for i, one in enumerate(routed):
                mine = trace.sel(request=int(by_id[str(i)]))
                agree.append(np.array_equal(np.asarray(mine.experts), one.experts))
                for name in ("weights", "scores"):  # another batch, another kernel: not to the last bit
                    theirs = np.asarray(getattr(mine, name))
                    agree.append(np.allclose(theirs, getattr(one, name), rtol=1e-3, atol=1e-5, equal_nan=True))
        try:
            probe.route([[5] * 1000])
            error = ""
        except moetrace.MoetraceError as e:
            error = str(e)
    print(json.dumps([agree, layers == trace.layers.tolist(), error]))
"""


@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2-v3", "gpt-oss"])
def test_the_probe_gives_what_a_capture_gives(architecture, runtime, model_file, tmp_path):
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 256, n).tolist() for n in (5, 40, 1, 17, 8)]
    agree, same_layers, error = ran(PROBE, model_file(architecture), tmp_path, json.dumps(sequences))
    assert all(agree)
    assert same_layers
    assert "do not fit" in error


SEARCH = """
    import sys, json, numpy as np
    from moetrace.analysis.experts.manipulation import path_margin, search_input
    from moetrace.host.probe import RoutingProbe
    model, paths, n_vocab = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    out = []
    with RoutingProbe(model, n_tokens=4, n_parallel=32, n_threads=1) as probe:
        for path in paths:
            def score(tokens):
                scores = np.stack([r.scores[-1] for r in probe.route(list(tokens))])
                return path_margin(scores, path, probe.layout.n_expert_used)
            run = search_input(score, [-1] * 3, np.arange(n_vocab), method="beam", budget=1500, seed=0)
            (routed,) = probe.route([run.tokens])
            chosen = all(expert in routed.experts[-1, layer] for layer, expert in path)
            out.append([run.tokens.tolist(), run.reached_at, chosen])
    print(json.dumps(out))
"""


def test_an_expert_that_fires_on_digits_is_reached_by_a_digit(runtime, tmp_path):
    digits = digit_tokens(768)
    made = write_planted(
        tmp_path / "p.gguf", fires_on={(2, 9): digits}, circuit=[(0, 3), (1, 4), (3, 5)], dead=[(1, 8)]
    )
    paths = [[[2, 9]], [[0, 3], [1, 4], [3, 5]], [[1, 8]]]
    digit, circuit, never = ran(SEARCH, made.path, json.dumps(paths), str(made.n_vocab))
    assert digit[1] is not None
    assert digit[2]
    assert digit[0][-1] in digits
    assert circuit[1] is not None
    assert circuit[2]
    assert never[1] is None  # a dead expert is not reached, and not said to be
    assert not never[2]


# -- the questions


ASK = """
    import sys, json, moetrace
    from moetrace.findings import Subject, question
    trace, model, name, options, folder = sys.argv[1:]
    options = json.loads(options)
    with moetrace.open(trace) as t:
        asked = question(name)(**options)
        finding = asked.answer(Subject([t], model=model, model_options={"n_threads": 1}))
    from pathlib import Path
    from moetrace.report.files import write_finding
    write_finding(finding, Path(folder))
    print(finding.to_json().replace(chr(10), " "))
"""


@pytest.fixture(scope="module")
def demo_trace(runtime, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "t.moet"
    code = """
        import sys, moetrace, json
        from moetrace.data import demo_model, prompts
        lines = [json.loads(line) for line in open(prompts("domains"))][::6]
        moetrace.capture(demo_model(), lines, sys.argv[1], n_predict=16, n_threads=1, n_parallel=2, all_outputs=True,
                         channels=["experts", "weights", "gate_input", "tensor:ffn_moe_out-*"])
        print(1)
    """
    ran(code, path)
    return path


@pytest.fixture
def few_texts(tmp_path) -> Path:
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(prompts("heldout-text").read_text().splitlines()[::10]) + "\n")
    return path


def asked(name: str, trace: Path, folder: Path, **options: Any) -> Any:
    finding = ran(ASK, trace, demo_model(), name, json.dumps(options), folder)
    assert finding["not_answered"] is None
    empty = {table for table, content in finding["tables"].items() if not content["data"]}
    assert empty <= {"candidates"}  # no two of the demo model's experts are alike
    return finding


def rows(finding: Any, name: str) -> list[dict[str, Any]]:
    table = finding["tables"][name]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_expert_interference_of_the_demo_model(demo_trace, few_texts, tmp_path):
    finding = asked(
        "expert-interference", demo_trace, tmp_path / "out", k="1,2", text=str(few_texts), tokens=200
    )
    k = {row["k"]: row for row in rows(finding, "k")}
    assert sorted(k) == [1, 2, 4]
    assert k[1]["change_low"] > k[2]["change_high"] > k[4]["change"] == 0
    assert k[1]["kl"] > k[2]["kl"] > k[4]["kl"] == 0
    assert all(row["error_max"] < 5e-3 for row in rows(finding, "layers"))
    assert (tmp_path / "out/figures/expert-interference-k.png").is_file()
    # the published measure has no idea: texts with one expert are not shorter
    assert {row["k"] for row in rows(finding, "as_published_lengths")} == {1, 2, 4}


def test_expert_merging_of_the_demo_model(demo_trace, few_texts, tmp_path):
    kept = tmp_path / "kept.gguf"
    finding = asked(
        "expert-merging",
        demo_trace,
        tmp_path / "out",
        counts="24",
        criteria="prune,dominant,random",
        text=str(few_texts),
        tokens=64,
        null=0,
        pairs=100,
        kl=False,
        keep=str(kept),
    )
    assert "800 of 3,968 pairs" in finding["sentences"][0]
    curve = {row["criterion"]: row for row in rows(finding, "curve")}
    assert curve["prune"]["change_high"] < curve["random"]["change_low"]
    assert all(row["size"] < 0.85 and row["kl"] is None for row in curve.values())
    pairs = rows(finding, "pairs")
    assert len(pairs) == 3968
    assert sum(row["cosine_aligned"] is not None for row in pairs) == 800
    for row in rows(finding, "as_published"):
        assert row["pairs_compared_published_code"] == 0
        assert row["pairs_compared"] == 496
    with ModelFile(kept) as model:
        assert model.n_expert == 24
    texts = [json.loads(line) for line in few_texts.read_text().splitlines()]
    assert nll(kept, texts=texts)[0].mean() == pytest.approx(curve["prune"]["nll"], abs=1e-6)


def test_routing_manipulation_of_the_demo_model(demo_trace, tmp_path):
    finding = asked(
        "routing-manipulation",
        demo_trace,
        tmp_path / "out",
        targets=3,
        depth=1,
        budget=96,
        prompts=4,
        length=3,
    )
    success = {row["method"]: row for row in rows(finding, "success")}
    assert set(success) == {"random", "greedy", "beam"}
    edits = rows(finding, "edits")
    # what stands before an edit cannot change, up to near ties in another batch
    assert all(row["jaccard"] > 0.98 for row in edits if row["region"] == "before")
    assert all(row["jaccard"] < 0.98 for row in edits if row["region"] == "after" and row["layer"] == 7)
    # a text with a word more at its end: unchanged token by token, and "changed" in the published way
    assert not [row for row in edits if row["kind"] == "suffix" and row["region"] == "after"]
    assert len(rows(finding, "as_published_robustness")) == 32


def test_on_a_random_model_nothing_is_claimed(runtime, tmp_path):
    model = write_planted(tmp_path / "r.gguf", n_expert=8, n_expert_used=3, n_vocab=2048).path
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(line) + "\n" for line in distinct_tokens(6, 60, 2048, seed=1)))
    code = """
        import sys, json, moetrace
        from moetrace.findings import Subject, question
        from moetrace.synthetic import distinct_tokens
        model, folder, text = sys.argv[1:]
        trace = moetrace.capture(model, distinct_tokens(12, 80, 2048), folder + "/t.moet", n_threads=1,
                                 all_outputs=True, channels=["experts", "weights", "gate_input"])
        subject = Subject([trace], model=model, model_options={"n_threads": 1})
        merging = question("expert-merging")(counts="7", criteria="prune", null=199, text=text, kl=False)
        merging = merging.answer(subject)
        k = question("expert-interference")(k="2", text=text, kl=False, generate=0).answer(subject)
        layers, pairs = k.tables["layers"], k.tables["pairs"]
        print(json.dumps([len(merging.tables["candidates"]), float(merging.tables["pairs"]["p_family"].min()),
                          float(layers["q_value"].min()), len(pairs), float(pairs["p_family"].min()), list(k.caveats)]))
    """
    candidates, alike, gain, n_pairs, pair, caveats = ran(code, model, tmp_path, texts)
    assert candidates == 0
    assert n_pairs > 50
    # 4 layers each: by chance the least of four p-values is below .0125 in one run of twenty
    assert min(alike, gain, pair) > 0.0125
    assert any("--capture experts,weights,gate_input,tensor:ffn_moe_out-*" in caveat for caveat in caveats)


def test_a_trace_without_gate_inputs_says_which_channel(runtime, model_file, tmp_path):
    code = """
        import sys, json, moetrace
        from moetrace.findings import Subject, question
        trace = moetrace.capture(sys.argv[1], ["One prompt here."], sys.argv[2], n_threads=1)
        print(json.dumps([question(name)().ask(Subject([trace], model=sys.argv[1])).not_answered
                          for name in ("expert-merging", "expert-interference")]))
    """
    for missing in ran(code, model_file("qwen3moe"), tmp_path / "t.moet"):
        assert "has no gate_input" in missing
        assert "--capture experts,weights,gate_input" in missing


# -- files without the least important experts


@pytest.mark.slow
def test_pruned_by_what_experts_add_loses_less_than_at_random(runtime, tmp_path):
    """The written file has the kept experts' own bytes, and llama.cpp runs it."""
    code = """
        import sys
        from moetrace.__main__ import main
        model, trace, file, out = sys.argv[1:]
        assert main(["capture", "-m", model, "-f", out + "/p.jsonl", "-n", "16", "-t", "1",
                     "--capture", "experts,weights,outputs", "-o", trace]) == 0
        assert main(["prune", trace, "-m", model, "--keep", "24", "-t", "1", "--write", file, "-o", out,
                     "--text", out + "/text.jsonl"]) == 0
        print(1)
    """
    shutil.copyfile(prompts("domains"), tmp_path / "p.jsonl")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(prompts("heldout-text").read_text().splitlines()[::3]) + "\n")
    ran(code, demo_model(), tmp_path / "t.moet", tmp_path / "pruned.gguf", tmp_path)
    curve = pd.read_csv(tmp_path / "tables/pruning-curve.csv").set_index("criterion")
    assert set(curve.index) == {"count", "weight", "saliency", "contribution", "random"}
    assert (curve.drop(index="random")["change_high"] < curve.loc["random", "change_low"]).all()
    best = curve.drop(index="random")["change"].idxmin()
    kept = pd.read_csv(tmp_path / "tables/pruning-kept.csv").set_index(["criterion", "layer"])["experts"]
    with ModelFile(demo_model()) as before, ModelFile(tmp_path / "pruned.gguf") as after:
        assert after.n_expert == 24
        assert after.n_bytes == (tmp_path / "pruned.gguf").stat().st_size
        for layer in before.moe_layers:
            stays = [int(e) for e in kept[best, layer].split()]
            for name in ("ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight"):
                old, new = (file.stored(f"blk.{layer}.{name}")[0] for file in (before, after))
                np.testing.assert_array_equal(new, old[stays])
    was, now = nll(demo_model(), tmp_path / "pruned.gguf", texts=str(text)).mean(axis=1)
    assert now - was == pytest.approx(curve.loc[best, "change"], abs=1e-3)
