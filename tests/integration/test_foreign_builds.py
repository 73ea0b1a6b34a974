"""llama.cpp as others build and pack it: recorded right, or refused with the true reason.

Packages come from npm and PyPI into ``build/foreign``, once; a test whose package cannot be had skips.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import ready_client

import moetrace
from moetrace.host.server import free_port
from moetrace.trace.record import RowFlag
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="packages for Linux")]

FOREIGN = Path(__file__).parents[2] / "build" / "foreign"
TEXTS = ["def f(x): return x", "Once upon a time there was"]

NODE = """
import {getLlama} from "node-llama-cpp";
const [path, ...texts] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: path});
const said = [];
for (const text of texts) {
    const context = await model.createContext({contextSize: 512, sequences: 2, threads: 1});
    const tokens = model.tokenize(text), got = [];
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0})) {
        got.push(token);
        if (got.length >= 12) break;
    }
    said.push({tokens, got});
}
console.log(JSON.stringify(said));
"""

# the same, each text in a thread with a context of its own
NODE_WORKERS = """
import {Worker, isMainThread, parentPort, workerData} from "node:worker_threads";
import {getLlama} from "node-llama-cpp";
if (isMainThread) {
    const [path, ...texts] = process.argv.slice(2);
    const said = [];
    await Promise.all(texts.map((text, i) => new Promise((resolve, reject) => {
        const worker = new Worker(new URL(import.meta.url), {workerData: {path, text}});
        worker.on("message", message => { said[i] = message; resolve(); });
        worker.on("error", reject);
    })));
    console.log(JSON.stringify(said));
} else {
    const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
    const model = await llama.loadModel({modelPath: workerData.path});
    const context = await model.createContext({contextSize: 512, sequences: 1, threads: 1});
    const tokens = model.tokenize(workerData.text), got = [];
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0})) {
        got.push(token);
        if (got.length >= 12) break;
    }
    parentPort.postMessage({tokens, got});
    await llama.dispose();
}
"""

PYTHON = {
    "llama_cpp": """
def answer(path, text):
    import llama_cpp
    model = llama_cpp.Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    return model(text, max_tokens=6, temperature=0)["choices"][0]["text"]
""",
    "xllamacpp": """
def answer(path, text):
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 256, 1, False
    params.cpuparams.n_threads = 1
    said = xllamacpp.Server(params).handle_completions({"prompt": text, "n_predict": 6, "temperature": 0})
    return said["choices"][0]["text"]
""",
    "llama_cpp_py_sync": """
def answer(path, text):
    import llama_cpp_py_sync
    model = llama_cpp_py_sync.Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1)
    return model.generate(text, max_tokens=6, temperature=0.0)
""",
    "ik_llama_cpp": """
def answer(path, text):
    import ik_llama_cpp
    model = ik_llama_cpp.IkLlama(path, n_ctx=256, n_threads=1)
    return model.generate(model.tokenize(text), max_tokens=6, temperature=0.0)
""",
}


def _installed(what: str, command: list[str], folder: Path) -> None:
    """Run an installer, once; skip where it cannot be had."""
    done = folder / f".{what.replace('/', '-')}"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        pytest.skip(f"{what} cannot be installed: {e}")
    if made.returncode != 0:
        pytest.skip(f"{what} cannot be installed: {(made.stderr.strip().splitlines() or ['?'])[-1]}")
    done.touch()


@pytest.fixture(scope="module")
def node() -> Path:
    """Return a folder whose scripts can import node-llama-cpp."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    folder = FOREIGN / "node"
    _installed("node-llama-cpp", ["npm", "install", "--no-audit", "--no-fund", "node-llama-cpp"], folder)
    return folder


def _python(*packages: str) -> Path:
    """Give an interpreter with these packages, and with those of the tests' own environment."""
    folder = FOREIGN / "python"
    program = folder / "bin" / "python"
    if not program.exists():
        venv.create(folder, with_pip=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "tests.pth").write_text(
            "\n".join(path for path in sys.path if path.endswith("site-packages"))
        )
    for package in packages:
        _installed(package, [str(program), "-m", "pip", "install", "--quiet", "--no-deps", package], folder)
    return program


def run(path: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "moetrace", "run", "-o", str(path), "--", *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=180, check=False)


def answered(run: subprocess.CompletedProcess[str]) -> list[Any]:
    """Give what the script printed of its answers, among what its libraries print."""
    assert run.returncode == 0, (run.stdout[-2000:], run.stderr[-3000:])
    return [json.loads(line.partition("ANSWER ")[2]) for line in run.stdout.splitlines() if "ANSWER " in line]


def script(folder: Path, *kinds: str) -> Path:
    """Write a program that asks these packages one after the other."""
    path = folder / "ask.py"
    asking = "".join(
        f"{PYTHON[kind]}\nprint('\\nANSWER ' + json.dumps(answer(*sys.argv[1:3])), flush=True)\n"
        for kind in kinds
    )
    path.write_text(f"import json, sys\n{asking}")
    return path


def rows(trace: moetrace.Trace) -> np.ndarray:
    """Give the numbers of the rows that are no trial of llama.cpp's own."""
    return np.flatnonzero((np.asarray(trace.column("flags")) & RowFlag.TRIAL) == 0)


def version(package: str) -> str:
    """Which version of a Python package was installed."""
    found = sorted(
        (FOREIGN / "python").glob(f"lib/python*/site-packages/{package.replace('-', '_')}-*.dist-info")
    )
    return found[-1].name.removesuffix(".dist-info").rpartition("-")[2] if found else ""


