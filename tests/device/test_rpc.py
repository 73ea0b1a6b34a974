"""llama.cpp's RPC backend on loopback: a device that is another process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checks import (
    DEFAULT,
    PLACEMENTS,
    WIDE,
    Problems,
    check_numbers,
    check_rows,
    check_same_columns,
    interventions_of,
    prompts_of,
    runs_of,
)
from devices import HERE, build_rpc, run_host
from identities import prompts_of_mixed_length
from running import MOE, ROUTER
from served import check_served

import moetrace
from moetrace.host.client import drive
from moetrace.host.server import free_port
from moetrace.synthetic import ARCHITECTURES

pytestmark = [pytest.mark.runtime, pytest.mark.host("RPC")]


@dataclass(frozen=True)
class Rpc:
    endpoint: str
    library: Path


@pytest.fixture
def rpc(runtime: Any) -> Iterator[Rpc]:
    """An RPC server of this machine's CPU, one per test: its memory lasts as long as it."""
    library = build_rpc(runtime)
    port = free_port()
    libraries = runtime.package / "lib"
    command = [sys.executable, HERE / "rpc_server.py", libraries, str(port)]
    environment = {**os.environ, "GGML_BACKEND_PATH": str(library)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert server.poll() is None, "the RPC server ended"
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Rpc(f"127.0.0.1:{port}", library)
    finally:
        server.kill()
        server.wait(30)


def test_a_server_whose_device_is_another_process(
    rpc: Rpc, runtime: Any, model_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGML_BACKEND_PATH", str(rpc.library))
    path, prompts = tmp_path / "t.moet", prompts_of_mixed_length(12)
    arguments = ["-np", "4", "-c", "4096", "-ub", "48", "-t", "1", "-ngl", "99", "--n-cpu-moe", "1"]
    with moetrace.serve(
        model_file("olmoe"),
        output=path,
        # a placement by pattern makes llama-server load the backend of GGML_BACKEND_PATH before it looks at --rpc
        arguments=[*arguments, "-ot", "none=CPU", "--rpc", rpc.endpoint, "--device", "RPC0"],
        channels=ROUTER,
        collector="tap",
        program=str(runtime.tool("llama-server")),
    ) as server:
        answers = drive(server.client, prompts)
        server.label([answer.label_line() for answer in answers])
    check_numbers(check_served(path, answers), "olmoe", model_file("olmoe"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE)
def test_the_same_bytes_as_on_the_cpu(name: str, rpc: Rpc, model_file: Any, tmp_path: Path) -> None:
    arch, model, prompts = ARCHITECTURES[name], model_file(name), prompts_of(name)
    kinds = {**DEFAULT, **WIDE, **({} if arch.encoder else interventions_of(arch))}
    placements = ("all", "part", "some-experts")
    shape = {"n_parallel": 1} if arch.encoder else {}
    on_cpu = run_host(
        model, tmp_path / "cpu", prompts, {k: {**shape, **v} for k, v in kinds.items()}, traced=True
    )
    ran = run_host(
        model,
        tmp_path / "rpc",
        prompts,
        runs_of(name, tuple(p for p in PLACEMENTS if p in placements), kinds),
        traced=True,
        environment={"GGML_BACKEND_PATH": str(rpc.library)},
        device="RPC0",
        rpc=rpc.endpoint,
    )
    problems = Problems()
    for kind in kinds:
        expected = check_rows(on_cpu[kind])
        for placement in placements:
            run = f"{placement}_{kind}"
            trace = problems(run, check_rows, ran[run])
            if trace is not None:
                problems(run, check_same_columns, trace, expected)
    problems.none()
