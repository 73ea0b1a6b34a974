"""A traced llama-server that others use too, and a plain HTTP client that keeps what it sent and got."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import moetrace
from moetrace.host.server import free_port

GREEDY = {"temperature": 0.0, "ignore_eos": True, "return_tokens": True}


def ask(port: int, path: str, body: Any = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, text, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        read = answer.read()
        assert answer.status == 200, read
        return json.loads(read)
    finally:
        connection.close()


@contextlib.contextmanager
def serving(runtime: Any, path: Path, *arguments: object) -> Iterator[int]:
    """A llama-server under `moetrace run`; gives its port."""
    port = free_port()
    server = [runtime.tool("llama-server"), "--host", "127.0.0.1", "--port", str(port), "-t", "1", *arguments]
    log = path.with_suffix(".log")
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "moetrace", "run", "-o", path, "--", *map(str, server)]
        run = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert run.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError, AssertionError):
                ask(port, "/health")
                break
            time.sleep(0.05)
        yield port
    finally:
        run.terminate()
        assert run.wait(60) == 0, log.read_text(errors="replace")[-3000:]


def moetrace_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moetrace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@dataclass
class Request:
    """What a client sent and got."""

    prompt: list[int]
    tokens: list[int]
    slot: int
    cached: int

    @property
    def rows(self) -> list[int]:
        """The tokens that the server computed for it; the last one generated is not decoded."""
        return [*self.prompt, *self.tokens][self.cached : -1]


def rows_of(trace: moetrace.Trace) -> dict[int, list[int]]:
    """The tokens of each request, in the order of their positions."""
    owner, token, position = (np.asarray(trace.column(name)) for name in ("request", "token", "position"))
    out = {}
    for number in trace.requests.index.tolist():
        mine = np.flatnonzero(owner == number)
        out[number] = token[mine[np.argsort(position[mine], kind="stable")]].tolist()
    return out
