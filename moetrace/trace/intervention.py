"""Interventions: what to change about the routing, as people write it, as the host reads it, as a trace keeps it.

An intervention is written ``KIND:LAYERS:EXPERTS``, optionally with ``@slot=N`` or ``@request=ID`` behind it::

    ablate:7:3,12         experts 3 and 12 of layer 7 are never chosen
    force:*:5@slot=1      expert 5 is chosen in every layer for every token of slot 1
    bias:0-3:3=+1.5       1.5 is added to the score that expert 3 is selected by
    replay:other.moet     every token gets the experts that were recorded at its position

Only the choice changes: the mixing weights are those that the router gave the experts that are then used.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import struct
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import RuntimeMissingError, TraceError, UsageError
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.storage import disk_error

FOLDER = "interventions"
NO_EXPERT = 0xFFFF

_MAGIC, _VERSION = b"MOETINTV", 1
_HEADER = struct.Struct("<8sIIQII")
_RULE = struct.Struct("<IiiifiIIQQ")
_LAYERS = re.compile(r"\*|\d+(-\d+)?(,\d+(-\d+)?)*")
_TARGET = re.compile(r"(?s)(.*)@(slot|request)=(.+)")
_FORM = (
    "write KIND:LAYERS:EXPERTS with KIND ablate, force or bias, or replay:TRACE; for example ablate:7:3,12"
)

#: layer, experts, experts used, groups, groups used, whether it chooses by scores: what a host says of a router
Router = tuple[int, int, int, int, int, bool]


class Kind(IntEnum):
    """What an intervention does (``intervention_kind`` of csrc/intervene.h)."""

    ABLATE = 0
    """Experts are never chosen."""
    FORCE = 1
    """Experts are always chosen; the best others fill up."""
    BIAS = 2
    """A number is added to the scores that the experts are selected by."""
    REPLAY = 3
    """The whole routing is replaced by a recorded one."""


@dataclass(frozen=True)
class Rule:
    """One rule of an intervention's file: ``ids`` is uint16 (positions, experts); one position unless a replay."""

    kind: Kind
    ids: NDArray[np.uint16]
    sequence: int = -1
    first_layer: int = -1
    last_layer: int = -1
    value: float = 0.0
    position: int = 0

    def has_layer(self, layer: int) -> bool:
        """Whether it is about this layer, by llama.cpp's number."""
        return self.first_layer < 0 or self.first_layer <= layer <= self.last_layer


