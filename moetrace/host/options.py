"""What to record: the same options for ``run``, ``capture``, Python and the preload library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict, Unpack

from moetrace.errors import UsageError

CHANNELS = ("experts", "weights", "logits", "scores", "gate_input", "outputs", "attention")
COLLECTORS = ("auto", "tap", "callback")
ON_FULL = ("block", "drop", "overwrite")

_LAYERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_SIZE = re.compile(r"(\d+)\s*([kmg]i?b?)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a size such as ``64MiB``, ``1g`` or ``4096``; gives bytes (units are powers of 1024).

    Raises
    ------
    UsageError
        If it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size", fix="write it like 64MiB, 1GiB or 4096")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[(match[2] or "")[:1].lower()]


def human_size(n: float) -> str:
    """Give bytes as people read them: ``41.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


class CaptureSettings(TypedDict, total=False):
    """What :class:`CaptureOptions` takes beside channels."""

    layers: str
    collector: str
    on_full: str
    ring_size: int
    block_ms: int
    paused: bool


@dataclass(frozen=True)
class CaptureOptions:
    """What to record, and how.

    Attributes
    ----------
    channels
        Of ``experts`` (always recorded), ``weights``, ``logits``, ``scores``, ``gate_input``, ``outputs``,
        ``attention``, and ``tensor:PATTERN`` with a shell pattern of tensor names.
    layers
        Ranges of llama.cpp's layer numbers such as ``0-5,23``; empty: all.
    collector
        ``tap`` keeps tensors alive and reads them once per graph, ``callback`` reads them as they are computed;
        ``auto`` chooses by channel.
    on_full
        What the host does when the drain does not keep up: ``block`` (wait, at most ``block_ms``), ``drop`` the
        newest rows or ``overwrite`` the oldest. Losses are counted.
    ring_size
        Bytes of the ring of each context.
    block_ms
        Longest wait in a row, milliseconds.
    paused
        Begin without recording; ``moetrace start`` switches it on.

    Raises
    ------
    UsageError
        For a channel, layer range or choice that does not exist.
    """

    channels: tuple[str, ...] = ("experts", "weights")
    layers: str = ""
    collector: str = "auto"
    on_full: str = "block"
    ring_size: int = 16 << 20
    block_ms: int = 10_000
    paused: bool = False

    def __post_init__(self) -> None:
        for channel in self.channels:
            if channel not in CHANNELS and not (channel.startswith("tensor:") and len(channel) > 7):
                raise UsageError(
                    f"unknown channel {channel!r}",
                    fix=f"choose from {', '.join(CHANNELS)} and tensor:NAME-PATTERN",
                )
            if any(c in channel for c in ",\n"):
                raise UsageError(f"the channel {channel!r} holds a comma or a line break")
        if self.layers and not _LAYERS.fullmatch(self.layers):
            raise UsageError(f"{self.layers!r} is not a list of layers", fix="write it like 0-5,23")
        for name, value, choices in (
            ("collector", self.collector, COLLECTORS),
            ("on-full", self.on_full, ON_FULL),
        ):
            if value not in choices:
                raise UsageError(
                    f"--{name} {value!r} does not exist", fix=f"choose from {', '.join(choices)}"
                )
        if self.ring_size < 1 << 16:
            raise UsageError(f"a ring of {self.ring_size} bytes is too small", fix="give at least 64KiB")

    @classmethod
    def of(cls, channels: str | Sequence[str], **rest: Unpack[CaptureSettings]) -> CaptureOptions:
        """Make options from a comma-separated list, or a sequence, of channels."""
        names = channels.split(",") if isinstance(channels, str) else list(channels)
        known = {f.name for f in fields(cls)}
        if not rest.keys() <= known:
            raise TypeError(f"unknown options {sorted(rest.keys() - known)}")
        return cls(channels=tuple(dict.fromkeys(name.strip() for name in names if name.strip())), **rest)

    def settings(self, trace: Path) -> dict[str, str]:
        """Give the tracer's keys (csrc/config.h) for recording into the folder ``trace``."""
        return {
            "trace": str(trace.absolute()),
            "capture": ",".join(self.channels),
            "layers": self.layers,
            "collector": self.collector,
            "on_full": self.on_full,
            "ring_size": str(self.ring_size),
            "block_ms": str(self.block_ms),
            "paused": str(int(self.paused)),
        }

    def environment(self, trace: Path) -> dict[str, str]:
        """Give the same as environment variables, for the preload library."""
        return {f"MOETRACE_{key.upper()}": value for key, value in self.settings(trace).items() if value}
