"""Router logits as Hugging Face's ``output_router_logits`` gives them, in a ``.npz``: (tokens, experts) by layer.

The arrays are layers, in the order of the numbers in their names (``arr_0``, ``layer_3``), or one array (layers,
tokens, experts); a file is one request. What was chosen is not in it: the k highest logits are taken, which is what
routers do that choose by a function of each logit alone (softmax, sigmoid), and not what those do that add a bias for
choosing or choose among groups (DeepSeek-V3, GLM-4.5).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError, UsageError
from moetrace.trace.importers.source import (
    MAX_EXPERTS,
    MAX_LAYERS,
    PHASE_UNKNOWN,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    malformed,
)


def is_logits(path: Path) -> bool:
    """Whether a ``.npz`` holds numbers with a fraction: its first array's header is read."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for name in archive.namelist()[:1]:
                with archive.open(name) as member:
                    version = np.lib.format.read_magic(member)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else (np.lib.format.read_array_header_2_0)
                    )
                    return bool(read(member)[2].kind == "f")
    except Exception:  # damaged, or something else: who reads it says so
        return False
    return False


def _layers(path: Path) -> dict[int, NDArray[Any]]:
    """Layer -> (n, E) logits; a pickle is never loaded."""
    try:
        with path.open("rb") as file, np.load(file) as loaded:
            arrays: dict[str, NDArray[Any]] = {name: loaded[name] for name in loaded}
    except Exception as e:  # whatever numpy and zipfile make of a damaged file
        why = (str(e) or type(e).__name__)[:200]
        raise InputError(f"{path} cannot be read", why=why, fix="give arrays of numbers") from e
    if len(arrays) == 1 and next(iter(arrays.values())).ndim == 3:
        out = dict(enumerate(next(iter(arrays.values()))))
    else:
        out = {}
        for name, array in arrays.items():
            number = re.search(r"(\d+)$", name)
            if number is None or int(number[1]) in out or int(number[1]) >= MAX_LAYERS:
                raise malformed(path, None, name, "does not end in the number of a layer of its own")
            out[int(number[1])] = array
    shapes = {array.shape for array in out.values()}
    if len(shapes) != 1 or any(
        a.ndim != 2 or a.dtype.kind != "f" or not 2 <= a.shape[1] < MAX_EXPERTS for a in out.values()
    ):
        raise malformed(
            path, None, "arrays", f"are of shapes {sorted(shapes)[:4]}, not (tokens, experts) alike for each layer",
            "give the router's logits: np.savez(path, *[layer.float().numpy() for layer in out.router_logits])",
        )  # fmt: skip
    if not all(np.isfinite(array).all() for array in out.values()):
        raise malformed(path, None, "arrays", "hold numbers that are not finite")
    return dict(sorted(out.items()))


def shape(path: Path, k: int | None) -> Shape:
    """First reading. Raises UsageError if k is not given: logits do not say it."""
    layers = _layers(path)
    n, n_expert = next(iter(layers.values())).shape
    if k is None or not 1 <= k <= n_expert:
        raise UsageError(
            f"how many of the {n_expert} experts does a token use?",
            why="router logits do not say it",
            fix=f"moetrace import {path} --n-expert-used K -o T.moet",
        )
    if n == 0:
        raise InputError(f"{path} holds no routing", fix="give logits of at least one token")
    return Shape(tuple(layers), k, n_expert, 0, n_expert=n_expert)


def pieces(path: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One request."""
    layers = list(_layers(path).values())
    n, k = len(layers[0]), shape.n_expert_used
    # the highest first; of equal ones the one of the lower number
    experts = np.stack(
        [np.argsort(-layer.astype(np.float64), axis=1, kind="stable")[:, :k] for layer in layers], axis=1
    )
    yield Piece(
        path.stem,
        label,
        np.array(shape.layers, np.int64),
        np.full((n, len(layers)), PRESENT, np.uint8),
        experts.astype(np.int64),
        None,
        token=int_array(n, -1),
        position=int_array(n, -1),
        predicted=None,
        time_ns=int_array(n, -1),
        phase=np.full(n, PHASE_UNKNOWN, np.uint8),
        row=np.arange(n, dtype=np.int64),
    )
