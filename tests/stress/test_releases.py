"""One build of moetrace against llama.cpp releases of two years: each is traced rightly, or refused with the reason.

`make releases` builds them into build/releases and tries all; where they were not built, the pinned one is tried
alone. ``MOETRACE_RELEASES`` names another folder that llama.cpp/releases.sh filled, or llama-server programs separated
by ``:``. What a whole run finds must be what llama.cpp/releases.json says; with ``MOETRACE_WRITE=1`` it is written
there, and from there into the tables of README.md and llama.cpp/README.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from identities import check_identity, last_tokens, prompts_of_mixed_length
from router_math import check_routing
from running import TEXT

import moetrace
from moetrace.errors import MoetraceError
from moetrace.host.client import Answer, ServerClient, drive
from moetrace.host.prompts import Prompt
from moetrace.host.runtime import loaded_libraries, probe
from moetrace.host.server import free_port
from moetrace.trace.record import State
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.stress, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "llama.cpp" / "releases.json"
SETTINGS = {"temperature": 0.0, "ignore_eos": True, "cache_prompt": True}
CHANNELS = "experts,weights,logits,scores,gate_input"
#: old and new, with a shared expert, with a router that has a bias, recurrent
NAMES = ["olmoe", "gpt-oss", "llama", "qwen2moe", "deepseek2-v2", "qwen3moe", "granitehybrid"]


@dataclass(frozen=True)
class Release:
    """A llama-server to try."""

    name: str
    program: Path

    def tool(self, name: str) -> Path:
        return self.program.with_name(name)


def releases() -> list[Release]:
    """Those that were built, oldest first as releases.txt has them, and the pinned one."""
    places = os.environ.get("MOETRACE_RELEASES", str(ROOT / "build" / "releases")).split(os.pathsep)
    found = {}
    for place in map(Path, places):
        for program in [place] if place.is_file() else place.glob("*/bin/llama-server"):
            name = re.sub(r"-(?=[^-]*$)", " ", program.parent.parent.name)
            found[name] = Release(name, program)
    ordered = [found.pop(name) for name, _ in stated_releases() if name in found]
    return [*found.values(), *ordered]


def stated_releases() -> list[tuple[str, str]]:
    """What releases.txt names: (name and version, month)."""
    lines = (ROOT / "llama.cpp" / "releases.txt").read_text().splitlines()
    parts = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [(name.replace("==", " "), month) for name, month in parts]


RELEASES = releases()
PINNED = (ROOT / "moetrace" / "host" / "pin.txt").read_text().strip().replace("==", " ")


def test_releases_were_built():
    if not RELEASES:
        pytest.skip("there is only the pinned llama.cpp; llama.cpp/releases.sh build/releases builds others")


@pytest.fixture(params=[*(r.name for r in RELEASES), PINNED], scope="module")
def release(request: pytest.FixtureRequest) -> Release:
    for one in RELEASES:
        if one.name == request.param:
            return one
    runtime = request.getfixturevalue("runtime")
    return Release(PINNED, runtime.tool("llama-server"))


#: what this run found, by release
results: dict[str, dict[str, Any]] = {}


def result_of(release: Release) -> dict[str, Any]:
    if release.name not in results:
        found = probe(loaded_libraries(release.program))
        source = release.program.parent.parent / "llama.cpp.txt"
        results[release.name] = {
            "release": release.name,
            "month": dict(stated_releases()).get(release.name, ""),
            "llama.cpp": source.read_text().strip() if source.is_file() else "",
            "ggml": found.ggml.partition(" (")[0] if found.ggml[:1].isdigit() else "",
            "requests": "announced" if found.symbols.get("llama_set_sampler") else "positions",
            "refused": found.error,
            "traced": [],
            "unknown": [],
            "broken": [],
            "attention": "",
        }
    return results[release.name]


# -- one architecture --------------------------------------------------------------------------------


def solo_prompts() -> list[Prompt]:
    return [Prompt(id=f"solo{i}", text=TEXT[70 * i : 70 * i + 60 + 9 * i], n_predict=16) for i in range(6)]


ARGUMENTS = ["-np", "4", "-c", "8192", "-ub", "32", "-t", "1"]


@contextlib.contextmanager
def untraced(
    release: Release, model: Path, log: Path, *arguments: str
) -> Iterator[tuple[Any, ServerClient | None]]:
    """A plain server and its client; no client if it ends before it is ready."""
    port = free_port()
    command = [release.program, "-m", model, "--port", str(port), *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        client = ServerClient(f"http://127.0.0.1:{port}")
        while not client.is_ready():
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            yield process, None
            return
        yield process, client
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(60)


def answer_alone(client: ServerClient) -> list[Answer]:
    """Greedy answers, one request at a time, nothing cached: the same arithmetic in every run."""
    settings = {**SETTINGS, "cache_prompt": False}
    return drive(client, solo_prompts(), n_parallel=1, settings=settings)


def with_tokens(client: ServerClient, trace: moetrace.Trace, answer: Answer) -> Answer:
    """The answer with its tokens: where the server does not give them, those of the rows that write out its text."""
    if answer.tokens or answer.n_generated == 0:
        return answer
    requests = trace.requests
    (number,) = requests.index[requests["id"] == answer.prompt.id]
    tokens = last_tokens(trace, number)[len(answer.prompt_tokens) - answer.cached :]
    written = client.call("/detokenize", {"tokens": tokens})["content"]
    assert len(tokens) == answer.n_generated - 1
    assert answer.text.startswith(written)
    return dataclasses.replace(answer, tokens=(*tokens, -1))  # the last one was never decoded


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_traced_rightly(release, name, size, model_file, tmp_path):
    if NAMES.index(name) >= size("models_of_each_release"):
        pytest.skip("tried in `make stress`")
    model = model_file(name)
    log = tmp_path / "plain.log"
    with untraced(release, model, log, *ARGUMENTS) as (plain, client):
        if client is None:
            assert "error loading model" in log.read_text(errors="replace"), log.read_text()[-2000:]
            result_of(release)["unknown"].append(name)
            pytest.skip(f"{release.name} does not load {name}")
        texts = [answer.text for answer in answer_alone(client)]
        try:
            drive(client, prompts_of_mixed_length(20), settings=SETTINGS)
        except MoetraceError:
            plain.wait(60)
            assert "GGML_ASSERT" in log.read_text(errors="replace")
            result_of(release)["broken"].append(name)
            pytest.skip(f"{release.name}'s own server ends on requests that overlap, with {name}")
    assert len(set(texts)) > 4, "a model that always says the same would prove nothing"

    for collector in ("tap", "callback"):
        path = tmp_path / f"{collector}.moet"
        with moetrace.serve(
            model,
            output=path,
            arguments=ARGUMENTS,
            collector=collector,
            channels=CHANNELS,
            program=str(release.program),
        ) as server:
            alone = answer_alone(server.client)
            answers = alone + drive(server.client, prompts_of_mixed_length(20), settings=SETTINGS)
            server.label([answer.label_line() for answer in answers])
            with server.trace as live:
                answers = [with_tokens(server.client, live, answer) for answer in answers]
        assert [answer.text for answer in alone] == texts
        with moetrace.open(path) as trace:
            assert trace.meta["exit_code"] == plain.returncode
            assert trace.facts["collector"] == collector
            assert trace.loss.rows_lost == trace.loss.lost == 0
            check_identity(trace, answers)
            step, sequence = trace.column("step"), trace.column("sequence")
            assert max(len(set(sequence[step == s])) for s in np.unique(step)) > 1, "no requests overlapped"
            check_routing(trace, name, model)
        assert verify(path).exit_code == 0
    result_of(release)["traced"].append(name)


# -- what else a release has -------------------------------------------------------------------------


def test_rejected_drafts_are_no_requests(release, model_file, tmp_path):
    """A model that drafts badly: every request is one request, and what stands at its end are its tokens."""
    options = subprocess.run([release.program, "--help"], capture_output=True, text=True, check=False).stdout
    if "--model-draft" not in options:
        pytest.skip(f"{release.name}'s server does not draft")
    n_max = "--spec-draft-n-max" if "--spec-draft-n-max" in options else "--draft-max"
    arguments = ["-md", str(model_file("olmoe", seed=7)), n_max, "4", "--draft-p-min", "0"]
    if "draft-simple" in options:
        arguments += ["--spec-type", "draft-simple"]
    path = tmp_path / "t.moet"
    prompts = [Prompt(id=str(i), text=TEXT[90 * i : 90 * i + 80], n_predict=24) for i in range(8)]
    with moetrace.serve(
        model_file("olmoe"),
        output=path,
        arguments=["-np", "2", "-c", "2048", "-t", "1", *arguments],
        program=str(release.program),
    ) as server:
        answers = drive(
            server.client, prompts, settings=SETTINGS
        )  # the cache is on: old servers draft only then
        server.label([answer.label_line() for answer in answers])
    assert verify(path).exit_code == 0
    with moetrace.open(path) as trace:
        assert trace.facts["role"] == "main"
        assert len(trace.requests) == len(prompts)
        assert trace.requests["n_rejected"].sum() > trace.requests["n_decode"].sum() / 4
        for answer in answers:
            (number,) = trace.requests.index[trace.requests["id"] == answer.prompt.id]
            tokens = [*answer.prompt_tokens, *answer.tokens][answer.cached : -1]
            assert last_tokens(trace, number)[: len(tokens)] == tokens


def test_counts_equal_those_of_the_releases_imatrix(release, model_file, tmp_path):
    """llama-imatrix of the same release counts every expert's rows by itself."""
    program = release.tool("llama-imatrix")
    if not program.is_file():
        pytest.skip(f"{release.name} has no llama-imatrix")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 6)
    path, out = tmp_path / "t.moet", tmp_path / "out.gguf"
    command = [program, "-m", model_file("olmoe"), "-f", text, "-o", out, "-c", "256", "-t", "1"]
    options = [sys.executable, "-m", "moetrace", "run", "-o", path, "--"]
    run = subprocess.run([*options, *command], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert verify(path).exit_code == 0
    with out.open("rb") as file:
        if file.read(4) != b"GGUF":
            pytest.skip(f"{release.name}'s llama-imatrix writes no counts")
    counts = {t.name: np.asarray(t.data).ravel() for t in gguf.GGUFReader(out).tensors}
    with moetrace.open(path) as trace:
        rows = (trace.column("flags") & 64) == 0
        for i, layer in enumerate(trace.layers):
            present = rows & (np.asarray(trace.state)[:, i] == State.PRESENT)
            ids = np.asarray(trace.experts)[present, i]
            used = np.bincount(ids.ravel(), minlength=trace.n_expert[i])
            assert used.sum() > 1000
            np.testing.assert_array_equal(counts[f"blk.{layer}.ffn_down_exps.weight.counts"], used)


def test_attention_rows_are_whole(release, model_file, tmp_path):
    """Every row has a weight for each key before it, and says at which positions these are, or that it cannot."""
    options = subprocess.run([release.program, "--help"], capture_output=True, text=True, check=False).stdout
    # before it could be said, it was off unless asked for
    off = ["-fa", "off"] if re.search(r"--flash-attn\W+on\b", options) else []
    path = tmp_path / "t.moet"
    with moetrace.serve(
        model_file("olmoe"),
        output=path,
        arguments=[*ARGUMENTS, *off],
        channels="experts,attention",
        program=str(release.program),
    ) as server:
        drive(server.client, solo_prompts(), settings=SETTINGS)
    assert verify(path).exit_code == 0
    firsts = set()
    with moetrace.open(path) as trace:
        rows = np.flatnonzero(trace.column("request") >= 0)
        serial, position = trace.column("serial")[rows], trace.column("position")[rows]
        for one, at in zip(serial.tolist(), position.tolist(), strict=True):
            for layer in trace.layers.tolist():
                found = trace.attention.row(one, layer)
                assert found is not None
                weights, first = found
                assert weights.shape == (4, at + 1)
                np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
                firsts.add(first)
    assert len(rows) > 300
    assert firsts in ({0}, {-1})
    result_of(release)["attention"] = "by position" if firsts == {0} else "in the cache's order"


def test_doctor_says_yes_or_why_not(release):
    command = [sys.executable, "-m", "moetrace", "doctor", "--", release.program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in run.stderr
    if refused := result_of(release)["refused"]:
        assert run.returncode == 1
        assert refused in run.stderr
        assert "fix:" in run.stderr
    else:
        assert run.returncode == 0, run.stderr
        assert "it can be traced" in run.stdout
        by_positions = result_of(release)["requests"] == "positions"
        assert ("llama_set_sampler" in run.stdout) == by_positions


@pytest.mark.parametrize("collector", ["tap", "callback"])
def test_interventions_hold(release, collector, model_file, tmp_path):
    """An ablated expert is never used and a forced one always, while they are; before and after, text is the same."""
    path = tmp_path / "t.moet"
    with moetrace.serve(
        model_file("olmoe"),
        output=path,
        arguments=ARGUMENTS,
        collector=collector,
        program=str(release.program),
    ) as server:
        before = [answer.text for answer in answer_alone(server.client)]
        with server.intervene("ablate:*:3", "force:*:5"):
            drive(server.client, prompts_of_mixed_length(12), settings=SETTINGS)
        after = [answer.text for answer in answer_alone(server.client)]
    assert verify(path).exit_code == 0
    assert before == after
    with moetrace.open(path) as trace:
        changed, ids = np.asarray(trace.intervened), np.asarray(trace.experts)
        there = (np.asarray(trace.state) == State.PRESENT)[:, :, None]
        assert changed.sum() > 100
        assert not ((ids == 3) & there)[changed].any()
        assert ((ids == 5).any(axis=2) | ~there[:, :, 0])[changed].all()
        assert ((ids == 3) & there)[~changed].any()
        assert not ((ids == 5).any(axis=2) | ~there[:, :, 0])[~changed].all()


def test_the_tables_say_what_was_found(release, figures):
    """Last of all: what this run found, against what the READMEs say."""
    found = result_of(release)
    if release.name not in dict(stated_releases()):
        pytest.skip(f"{release.name} is not in releases.txt: it has no line in the tables")
    if {*found["traced"], *found["unknown"], *found["broken"]} != set(NAMES):
        pytest.skip("not every model was tried in this run, or one of them failed")
    assert found["refused"] or len(found["traced"]) >= 3
    n_failed = len(found["unknown"]) + len(found["broken"])
    figures(
        "releases",
        **{found["release"]: f"{len(found['traced'])} models traced rightly, {n_failed} it cannot serve"},
    )
    stored = {one["release"]: one for one in json.loads(FOUND.read_text())} if FOUND.is_file() else {}
    if os.environ.get("MOETRACE_WRITE"):
        stored = {name: one for name, one in stored.items() if one.keys() == found.keys()} | {
            release.name: found
        }
        ranked = [stored[name] for name, _ in stated_releases() if name in stored]
        FOUND.write_text(json.dumps(ranked, indent=2) + "\n")
        subprocess.run([sys.executable, ROOT / "llama.cpp" / "table.py"], check=True)
    else:
        assert stored.get(found["release"]) == found, "MOETRACE_WRITE=1 writes it"
