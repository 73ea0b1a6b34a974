"""Small random routing, and slow, plain re-computations to hold the kernels against."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Arrays = dict[str, Any]


def shared_data(name: str) -> Path:
    """A file of the real data beside the repository; skips where that is absent."""
    root = Path(os.environ.get("MOETRACE_SHARED", Path(__file__).parents[3] / "shared"))
    path = root / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here (set MOETRACE_SHARED)")
    return path


def random_rows(
    seed: int, n: int = 150, n_layers: int = 3, n_expert: int = 32, k: int = 4, n_requests: int = 6
) -> Arrays:
    """Rows of interleaved requests, each with one gap in its positions; some cells absent."""
    rng = np.random.default_rng(seed)
    kind = np.uint8 if n_expert <= 255 else np.uint16
    experts = np.argsort(rng.random((n, n_layers, n_expert)), axis=2)[:, :, :k].astype(kind)
    request = rng.integers(-1, n_requests, n)
    position = np.zeros(n, dtype=np.int32)
    for r in np.unique(request):
        mine = np.flatnonzero(request == r)
        position[mine] = np.arange(mine.size) + (np.arange(mine.size) > 4)
    return {
        "experts": experts,
        "request": request,
        "position": position,
        "state": (rng.random((n, n_layers)) < 0.9).astype(np.uint8),
        "token": rng.integers(0, 9, n).astype(np.int32),
        "n_expert": n_expert,
    }


def count_slowly(
    experts: Any, request: Any, position: Any, n_expert: int, state: Any, max_lag: int
) -> Arrays:
    """:func:`moetrace.analysis.count_routing` by its definition, cell by cell; requests are prompts."""
    _, n_layers, _ = experts.shape
    requests = sorted({int(r) for r in request if r >= 0}, key=str)
    shape = (len(requests), n_layers)
    out = {
        "tokens": np.zeros(shape, int),
        "included": np.zeros((*shape, n_expert), int),
        "top1": np.zeros((*shape, n_expert), int),
        "transitions": np.zeros((n_layers, n_expert, n_expert), int),
        "lag_pairs": np.zeros((*shape, max_lag), int),
        "lag_shared": np.zeros((*shape, max_lag), int),
        "lag_top1": np.zeros((*shape, max_lag), int),
    }
    for i, r in enumerate(requests):
        rows = np.flatnonzero(request == r)
        for layer in range(n_layers):
            for a, t in enumerate(rows):
                if state[t, layer] != 1:
                    continue
                out["tokens"][i, layer] += 1
                out["included"][i, layer, experts[t, layer]] += 1
                out["top1"][i, layer, experts[t, layer, 0]] += 1
                for d in range(1, min(max_lag, len(rows) - 1 - a) + 1):
                    u = rows[a + d]
                    if position[u] - position[t] != d or state[u, layer] != 1:
                        continue
                    one, two = experts[t, layer], experts[u, layer]
                    out["lag_pairs"][i, layer, d - 1] += 1
                    out["lag_shared"][i, layer, d - 1] += len(set(one.tolist()) & set(two.tolist()))
                    out["lag_top1"][i, layer, d - 1] += int(one[0] == two[0])
                    if d == 1:
                        out["transitions"][layer, one[0], two[0]] += 1
    return out
