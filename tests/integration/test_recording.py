"""A recording's life around a server: wrappers, signals, full disks, starts that fail, captures that are cut short."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from running import TEXT, child_of

import moetrace
from moetrace.findings import Subject
from moetrace.host.client import Answer, ServerClient, drive
from moetrace.host.prompts import Prompt
from moetrace.host.runtime import preload_path
from moetrace.host.server import free_port
from moetrace.report.captured import captured
from moetrace.trace.record import RowFlag
from moetrace.trace.ring import process_alive
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

MOETRACE = [sys.executable, "-m", "moetrace"]


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MOETRACE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def until(condition: Callable[[], object], what: object = "") -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def keep(descriptor: int, path: Path) -> threading.Thread:
    """Write what comes out of a pipe or terminal to a file, until it ends."""
    path.touch()

    def copy() -> None:
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):  # a terminal ends with EIO
            while part := os.read(descriptor, 1 << 16):
                file.write(part)

    thread = threading.Thread(target=copy)
    thread.start()
    return thread


class Recorded:
    """``moetrace run`` of llama-server, perhaps in a wrapper; what it says is in a file."""

    def __init__(self, runtime, model: Path, folder: Path, *options: str, wrap=None, arguments=()) -> None:
        self.trace = folder / "t.moet"
        self.said = folder / "said"
        self.port = free_port()
        self.server = [str(runtime.tool("llama-server")), "-m", str(model), "--port", str(self.port)]
        self.server += ["-np", "1", "-c", "2048", "-t", "1", *arguments]
        line = [*MOETRACE, "run", "-o", str(self.trace), *options, "--"]
        line += self.server if wrap is None else wrap(self.server)
        self.run = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.run.stdout is not None
        self.reader = keep(self.run.stdout.fileno(), self.said)

    def ready(self) -> ServerClient:
        client = ServerClient(f"http://127.0.0.1:{self.port}", api_key="S3CRET")
        until(client.is_ready, self.said)
        return client

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    @property
    def told(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("moetrace:")]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.run.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        code = self.run.wait(60)
        self.reader.join(60)
        self.run.stdout.close()
        return code


@pytest.fixture
def recorded(runtime, model_file, tmp_path):
    """Return ``recorded(*options, wrap=..., arguments=...)``; what still runs at the end of the test is killed."""
    made: list[Recorded] = []

    def start(*options: str, **how) -> Recorded:
        made.append(Recorded(runtime, model_file("qwen3moe"), tmp_path, *options, **how))
        return made[-1]

    yield start
    for started in made:
        if started.run.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.run.pid, signal.SIGKILL)
            started.ended()


def ask(client: ServerClient, n: int = 2, start: int = 0) -> list[Answer]:
    prompts = [Prompt(id=str(i), text=TEXT[7 * i : 7 * i + 60], n_predict=4) for i in range(start, start + n)]
    return drive(client, prompts, settings={"temperature": 0.0, "cache_prompt": False})


def rows_of(trace: moetrace.Trace) -> int:
    return int(((trace.column("flags") & RowFlag.TRIAL) == 0).sum())


def computed(answers: list[Answer]) -> int:
    """Tokens that the server says it computed; the last of an answer never is."""
    return sum(len(a.prompt_tokens) - a.cached + len(a.tokens) - 1 for a in answers)


def listening(port: int) -> bool:
    return ServerClient(f"http://127.0.0.1:{port}").is_ready()


def test_a_shell_that_keeps_the_signal_to_itself(recorded):
    """GIVEN a server started by a shell WHEN moetrace gets SIGTERM THEN the server ends, recorded to its end."""
    started = recorded(wrap=lambda server: ["sh", "-c", " ".join(server) + "; true"])
    answers = ask(started.ready())
    assert started.end() == 128 + signal.SIGTERM
    assert not listening(started.port)
    assert rows_of(moetrace.open(started.trace)) == computed(answers)
    assert verify(started.trace).exit_code == 0
    assert "0 rows lost" in started.text


def test_a_server_that_is_left_behind(recorded):
    """GIVEN a script that leaves a server WHEN it ends THEN the server is recorded until it ends, which is said."""
    started = recorded(wrap=lambda server: ["sh", "-c", " ".join(server) + " &"])
    client = started.ready()
    until(lambda: any("runs on and is recorded" in line for line in started.told), started.said)
    answers = ask(client)
    assert started.run.poll() is None
    assert started.end() == 0
    assert not listening(started.port)
    assert rows_of(moetrace.open(started.trace)) == computed(answers)
    assert verify(started.trace).exit_code == 0


def test_an_environment_that_is_emptied(recorded):
    """GIVEN env -i before the server WHEN it runs THEN that is said at once, the server serves, no trace is left."""
    started = recorded(wrap=lambda server: ["env", "-i", *server])
    assert ask(started.ready())[0].tokens
    until(lambda: started.told, started.said)
    assert "runs without the tracer" in started.told[0]
    assert "env -i" in started.text
    assert started.end() == 1
    assert len(started.told) == 1
    assert not started.trace.exists()


@pytest.mark.parametrize("to", ["moetrace", "group", "terminal", "moetrace in a terminal"])
def test_an_interrupt_reaches_the_server_once(to, recorded, runtime, model_file, tmp_path):
    """GIVEN SIGINT to moetrace alone, to its group, or of a terminal THEN the server ends, as of one: cleanly."""
    if "terminal" in to:
        port = free_port()
        path = tmp_path / "t.moet"
        pid, terminal = pty.fork()
        if pid == 0:  # the child has the terminal, and is in its foreground
            server = [
                runtime.tool("llama-server"),
                "-m",
                model_file("qwen3moe"),
                "--port",
                str(port),
                *("-t", "1", "-c", "512", "-np", "1"),
            ]
            os.execv(sys.executable, [*MOETRACE, "run", "-o", str(path), "--", *map(str, server)])
        reader = keep(terminal, tmp_path / "said")
        until(lambda: listening(port))
        ask(ServerClient(f"http://127.0.0.1:{port}"))
        if to == "terminal":
            os.write(terminal, b"\x03")
        else:  # somebody else's `kill -INT`, which the server does not get
            os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (tmp_path / "said").read_text()
        reader.join(60)
        os.close(terminal)
        assert verify(path).exit_code == 0
        return
    started = recorded()
    ask(started.ready())
    if to == "group":
        os.killpg(started.run.pid, signal.SIGINT)
        assert started.ended() == 0
    else:
        assert started.end(signal.SIGINT) == 0
    assert "0 rows lost" in started.text
    assert verify(started.trace).exit_code == 0


def test_a_disk_that_fills_and_is_freed(recorded):
    """GIVEN files that may not grow for a while WHEN they may again THEN recording goes on; loss is counted."""
    started = recorded("--capture", "weights,logits", "--ring-size", "128KiB", "--block-ms", "200",
    )  # fmt: skip
    client = started.ready()
    server = child_of(started.run.pid)
    answers = ask(client)
    until(lambda: command("verify", started.trace).returncode == 0)  # the recorder has taken the context on
    _, hard = resource.prlimit(started.run.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(started.run.pid, resource.RLIMIT_FSIZE, (1024, hard))

    def noticed() -> bool:
        """A few rows more may still fit."""
        answers.extend([] if started.told else ask(client))
        return bool(started.told)

    until(noticed, started.said)
    assert "waits for the disk" in started.told[0]
    until(lambda: "waiting for the disk" in command("status", started.trace).stdout)
    assert command("verify", started.trace).returncode == 0
    resumed = command("resume", started.trace)
    assert resumed.returncode == 1
    assert "kill" not in resumed.stderr
    assert str(server) not in resumed.stderr
    answers += ask(client, 12)
    assert all(answer.tokens for answer in answers), "the server serves on"
    resource.prlimit(started.run.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: len(started.told) == 2, started.said)
    assert "recording goes on" in started.told[1]
    assert "recording" in command("status", started.trace).stdout
    after = ask(client, 3, start=40)
    assert process_alive(server)
    assert started.end() == 0
    trace = moetrace.open(started.trace)
    trial = len(trace) - rows_of(trace)
    assert trace.loss.rows_lost > 0
    assert rows_of(trace) + trace.loss.rows_lost == computed(answers + after)
    assert trial <= 4
    assert verify(started.trace).exit_code == 0
    # what was computed afterwards is here, token by token
    for answer, number in zip(after, trace.requests.index[-3:], strict=True):
        mine = trace.column("request") == number
        expected = [*answer.prompt_tokens, *answer.tokens[:-1]][answer.cached :]
        np.testing.assert_array_equal(trace.column("token")[mine], expected)


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_that_goes_away(how, recorded, tmp_path):
    started = recorded()
    client = started.ready()
    answers = ask(client)
    if how == "moved":
        started.trace.rename(tmp_path / "u.moet")
    else:
        subprocess.run(["rm", "-rf", started.trace], check=True)
    started.trace.mkdir()
    until(lambda: started.told, started.said)
    answers += ask(client, start=4)
    assert all(answer.tokens for answer in answers)
    if how == "moved":
        assert str(tmp_path / "u.moet") in started.told[0]
        assert started.end() == 0, started.text
        assert rows_of(moetrace.open(tmp_path / "u.moet")) == computed(answers)
        assert verify(tmp_path / "u.moet").exit_code == 0
        assert f"Wrote {tmp_path / 'u.moet'}" in started.text
    else:
        assert "deleted or replaced" in started.told[0]
        assert started.end() == 1
    assert list(started.trace.iterdir()) == []
    assert "Traceback" not in started.text


def test_keys_are_not_kept(recorded):
    started = recorded(arguments=["--api-key", "S3CRET"])
    ask(started.ready())
    assert started.end() == 0
    for path in started.trace.rglob("*"):
        assert not path.is_file() or b"S3CRET" not in path.read_bytes(), path
    assert "--api-key" in moetrace.open(started.trace).meta["command"]


def test_starts_that_fail_leave_nothing(runtime, model_file, tmp_path):
    """GIVEN a start that fails WHEN it is tried again rightly THEN the same name may be used."""
    path, log = tmp_path / "t.moet", tmp_path / "t.moet.log"
    log.write_text("what was there before\n")
    program = str(runtime.tool("llama-server"))
    with pytest.raises(moetrace.MoetraceError, match="ended with exit code") as e:
        moetrace.serve(model_file("qwen3moe"), output=path, program=program, arguments=["--nonsense"])
    assert "nonsense" in e.value.why
    assert "before" not in e.value.why
    assert not path.exists()
    assert log.read_text().startswith("what was there before\n")
    with moetrace.serve(
        model_file("qwen3moe"), output=path, program=program, arguments=["-np", "1", "-c", "512", "-t", "1"]
    ) as server:
        ask(server.client)
    before = log.read_bytes()
    with pytest.raises(moetrace.MoetraceError, match="exists"):
        moetrace.serve(model_file("qwen3moe"), output=path, program=program)
    assert log.read_bytes() == before
    victim, other = tmp_path / "victim", tmp_path / "u.moet"
    victim.write_text("precious")
    (tmp_path / "u.moet.log").symlink_to(victim)
    with pytest.raises(moetrace.MoetraceError, match="cannot write the log"):
        moetrace.serve(model_file("qwen3moe"), output=other, program=program)
    assert victim.read_text() == "precious"
    assert not other.exists()
    run = command(
        "run", "-o", other, "--", program, "-m", tmp_path / "no-such.gguf", "--port", str(free_port())
    )
    assert run.returncode != 0
    assert "it ended with exit code" in run.stderr or "refused what it saw" in run.stderr
    assert "shared library" not in run.stderr
    assert not other.exists()


def test_variables_that_nobody_gave_to_python(runtime, model_file, tmp_path):
    """GIVEN variables of commands in the environment WHEN Python records or evaluates THEN they change nothing."""
    model = model_file("qwen3moe")
    live = tmp_path / "live.moet"
    code = (
        "import moetrace, sys; model, folder, program = sys.argv[1:]\n"
        "with moetrace.Evaluator(model, context=64, n_batch=64) as e: e.evaluate(['Once upon a time ' * 20])\n"
        "trace = moetrace.capture(model, ['Once'], folder + '/capture.moet', n_threads=1)\n"
        "with moetrace.serve(model, output=folder + '/serve.moet', program=program,\n"
        "                    arguments=['-np', '1', '-c', '256', '-t', '1']) as server:\n"
        "    server.client.call('/completion', {'prompt': 'x', 'n_predict': 2})\n"
        "print(len(trace.layers), len(moetrace.open(folder + '/serve.moet').layers))\n"
    )
    variables = {"MOETRACE_TRACE": str(live), "MOETRACE_LAYERS": "0", "MOETRACE_PAUSED": "1"}
    variables |= {"MOETRACE_INTERVENTION": "7", "MOETRACE_CAPTURE": "logits"}
    live.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", code, model, tmp_path, runtime.tool("llama-server")],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    recorded, served = map(int, run.stdout.split())
    assert recorded == served > 1
    assert list(live.iterdir()) == []


def test_a_capture_that_is_cut_short_says_so(runtime, model_file, tmp_path):
    path, file = tmp_path / "t.moet", tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": TEXT[:100], "label": "a"}) + "\n" for _ in range(3000)))
    line = [
        *MOETRACE,
        "capture",
        "-m",
        model_file("qwen3moe"),
        "-f",
        file,
        "-o",
        path,
        "-n",
        "100",
        "-t",
        "1",
    ]
    run = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # who runs the tests in the background of a shell has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    labels = path / "labels.jsonl"
    until(lambda: labels.exists() and labels.read_bytes().count(b"\n") > 1)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGINT, error
    done = labels.read_bytes().count(b"\n")
    said = f"{done:,} of 3,000 prompts"
    assert moetrace.open(path).meta["asked"] == {"prompts": 3000, "done": done}
    for words in (["info"], ["verify"]):
        shown = command(*words, path)
        assert shown.returncode == 0
        assert said in shown.stdout, words
    with moetrace.open(path) as trace:
        remarks = captured(Subject([trace])).completeness
    assert [said in remark.text for remark in remarks if remark.weight == "warn"] == [True]


def test_calls_past_the_tracer(runtime, model_file, tmp_path):
    """GIVEN llama-cpp-python under moetrace run WHEN its rows have no request THEN that is said, and what to use."""
    code = (
        "import llama_cpp, sys\n"
        "m = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)\n"
        "m.eval(m.tokenize(b'hello there'))\n"
    )
    path = tmp_path / "t.moet"
    run = command("run", "-o", path, "--", sys.executable, "-c", code, model_file("qwen3moe"))
    assert run.returncode == 0, run.stderr
    for shown in (run.stderr, command("info", path).stdout, command("verify", path).stdout):
        assert "moetrace.capture" in shown
        assert "past the tracer" in shown
    assert (moetrace.open(path).column("request") == -1).all()


def test_a_program_without_experts(runtime, model_file, tmp_path):
    run = command(
        "run", "-o", tmp_path / "t.moet", "--", runtime.tool("llama-results"), "-m", model_file("llama-dense"),
        "-p", "Hello", "-t", "1", "-c", "256", "-o", tmp_path / "logits",
    )  # fmt: skip
    assert run.returncode == 1
    assert "has no experts" in run.stderr
    assert "statically" not in run.stderr
    assert "shared library" not in run.stderr
    assert not (tmp_path / "t.moet").exists()


def test_a_server_that_was_started_without_moetrace(runtime, model_file, tmp_path):
    """GIVEN LD_PRELOAD and a folder, as `preload-path --help` says WHEN resumed THEN it is a trace like any other."""
    trace, log = tmp_path / "t.moet", tmp_path / "server.log"
    trace.mkdir()
    port = free_port()
    environment = {**os.environ, "LD_PRELOAD": str(preload_path()), "MOETRACE_TRACE": str(trace)}
    serve = [
        runtime.tool("llama-server"),
        "-m",
        model_file("qwen3moe"),
        "--port",
        str(port),
        "-t",
        "1",
        "-np",
        "1",
    ]
    client = ServerClient(f"http://127.0.0.1:{port}")

    with log.open("wb") as stream:
        server = subprocess.Popen(serve, env=environment, stdout=stream, stderr=stream)
    try:
        until(client.is_ready)
        answers = ask(client)
        refused = command("info", trace)
        assert refused.returncode == 1
        assert f"moetrace resume {trace}" in refused.stderr
        resuming = subprocess.Popen(
            [sys.executable, "-m", "moetrace", "resume", str(trace)], stderr=subprocess.PIPE, text=True
        )
        assert resuming.stderr is not None
        assert "Recording" in resuming.stderr.readline()
        answers += ask(client, start=2)
    finally:
        server.terminate()
        server.wait(60)
    assert "0 rows lost" in resuming.communicate(timeout=60)[1]
    assert rows_of(moetrace.open(trace)) == computed(answers)
    assert verify(trace).exit_code == 0

    # nobody read while it ran: what the ring holds is recovered
    left = tmp_path / "left.moet"
    left.mkdir()
    with log.open("wb") as stream:
        server = subprocess.Popen(
            serve,
            env={**environment, "MOETRACE_TRACE": str(left)},
            stdout=stream,
            stderr=stream,
        )
    try:
        until(client.is_ready)
        answers = ask(client)
    finally:
        server.terminate()
        server.wait(60)
    recovered = command("recover", left)
    assert recovered.returncode == 0, recovered.stderr
    assert rows_of(moetrace.open(left)) == computed(answers)
    assert verify(left).exit_code == 0
