"""A live llama-server under the tracer: who is every row, and is the server unharmed?"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from identities import check_identity, prompts_of_mixed_length
from running import TEXT, child_of, ready_client, start_run

import moetrace
from moetrace.host.client import drive
from moetrace.host.prompts import Prompt
from moetrace.host.server import free_port
from moetrace.trace.record import RowFlag
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.runtime, pytest.mark.host("llama-server")]


@pytest.mark.parametrize("collector", ["tap", "callback"])
@pytest.mark.parametrize("cache", ["-kvu", "-no-kvu"])
@pytest.mark.parametrize("name", ["qwen3moe", "granitehybrid"])
def test_every_row_belongs_to_its_request(name, cache, collector, runtime, model_file, tmp_path):
    prompts = prompts_of_mixed_length(40)
    arguments = ["-np", "4", "-c", "8192", "-ub", "32", "-t", "1", cache]
    path = tmp_path / "t.moet"
    with moetrace.serve(
        model_file(name),
        output=path,
        arguments=arguments,
        collector=collector,
        program=str(runtime.tool("llama-server")),
    ) as server:
        answers = drive(server.client, prompts)
        server.label([answer.label_line() for answer in answers])
        live = server.trace
        assert live.live
        assert len(live) > 0
        assert len(live.requests) >= len(prompts) - 4
    trace = moetrace.open(path)
    assert not trace.live
    check_identity(trace, answers)
    assert verify(path).exit_code == 0
    # requests did overlap: ubatches with several slots
    step, sequence = trace.column("step"), trace.column("sequence")
    several = [len(set(sequence[step == s])) for s in np.unique(step)]
    assert max(several) > 1
    assert trace.loss.rows_lost == 0


ALL_CHANNELS = "experts,weights,logits,scores,gate_input,outputs"


@pytest.fixture(scope="module")
def untraced_texts(runtime, model_file):
    """Greedy answers of a plain server to 50 prompts, one at a time."""
    return texts_of(runtime, model_file("gpt-oss"), None)


def fifty_prompts() -> list[Prompt]:
    return [Prompt(id=str(i), text=TEXT[7 * i : 7 * i + 30 + i]) for i in range(50)]


def texts_of(runtime, model: Path, trace: Path | None, **options) -> list[str]:
    arguments = ["-np", "1", "-c", "1024", "-t", "1", "-fa", "off"]
    settings = {"temperature": 0.0, "ignore_eos": True}
    program = str(runtime.tool("llama-server"))
    if trace is not None:
        with moetrace.serve(model, output=trace, arguments=arguments, program=program, **options) as server:
            answers = drive(server.client, fifty_prompts(), n_predict=12, settings=settings)
    else:
        port = free_port()
        command = [program, "-m", model, "--port", str(port), *arguments]
        plain = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            client = ready_client(plain, port)
            answers = drive(client, fifty_prompts(), n_predict=12, settings=settings)
        finally:
            plain.terminate()
            plain.wait(30)
    return [answer.text for answer in answers]


@pytest.mark.parametrize(
    ("collector", "channels"),
    [
        ("tap", "experts,weights"),
        ("tap", ALL_CHANNELS),
        ("callback", "experts,weights"),
        ("callback", f"{ALL_CHANNELS},attention,tensor:l_out-*"),
    ],
)
def test_text_is_the_same_with_and_without_the_tracer(
    collector, channels, runtime, model_file, tmp_path, untraced_texts
):
    path = tmp_path / "t.moet"
    texts = texts_of(runtime, model_file("gpt-oss"), path, collector=collector, channels=channels)
    assert len(set(untraced_texts)) > 40, "a model that always says the same would prove nothing"
    assert texts == untraced_texts
    assert moetrace.open(path).loss.rows_lost == 0


def test_pausing_and_resuming_a_live_server(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    prompts = [Prompt(id=str(i), text=TEXT[50 * i : 50 * i + 60], n_predict=5) for i in range(6)]

    def control(word: str) -> str:
        command = [sys.executable, "-m", "moetrace", word, path]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return run.stdout

    with moetrace.serve(
        model_file("qwen3moe"),
        output=path,
        arguments=["-np", "1", "-c", "1024", "-t", "1"],
        program=str(runtime.tool("llama-server")),
        paused=True,
    ) as server:
        answers = drive(server.client, prompts[:2])
        assert "paused" in control("status")
        control("start")
        recorded = drive(server.client, prompts[2:4])
        assert "recording" in control("status")
        control("stop")
        answers += drive(server.client, prompts[4:])
        server.label([answer.label_line() for answer in recorded])
    trace = moetrace.open(path)
    assert sorted(trace.requests["id"].dropna()) == ["2", "3"]
    n_recorded = sum(len(a.prompt_tokens) - a.cached + len(a.tokens) - 1 for a in recorded)
    assert (trace.column("request") >= 0).sum() == n_recorded
    n_paused = sum(len(a.prompt_tokens) - a.cached + len(a.tokens) - 1 for a in answers)
    assert trace.counters["rows_paused"] >= n_paused  # and llama.cpp's own trial batches
    assert verify(path).exit_code == 0
    ended = subprocess.run(
        [sys.executable, "-m", "moetrace", "status", path], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "fix:" in ended.stderr


def test_run_passes_signals_and_the_exit_code_on(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    run, client = start_run(runtime, model_file("qwen3moe"), path)
    drive(client, prompts_of_mixed_length(3))
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0  # llama-server ends cleanly on SIGTERM
    error = path.with_suffix(".err").read_text()
    assert "0 rows lost" in error
    assert re.search(rf"Next: .*moetrace info {re.escape(str(path))}", error)
    assert moetrace.open(path).meta["exit_code"] == 0
    assert verify(path).exit_code == 0


def test_killing_the_server_keeps_every_committed_row(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    run, client = start_run(runtime, model_file("qwen3moe"), path)
    answers = drive(client, prompts_of_mixed_length(6))
    os.kill(child_of(run.pid), signal.SIGKILL)
    assert run.wait(60) == 128 + signal.SIGKILL
    trace = moetrace.open(path)
    expected = sum(len(a.prompt_tokens) - a.cached + len(a.tokens) - 1 for a in answers)
    assert (trace.column("request") >= 0).sum() == expected
    assert verify(path).exit_code == 0


def test_killing_moetrace_leaves_the_server_serving(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    run, client = start_run(runtime, model_file("qwen3moe"), path, "--block-ms", "300")
    first = drive(client, prompts_of_mixed_length(4))
    server = child_of(run.pid)
    run.kill()
    run.wait(30)
    try:
        second = drive(client, prompts_of_mixed_length(4, seed=1))
        assert all(answer.tokens for answer in second)
    finally:
        os.kill(server, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while (
        Path(f"/proc/{server}/status").exists() and "zombie" not in Path(f"/proc/{server}/status").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    recover = subprocess.run(
        [sys.executable, "-m", "moetrace", "recover", path], capture_output=True, text=True, check=False
    )
    assert recover.returncode == 0, recover.stderr
    trace = moetrace.open(path)
    expected = sum(len(a.prompt_tokens) - a.cached + len(a.tokens) - 1 for a in first + second)
    assert (trace.column("request") >= 0).sum() == expected  # all of it was in the ring
    assert verify(path).exit_code == 0


def test_a_full_disk_stops_the_recording_and_not_the_server(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"

    def limit() -> None:  # no file beyond 200 kB; the ring is smaller
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    port = free_port()
    server = [runtime.tool("llama-server"), "-m", model_file("qwen3moe"), "--port", str(port), "-np", "1"]
    options = ["--capture", "weights,logits", "--ring-size", "128KiB", "--block-ms", "300"]
    command = [
        sys.executable,
        "-m",
        "moetrace",
        "run",
        "-o",
        path,
        *options,
        "--",
        *server,
        "-c",
        "2048",
        "-t",
        "1",
    ]
    with path.with_suffix(".err").open("wb") as error:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error, preexec_fn=limit)
    client = ready_client(run, port, path.with_suffix(".err"))
    prompts = [Prompt(id=str(i), text=TEXT[i:], n_predict=3) for i in range(6)]
    answers = drive(client, prompts, settings={"temperature": 0.0, "cache_prompt": False})
    assert all(answer.tokens for answer in answers)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 1
    error = path.with_suffix(".err").read_text()
    assert error.count("moetrace:") == 2  # when it happened, and at the end: what to do about it
    assert "moetrace recover" in error
    assert "fix:" in error
    assert "Traceback" not in error
    recover = subprocess.run(
        [sys.executable, "-m", "moetrace", "recover", path], capture_output=True, check=False
    )
    assert recover.returncode == 0, recover.stderr
    trace = moetrace.open(path)
    computed = sum(len(a.prompt_tokens) + len(a.tokens) - 1 for a in answers)
    trial = (trace.column("flags") & RowFlag.TRIAL) != 0
    assert trace.counters["rows_produced"] == computed + trial.sum()
    assert trace.loss.rows_lost == trace.counters["rows_produced"] - len(trace) > 0
    assert len(trace) > 500
    assert verify(path).exit_code == 0


@pytest.mark.parametrize("policy", ["block", "drop", "overwrite"])
def test_a_full_ring_follows_its_policy_and_counts(policy, runtime, model_file, tmp_path):
    """A ring of 64 KiB and nobody who reads: the server goes on, and what was lost is counted exactly."""
    path = tmp_path / "t.moet"
    path.mkdir()
    port = free_port()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(moetrace_library()),
        "MOETRACE_TRACE": str(path),
        "MOETRACE_ON_FULL": policy,
        "MOETRACE_RING_SIZE": str(1 << 16),
        "MOETRACE_BLOCK_MS": "200",
    }
    command = [runtime.tool("llama-server"), "-m", model_file("qwen3moe"), "--port", str(port)]
    server = subprocess.Popen(
        [*command, "-np", "1", "-c", "2048", "-t", "1"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = ready_client(server, port)
        answers = drive(client, [Prompt(id=str(i), text=TEXT, n_predict=3) for i in range(3)])
    finally:
        server.terminate()
        assert server.wait(30) == 0
    computed = sum(len(a.prompt_tokens) - a.cached + len(a.tokens) - 1 for a in answers)
    from moetrace.trace.ring import Ring

    with Ring(path / "ctx0" / "ring") as ring:
        n = ring.counters
        trial = n["rows_produced"] - computed
        assert 0 <= trial <= 4
        assert n["rows_produced"] == n["rows_committed"] + n["rows_lost_full"]
        if policy == "overwrite":
            assert n["rows_lost_full"] == 0
            assert ring.head > ring.capacity
            assert n["rows_overwritten"] + n["events_overwritten"] == ring.head - ring.capacity
        else:
            assert n["rows_lost_full"] > 0
            assert ring.head == ring.capacity
            assert n["rows_committed"] + n["events_committed"] == ring.capacity
        assert (n["wait_ns"] > 0) == (policy == "block")


def moetrace_library() -> Path:
    from moetrace.host.runtime import preload_path

    return preload_path()


def test_run_refuses_with_a_reason(runtime, model_file, tmp_path):
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moetrace", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("not a trace")
    static = tmp_path / "static"
    static.write_bytes(b"\x7fELF of a program that has ggml_backend_sched inside")
    cases = [
        (["run", "-o", tmp_path / "a.moet"], 2, "what should run"),
        (["run", "-o", tmp_path / "a.moet", "--", "no-such-server"], 1, "not found"),
        (["run", "-o", taken, "--force", "--", runtime.tool("llama-server")], 1, "never overwritten"),
        (["run", "-o", tmp_path / "b.moet", "--capture", "wieghts", "--", "llama-server"], 2, "wieghts"),
        (["run", "-o", tmp_path / "b.moet", "--layers", "3-x", "--", "llama-server"], 2, "0-5,23"),
        (["run", "-o", tmp_path / "c.moet", "--", "/bin/true"], 1, "llama.cpp's libraries"),
        (["drive", "-f", tmp_path / "none.jsonl"], 1, "cannot read"),
        (["doctor", "--", static], 1, "BUILD_SHARED_LIBS"),
        (["status", tmp_path / "nothing"], 1, "not being recorded"),
    ]
    for arguments, code, text in cases:
        result = run(*arguments)
        assert result.returncode == code, (arguments, result.stderr)
        assert text in result.stderr, (arguments, result.stderr)
        assert "fix:" in result.stderr
        assert "Traceback" not in result.stderr
    assert (taken / "mine.txt").read_text() == "not a trace"

    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"promt": "y"}) + "\n")
    result = run("drive", "-f", bad)
    assert result.returncode == 1
    assert "line 2" in result.stderr

    # a port that is taken: the server's own message and exit code, and a trace that says that nothing was
    # seen
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        server = [runtime.tool("llama-server"), "-m", model_file("qwen3moe"), "--port", port, "-t", "1"]
        result = run("run", "-o", tmp_path / "d.moet", "--", *server)
    assert result.returncode != 0
    assert "bind" in result.stderr or "port" in result.stderr


def test_doctor_approves_of_the_runtime(runtime):
    command = [sys.executable, "-m", "moetrace", "doctor", "--", runtime.tool("llama-server")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "it can be traced" in result.stdout
