"""Models in several parts, as llama.cpp's own tool cuts them: served, intervened on, and read whole."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running import TEXT, python

import moetrace
from moetrace.analysis.experts.merging import drop_experts, merge
from moetrace.findings import Subject, question
from moetrace.host.client import drive
from moetrace.host.prompts import Prompt
from moetrace.model.file import ModelFile
from moetrace.model.merged import write_merged
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime


def split(tool: Path, model: Path, folder: Path, *options: str) -> list[Path]:
    folder.mkdir()
    command = [tool, "--split", "--split-max-tensors", "20", *options, model, folder / "model"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    parts = sorted(folder.glob("model-*-of-*.gguf"))
    assert len(parts) > 2
    return parts


@pytest.fixture(scope="module")
def whole(model_file) -> Path:
    return model_file("gpt-oss", n_embd=64, n_ff_expert=64, quantization="Q8_0")


@pytest.mark.parametrize("options", [(), ("--no-tensor-first-split",)], ids=["", "no-tensor-first"])
def test_every_part_gives_what_the_whole_gives(options, runtime, whole, tmp_path):
    parts = split(runtime.tool("llama-gguf-split"), whole, tmp_path / "parts", *options)
    with ModelFile(whole) as expected:
        for part in parts:
            with ModelFile(part) as file:
                assert file.parts == tuple(parts)
                assert sorted(file.tensor_names) == sorted(expected.tensor_names)
                for name in file.tensor_names:
                    np.testing.assert_array_equal(file.stored(name)[0], expected.stored(name)[0])
                assert file.vocabulary == expected.vocabulary
                assert [file.expert_bytes(n) for n in file.moe_layers] == [
                    expected.expert_bytes(n) for n in expected.moe_layers
                ]


def test_served_from_parts(runtime, whole, tmp_path):
    """GIVEN a model in parts WHEN served with an expert of its last layer ablated THEN it is never used."""
    parts = split(runtime.tool("llama-gguf-split"), whole, tmp_path / "parts")
    path = tmp_path / "t.moet"
    with ModelFile(whole) as file:
        last, n_expert = file.moe_layers[-1], file.n_expert
    with moetrace.serve(
        parts[0],
        output=path,
        intervene=f"ablate:{last}:3",
        arguments=["-np", "2", "-t", "1"],
        program=str(runtime.tool("llama-server")),
    ) as server:
        prompts = [Prompt(id=str(i), text=TEXT[50 * i : 50 * i + 200]) for i in range(6)]
        answers = drive(server.client, prompts, n_predict=8)
        server.label([answer.label_line() for answer in answers])
    assert verify(path).findings == ()
    tables = []
    with moetrace.open(path) as trace:
        assert trace.facts["model_path"] == str(parts[0])
        assert not (np.asarray(trace.sel(layer=last).experts) == 3).any()
        assert trace.vocabulary is not None
        for model in (whole, parts[1]):
            finding = question("expert-cache")().answer(Subject([trace], model=model))
            cache = finding.tables["cache"]
            tables.append(cache["memory_bytes"].max())
            np.testing.assert_allclose(cache["fetched_ms"], cache["fetched_bytes"] / 25e6)
    with ModelFile(whole) as file:
        assert tables[0] == tables[1] == sum(n_expert * file.expert_bytes(n) for n in file.moe_layers)


def test_a_file_with_fewer_experts_made_of_parts_runs(runtime, whole, tmp_path):
    parts = split(runtime.tool("llama-gguf-split"), whole, tmp_path / "parts")
    with ModelFile(whole) as file:
        groups = {n: drop_experts(np.arange(file.n_expert), file.n_expert - 2) for n in file.moe_layers}
    made = [
        write_merged(model, tmp_path / f"{i}.gguf", groups, merge=merge)
        for i, model in enumerate((whole, parts[-1]))
    ]
    result = python(
        """
        import sys, json
        from moetrace.host.evaluate import Evaluator
        out = []
        for model in sys.argv[2:]:
            with Evaluator(model, n_threads=1) as evaluator:
                out.append(evaluator.evaluate([sys.argv[1]]).nll.tolist())
        print(json.dumps(out))
        """,
        TEXT[:200],
        *(file.path for file in made),
    )
    assert result.returncode == 0, result.stderr
    one, two = json.loads(result.stdout.splitlines()[-1])
    assert one == two
    assert np.isfinite(one).all()
