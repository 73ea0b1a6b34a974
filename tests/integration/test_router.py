"""A router serves two models from one command: each has its own contexts, and unloading one does not end its story."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import moetrace_command, serving
from running import TEXT

import moetrace
from moetrace.__main__ import main
from moetrace.host.client import ServerClient
from moetrace.host.server import free_port
from moetrace.model.file import ModelFile
from moetrace.trace.trace import Trace
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime


@dataclass
class Recorded:
    """A recording of a router, and what an HTTP client sent and got: tokens of each request, by model."""

    path: Path
    files: dict[str, Path]
    sent: dict[str, list[list[int]]] = field(default_factory=lambda: {"one": [], "two": []})


def ask(client: ServerClient, recorded: Recorded, model: str, text: str, *, unrecorded: bool = False) -> None:
    tokens = client.call("/tokenize", {"model": model, "content": text, "add_special": True})["tokens"]
    body = {"model": model, "prompt": tokens, "n_predict": 6, "temperature": 0, "return_tokens": True}
    answer = client.call("/completion", {**body, "cache_prompt": False, "ignore_eos": True})
    if not unrecorded:
        recorded.sent[model].append([*tokens, *answer["tokens"][:-1]])  # the last one is never decoded


def moetrace_says(*words: str | Path) -> str:
    """Run a command that must work; gives what it prints."""
    run = subprocess.run([sys.executable, "-m", "moetrace", *map(str, words)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def recorded(runtime, model_file, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("router")
    (folder / "models").mkdir()
    files = {name: folder / "models" / f"{name}.gguf" for name in ("one", "two")}
    shutil.copy(model_file("olmoe"), files["one"])
    shutil.copy(model_file("qwen3moe"), files["two"])
    recorded = Recorded(folder / "t.moet", files)
    port = free_port()
    server = [runtime.tool("llama-server"), "--models-dir", folder / "models", "--host", "127.0.0.1"]
    arguments = ["--port", port, "-np", 2, "-c", 1024, "-t", 1]
    command = [sys.executable, "-m", "moetrace", "run", "-o", recorded.path, "--", *server, *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    try:
        client = ServerClient(f"http://127.0.0.1:{port}", timeout=120)
        deadline = time.monotonic() + 120
        while not client.is_ready():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for model, start in (("one", 0), ("two", 90), ("one", 200), ("two", 300)):
            ask(client, recorded, model, TEXT[start : start + 60])
        # what is set outlives the process that it was set in
        moetrace_says("intervene", recorded.path, "ablate:1:0", "--model", "one")
        moetrace_says("stop", recorded.path)
        ask(client, recorded, "one", TEXT[350:390], unrecorded=True)
        client.call("/models/unload", {"model": "one"})
        deadline = time.monotonic() + 60
        while any(m["status"]["value"] != "unloaded" for m in listed(client) if m["id"] == "one"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ask(client, recorded, "one", TEXT[360:390], unrecorded=True)
        assert "intervention 1 is in force" in moetrace_says("status", recorded.path)
        moetrace_says("start", recorded.path)
        for model, start in (("one", 400), ("two", 500)):
            ask(client, recorded, model, TEXT[start : start + 60])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return recorded


def listed(client: ServerClient) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = client.call("/models")["data"]
    return models


def check(trace: Trace, sent: list[list[int]]) -> None:
    """The requests of the trace, in order, are exactly what was sent and answered."""
    requests = trace.requests
    assert len(requests) == len(sent)
    request, token = trace.request, trace.token_ids
    for number, tokens in zip(requests.sort_values("start_ns").index, sent, strict=True):
        np.testing.assert_array_equal(token[request == number], tokens)
    assert trace.loss.complete


def test_a_model_must_be_chosen(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recorded.path)
    assert verify(path).exit_code == 0
    assert main(["verify", path]) == 0
    assert "in 3 contexts of 2 models" in capsys.readouterr().out
    for command in (["stats"], ["dump"], ["report"]):
        assert main([*command, path]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert all(word in said.err for word in ("ctx0", "ctx1", "ctx2", "olmoe", "qwen3moe", "--model"))
    chosen = ["--model", str(recorded.files["two"])]
    assert main(["stats", path, *chosen, "--only", "overview", "--phase", "all"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Nothing lost of what is shown" in " ".join(out.split())
    assert "is not shown: --context ctx0" in out


def test_unloading_a_model_leaves_one_story(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (moetrace.open(recorded.path, model=name) for name in ("one", "two"))
    assert (len(one.shown), len(two.shown)) == (2, 1)
    assert len({part.facts["pid"] for part in one.parts}) == 2
    check(one, recorded.sent["one"])
    check(two, recorded.sent["two"])
    assert one.requests["context"].nunique() == 2
    assert set(one.requests.loc[np.unique(one.request[one.intervened])]["context"]) == {one.shown[1]}
    assert int(one.intervened.sum()) == len(recorded.sent["one"][-1])
    assert len(one.left_out) == 1
    assert (
        main(["stats", str(recorded.path), "--model", str(recorded.files["one"]), "--only", "overview"]) == 0
    )
    assert "2 contexts of t.moet are taken together" in " ".join(capsys.readouterr().out.split())


def test_each_model_has_its_name_and_its_words(recorded: Recorded) -> None:
    for name in ("one", "two"):
        trace = moetrace.open(recorded.path, model=name)
        assert trace.shown == moetrace.open(recorded.path, model=str(recorded.files[name])).shown
        assert trace.facts["model_path"] == str(recorded.files[name])
        with ModelFile(recorded.files[name]) as file:
            assert trace.vocabulary == file.vocabulary


def test_names_for_one_file_and_contexts_of_other_sizes(runtime, model_file, tmp_path: Path) -> None:
    """GIVEN presets that give one file two names, and later other sizes WHEN served THEN it is one model with two
    names, whatever the size.
    """
    path, preset, model = tmp_path / "t.moet", tmp_path / "models.ini", model_file("olmoe")

    def write(*sizes: int) -> None:
        preset.write_text(
            "".join(
                f"[{name}]\nmodel = {model}\nc = {n}\nnp = 2\n" for name, n in zip("ab", sizes, strict=True)
            )
        )

    write(1024, 2048)
    sent: dict[str, list[list[int]]] = {"a": [], "b": []}
    recorded = Recorded(path, {}, sent)
    with serving(runtime, path, "--models-preset", preset) as port:
        client = ServerClient(f"http://127.0.0.1:{port}", timeout=120)
        ask(client, recorded, "a", TEXT[:60])
        ask(client, recorded, "b", TEXT[100:160])
        assert moetrace_command("intervene", path, "ablate:1:0-1", "--model", "b").returncode == 0
        ask(client, recorded, "a", TEXT[200:260])
        ask(client, recorded, "b", TEXT[300:360])
        assert moetrace_command("intervene", path, "off").returncode == 0
        client.call("/models/unload", {"model": "a"})
        write(4096, 2048)
        client.call("/models?reload=1")
        ask(client, recorded, "a", TEXT[400:460])
    assert verify(path).exit_code == 0
    for name, sizes in (("a", [1024, 4096]), ("b", [2048])):
        trace = moetrace.open(path, model=name)
        check(trace, sent[name])
        assert [part.facts["model"]["n_ctx"] for part in trace.parts] == sizes
        assert trace.intervened.any() == (name == "b")
    together = moetrace.open(path)
    assert len(together.shown) == 3
    assert len(together.requests) == 5


@pytest.mark.parametrize("other", ["olmoe", "gpt-oss"])
def test_two_servers_under_one_shell(other: str, runtime, model_file, tmp_path: Path) -> None:
    path, ports = tmp_path / "t.moet", [free_port(), free_port()]
    start = [
        f"{runtime.tool('llama-server')} -m {model} --host 127.0.0.1 --port {port} -t 1 -np 2 -c 1024 & {name}=$!; "
        for name, model, port in zip("ab", (model_file("olmoe"), model_file(other)), ports, strict=True)
    ]
    shell = f"trap 'kill $a $b' TERM; {''.join(start)} wait; wait"
    command = [sys.executable, "-m", "moetrace", "run", "-o", path, "--", "sh", "-c", shell]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    recorded = Recorded(path, {})
    try:
        clients = [ServerClient(f"http://127.0.0.1:{port}", timeout=120) for port in ports]
        deadline = time.monotonic() + 120
        while not all(client.is_ready() for client in clients):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for i, start_at in enumerate((0, 100, 200, 300)):
            model = ("one", "two")[i % 2]
            ask(clients[i % 2], recorded, model, TEXT[start_at : start_at + 60])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert verify(path).exit_code == 0
    if other == "olmoe":
        trace = moetrace.open(path)
        assert len(trace.shown) == 2
        one, two = recorded.sent["one"], recorded.sent["two"]
        check(trace, [one[0], two[0], one[1], two[1]])
    else:
        check(moetrace.open(path, model=str(model_file("olmoe"))), recorded.sent["one"])
        check(moetrace.open(path, model=str(model_file(other))), recorded.sent["two"])


def test_what_was_set_holds_for_models_that_are_loaded_later(runtime, model_file, tmp_path: Path) -> None:
    """GIVEN a model with a draft of the same model WHEN it is unloaded THEN the last word said of it counts, for it and
    not for its draft; and what was said of all counts for what was not loaded then.
    """
    path, preset, model = tmp_path / "t.moet", tmp_path / "models.ini", model_file("olmoe")
    drafts = f"model-draft = {model}\nspec-type = draft-simple\nspec-draft-n-max = 3\n"
    preset.write_text(
        f"[a]\nmodel = {model}\nc = 1024\nnp = 1\n{drafts}[b]\nmodel = {model_file('gpt-oss')}\nc = 1024\n"
    )
    recorded, secret = Recorded(path, {}, {"a": [], "b": []}), Recorded(path, {}, {"a": [], "b": []})

    def tell(*words: str) -> None:
        result = moetrace_command(words[0], path, *words[1:])
        assert result.returncode == 0, result.stderr

    with serving(runtime, path, "--models-preset", preset) as port:
        client = ServerClient(f"http://127.0.0.1:{port}", timeout=120)

        def unload(*models: str) -> None:
            for name in models:
                client.call("/models/unload", {"model": name})
            deadline = time.monotonic() + 60
            while any(m["status"]["value"] != "unloaded" for m in listed(client) if m["id"] in models):
                assert time.monotonic() < deadline
                time.sleep(0.05)

        ask(client, recorded, "a", TEXT[:60])
        tell("intervene", "ablate:1:0-1", "--model", "a")
        tell("stop", "--model", "a")
        unload("a")
        ask(client, secret, "a", TEXT[100:160])
        tell("start")
        ask(client, recorded, "a", TEXT[200:260])  # intervened on
        unload("a")
        tell("stop")
        ask(client, secret, "a", TEXT[300:360])
        ask(client, secret, "b", TEXT[300:360])
        unload("a", "b")
        tell("start")
        tell("intervene", "off")
        ask(client, recorded, "a", TEXT[400:460])
        ask(client, recorded, "b", TEXT[500:560])
    assert verify(path).exit_code == 0
    one, two = (moetrace.open(path, model=name) for name in "ab")
    check(two, recorded.sent["b"])
    assert len(one.requests) == 3
    touched = [
        bool(one.intervened[one.request == n].all()) for n in one.requests.sort_values("start_ns").index
    ]
    assert touched == [False, True, False]
    token = one.token_ids.tolist()
    for prompt in secret.sent["a"]:
        assert not any(token[i : i + 8] == prompt[:8] for i in range(len(token)))
    whole = moetrace.open(path, context=0)
    drafted = [whole.in_context(name) for name in whole.contexts]
    drafted = [part for part in drafted if part.facts["role"] == "draft"]
    assert len(drafted) > 1
    assert not any(part.intervened.any() for part in drafted)
    assert sum(len(part.requests) for part in drafted) == 3
