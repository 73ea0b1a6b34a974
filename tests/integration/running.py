"""Ways of running moetrace in tests: the command, Python in a process of its own, a traced server; and a text."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from moetrace.host.client import ServerClient
from moetrace.host.server import free_port
from moetrace.synthetic import ARCHITECTURES

REFERENCE = Path(__file__).with_name("reference_routing.py")
TEXT = """\
A lighthouse keeper writes down the weather three times a day: wind, cloud, the height of the waves. In 40
years he has filled 112 books, and he says that no two pages in them are the same. "I could tell you," he
said, "what the sea did on any morning you like." Zwölf Möwen saßen auf der Mauer; 七 of them were asleep.

def area(width: float, height: float) -> float:
    if width < 0 or height < 0:
        raise ValueError(f"negative size: {width} x {height}")
    return width * height

for (size_t i = 0; i < n; ++i) { total += values[i] * weights[i]; }

Let f(x) = 3x^2 - 2x + 7. Then f'(x) = 6x - 2, which is zero at x = 1/3, so the smallest value is 20/3.
SELECT name, count(*) FROM visits WHERE year >= 1999 GROUP BY name ORDER BY 2 DESC;
"""
MOE = [name for name, arch in ARCHITECTURES.items() if arch.n_expert]
ROUTER = "experts,weights,logits,scores,gate_input,outputs"


def capture(model: Path, output: Path, prompts: list[dict], *options: str, ok: bool = True) -> str:
    """Run ``moetrace capture`` in a process of its own; gives its standard error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    command = [sys.executable, "-m", "moetrace", "capture", "-m", model, "-f", file, "-o", output, "-t", "1"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode == 0) == ok, run.stderr
    return run.stderr


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: llama.cpp's libraries must stay out of the test process."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def ready_client(run: subprocess.Popen[bytes], port: int, log: Path | None = None) -> ServerClient:
    """Wait until the server answers; its end is an error that shows the log, if there is one."""
    client = ServerClient(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while not client.is_ready():
        assert run.poll() is None, log and log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return client


def start_run(
    runtime, model: Path, path: Path, *options: str
) -> tuple[subprocess.Popen[bytes], ServerClient]:
    port = free_port()
    server = [
        runtime.tool("llama-server"),
        "-m",
        model,
        "--port",
        str(port),
        "-np",
        "2",
        "-c",
        "2048",
        "-t",
        "1",
    ]
    command = [sys.executable, "-m", "moetrace", "run", "-o", path, *options, "--", *server]
    with path.with_suffix(".err").open("wb") as error:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error, start_new_session=True)
    client = ready_client(run, port, path.with_suffix(".err"))
    return run, client


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])
