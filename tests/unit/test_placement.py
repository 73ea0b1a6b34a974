"""Which layers' experts to keep: bytes against counting by hand, and what is typed against the model's own tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moetrace import data
from moetrace.__main__ import main
from moetrace.analysis import RoutedText
from moetrace.analysis.placement.layers import choose_layers, compare_placements, layer_traffic
from moetrace.commands.demo import unpack
from moetrace.findings import placement
from moetrace.findings.placement import server_line
from moetrace.host.memory import MemoryUse, memory_use
from moetrace.model.file import ModelFile


def counted(
    experts: np.ndarray[Any, Any], owner: list[int], step: list[int], size: list[int]
) -> np.ndarray[Any, Any]:
    """Bytes read for each prompt and layer, token by token."""
    out = np.zeros((max(owner) + 1, experts.shape[1]))
    for t, (who, when) in enumerate(zip(owner, step, strict=True)):
        together = [u for u in range(len(step)) if step[u] == when]
        for layer in range(experts.shape[1]):
            distinct = {int(e) for u in together for e in experts[u, layer] if e < 8}
            out[who, layer] += len(distinct) * size[layer] / len(together)
        assert t >= 0
    return out


def test_bytes_are_those_of_distinct_experts_of_each_ubatch() -> None:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((12, 3, 8)), axis=2)[:, :, :2]
    experts[3, 2] = 255
    owner = [0] * 5 + [1] * 4 + [2] * 3
    step = [0, 0, 0, 1, 2, 3, 3, 4, 5, 5, 6, 2]
    text = RoutedText(experts.astype(np.uint8), np.array([0, 5, 9, 12]), 8)
    traffic = layer_traffic(text, step, [10, 20, 30])
    np.testing.assert_allclose(traffic.read, counted(experts, owner, step, [10, 20, 30]))
    assert traffic.tokens.tolist() == [5, 4, 3]
    whole = traffic.per_token([0, 1, 2])
    assert whole.low < traffic.read.sum() / 12 < whole.high


def test_layers_that_are_read_most_for_their_size_are_kept() -> None:
    assert choose_layers([5, 9, 1, 9], [10, 30, 10, 10], 25).tolist() == [0, 3]
    assert choose_layers([1, 1, 1], [10, 10, 10], 25).tolist() == [1, 2], "of equal ones the last, as -ncmoe"
    assert choose_layers([1, 1], [10, 10], 5).tolist() == []


def test_placements_are_compared_on_the_same_prompts() -> None:
    rng = np.random.default_rng(1)
    experts = np.argsort(rng.random((80, 4, 8)), axis=2)[:, :, :2]
    experts[:, 3, :] = (0, 1)  # the last layer has two experts only: a batch reads it for little
    text = RoutedText(experts.astype(np.uint8), np.arange(0, 81, 10), 8)
    step = np.repeat(np.arange(20), 4)
    table, kept = compare_placements(layer_traffic(text, step, [10] * 4), [80] * 4, 170)
    rows = table.set_index("placement")
    assert kept["last"].tolist() == [2, 3]
    assert kept["first"].tolist() == [0, 1]
    assert 3 not in kept["traffic"].tolist()
    assert rows.loc["last", "more_low"] > 0
    assert rows.loc["traffic", "left"] == rows["left"].drop("no layer").min()
    assert rows.loc["no layer", "left"] == rows["left"].max()
    assert rows["bytes"].tolist() == [160, 160, 160, 0]


@pytest.mark.parametrize(
    ("kept", "named", "on_cpu"),
    [([1, 4], True, [0, 2, 3, 5, 6, 7]), ([6, 7], False, [0, 1, 2, 3, 4, 5]), ([], False, list(range(8)))],
)
def test_what_is_typed_names_the_tensors_of_these_layers(
    kept: list[int], named: bool, on_cpu: list[int]
) -> None:
    """llama.cpp's own patterns: -ncmoe N is blk.0 to blk.N-1, -cmoe all."""
    line = server_line(kept, list(range(8)), named=named)
    exps = "ffn_(up|down|gate|gate_up)_(ch|)exps"
    if found := re.search(r"-ncmoe (\d+)", line):
        patterns = [rf"blk\.{n}\.{exps}" for n in range(int(found[1]))]
    elif "-cmoe" in line:
        patterns = [rf"\.{exps}"]
    else:
        patterns = [re.search(r'-ot "(.*)=CPU"', line)[1]]  # type: ignore[index]
    with ModelFile(data.demo_model()) as model:
        found_on_cpu = {
            int(name.split(".")[1])
            for name in model.tensor_names
            if any(re.search(p, name) for p in patterns)
        }
        assert all(
            "_exps" in name for name in model.tensor_names if any(re.search(p, name) for p in patterns)
        )
    assert sorted(found_on_cpu) == on_cpu
    assert server_line(list(range(8)), list(range(8)), named=False) == "-ngl 99"


