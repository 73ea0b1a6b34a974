"""The tests' device itself: other tests rest on what it does."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import PLACEMENTS, prompts_of, runs_of
from devices import Host, Setup, build, run_host
from running import MOE, python

pytestmark = [pytest.mark.runtime, pytest.mark.host("device")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "granitehybrid" else pytest.mark.slow) for name in MOE],
)
def test_it_computes_what_the_cpu_computes(
    name: str, on_device: Host, model_file: Any, tmp_path: Path
) -> None:
    """In any valid order, wherever what lies; and something else, a little, where it fuses."""
    model, prompts = model_file(name), prompts_of(name)
    runs = runs_of(name, tuple(PLACEMENTS), {"": {}})
    (cpu,) = run_host(
        model, tmp_path / "cpu", prompts, {"cpu": runs["all_"] | {"n_gpu_layers": 0}}, traced=False
    ).values()
    orders = (
        ["random:7"]
        if name == "granitehybrid"
        else ["", "vulkan", "metal", *(f"random:{i}" for i in range(4))]
    )
    for i, order in enumerate(orders):
        setup = Setup(order, count=1 + i % 3, fuse=False, stream="lazy" if i % 2 else "20")
        for run, ran in on_device(setup, model, prompts, runs, traced=False).items():
            assert ran.sent == cpu.sent, (order, run)
            assert ran.logits.tobytes() == cpu.logits.tobytes(), (order, run)
            assert ran.counts["graphs"] > 0
            assert (ran.counts["moved"] > 0) == bool(order)
    fused = on_device(Setup(), model, prompts, {"all": runs["all_"]}, traced=False)["all"]
    assert fused.counts["norm_mul"] > 0 or name in ("nomic-bert-moe",)
    if fused.sent == cpu.sent and len(cpu.logits):
        assert np.abs(fused.logits - cpu.logits).max() > 0


READ = """
    import ctypes, sys
    from pathlib import Path
    import llama_cpp
    lib = Path(llama_cpp.__file__).parent / "lib"
    ggml, base = (ctypes.CDLL(str(lib / f"lib{n}.so"), mode=ctypes.RTLD_GLOBAL) for n in ("ggml", "ggml-base"))
    ggml.ggml_backend_load_all()
    def call(name, *arguments, library=base):
        function = getattr(library, name)
        function.restype = ctypes.c_void_p
        return function(*map(ctypes.c_void_p, arguments))
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    device = ggml.ggml_backend_dev_by_name(b"Test0")
    kind = call("ggml_backend_dev_buffer_type", device)
    base.ggml_backend_buft_is_host.restype = ctypes.c_bool
    print(device is not None, base.ggml_backend_buft_is_host(ctypes.c_void_p(kind)), flush=True)
    buffer = call("ggml_backend_buft_alloc_buffer", kind, 4096)
    ctypes.string_at(call("ggml_backend_buffer_get_base", buffer), 1)
    print("was read", flush=True)
"""


def test_its_memory_is_not_the_hosts(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Setup().environment(device).items():
        monkeypatch.setenv(name, value)
    result = python(READ)
    assert result.stdout.split() == ["True", "False"], result.stderr
    assert result.returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        pytest.param(['-DPLUGIN_GGML_VERSION="0.0.1"'], {}, "another ggml", marks=pytest.mark.slow),
        ([], {"TEST_DEVICE_ORDER": "sideways"}, "TEST_DEVICE_ORDER"),
        ([], {"TEST_DEVICE_COUNT": "9"}, "TEST_DEVICE_COUNT"),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: list[str], environment: dict[str, str], says: str, runtime: Any, device: Path, tmp_path: Path
) -> None:
    library = build(runtime, tmp_path / "other.so", *flags) if flags else device
    command = [runtime.tool("llama-server"), "--list-devices"]
    listed = {
        wrong: subprocess.run(
            command,
            env={
                **os.environ,
                **Setup().environment(library if wrong else device),
                **(environment if wrong else {}),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for wrong in (False, True)
    }
    assert "Test0" in listed[False].stdout
    assert "Test0" not in listed[True].stdout
    assert says in listed[True].stderr
