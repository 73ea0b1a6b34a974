"""SIGKILL at random instants: what was committed is recovered, once, and as it was written."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from actors import expected_rows
from scale import ROOT, Figures, Size

import moetrace
from moetrace.errors import MoetraceError, TraceError
from moetrace.host.client import ServerClient
from moetrace.host.server import free_port
from moetrace.trace.record import OnFull, RecordKind, RowFlag
from moetrace.trace.recover import recover
from moetrace.trace.ring import Ring, process_alive, ring_is_ready
from moetrace.trace.store import TraceStore
from moetrace.trace.verify import verify

pytestmark = pytest.mark.stress
PATIENCE = 60.0  # seconds; nothing here takes one


class Actor:
    """A process that plays a role; see actors.py."""

    def __init__(self, stage: Stage, number: int) -> None:
        self._stage, self._number = stage, number
        self.pid = int(self.hear("pid"))

    def hear(self, key: str) -> Any:
        """Wait until it says ``key``; an error that it says instead is raised."""
        deadline = time.monotonic() + PATIENCE
        told, last = self._stage.told[self._number], False
        while time.monotonic() < deadline:
            try:
                line = told.get(timeout=5 if last else 0.5)
            except queue.Empty:
                if last:
                    break
                last = key != "pid" and not process_alive(self.pid)  # what it said may still be on its way
                continue
            if "error" in line:
                raise MoetraceError(line["error"])
            if key in line:
                return line[key]
        raise AssertionError(f"a process never said {key!r}")

    def kill(self) -> None:
        kill(self.pid)


class Stage:
    """The process that forks the actors."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("actors.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip
        self.told: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            told = json.loads(line)
            self.told[told.pop("id")].put(told)

    def start(self, role: str, **order: Any) -> Actor:
        number = len(self.told)
        self.told[number] = queue.SimpleQueue()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, "role": role, **order}) + "\n")
        self.process.stdin.flush()
        return Actor(self, number)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self._listener.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def kill(pid: int) -> None:
    """Kill a process, if it still runs, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while process_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def ready(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ring_is_ready(path):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def unreleased(folder: Path, ring: Path) -> None:
    """A drain was killed: of what it had sealed, at most one block is still in the ring, and nothing is missing."""
    try:
        store = TraceStore(folder).context("ctx0")
    except TraceError:  # killed before it had listed the context: all is in the ring
        with Ring(ring) as opened:
            assert opened.tail == 0
        return
    blocks = [
        int(table.ledger["rows"][-1]) if len(table.ledger) else 0 for table in (store.events, store.rows)
    ]
    with Ring(ring) as opened:
        twice = store.events.n_rows + store.rows.n_rows - opened.tail
    assert twice in (0, blocks[0], blocks[1], sum(blocks)), (twice, blocks)


def check_rows(folder: Path, ring: Path) -> int:
    """Every committed row is there, once, as its serial wants it; gives how many."""
    assert verify(folder).findings == ()
    with Ring(ring) as opened:
        head, dropped = opened.head, opened.on_full == OnFull.OVERWRITE
    store = TraceStore(folder)
    if not store.context_names:
        assert head == 0
        return 0
    context = store.context("ctx0")
    rows = context.rows
    if not dropped:
        assert rows.n_rows + context.events.n_rows == head
    expected = expected_rows(np.asarray(rows["serial"]))
    for name in ("token", "position", "sequence", "batch", "flags", "experts", "weights"):
        np.testing.assert_array_equal(rows[name], expected[name], err_msg=name)
    if (
        rows.n_rows and int(rows["serial"][-1]) + 1 == rows.n_rows
    ):  # nothing lost: phases and requests are known
        np.testing.assert_array_equal(rows["phase"], expected["phase"])
        began = np.stack([expected["sequence"], expected["began"]])
        pairs, of_pair = np.unique(began, axis=1, return_inverse=True)
        request = np.asarray(rows["request"])
        first = np.unique(of_pair, return_index=True)[1]
        np.testing.assert_array_equal(request, request[first][of_pair.ravel()])
        assert len(np.unique(request)) == pairs.shape[1] == store.requests.n_rows
    return rows.n_rows


@pytest.mark.timeout(3600)
def test_native_hosts(stage: Stage, tmp_path: Path, size: Size, figures: Figures) -> None:
    """GIVEN the C++ producer and the drain WHEN either, both or a recovery is killed THEN nothing is lost or wrong."""
    wanted = size("kills_of_native_hosts")
    random = np.random.default_rng(2024)
    kills = {"host": 0, "drain": 0, "both": 0, "recovery": 0}
    n_rows = n_traces = 0
    while sum(kills.values()) < wanted:
        n_traces += 1
        folder, ring = tmp_path / f"{n_traces}.moet", tmp_path / f"{n_traces}.moet.ring"
        on_full = int(random.choice([OnFull.BLOCK] * 6 + [OnFull.DROP, OnFull.OVERWRITE]))
        host = stage.start(
            "host", folder=str(folder), seed=n_traces, on_full=on_full, capacity=int(random.choice([64, 512, 8192]))
        )  # fmt: skip
        recorder = stage.start("drain", folder=str(folder), host_pid=host.pid)
        kind = random.choice(["host", "drain", "both"])
        ready(ring)
        time.sleep(random.choice([0.02, 0.1, 0.7]) * random.random())
        if kind == "host":
            host.kill()
            kills["host"] += 1
            recorder.hear("done")
        elif kind == "drain":
            for _ in range(int(random.integers(1, 4))):
                recorder.kill()
                kills["drain"] += 1
                assert process_alive(host.pid)  # it goes on
                if on_full != OnFull.OVERWRITE:
                    unreleased(folder, ring)
                if not (folder / "meta.json").exists():
                    break
                recorder = stage.start("resume", folder=str(folder))
                time.sleep(0.2 * random.random())
            else:
                recorder.hear("resumed")
                if random.random() < 0.5:
                    Path(f"{folder}.enough").touch()
                else:
                    host.kill()
                    kills["host"] += 1
                recorder.hear("done")
        else:
            pair = [host.pid, recorder.pid]
            random.shuffle(pair)
            os.kill(pair[0], signal.SIGKILL)
            time.sleep(random.choice([0.0, 0.002]) * random.random())
            kill(pair[1])
            kill(pair[0])
            kills["both"] += 1
            if on_full != OnFull.OVERWRITE and (folder / "meta.json").exists():
                unreleased(folder, ring)
            while (folder / "meta.json").exists() and random.random() < 0.4:
                mender = stage.start("recover", folder=str(folder))
                time.sleep(0.03 * random.random())
                if process_alive(mender.pid):
                    mender.kill()
                    kills["recovery"] += 1
            if (folder / "meta.json").exists():
                recover(folder)
        if process_alive(host.pid):  # killed before there was a trace to go on with
            host.kill()
            continue
        if (folder / "meta.json").exists():
            n_rows += check_rows(folder, ring)
    figures(
        "kill",
        **{
            "SIGKILLs with the C++ producer as the host": f"{sum(kills.values()):,}: "
            + ", ".join(
                f"{n:,} of the {who}" if who != "both" else f"{n:,} of both" for who, n in kills.items()
            ),
            "rows checked, C++ producer": f"{n_rows:,} in {n_traces:,} traces; 0 lost, wrong or twice",
        },
    )


class Clients:
    """Keeps every slot of a server busy; knows what was sent to it, and what came back."""

    def __init__(self, url: str, seed: int) -> None:
        self._client = ServerClient(url, timeout=PATIENCE)
        self._random = [np.random.default_rng([seed, slot]) for slot in range(4)]
        self.sent: list[list[list[int]]] = [[] for _ in range(4)]
        self.answers: list[list[list[int]]] = [[] for _ in range(4)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(slot,)) for slot in range(4)]
        for thread in self._threads:
            thread.start()

    def _work(self, slot: int) -> None:
        random = self._random[slot]
        while not self._stop.is_set():
            prompt = random.integers(5, 200, int(random.integers(4, 60))).tolist()
            self.sent[slot].append(prompt)
            try:
                answer = self._client.call(
                    "/completion",
                    {"prompt": prompt, "n_predict": int(random.integers(2, 24)), "id_slot": slot, "temperature": 0.0,
                     "cache_prompt": False, "ignore_eos": True, "return_tokens": True},
                )  # fmt: skip
            except (MoetraceError, OSError):
                return  # the server was killed
            self.answers[slot].append(answer["tokens"])

    @property
    def n_answers(self) -> int:
        return sum(map(len, self.answers))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def check_server(folder: Path, clients: Clients) -> int:
    """Rows are the tokens that were sent and answered, and experts are what their own logits choose."""
    result = verify(folder)
    assert result.findings == (), result
    trace = moetrace.open(folder)
    assert trace.loss.rows_lost == 0
    logits, experts = np.asarray(trace.logits), np.asarray(trace.experts)
    present = np.asarray(trace.state) == 1
    best = np.argsort(-logits[present], axis=1, kind="stable")[:, : experts.shape[2]]
    np.testing.assert_array_equal(experts[present], best)
    request, token, position = trace.column("request"), trace.column("token"), trace.column("position")
    trial = (trace.column("flags") & RowFlag.TRIAL) != 0
    assert ((request >= 0) == ~trial).all()
    table = trace.requests.sort_values("first_serial") if "first_serial" in trace.requests else trace.requests
    for slot in range(4):
        numbers = sorted(table.index[table["slot"] == slot])
        assert len(clients.answers[slot]) <= len(numbers) <= len(clients.sent[slot])
        for i, number in enumerate(numbers):
            mine = np.flatnonzero(request == number)
            np.testing.assert_array_equal(position[mine], np.arange(len(mine)))
            whole = clients.sent[slot][i] + (
                clients.answers[slot][i][:-1] if i < len(clients.answers[slot]) else []
            )
            if i < len(clients.answers[slot]):
                assert len(mine) == len(whole)
            n = min(len(mine), len(whole))
            np.testing.assert_array_equal(token[mine[:n]], whole[:n])
    return len(trace)


@pytest.mark.runtime
@pytest.mark.timeout(3600)
def test_llama_server(
    stage: Stage, runtime: Any, model_file: Any, tmp_path: Path, size: Size, figures: Figures
) -> None:
    """GIVEN llama-server with 4 busy slots WHEN it, its drain or both are killed THEN nothing is lost or wrong."""
    wanted = size("kills_of_llama_server")
    random = np.random.default_rng(2025)
    kills = {"server": 0, "drain": 0, "both": 0}
    n_rows = n_starts = n_answers = 0
    kinds = ["drain", "both", "server"]
    while sum(kills.values()) < wanted or n_starts < len(kinds):
        kind = kinds[n_starts % 3]
        n_starts += 1
        folder, port = tmp_path / f"{n_starts}.moet", free_port()
        command = [
            str(runtime.tool("llama-server")), "-m", str(model_file("qwen3moe")), "--port", str(port),
            "-np", "4", "-c", "2048", "-t", "1", "--no-warmup",
        ]  # fmt: skip
        recorder = stage.start("run", folder=str(folder), command=command, channels="experts,weights,logits")
        server = int(recorder.hear("server"))
        client = ServerClient(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + PATIENCE
        while not client.is_ready():
            assert process_alive(server), Path(f"{folder}.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        clients = Clients(f"http://127.0.0.1:{port}", n_starts)
        while not all(clients.sent):
            time.sleep(0.005)
        time.sleep(0.6 * random.random())
        if kind == "drain":
            for _ in range(size("drains_per_llama_server")):
                recorder.kill()
                kills["drain"] += 1
                before = clients.n_answers
                if (folder / "ctx0" / "ring").exists():
                    unreleased_with(folder)
                while clients.n_answers < before + 2:  # the server serves on
                    assert process_alive(server)
                    time.sleep(0.005)
                recorder = stage.start("resume", folder=str(folder))
                time.sleep(0.3 * random.random())
            recorder.hear("resumed")
        if kind == "both":
            pair = [server, recorder.pid]
            random.shuffle(pair)
            os.kill(pair[0], signal.SIGKILL)
            time.sleep(random.choice([0.0, 0.005]) * random.random())
            kill(pair[1])
            kill(pair[0])
            kills["both"] += 1
            recover(folder)
        else:
            kill(server)
            kills["server"] += 1
            recorder.hear("done")
        clients.stop()
        n_answers += clients.n_answers
        n_rows += check_server(folder, clients)
    figures(
        "kill",
        **{
            "SIGKILLs with llama-server, 4 busy slots": f"{sum(kills.values()):,}: "
            + ", ".join(
                f"{n:,} of the {who}" if who != "both" else f"{n:,} of both" for who, n in kills.items()
            ),
            "rows checked, llama-server": f"{n_rows:,} of {n_answers:,} answered requests, {n_starts:,} servers; "
            "0 lost, wrong or twice",
        },
    )


def unreleased_with(folder: Path) -> None:
    """As :func:`unreleased`, for a ring that lies in its trace."""
    unreleased(folder, folder / "ctx0" / "ring")


def test_resume_refuses_with_a_reason(stage: Stage, tmp_path: Path) -> None:
    """GIVEN another drain alive, or the host dead, WHEN resumed THEN refused, and told what to do."""
    folder, ring = tmp_path / "t.moet", tmp_path / "t.moet.ring"

    def resume() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moetrace", "resume", folder]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    host = stage.start("host", folder=str(folder), seed=1, on_full=int(OnFull.BLOCK), capacity=512)
    recorder = stage.start("drain", folder=str(folder), host_pid=host.pid)
    ready(ring)
    while not (folder / "ctx0" / "context.json").exists():
        time.sleep(0.001)
    time.sleep(0.1)
    refused = resume()
    assert refused.returncode == 1
    assert f"process {recorder.pid} writes it" in refused.stderr
    recorder.kill()

    # taken up by the command, and let go of again
    with (tmp_path / "err").open("w+") as error:
        command = [sys.executable, "-m", "moetrace", "resume", folder]
        taken = subprocess.Popen(command, stderr=error, text=True)
        while "were waiting" not in (tmp_path / "err").read_text():
            assert taken.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.02)
        assert resume().returncode == 1  # one at a time
        taken.send_signal(signal.SIGINT)
        assert taken.wait(PATIENCE) == 0
    assert "The server runs on" in (tmp_path / "err").read_text()
    assert process_alive(host.pid)
    assert TraceStore(folder).live

    host.kill()
    refused = resume()
    assert refused.returncode == 1
    assert f"moetrace recover {folder}" in refused.stderr
    recover(folder)
    check_rows(folder, ring)
    refused = resume()
    assert refused.returncode == 1
    assert "is closed" in refused.stderr
    with Ring(ring) as opened:
        assert opened.snapshot()[0]["kind"].max(initial=0) <= RecordKind.EVENT
