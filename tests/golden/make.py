"""Makes the golden traces.

A reader must read those of every format version for ever: before a version changes, keep one under its number
(``two-contexts-1.0``), then run ``PYTHONPATH=.:tests/unit python tests/golden/make.py FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
from rings import make_layout
from traces import Context, server_records, write_trace


def two_contexts(path: Path) -> Path:
    """Closed; two-byte ids, uneven layers, every optional channel, two rows lost; and a draft context."""
    rng = np.random.default_rng(11)
    channels = ("experts", "weights", "logits", "scores", "gate_input", "tensor.l_out")
    main = make_layout(
        layers=(1, 2, 3), n_expert=(300, 8, 300), k=(4, 2, 4), channels=channels, numbered=True
    )
    draft = make_layout(layers=(0, 1), n_expert=8, k=2, channels=("experts",), numbered=True)
    return write_trace(
        path,
        [
            Context(main, server_records(main, rng, lose=(7, 13)), lost=2),
            Context(draft, server_records(draft, rng, n_requests=1), facts={"role": "draft"}),
        ],
        labels=[
            {"request": 0, "id": "code-00", "label": "code", "prompt": "def f(x):"},
            {"request": 1, "id": "math-00", "label": "math", "prompt": "1 + 1 ="},
            {"request": 1, "label": "arithmetic"},
        ],
        vocabulary=[
            b"<s>",
            b" the",
            "é".encode(),
            b"\xc3",
            b"\xa9",
            *(f"t{i}".encode() for i in range(5, 100)),
        ],
    )


def killed(path: Path) -> Path:
    """Never closed: 20 records sealed, the rest in the ring, bytes of an unsealed block in the columns."""
    layout = make_layout(numbered=True)
    records = server_records(layout, np.random.default_rng(12), n_requests=4, lose=(33,))
    write_trace(path, [Context(layout, records, lost=1)], close=False, sealed=20)
    for column in ("serial", "experts"):
        with (path / "ctx0" / "rows" / f"{column}.npy").open("ab") as f:
            f.write(bytes(range(50)))
    return path


GOLDEN = {"two-contexts": two_contexts, "killed": killed}


def make(folder: Path) -> None:
    """Write all of them, at a fixed time."""
    with mock.patch("time.time_ns", return_value=1_700_000_001_000_000_000):
        for name, write in GOLDEN.items():
            write(folder / name)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
