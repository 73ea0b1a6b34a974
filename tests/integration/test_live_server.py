"""A real llama-server watched while it serves: metrics scraped, requests' experts fetched, interventions set."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moetrace
from moetrace.data import demo_model
from moetrace.trace.routed import routed_experts

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.runtime

TEXT = "The old man looked at the sea and said nothing for a long while, then he went home. " * 3


def asked(url: str, body: Any = None, **headers: str) -> Any:
    request = urllib.request.Request(
        url,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def completed(url: str, prompt: str, n: int = 8) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "cache_prompt": True, "ignore_eos": True}
    return asked(f"{url}/completion", body)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def waited(what: Any, seconds: float = 60.0) -> Any:
    ends = time.monotonic() + seconds
    while True:
        try:
            return what()
        except (OSError, urllib.error.URLError):
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)


def test_what_was_cached_is_what_the_earlier_request_computed(runtime, tmp_path):
    """Of the same slot's memory only: what the server restored from elsewhere is not known, and says so."""
    with moetrace.serve(
        str(demo_model()), output=tmp_path / "t.moet", arguments=["-np", "1", "-t", "1"]
    ) as server:
        first = completed(server.url, TEXT)
        second = completed(server.url, TEXT + "And then")
        completed(server.url, "Another text, of which nothing is cached but the first token.")
        completed(server.url, TEXT)  # the server takes its memory back from a copy
    with moetrace.open(tmp_path / "t.moet") as trace:
        a, b, _, d = (routed_experts(trace, n) for n in trace.requests.index.tolist())
        cached = trace.requests["n_cached"].tolist()
        assert len(a.experts) == first["tokens_evaluated"] + first["tokens_predicted"] - 1
        assert len(b.experts) == second["tokens_evaluated"] + second["tokens_predicted"] - 1
        assert (b.from_cache, b.cached) == (cached[1], 0)
        assert b.from_cache > 40
        np.testing.assert_array_equal(b.experts[: b.from_cache], a.experts[: b.from_cache])
        np.testing.assert_array_equal(b.tokens[: b.from_cache], a.tokens[: b.from_cache])
        assert a.complete
        assert b.complete
        restored = trace.events["event"] == "restore"
        if restored.any():
            assert (d.from_cache, d.cached) == (0, cached[3])
            assert not d.complete
            assert (d.experts[: d.cached] == -1).all()


def test_what_happened_in_a_pause_is_not_known(runtime, tmp_path):
    """GIVEN a slot that computed while nothing was recorded THEN what it holds is nobody's for certain."""
    path = tmp_path / "t.moet"
    with moetrace.serve(str(demo_model()), output=path, arguments=["-np", "1", "-t", "1"]) as server:
        completed(server.url, TEXT)
        command = [sys.executable, "-m", "moetrace"]
        subprocess.run([*command, "stop", path], check=True, capture_output=True, timeout=60)
        completed(server.url, "Another text, which nobody records.")
        completed(server.url, TEXT)
        subprocess.run([*command, "start", path], check=True, capture_output=True, timeout=60)
        completed(server.url, TEXT + "And then")
    with moetrace.open(path) as trace:
        last = routed_experts(trace, int(trace.requests.index[-1]))
        assert last.from_cache == 0
        assert last.cached > 40
        assert not last.complete


def test_a_server_that_is_listened_to(runtime, tmp_path):
    """``run --listen``: metrics, a request's experts as soon as its client has the answer, an intervention."""
    port, live = free_port(), free_port()
    (tmp_path / "token").write_text("abc\n")
    command = [
        sys.executable,
        "-m",
        "moetrace",
        "run",
        "-o",
        tmp_path / "t.moet",
        "--listen",
        f"127.0.0.1:{live}",
    ]
    command += ["--token-file", tmp_path / "token", "--", runtime.tool("llama-server"), "-m", demo_model()]
    command += ["-np", "2", "-t", "1", "--port", str(port)]
    token = {"Authorization": "Bearer abc"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        waited(lambda: asked(f"http://127.0.0.1:{port}/health"))
        told = completed(f"http://127.0.0.1:{port}", TEXT, 20)
        service = f"http://127.0.0.1:{live}"
        waited(lambda: asked(f"{service}/interventions", **token))
        ends = time.monotonic() + 20  # rows are there when they are sealed
        while not (rows := asked(f"{service}/requests", **token)) and time.monotonic() < ends:
            time.sleep(0.1)
        (row,) = rows
        n = told["tokens_evaluated"] + told["tokens_predicted"]
        got = asked(f"{service}/requests/{row['request']}/experts?tokens={n}&wait=10", **token)
        assert got["complete"]
        assert got["shape"][0] == n - 1
        request = urllib.request.Request(f"{service}/metrics", headers=token)
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read().decode()
        assert f'moetrace_tokens_total{{phase="decode"}} {told["tokens_predicted"] - 1}.0' in text
        assert 'moetrace_recording{context="ctx0"} 1.0' in text
        assert asked(f"{service}/interventions", {"specs": ["ablate:0:3"]}, **token)["intervention"] > 0
        completed(f"http://127.0.0.1:{port}", "Something else.", 4)
        assert asked(f"{service}/interventions", **token)["ctx0"] > 0
    finally:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr.decode()[-2000:]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{live}/", timeout=5)
    with moetrace.open(tmp_path / "t.moet") as trace:
        assert trace.loss.complete
        assert len(trace.interventions)


def test_live_in_a_terminal(runtime, tmp_path):
    """Keys are typed and the screen is read; the terminal is as it was afterwards."""
    with moetrace.serve(
        str(demo_model()), output=tmp_path / "t.moet", arguments=["-np", "1", "-t", "1"]
    ) as server:
        completed(server.url, TEXT)
        main, child = pty.openpty()
        command = [sys.executable, "-m", "moetrace", "live", tmp_path / "t.moet", "--every", "0.2"]
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        process = subprocess.Popen(command, stdin=child, stdout=child, stderr=subprocess.DEVNULL, env=env)
        os.close(child)

        def read(until: str) -> str:
            out, ends = "", time.monotonic() + 30
            while until not in out and time.monotonic() < ends:
                if select.select([main], [], [], 0.2)[0]:
                    out += os.read(main, 1 << 16).decode("utf-8", "replace")
            assert until in out, out[-2000:]
            return out

        assert "the last seconds" in read("q end")
        completed(server.url, TEXT + "Then")
        read("hottest")
        os.write(main, b"w")
        read("the last hour")
        os.write(main, b"l")
        read("layer 0, the last hour")
        os.write(main, b"LL")
        read("layer 7, the last hour")
        os.write(main, b"d")
        read("no request has a label yet")
        os.write(main, b"s")
        read("ctx0: paused")
        completed(server.url, TEXT + "And")
        os.write(main, b"s")
        read("ctx0: recording")
        assert server.trace.counters["rows_paused"] > 0
        os.write(main, b"p")
        read("go on")
        os.write(main, b"q")
        assert "\x1b[?1049l" in read("\x1b[?1049l")
        assert process.wait(10) == 0
        os.close(main)
    assert verify_is_fine(tmp_path / "t.moet")


def verify_is_fine(path: Path) -> bool:
    command = [sys.executable, "-m", "moetrace", "verify", path]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