@pytest.mark.host("node-llama-cpp")
@pytest.mark.parametrize("source", [NODE, NODE_WORKERS], ids=["contexts", "threads"])
def test_node(source, node, runtime, model_file, tmp_path, record_property):
    """Two contexts in turn, and in threads at once: each request's rows are its tokens, node answers as untraced."""
    package = node / "node_modules" / "node-llama-cpp" / "package.json"
    record_property("version", json.loads(package.read_text())["version"])
    model = model_file("olmoe")
    (node / "ask.mjs").write_text(source)
    command = ["node", node / "ask.mjs", model, *TEXTS]
    plain = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
    traced = run(tmp_path / "t.moet", *command)
    assert traced.returncode == 0, traced.stderr
    said = json.loads(plain.stdout.splitlines()[-1])
    assert json.loads(traced.stdout.splitlines()[-1]) == said
    trace = moetrace.open(tmp_path / "t.moet")
    assert verify(tmp_path / "t.moet").exit_code == 0
    token, request = np.asarray(trace.column("token")), np.asarray(trace.request)
    mine = rows(trace)
    recorded = [token[mine[request[mine] == number]].tolist() for number in trace.requests.index]
    expected = [one["tokens"] + one["got"] for one in said]
    assert len(recorded) == len(expected)
    for want in expected:
        # the last token of an answer is computed only where node asks for another after it
        assert want in recorded or want[:-1] in recorded
    assert len(trace.vocabulary) > 0, "the model's file was found from the host itself"


@pytest.mark.parametrize(
    ("kinds", "packages"),
    [
        pytest.param(*pair, marks=pytest.mark.host(host), id="-".join(pair[0]))
        for host, pair in (
            ("xllamacpp", (("xllamacpp",), ("xllamacpp",))),
            ("llama-cpp-py-sync", (("llama_cpp_py_sync",), ("llama-cpp-py-sync", "cffi", "pycparser"))),
            ("ik-llama-cpp-python", (("ik_llama_cpp",), ("ik-llama-cpp-python",))),
            ("two llama.cpp", (("llama_cpp", "xllamacpp"), ("xllamacpp",))),
            ("two llama.cpp", (("xllamacpp", "llama_cpp"), ("xllamacpp",))),
            ("two llama.cpp", (("xllamacpp", "llama_cpp", "xllamacpp"), ("xllamacpp",))),
        )
    ],
)
def test_python_packages(kinds, packages, runtime, model_file, tmp_path, record_property):
    """Alone, and two llama.cpp in one process: the first is recorded, the other is counted, both answer as untraced."""
    program, model = _python(*packages), model_file("qwen3moe")  # which all of them know
    if len(kinds) == 1:
        record_property("version", version(packages[0]))
    command = [program, script(tmp_path, *kinds), model, TEXTS[0]]
    plain = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    if plain.returncode != 0:
        why = plain.stderr.strip().splitlines()[-1]
        needs = re.search(r"version `(\w+_[\d.]+)' not found", why)
        pytest.skip(f"it needs {needs[1]}" if needs else f"it does not run here: {why}")
    traced = run(tmp_path / "t.moet", *command)
    assert answered(traced) == answered(plain)
    trace = moetrace.open(tmp_path / "t.moet")
    assert verify(tmp_path / "t.moet").exit_code == 0
    whose = np.asarray(trace.request)[rows(trace)]
    if kinds[0] == "xllamacpp":
        assert (whose >= 0).all()
        assert len(trace.requests) == kinds.count("xllamacpp")
    else:  # ctypes goes past the hooks, and it is said
        assert (whose < 0).all()
        assert "called past the tracer" in traced.stderr
    assert ("another llama.cpp" in traced.stderr) == (len(set(kinds)) > 1)
    elsewhere = trace.counters["graphs_elsewhere"]
    assert (elsewhere > 0) == (len(set(kinds)) > 1)


@pytest.mark.host("static")
def test_what_has_llama_cpp_inside_is_refused_with_the_reason(tmp_path):
    _python("cyllama")
    library = next((FOREIGN / "python").glob("lib/python*/site-packages/cyllama/llama/llama_cpp*.so"))
    said = subprocess.run(
        [sys.executable, "-m", "moetrace", "doctor", "--", str(library)],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ,
    )  # fmt: skip
    assert said.returncode == 1
    assert "linked into it statically" in said.stderr


@pytest.mark.host("without /dev/shm")
def test_a_server_where_there_is_no_shared_memory(runtime, model_file, tmp_path):
    """GIVEN a mount namespace whose /dev/shm takes no file, as in some containers THEN rings lie in the trace."""
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    empty = "mount -t tmpfs -o ro none /dev/shm && ! touch /dev/shm/x 2>/dev/null && "
    if subprocess.run([*inside, f"{empty} true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounts of one's own are not allowed here")
    server = [str(runtime.tool("llama-server")), "-m", str(model_file("olmoe")), "-np", "2", "-t", "1"]
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "moetrace",
        "run",
        "-o",
        str(tmp_path / "t.moet"),
        "--",
        *server,
        "--port",
        str(port),
    ]
    with subprocess.Popen(
        [*inside, f'{empty} exec "$@"', "sh", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as host:
        client = ready_client(host, port)
        client.call("/completion", {"prompt": [1, 2, 3, 4, 5], "n_predict": 4, "ignore_eos": True})
        host.send_signal(signal.SIGTERM)
        said = host.stderr.read()
    assert host.returncode == 0, said
    assert verify(tmp_path / "t.moet").exit_code == 0
    trace = moetrace.open(tmp_path / "t.moet")
    assert len(trace.sel(request=0)) == 5 + 4 - 1
