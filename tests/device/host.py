"""Decode prompts in this process with llama.cpp's backend of GGML_BACKEND_PATH, traced or not.

    python host.py JOB.json

JOB has ``model``, ``prompts`` (as ``moetrace capture`` takes them), ``folder``, ``traced`` and ``runs``: name → options
of ``moetrace.capture``, and besides ``on_cpu``, patterns of tensors that stay in the CPU's memory (llama-server's
``-ot PATTERN=CPU``). Each run writes NAME.npy, the logits of all outputs in their order, and NAME.json, what the tests'
device counted meanwhile; a traced one NAME.moet too, or NAME.error, if it is refused.

Not traced means that the tracer's library is not even loaded.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from moetrace.errors import MoetraceError
from moetrace.host import inprocess, llama
from moetrace.host.prompts import read_prompts

N_PARALLEL = 4
N_UBATCH = 48


def load_backends(package: Path) -> ctypes.CDLL:
    """Load llama.cpp's libraries, and the backend of GGML_BACKEND_PATH, which llama-server loads by itself."""
    library = ctypes.CDLL(str(package / "lib" / "libggml.so"), mode=ctypes.RTLD_GLOBAL)
    library.ggml_backend_load_all()
    return library


def counts() -> dict[str, int]:
    path = Path(os.environ["TEST_DEVICE_COUNTS"])
    return json.loads(path.read_text()) if path.is_file() else {}


def on_cpu(patterns: list[str]) -> Any:
    """Give llama.cpp's placement of the tensors that match, as ``--override-tensor`` makes it."""
    import llama_cpp

    base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    base.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    cpu = base.ggml_backend_cpu_buffer_type()
    entries = [llama._Placement(pattern.encode(), cpu) for pattern in patterns]
    return (llama._Placement * (len(entries) + 1))(*entries)


class Logits:
    """Keeps what llama.cpp gave for every output."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def of(self, original: Any) -> Any:
        def logits(model: llama.Llama, index: int) -> np.ndarray:
            row = original(model, index)
            self.rows.append(row)
            return row

        return logits


def run(job: dict[str, Any], options: dict[str, Any], folder: Path, name: str) -> None:
    prompts = job["prompts"]
    placed = options.pop("on_cpu", None)
    kept = Logits()
    with (
        mock.patch.object(llama.Llama, "logits", kept.of(llama.Llama.logits)),
        mock.patch.object(llama, "_experts_on_cpu", lambda _: on_cpu(placed)),
    ):
        shape = {"n_parallel": N_PARALLEL, "n_ubatch": N_UBATCH, "n_threads": 1}
        if placed:
            options["n_cpu_moe"] = 1
        if job["traced"]:
            inprocess.capture(job["model"], prompts, folder / f"{name}.moet", **shape, **options)
        else:
            items = read_prompts(prompts)
            context = inprocess._context_size(items, 0, N_PARALLEL)
            fa = options.pop("flash_attention", None)
            with llama.Llama(
                job["model"],
                n_ctx=context,
                n_seq=N_PARALLEL,
                n_ubatch=N_UBATCH,
                n_threads=1,
                flash_attention=fa,
                **options,
            ) as loaded:
                inprocess.Generator(loaded, n_parallel=N_PARALLEL).run(items, 0, lambda _: None)
    np.save(folder / f"{name}.npy", np.stack(kept.rows))


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    folder = Path(job["folder"])
    import importlib.util

    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    if job["traced"]:
        llama.tracer()
    else:
        plain = ctypes.CDLL(str(package / "lib" / "libllama.so"), mode=ctypes.RTLD_GLOBAL)
        llama.tracer = lambda: plain
    load_backends(package)
    for name, options in job["runs"].items():
        before = counts()
        try:
            run(job, dict(options), folder, name)
        except MoetraceError as e:
            (folder / f"{name}.error").write_text(str(e))
        after = counts()
        (folder / f"{name}.json").write_text(json.dumps({k: n - before.get(k, 0) for k, n in after.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
