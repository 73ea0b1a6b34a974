"""Decode prompts in this process with llama.cpp and the backend of GGML_BACKEND_PATH, traced or not.

    python host.py JOB.json

JOB (in which FOLDER stands for its own folder) has ``model``, ``prompts`` (as ``moetrace capture`` takes them),
``traced``, ``device`` (one that must be there, or null), ``rpc`` (an RPC server whose devices are added, or null)
and ``runs``: name → options of ``moetrace.capture``; besides those, ``on_cpu``: patterns of tensors that stay in
the CPU's memory (llama-server's ``-ot PATTERN=CPU``). Each run writes NAME.npy, the logits of all outputs in their
order, NAME.sent, what was decoded, and NAME.json, what the tests' device counted meanwhile; a traced one NAME.moet
too, or NAME.error, if it is refused.

Where it is not traced, the tracer's library is not even loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
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

SHAPE = {"n_ubatch": 48, "n_threads": 1}


def counts() -> dict[str, int]:
    path = os.environ.get("TEST_DEVICE_COUNTS")
    return json.loads(Path(path).read_text()) if path and Path(path).is_file() else {}


def placed(ggml: ctypes.CDLL, patterns: list[str]) -> Any:
    """Give llama.cpp's placement of the tensors that match, as ``--override-tensor`` makes it."""
    cpu = ggml.ggml_backend_cpu_buffer_type()
    entries = [llama._Placement(pattern.encode(), cpu) for pattern in patterns]
    return (llama._Placement * (len(entries) + 1))(*entries)


class Watched(llama.Llama):
    """Keeps what was decoded and what llama.cpp gave for every output."""

    sent: list[tuple[int, int, int]]
    rows: list[np.ndarray]

    def decode(self, entries: Any) -> None:
        super().decode(entries)
        Watched.sent += [entry[:3] for entry in entries]

    def logits(self, index: int) -> np.ndarray:
        Watched.rows.append(super().logits(index))
        return Watched.rows[-1]


def plain(
    model: str, prompts: Any, n_parallel: int, flash_attention: bool | None = None, **options: Any
) -> None:
    items = read_prompts(prompts)
    n_ctx = inprocess._context_size(items, 0, n_parallel)
    with Watched(
        model, n_ctx=n_ctx, n_seq=n_parallel, flash_attention=flash_attention, **SHAPE, **options
    ) as loaded:
        inprocess.Generator(loaded, n_parallel=n_parallel).run(items, 0, lambda _: None)


def run(job: dict[str, Any], options: dict[str, Any], out: Path, ggml: ctypes.CDLL) -> None:
    patterns = options.pop("on_cpu", [])
    options = {"n_parallel": 4, "n_cpu_moe": 1, **options}  # n_cpu_moe: so that the patterns are asked for
    Watched.sent, Watched.rows = [], []
    with (
        mock.patch.object(llama, "Llama", Watched),
        mock.patch.object(llama, "_experts_on_cpu", return_value=placed(ggml, patterns)),
    ):
        if job["traced"]:
            inprocess.capture(job["model"], job["prompts"], out.with_suffix(".moet"), **SHAPE, **options)
        else:
            plain(job["model"], job["prompts"], **options)
    np.save(out.with_suffix(".npy"), np.array(Watched.rows))
    out.with_suffix(".sent").write_text(json.dumps(Watched.sent))


def rpc_add(ggml: ctypes.CDLL, endpoint: str) -> None:
    """Add the devices of an RPC server, as llama-server's ``--rpc`` does."""
    for function in (ggml.ggml_backend_reg_by_name, ggml.ggml_backend_reg_get_proc_address):
        function.restype = ctypes.c_void_p
    registry = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"RPC"))
    found = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server")
    devices = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(found)(endpoint.encode())
    ggml.ggml_backend_register(ctypes.c_void_p(devices))


def main(path: str) -> None:
    text = Path(path).read_text()
    job = json.loads(text.replace("FOLDER", str(Path(path).parent)))
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    libraries = Path(found.origin).parent / "lib"
    if job["traced"]:
        llama.tracer()
    else:
        itself = ctypes.CDLL(str(libraries / "libllama.so"), mode=ctypes.RTLD_GLOBAL)
        llama.tracer = lambda: itself
    # llama-server loads the backend of GGML_BACKEND_PATH by itself
    ggml = ctypes.CDLL(str(libraries / "libggml.so"), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all()
    if job["rpc"]:
        rpc_add(ggml, job["rpc"])
    if job["device"]:
        ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        assert ggml.ggml_backend_dev_by_name(job["device"].encode()), f"there is no device {job['device']}"
    base = ctypes.CDLL(str(libraries / "libggml-base.so"))
    base.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    for name, options in job["runs"].items():
        out = Path(path).parent / name
        before = counts()
        try:
            run(job, dict(options), out, base)
        except MoetraceError as e:
            out.with_suffix(".error").write_text(str(e))
        after = counts()
        out.with_suffix(".json").write_text(json.dumps({k: n - before.get(k, 0) for k, n in after.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