@dataclass(frozen=True)
class Intervention:
    """One change of the routing.

    Attributes
    ----------
    kind
        What is done.
    layers
        Closed ranges of llama.cpp's layer numbers; empty: all layers with experts.
    experts
        The experts; none for a replay.
    value
        What a bias adds: in the unit of the scores (probabilities, sigmoids, or logits, as the architecture has it).
    slot
        Only tokens of this slot (llama.cpp's sequence); None: all.
    request
        Only tokens of the request with this id. Needs who sends the requests: ``capture`` and ``evaluate``.
    source, source_request
        Of a replay: the trace, and the id of the request in it.

    Raises
    ------
    UsageError
        If the parts contradict each other.
    """

    kind: Kind
    layers: tuple[tuple[int, int], ...] = ()
    experts: tuple[int, ...] = ()
    value: float = 0.0
    slot: int | None = None
    request: str | None = None
    source: str = ""
    source_request: str | None = None

    def __post_init__(self) -> None:
        def bad(why: str) -> UsageError:
            return UsageError(f"{str(self)!r} is no intervention", why=why, fix=_FORM)

        if self.kind is Kind.REPLAY:
            if not self.source or self.experts:
                raise bad("a replay names a trace, and no experts")
        elif not self.experts or self.source:
            raise bad("it names no experts")
        if any(not 0 <= e < NO_EXPERT for e in self.experts) or len(set(self.experts)) < len(self.experts):
            raise bad("experts are different numbers from 0 on")
        if any(not 0 <= a <= b < 1 << 31 for a, b in self.layers):
            raise bad("a range of layers runs backwards")
        if not math.isfinite(self.value) or (self.kind is Kind.BIAS) == (self.value == 0):
            raise bad("a bias, and nothing else, has a number other than 0, as in bias:7:3=+1.5")
        if self.slot is not None and (self.request is not None or not 0 <= self.slot < 1 << 31):
            raise bad("it is about a slot or about a request")

    @classmethod
    def parse(cls, text: str) -> Intervention:
        """Read one as people write it (see the module's head).

        Raises
        ------
        UsageError
            If it is none.
        """
        rest, slot, request = text.strip(), None, None
        if target := _TARGET.fullmatch(rest):
            rest = target[1]
            if target[2] == "request":
                request = target[3]
            elif target[3].isdecimal():
                slot = int(target[3])
            else:
                raise UsageError(f"{target[3]!r} is not a slot", fix="write it like @slot=1")
        name, _, rest = rest.partition(":")
        if name.upper() not in Kind.__members__:
            raise UsageError(f"{text!r} is no intervention", why=f"there is no kind {name!r}", fix=_FORM)
        kind = Kind[name.upper()]
        layers, colon, tail = rest.partition(":")
        if not (colon and _LAYERS.fullmatch(layers)):
            if kind is not Kind.REPLAY:
                raise UsageError(f"{text!r} is no intervention", why=f"{layers!r} are no layers", fix=_FORM)
            layers, tail = "*", rest
        ranges = () if layers == "*" else tuple(_range(part) for part in layers.split(","))
        if kind is Kind.REPLAY:
            source, _, source_request = tail.partition("#")
            return cls(
                kind, ranges, slot=slot, request=request, source=source, source_request=source_request or None
            )
        ids, equals, number = tail.partition("=")
        try:
            experts = tuple(int(part) for part in ids.split(","))
            value = float(number) if equals else 0.0
        except ValueError:
            raise UsageError(f"{text!r} is no intervention", why=f"{tail!r}", fix=_FORM) from None
        return cls(kind, ranges, experts, value, slot, request)

    def __str__(self) -> str:
        layers = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in self.layers) or "*"
        if self.kind is Kind.REPLAY:
            what = self.source + (f"#{self.source_request}" if self.source_request is not None else "")
            text = f"replay:{what}" if layers == "*" else f"replay:{layers}:{what}"
        else:
            text = f"{self.kind.name.lower()}:{layers}:{','.join(map(str, self.experts))}"
        text += f"={self.value:+g}" if self.kind is Kind.BIAS else ""
        text += f"@slot={self.slot}" if self.slot is not None else ""
        return text + (f"@request={self.request}" if self.request is not None else "")


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def parse_interventions(
    given: str | Intervention | Iterable[str | Intervention] | None,
) -> tuple[Intervention, ...]:
    """Read one or several; None: none.

    Raises
    ------
    UsageError
        If one of them is none.
    """
    if given is None:
        return ()
    items = [given] if isinstance(given, (str, Intervention)) else given
    return tuple(Intervention.parse(item) if isinstance(item, str) else item for item in items)


def encode(rules: Sequence[Rule]) -> bytes:
    """Give the file that the host reads (csrc/intervene.h)."""
    offset = _HEADER.size + _RULE.size * len(rules)
    heads, bodies = [], []
    for rule in rules:
        ids = np.ascontiguousarray(rule.ids, "<u2")
        heads.append(
            _RULE.pack(
                rule.kind, rule.sequence, rule.first_layer, rule.last_layer, rule.value, rule.position,
                *ids.shape, offset, 0,
            )
        )  # fmt: skip
        bodies.append(ids.tobytes())
        offset += ids.nbytes
    body = b"".join(heads + bodies)
    return _HEADER.pack(_MAGIC, _VERSION, len(rules), offset, zlib.crc32(body), 0) + body


