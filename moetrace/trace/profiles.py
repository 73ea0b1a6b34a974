"""How often each expert was used, in the files that other engines place experts by.

=================== ================================================================================================
``ktransformers``   ``.pt``, {"logical_count": (layers of the model, experts) int64}: ``--init-expert-location`` with
                    ``--kt-expert-placement-strategy frequency``; dense layers have zeros
``sglang``          the same as JSON, which SGLang's ``--init-expert-location`` takes, too
``exllamav3``       ``.npz``, ``counts_decode`` and ``counts_prefill`` (layers with experts, experts) int64, as pull
                    request 315 proposes for ``--moe_cpu_profile``
``colibri``         lines ``layer expert count``: ``PIN=FILE PIN_GB=N``
``moe-trace``       lines ``layer,expert``, one for each use: ``--moe-cache-profile`` of llama.cpp's forks, and what its
                    example ``moe-trace`` writes
=================== ================================================================================================
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import IO

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.trace.record import RowFlag
from moetrace.trace.view import PHASES, Rows

PROFILES = ("ktransformers", "sglang", "exllamav3", "colibri", "moe-trace")
_CHUNK = 1 << 14  # rows looked at together


def expert_uses(rows: Rows) -> dict[str, NDArray[np.int64]]:
    """How often each expert was used: phase -> (L, E) int64, new arrays.

    llama.cpp's own trial batches are no use. Raises ChannelMissingError if experts were not captured.
    """
    n_layers, n_expert = len(rows.layers), int(rows.n_expert.max())
    out = {phase: np.zeros(n_layers * n_expert, np.int64) for phase in PHASES}
    for phase, items in _uses(rows):
        out[phase] += np.bincount(items, minlength=n_layers * n_expert)
    return {phase: counts.reshape(n_layers, n_expert) for phase, counts in out.items()}


def _uses(rows: Rows) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Phase, and items (layer index · E + expert), of a piece's uses, in the order of the recording."""
    if not len(rows):
        return
    if "experts" not in rows.column_names:
        _ = rows.experts  # says so
    n_layers, n_expert = len(rows.layers), int(rows.n_expert.max())
    layer = np.arange(n_layers)[:, None] * n_expert
    for start in range(0, len(rows), _CHUNK):
        piece = slice(start, start + _CHUNK)
        experts = rows.column("experts", piece)
        ours = (rows.column("flags", piece) & RowFlag.TRIAL) == 0
        phases = rows.column("phase", piece)
        for number, phase in enumerate(PHASES):
            mine = experts[ours & (phases == number)].astype(np.int64)
            if len(mine):
                yield phase, (mine + layer)[mine < rows.n_expert[:, None]]


def write_profile(rows: Rows, f: IO[bytes], profile: str, *, n_layer: int = 0) -> str:
    """Write how often each expert was used, in the form of one of ``PROFILES``.

    Parameters
    ----------
    rows
        A trace, or a selection of its rows: of a phase, of a label.
    f
        The file.
    n_layer
        Layers of the model, dense ones too; at least as many as the last that is recorded needs.

    Returns
    -------
    str
        A sentence: how many uses it rests on, and which layers of the model have none.

    Raises UsageError if no expert was used, and ChannelMissingError if experts were not captured.
    """
    uses = expert_uses(rows)
    counts = np.asarray(sum(uses.values()))
    if not counts.any():
        raise UsageError("there is no routing to make a profile of", fix="choose rows that have some")
    layers = rows.layers.tolist()
    n_layer = max(n_layer, max(layers) + 1)
    if profile in ("ktransformers", "sglang"):
        whole = np.zeros((n_layer, counts.shape[1]), np.int64)
        whole[layers] = counts
        as_json = json.dumps({"logical_count": whole.tolist()}).encode()
        f.write(as_json if profile == "sglang" else _torch_file(whole))
    elif profile == "exllamav3":
        # what is of no known phase is how experts were used, too
        generated = uses["decode"] if uses["decode"].any() else counts
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, counts_decode=generated, counts_prefill=uses["prefill"], layers=np.asarray(layers)
        )
        f.write(buffer.getvalue())
    elif profile == "colibri":
        lines = (f"{layers[i]} {e} {counts[i, e]}\n" for i, e in np.argwhere(counts).tolist())
        f.write("".join(lines).encode())
    else:
        f.write(b"layer,expert\n")
        for _, items in _uses(rows):
            pairs = zip(*(a.tolist() for a in np.divmod(items, counts.shape[1])), strict=True)
            f.write("".join(f"{layers[i]},{e}\n" for i, e in pairs).encode())
    each = counts.sum() / np.asarray(rows.n_expert).sum()
    none = sorted(set(range(n_layer)) - {layer for layer, n in zip(layers, counts, strict=True) if n.any()})
    return (
        f"{counts.sum():,} uses, {each:,.0f} of each expert on average"
        + ("; so few rank experts by chance" if each < _ENOUGH else "")
        + (f"; none of layers {', '.join(map(str, none))}: dense, or not recorded" if none else "")
    )


_ENOUGH = 20  # uses of each expert, from which on exllamav3's proposal does not warn


def _torch_file(counts: NDArray[np.int64]) -> bytes:
    """{"logical_count": counts} as torch.save writes it: a zip archive of a pickle, and of the storage that it names.

    https://docs.pytorch.org/docs/stable/notes/serialization.html; torch need not be installed.
    """

    def text(said: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(said)) + said.encode()

    def numbers(*values: int) -> bytes:
        return pickle.MARK + b"".join(pickle.BININT + struct.pack("<i", n) for n in values) + pickle.TUPLE

    def name(module: str, of: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{of}\n".encode()

    storage = pickle.MARK + text("storage") + name("torch", "LongStorage") + text("0") + text("cpu")
    storage += pickle.BININT + struct.pack("<i", counts.size) + pickle.TUPLE + pickle.BINPERSID
    hooks = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    made = pickle.MARK + storage + pickle.BININT1 + b"\0" + numbers(*counts.shape)
    made += numbers(counts.shape[1], 1) + pickle.NEWFALSE + hooks + pickle.TUPLE
    tensor = name("torch._utils", "_rebuild_tensor_v2") + made + pickle.REDUCE
    pickled = pickle.EMPTY_DICT + text("logical_count") + tensor + pickle.SETITEM
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + pickled + pickle.STOP)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", counts.astype("<i8").tobytes())
        archive.writestr("archive/version", "3\n")
    return out.getvalue()