def test_sizes_of_a_model_file() -> None:
    with ModelFile(data.demo_model()) as model:
        stored = {name: model.stored(name)[0].nbytes for name in model.tensor_names}
        experts = sum(size for name, size in stored.items() if "_exps" in name)
        assert sum(model.layer_expert_bytes(layer) for layer in model.moe_layers) == experts
        assert model.gpu_bytes_beside_experts == sum(stored.values()) - experts - stored["token_embd.weight"]
        # 8 layers, 4 heads of width 32 for keys and values, 2 bytes
        assert model.kv_bytes(100) == 100 * 8 * 2 * 4 * 32 * 2


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN no llama-fit-params."""
    monkeypatch.setattr(placement, "memory_use", lambda *_args, **_options: None)


@pytest.mark.usefixtures("no_account")
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(unpack(data.recorded_demo(), tmp_path))
    model = str(data.demo_model())
    line = ["place", trace, "-m", model, "-c", "512", "--reserve", "64KiB"]
    assert main([*line, "--vram", "5MiB", "-o", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "llama-server -m demo.gguf -c 512 -ngl 99 -ncmoe 6"
    assert "of experts per token stay with the CPU" in " ".join(out.split())
    assert (tmp_path / "o" / "figures" / "placement-by_layer.png").is_file()
    assert main([*line, "--vram", "1GiB"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("-c 512 -ngl 99")
    assert main([*line, "--vram", "2MiB"]) == 2
    assert "do not hold the model without any expert" in capsys.readouterr().err


@pytest.mark.usefixtures("no_account")
def test_a_cache_of_unknown_size_is_not_called_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GIVEN an architecture whose KV cache cannot be reckoned THEN that is said, and no 0 stands for it."""
    monkeypatch.setattr(ModelFile, "kv_bytes", lambda self, n: None)
    trace = str(unpack(data.recorded_demo(), tmp_path))
    line = ["place", trace, "-m", str(data.demo_model()), "--vram", "5MiB", "--reserve", "64KiB"]
    assert main([*line, "-o", str(tmp_path / "o")]) == 0
    assert "a KV cache of unknown size, which is not counted" in " ".join(capsys.readouterr().out.split())
    memory = pd.read_csv(tmp_path / "o" / "tables" / "placement-memory.csv").set_index("what")["bytes"]
    assert np.isnan(memory["KV cache"])
    assert main([*line, "--layers", "0-3"]) == 2
    assert "nothing is known of layers 4-7" in capsys.readouterr().err


def fake_tool(folder: Path, script: str) -> str:
    """A llama-server, and beside it a llama-fit-params that runs this."""
    for name, body in (("llama-server", "exit 1"), ("llama-fit-params", script)):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return str(folder / "llama-server")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo noise; echo 'CUDA0 100 40 300'; echo 'Host 900 0 12'",
            MemoryUse(("CUDA0",), 40 << 20, 300 << 20),
        ),
        (
            "echo 'CUDA0 (RTX 4090) 1 2 3 '; echo 'CUDA1 4 5 6 '; echo 'Host 7 8 9 '",
            MemoryUse(("CUDA0 (RTX 4090)", "CUDA1"), 15 << 20, 9 << 20),
        ),
        ("echo 'Host 7 8 9 '", MemoryUse((), 8 << 20, 9 << 20)),
        ("echo 'error: invalid argument: --fit-print' >&2; exit 1", None),
        ("echo '-c 4096 -ngl 99'", None),
        ("echo 'CUDA0 1 2 3'; exit 1", None),
    ],
)
def test_the_account_of_llama_cpp_is_read_or_there_is_none(
    script: str, expected: MemoryUse | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRACE_LLAMA_SERVER", fake_tool(tmp_path, script))
    assert memory_use("m.gguf", n_ctx=512, n_ubatch=512) == expected


def test_it_is_asked_with_what_will_be_typed_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'echo "$@" > {tmp_path}/asked; echo "CUDA0 1 3 5"; echo "Host 1 0 9"'
    monkeypatch.setenv("MOETRACE_LLAMA_SERVER", fake_tool(tmp_path, script))
    trace, model = str(unpack(data.recorded_demo(), tmp_path)), str(data.demo_model())
    line = [
        "place",
        trace,
        "-m",
        model,
        "-c",
        "512",
        "-ub",
        "64",
        "--reserve",
        "0",
        "-o",
        str(tmp_path / "o"),
    ]
    assert main([*line, "--vram", "12MiB"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("llama-server -m demo.gguf -c 512 -ub 64 -ngl 99 -ncmoe")
    assert "compute buffers of 5.0 MiB and a KV cache of 3.0 MiB" in out
    assert "what llama.cpp says of CUDA0" in out
    assert "-c 512 -b 64 -ub 64 -ngl 99 -cmoe" in (tmp_path / "asked").read_text()
    memory = pd.read_csv(tmp_path / "o" / "tables" / "placement-memory.csv").set_index("what")["bytes"]
    beside = memory["weights beside experts"] + (8 << 20)
    assert memory["room for experts"] == (12 << 20) - beside
