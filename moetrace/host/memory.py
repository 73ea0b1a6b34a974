"""How much memory a model takes beside its weights, by llama.cpp's own account."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from moetrace.errors import RuntimeMissingError
from moetrace.host.runtime import find_tool

TOOL = "llama-fit-params"
_LINE = re.compile(r"(.*\S) (\d+) (\d+) (\d+) *")
_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryUse:
    """What ``llama-fit-params`` says; bytes, in whole MiB and rounded down as it does.

    Attributes
    ----------
    devices
        Names of the devices that hold it, besides the host; empty where llama.cpp found none.
    kv
        The KV cache, and what else a context remembers (recurrent states).
    compute
        Compute buffers: of the devices, or of the host where there are none.
    """

    devices: tuple[str, ...]
    kv: int
    compute: int


def memory_use(model: str | os.PathLike[str], *, n_ctx: int, n_ubatch: int) -> MemoryUse | None:
    """Ask llama.cpp what a context would take with all layers on the GPU and the experts with the CPU.

    Nothing is loaded: it reads the file's head. None if there is no ``llama-fit-params``, or an older one, or it does
    not load the model.
    """
    try:
        tool = find_tool(TOOL)
    except RuntimeMissingError:
        return None
    options = ["-c", str(n_ctx), "-b", str(n_ubatch), "-ub", str(n_ubatch), "-ngl", "99", "-cmoe"]
    command = [str(tool), "--fit-print", "on", "-m", os.fspath(model), *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = [found for line in run.stdout.splitlines() if (found := _LINE.fullmatch(line))]
    if run.returncode != 0 or not said or said[-1][1] != "Host":
        return None
    *devices, host = said
    return MemoryUse(
        devices=tuple(line[1] for line in devices),
        kv=sum(int(line[3]) for line in said) * _MIB,
        compute=sum(int(line[4]) for line in devices or [host]) * _MIB,
    )