def decode(data: bytes) -> list[Rule]:
    """Give the rules of a file that :func:`encode` made.

    Raises
    ------
    TraceError
        If it is damaged, or something else.
    """
    try:
        magic, version, n_rules, size, crc, _ = _HEADER.unpack_from(data)
        if (magic, version, size) != (_MAGIC, _VERSION, len(data)) or crc != zlib.crc32(data[_HEADER.size :]):
            raise ValueError("its header or checksum does not fit")
        rules = []
        for i in range(n_rules):
            kind, sequence, first, last, value, position, n_rows, n_ids, offset, _ = _RULE.unpack_from(
                data, _HEADER.size + i * _RULE.size
            )
            ids = np.frombuffer(data, "<u2", n_rows * n_ids, offset).reshape(n_rows, n_ids)
            rules.append(Rule(Kind(kind), ids, sequence, first, last, value, position))
    except (struct.error, ValueError, OverflowError) as e:
        raise TraceError("an intervention's file is damaged", why=str(e), fix="restore it from a copy") from e
    return rules


def check(data: bytes, routers: Sequence[Router]) -> None:
    """Refuse what routers of these shapes cannot do, with the host's own words.

    Raises
    ------
    UsageError
        If they cannot; names the layer and why.
    RuntimeMissingError
        If moetrace was installed without its native module.
    """
    try:
        native = importlib.import_module("moetrace._native")
    except ImportError as e:
        raise RuntimeMissingError(
            "moetrace's native module is missing, so interventions cannot be checked",
            why=str(e),
            fix="install moetrace with `pip install .` (it needs a C++17 compiler)",
        ) from e
    if why := native.intervention_check(data, list(routers)):
        raise UsageError("the intervention is refused; nothing was changed", why=why)


def routers_of(meta: Mapping[str, Any]) -> list[Router]:
    """Give what a ring's text (or context.json) says of the model's routers; empty if it says nothing."""
    raw = meta.get("routers")
    rows = raw if isinstance(raw, list) else []
    if not all(
        isinstance(r, list) and len(r) == 6 and all(type(n) is int and 0 <= n < 1 << 20 for n in r)
        for r in rows
    ):
        return []
    return [(r[0], r[1], r[2], r[3], r[4], bool(r[5])) for r in rows]


def store(trace: Path, interventions: Sequence[Intervention], data: bytes) -> int:
    """Write an intervention into a trace's folder; gives its number, from 1 on. It is not in force by that.

    Raises
    ------
    MoetraceError
        If it cannot be written.
    """
    folder = trace / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        number = 1 + max((int(p.stem) for p in folder.glob("*.bin") if p.stem.isdecimal()), default=0)
        while True:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            try:
                fd = os.open(folder / f"{number}.bin", flags, 0o600)
                break
            except FileExistsError:  # another process came first
                number += 1
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except OSError as e:
        raise disk_error(folder, e) from e
    write_json(
        folder / f"{number}.json",
        {"number": number, "rules": [str(i) for i in interventions], "time_ns": time.time_ns()},
    )
    return number


def stored_rules(trace: Path) -> list[Rule] | None:
    """Give the rules of all interventions that a trace keeps, of whichever number; None if it keeps none.

    Raises
    ------
    TraceError
        If the file of one is missing or damaged.
    """
    rules: list[Rule] = []
    numbers = [path.stem for path in (trace / FOLDER).glob("*.json") if path.stem.isdecimal()]
    for number in numbers:
        path = trace / FOLDER / f"{number}.bin"
        if not path.is_file():
            raise TraceError(f"{path} is missing", why="the trace lists this intervention")
        try:
            rules += decode(path.read_bytes())
        except OSError as e:
            raise TraceError(f"{path} cannot be read", why=e.strerror or str(e)) from e
    return rules if numbers else None


def described(trace: Path) -> dict[int, str]:
    """Give number -> the interventions that it stands for, joined by blanks, of a trace's folder."""
    out = {}
    for path in (trace / FOLDER).glob("*.json"):
        facts = read_json(path)
        rules, number = facts.get("rules"), facts.get("number")
        if isinstance(number, int) and isinstance(rules, list):
            out[number] = " ".join(map(str, rules))
    return out
