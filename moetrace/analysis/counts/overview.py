"""What there is: tokens by phase, prompts by domain, entries by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

PHASES = ("prefill", "decode", "unknown")
_CHUNK = 1 << 16


def phases(
    phase: npt.NDArray[np.uint8], state: npt.NDArray[np.uint8], request: npt.ArrayLike
) -> pd.DataFrame:
    """Tokens by phase: phase (N,), state (N, L), request (N,), which may be memory-mapped.

    Returns a row per phase, and one, ``no request``, for rows of no request (llama.cpp's own warm-up and
    probes): ``phase``, ``tokens``, ``entries`` that are present.
    """
    code = np.where(np.asarray(request) < 0, len(PHASES), np.minimum(np.asarray(phase), len(PHASES) - 1))
    tokens, entries = np.zeros((2, len(PHASES) + 1), dtype=np.int64)
    for start in range(0, code.size, _CHUNK):
        part = code[start : start + _CHUNK]
        here = (np.asarray(state[start : start + _CHUNK]) == 1).sum(axis=1)
        tokens += np.bincount(part, minlength=tokens.size)
        entries += np.bincount(part, weights=here, minlength=tokens.size).astype(np.int64)
    return pd.DataFrame({"phase": [*PHASES, "no request"], "tokens": tokens, "entries": entries})


def domains(requests: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Prompts by domain, from the tables of requests of one or several traces (``Trace.requests``).

    Returns a row per domain ("" for requests without): ``prompts`` (requests of one id are one prompt),
    ``requests``, and tokens ``prefill``, ``decode``, ``lost``.
    """
    parts = []
    for trace, table in enumerate(requests):
        ids = table["id"].astype(object)
        own = pd.Series([f"{trace}#{number}" for number in table.index], index=table.index, dtype=object)
        parts.append(
            pd.DataFrame(
                {
                    "domain": table["label"].astype(object).where(table["label"].notna(), "").astype(str),
                    "prompt": ids.where(ids.notna(), own).astype(str),
                    "prefill": table["n_prefill"],
                    "decode": table["n_decode"],
                    "lost": table["n_lost"],
                }
            )
        )
    every = pd.concat(parts)
    groups = every.groupby("domain", sort=True)
    return pd.DataFrame(
        {
            "prompts": groups["prompt"].nunique(),
            "requests": groups.size(),
            **{name: groups[name].sum() for name in ("prefill", "decode", "lost")},
        }
    ).reset_index()


def layers(
    state: npt.NDArray[np.uint8],
    *,
    layers: npt.ArrayLike,
    n_expert: npt.ArrayLike,
    n_expert_used: npt.ArrayLike,
) -> pd.DataFrame:
    """Entries by layer: state (N, L), which may be memory-mapped; the others (L,).

    Returns a row per layer: ``layer``, ``n_expert``, ``n_expert_used``, and entries ``present``,
    ``not_computed``, ``lost``.
    """
    counts = np.zeros((3, state.shape[1]), dtype=np.int64)
    for start in range(0, state.shape[0], _CHUNK):
        part = np.asarray(state[start : start + _CHUNK])
        counts += np.stack([(part == code).sum(axis=0) for code in (1, 2, 0)])
    return pd.DataFrame(
        {
            "layer": np.asarray(layers),
            "n_expert": np.asarray(n_expert),
            "n_expert_used": np.asarray(n_expert_used),
            "present": counts[0],
            "not_computed": counts[1],
            "lost": counts[2],
        }
    )
