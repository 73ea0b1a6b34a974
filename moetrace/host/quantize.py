"""llama.cpp's quantisation: how much a type changes matrices, and files made by ``llama-quantize``."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, RuntimeMissingError, UsageError
from moetrace.host.runtime import find_tool, loaded_libraries
from moetrace.model.file import ModelFile

_ROWS = 64  # of each sampled expert, spread over the matrix


def block_of(name: str) -> tuple[int, int]:
    """Values and bytes of one block of a type, as llama.cpp calls it (``q4_k``). Raises UsageError for others."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if name.upper() not in GGMLQuantizationType.__members__:
        raise UsageError(
            f"there is no type {name!r}", fix="name types as llama-quantize does: q4_k,q5_k,q6_k"
        )
    found = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    return int(found[0]), int(found[1])


def quantization_errors(
    model: str | os.PathLike[str], experts: Mapping[str, Sequence[int]], types: Sequence[str]
) -> pd.DataFrame:
    """Measure ‖quantised − W‖ / ‖W‖ of some experts' matrices, by llama.cpp's own functions in a process of their own.

    Parameters
    ----------
    experts
        Tensor -> the experts looked at, each as often as it is named: up to 64 of their rows.
    types
        As llama-quantize calls them. Those that need an importance matrix (iq1, iq2, iq3_xxs) cannot be measured.

    Returns
    -------
    DataFrame
        ``tensor``, ``type``, ``error``: the root of the mean of squares.

    Raises
    ------
    RuntimeMissingError
        If there is no llama.cpp, or it cannot quantise so.
    """
    libraries = loaded_libraries(Path(find_tool("llama-quantize")))
    base = next((path for name, path in libraries.items() if "ggml-base" in name and path), None)
    if base is None:
        raise RuntimeMissingError(
            "llama-quantize links no libggml-base",
            why="it is a static program, whose functions cannot be called from here",
            fix="use a llama.cpp with shared libraries: moetrace setup",
        )
    # not in this process: llama.cpp's libraries must come after the tracer's
    code = "from moetrace.host import quantize; quantize._measure_here()"
    asked = {"library": base, "model": os.fspath(model), "experts": dict(experts), "types": list(types)}
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeMissingError(
            "the error of types could not be measured",
            why=(run.stderr.strip().splitlines() or ["the process died"])[-1],
        )
    return pd.DataFrame(json.loads(run.stdout), columns=["tensor", "type", "error"])


def _measure_here() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    asked = json.load(sys.stdin)
    quantize = ctypes.CDLL(asked["library"]).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    found = []
    with ModelFile(asked["model"]) as model:
        for name, experts in asked["experts"].items():
            chosen, often = np.unique(experts, return_counts=True)
            rows = [_some_rows(model.tensor(name, int(expert))) for expert in chosen]
            values = np.ascontiguousarray(np.concatenate(rows))
            n, width = values.shape
            for type_name in asked["types"]:
                kind = GGMLQuantizationType[type_name.upper()]
                block, size = GGML_QUANT_SIZES[kind]
                made = np.empty((n, width // block * size), np.uint8)
                source, target = (a.ctypes.data_as(ctypes.c_void_p) for a in (values, made))
                n_rows, n_per_row = ctypes.c_int64(n), ctypes.c_int64(width)
                quantize(ctypes.c_int(kind), source, target, ctypes.c_int64(0), n_rows, n_per_row, None)
                apart = np.square(dequantize(made, kind) - values, dtype=np.float64).sum(axis=1)
                whole = np.square(values, dtype=np.float64).sum(axis=1)
                ends = np.cumsum([len(part) for part in rows])[:-1]
                each = [
                    a.sum() / w.sum()
                    for a, w in zip(np.split(apart, ends), np.split(whole, ends), strict=True)
                ]
                found.append([name, type_name, float(np.sqrt(np.average(each, weights=often)))])
    json.dump(found, sys.stdout)


def _some_rows(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = matrix.reshape(-1, matrix.shape[-1])
    return flat[np.unique(np.linspace(0, len(flat) - 1, min(_ROWS, len(flat))).astype(np.int64))]


def type_lines(types: Mapping[str, str]) -> str:
    """What ``llama-quantize --tensor-type-file`` reads: a pattern for each tensor, and its type."""
    return "".join(f"{re.escape(name)}={kind}\n" for name, kind in types.items())


def write_quantized(
    model: str | os.PathLike[str],
    target: Path,
    types: Mapping[str, str],
    rest: str,
    imatrix: str | None = None,
) -> int:
    """Quantise a model with llama-quantize: ``types`` for the tensors named, ``rest`` (``Q8_0``) for the others.

    Gives the file's size in bytes. Raises MoetraceError if llama-quantize fails.
    """
    lines = target.with_suffix(".types")
    lines.write_text(type_lines(types), encoding="utf-8")
    command = [
        os.fspath(find_tool("llama-quantize")),
        "--allow-requantize",
        *(["--imatrix", imatrix] if imatrix else []),
        "--tensor-type-file",
        os.fspath(lines),
        os.fspath(model),
        os.fspath(target),
        rest,
    ]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.returncode:
        said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        raise MoetraceError("llama-quantize failed", why=(said or ["it said nothing"])[-1][:300])
    return target.stat().st_size
