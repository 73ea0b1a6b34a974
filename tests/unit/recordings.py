"""Recordings of other programs, as small as can be."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(os.environ.get("MOETRACE_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder shared/ beside the repository")


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def entry(layer, component, ids, **more):
    return {
        "operation_type": "MUL_MAT_ID",
        "layer_id": layer,
        "dst_name": f"ffn_moe_{component}-{layer}",
        "expert_ids": ids,
        "phase": "GENERATE",
        "timestamp_ns": 5,
    } | more


def one_pass(ids_of_layer, **more):
    other = {"operation_type": "RMS_NORM", "layer_id": None, "dst_name": "norm", "expert_ids": []}
    return [
        e
        for layer, ids in enumerate(ids_of_layer)
        for e in (other, *(entry(layer, c, ids, **more) for c in ("gate", "up", "down")))
    ]


def token_file(root, domain, number, *passes):
    path = root / domain / "traces" / f"token-{number:05d}.json"
    return write(path, json.dumps({"token_id": number, "entries": [e for p in passes for e in p]}))


WARMUP = one_pass([list(range(15, -1, -1)), list(range(16))], phase="PROMPT")


def olmoe_line(experts, **more):
    """experts: (token, layer, k), turned as the format has it: [token][k][layer]."""
    n = len(experts)
    exp_ids = np.array(experts).transpose(0, 2, 1).tolist()
    return json.dumps(
        {"input_ids": list(range(n)), "predicted_token_ids": list(range(1, n + 1)), "exp_ids": exp_ids} | more
    )
