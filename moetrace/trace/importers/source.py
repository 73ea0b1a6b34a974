"""What every importer shares: pieces of a recording, careful reading of text, and errors that name the
place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError

MAX_LINE = 64 << 20
"""bytes; a longer line is no line of any format read here"""
MAX_EXPERTS = 65535
MAX_LAYERS = 65536

PREFILL, DECODE, PHASE_UNKNOWN = 0, 1, 2
LOST, PRESENT, NOT_COMPUTED = 0, 1, 2


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one request, in the order computed; n rows, L layers, k experts, D values.

    Attributes
    ----------
    request, label
        Name of the request and its domain. Pieces of one request follow each other.
    layers
        (L,) int64 layer numbers, ascending.
    state
        (n, L) uint8: 0 lost, 1 present, 2 not computed.
    experts
        (n, L, k) int64, -1 where there is none; None if the source has no experts.
    gate_input
        (n, L, D) float32, NaN where there is none; None if the source has none.
    token, position
        (n,) int64, -1 where the source does not say.
    predicted
        (n,) int64 token that the model gave the highest logit next; None if the source does not say.
    time_ns
        (n,) int64, -1 where the source does not say.
    phase
        (n,) uint8: 0 prefill, 1 decode, 2 unknown.
    row
        (n,) int64 index within the ubatch, from 0: a new ubatch begins where it does not rise.
    skipped
        Rows missing before this piece: the source numbers its tokens and left some out.
    extra
        What else the source says of the request: JSON values.
    weights
        (n, L, k) float32 mixing weights, NaN where there is none; None if the source has none.
    """

    request: str
    label: str
    layers: NDArray[np.int64]
    state: NDArray[np.uint8]
    experts: NDArray[np.int64] | None
    gate_input: NDArray[np.float32] | None
    token: NDArray[np.int64]
    position: NDArray[np.int64]
    predicted: NDArray[np.int64] | None
    time_ns: NDArray[np.int64]
    phase: NDArray[np.uint8]
    row: NDArray[np.int64]
    skipped: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    weights: NDArray[np.float32] | None = None


def merged(pieces: Iterator[Piece], n_bytes: int) -> Iterator[Piece]:
    """The same rows in fewer pieces: those of one request, without a gap, of about ``n_bytes`` together."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and (size >= n_bytes or piece.skipped or piece.request != group[0].request):
            yield _joined(group)
            group, size = [], 0
        group.append(piece)
        size += sum(a.nbytes for a in vars(piece).values() if isinstance(a, np.ndarray))
    if group:
        yield _joined(group)


def _joined(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    first = vars(group[0])
    columns = {
        name: np.concatenate([vars(piece)[name] for piece in group])
        for name, value in first.items()
        if isinstance(value, np.ndarray) and name != "layers"
    }
    return Piece(**(first | columns))


@dataclass
class Tally:
    """What an importer left out, or could not place; counted while its pieces are read."""

    rows_all_experts: int = 0
    """rows of passes that ran every expert (llama.cpp's warm-up)"""
    records_unplaced: int = 0
    """records of the last layer of which the source does not say to which row of the ubatch they belong"""
    lines_left_out: int = 0
    """lines of the other kind in a log that mixes two"""


@dataclass(frozen=True)
class Shape:
    """What a first reading of a source finds, before any column is made."""

    layers: tuple[int, ...]
    n_expert_used: int
    """k; 0 if the source has no experts"""
    n_expert_seen: int
    """highest expert id + 1; 0 if the source has no experts"""
    n_embd: int
    """values of a gate input; 0 if the source has none"""
    one_per_line: bool = False
    """each line of the source has one of the k experts of a token"""
    weights: bool = False
    """the source has mixing weights"""
    knows: frozenset[str] = frozenset()
    """what else it says, of ``token``, ``position``, ``phase``, ``time``"""
    n_expert: int = 0
    """experts of a layer, as the source says; 0 if it does not"""
    model: Mapping[str, str] = field(default_factory=dict)
    """name and architecture, as far as it says"""
    expert_bytes: tuple[int, ...] = ()
    """bytes of an expert of each layer; empty if it does not say"""
    says_loss: bool = True
    """what is missing in the source was lost; else rows may have been left out"""


def malformed(path: Path, line: int | None, field: str, why: str, fix: str = "") -> InputError:
    """An error that names file, line (from 1) and field."""
    where = f"{path}:{line}" if line is not None else str(path)
    return InputError(f"{where}: {field}: {why}", fix=fix or "correct the file, or export it again")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line that is not blank, without its end; one line in memory at a time.

    Raises InputError if the file cannot be read, is not UTF-8, or has a line of more than 64 MiB.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE + 1):
                number += 1
                if len(data) > MAX_LINE:
                    raise malformed(
                        path, number, "line", "is longer than 64 MiB", "give a text log, one record a line"
                    )
                try:
                    text = data.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as e:
                    raise malformed(
                        path, number, "line", f"is not UTF-8 text ({e.reason} at byte {e.start})"
                    ) from None
                if text.strip():
                    yield number, text
    except OSError as e:
        raise InputError(
            f"cannot read {path}", why=e.strerror or str(e), fix="give the path of a readable file"
        ) from e


def integer(path: Path, line: int | None, field: str, text: str, below: int) -> int:
    """``text`` as a whole number in [0, below)."""
    word = text.strip()
    if not (word.isascii() and word.isdigit()):
        raise malformed(path, line, field, f"{text[:40]!r} is no whole number of 0 or more")
    value = int(word) if len(word) < 20 else below
    if value >= below:
        raise malformed(path, line, field, f"{word[:40]} is too large (at most {below - 1})")
    return value


def is_int(value: Any, low: int, below: int) -> TypeGuard[int]:
    """Whether a JSON value is a whole number in [low, below); true and false are not."""
    return type(value) is int and low <= value < below


def parse_object(path: Path, line: int | None, text: str | bytes) -> dict[str, Any]:
    """One JSON object; a syntax error is reported at its line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise malformed(path, line if line is not None else e.lineno, f"column {e.colno}", e.msg) from None
    except (ValueError, RecursionError) as e:
        raise malformed(path, line, "line" if line is not None else "file", str(e)[:200]) from None
    if not isinstance(value, dict):
        raise malformed(path, line, "line" if line is not None else "file", "is no JSON object")
    return value


def int_array(n: int, value: int) -> NDArray[np.int64]:
    return np.full(n, value, np.int64)
