"""What `moetrace place` says to type is run: llama-server takes it, and says itself which tensors stay with the CPU."""

from __future__ import annotations

import re
import shlex
import subprocess
import time

import pytest

from moetrace import data
from moetrace.__main__ import main
from moetrace.commands.demo import unpack
from moetrace.findings.placement import server_line
from moetrace.host.client import ServerClient
from moetrace.host.memory import memory_use
from moetrace.host.server import free_port
from moetrace.model.file import ModelFile

pytestmark = pytest.mark.runtime


def said_by_server(runtime, arguments: list[str], folder) -> str:
    """What llama-server prints until it is ready."""
    port, log = free_port(), folder / "server.log"
    client = ServerClient(f"http://127.0.0.1:{port}")
    command = [runtime.tool("llama-server"), *arguments, "--port", str(port), "-t", "1", "-v"]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            for _ in range(600):
                if client.is_ready():
                    break
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.1)
            else:
                pytest.fail(log.read_text()[-2000:])
        finally:
            server.terminate()
    return log.read_text()


def on_cpu(log: str) -> set[str]:
    return set(re.findall(r"tensor (\S+) .*buffer type overridden to CPU", log))


@pytest.mark.parametrize(
    ("kept", "named"), [([1, 4], True), ([0, 1], True), ([6, 7], False), ([], False), (range(8), False)]
)
def test_llama_server_takes_the_line_and_leaves_these_experts_with_the_cpu(kept, named, runtime, tmp_path):
    line = server_line(list(kept), list(range(8)), named=named)
    log = said_by_server(runtime, ["-m", str(data.demo_model()), "-c", "512", *shlex.split(line)], tmp_path)
    with ModelFile(data.demo_model()) as model:
        expected = {
            name
            for name in model.tensor_names
            if "_exps." in name and int(name.split(".")[1]) not in set(kept)
        }
        kv = model.kv_bytes(512)
    assert on_cpu(log) == expected
    told = re.search(r"llama_kv_cache: size = +([\d.]+) MiB", log)
    assert kv == pytest.approx(float(told[1]) * 2**20, rel=0.05)


def test_the_whole_answer(runtime, tmp_path, capsys):
    trace = unpack(data.recorded_demo(), tmp_path)
    command = [
        "place",
        str(trace),
        "-m",
        str(data.demo_model()),
        "--vram",
        "7MiB",
        "-c",
        "512",
        "--reserve",
        "64KiB",
    ]
    assert main(command) == 0
    _, *arguments = shlex.split(capsys.readouterr().out.splitlines()[0])
    arguments[arguments.index("-m") + 1] = str(data.demo_model())
    assert {int(name.split(".")[1]) for name in on_cpu(said_by_server(runtime, arguments, tmp_path))} == set(
        range(6)
    )


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "deepseek2-v3", "granitehybrid"])
def test_the_account_is_the_servers_own(name, model_file, runtime, tmp_path):
    """Also where no formula is known: sliding windows, latent attention, recurrent layers."""
    path, n_ctx = model_file(name), 1 << 16
    account = memory_use(path, n_ctx=n_ctx, n_ubatch=512)
    log = said_by_server(runtime, ["-m", str(path), "-c", str(n_ctx), "-ub", "512"], tmp_path)
    log = log[log.rindex("load_tensors:") :]  # before that it looks whether it will fit
    caches = [float(size) for size in re.findall(r": size = +([\d.]+) MiB \(", log)]
    (compute,) = re.findall(r"CPU compute buffer size = +([\d.]+) MiB", log)
    assert sum(caches) > 1
    assert account.kv / 2**20 == pytest.approx(sum(caches), abs=1, rel=0.05)
    assert account.compute / 2**20 == pytest.approx(float(compute), abs=1, rel=0.05)
