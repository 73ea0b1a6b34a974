"""JSON lines of the OLMoE analysis: ``input_ids``, ``predicted_token_ids``, ``exp_ids[token][k][layer]``.

A line is one text that the model read in one forward pass: its token ids and positions are known, weights are
not. Where a part of it was generated, ``n_prompt`` says how many tokens were the prompt; a token id of -1 is not known.
Other keys with texts or numbers, such as ``group``, are kept with the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.trace.importers.source import (
    DECODE,
    MAX_EXPERTS,
    PREFILL,
    PRESENT,
    Piece,
    Shape,
    Tally,
    int_array,
    is_int,
    lines,
    malformed,
    parse_object,
)

MAX_TOKEN = 1 << 31
UNKNOWN = -1
KEYS = ("input_ids", "exp_ids", "predicted_token_ids", "label", "domain", "id", "n_prompt")


def find(source: Path) -> list[Path]:
    """The file itself, or the ``*.jsonl`` files of a folder."""
    return sorted(source.glob("*.jsonl")) if source.is_dir() else [source]


def _ids(
    path: Path, line: int, text: dict[str, Any], field: str, below: int, ndim: int, least: int = 0
) -> NDArray[np.int64]:
    value = text.get(field)
    if value is None:
        raise malformed(path, line, field, "is missing")
    try:
        array = np.array(value)
    except ValueError:
        raise malformed(path, line, field, "its lists are of unequal length") from None
    if array.ndim != ndim or (array.size and array.dtype.kind not in "iu"):
        raise malformed(
            path,
            line,
            field,
            f"is no {'list' if ndim == 1 else 'nested list [token][k][layer]'} of whole numbers",
        )
    if array.size and not (int(array.min()) >= least and int(array.max()) < below):
        raise malformed(path, line, field, f"a number is not within {least} to {below - 1}")
    return array.astype(np.int64)


def records(
    path: Path,
) -> Iterator[
    tuple[
        int,
        str,
        NDArray[np.int64],
        NDArray[np.int64] | None,
        NDArray[np.int64],
        NDArray[np.uint8],
        dict[str, str | float],
    ]
]:
    """Line, label, (n,) token ids, (n,) predicted ids or None, (n, k, L) experts, (n,) phases, what else it says."""
    for line, text in lines(path):
        obj = parse_object(path, line, text)
        token = _ids(path, line, obj, "input_ids", MAX_TOKEN, 1, UNKNOWN)
        experts = _ids(path, line, obj, "exp_ids", MAX_EXPERTS, 3)
        predicted = (
            _ids(path, line, obj, "predicted_token_ids", MAX_TOKEN, 1, UNKNOWN)
            if "predicted_token_ids" in obj
            else None
        )
        if len(experts) != len(token):
            raise malformed(path, line, "exp_ids", f"has {len(experts)} tokens, input_ids has {len(token)}")
        if predicted is not None and len(predicted) != len(token):
            raise malformed(
                path, line, "predicted_token_ids", f"has {len(predicted)} tokens, input_ids has {len(token)}"
            )
        in_order = np.sort(experts, axis=1)
        if (in_order[:, 1:] == in_order[:, :-1]).any():
            raise malformed(path, line, "exp_ids", "names one expert twice in one layer of one token")
        label = obj.get("label", obj.get("domain", path.stem))
        if not isinstance(label, str):
            raise malformed(path, line, "label", "is no text")
        n_prompt = obj.get("n_prompt", len(token))
        if not is_int(n_prompt, 0, len(token) + 1):
            raise malformed(path, line, "n_prompt", f"{n_prompt!r} is no number of the line's tokens")
        extra = {
            key: value
            for key, value in obj.items()
            if key not in KEYS and isinstance(value, str | int | float)
        }
        phase = np.where(np.arange(len(token)) < n_prompt, PREFILL, DECODE).astype(np.uint8)
        yield line, label, token, predicted, experts, phase, extra


def shape(source: Path) -> Shape:
    """First reading."""
    found: tuple[int, int] | None = None
    highest = -1
    for path in find(source):
        for line, _, token, _, experts, *_ in records(path):
            if not len(token):
                continue
            if found is None:
                found = experts.shape[1], experts.shape[2]
            if experts.shape[1:] != found:
                raise malformed(
                    path, line, "exp_ids", f"has k, layers = {experts.shape[1:]} where others have {found}"
                )
            highest = max(highest, int(experts.max()))
    if found is None:
        raise InputError(f"{source} holds no texts", fix="give JSON lines with input_ids and exp_ids")
    return Shape(
        tuple(range(found[1])), found[0], highest + 1, 0, knows=frozenset({"token", "position", "phase"})
    )


def pieces(source: Path, shape: Shape, tally: Tally, *, label: str = "") -> Iterator[Piece]:
    """One piece and one request per text; its label is its own, else ``label``, else the file's name."""
    layers = np.array(shape.layers, np.int64)
    for path in find(source):
        for line, own, token, predicted, experts, phase, extra in records(path):
            n = len(token)
            if n:
                yield Piece(
                    f"{path.stem}-{line:06d}",
                    label if label and own == path.stem else own,
                    layers,
                    np.full((n, len(layers)), PRESENT, np.uint8),
                    np.ascontiguousarray(experts.transpose(0, 2, 1)),
                    None,
                    token=token,
                    position=np.arange(n, dtype=np.int64),
                    predicted=predicted,
                    time_ns=int_array(n, -1),
                    phase=phase,
                    row=np.arange(n, dtype=np.int64),
                    extra=extra,
                )
