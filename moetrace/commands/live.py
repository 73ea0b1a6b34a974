"""``moetrace live``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moetrace.commands.control import switched
from moetrace.commands.options import add_option, paint, use_color
from moetrace.errors import MoetraceError, UsageError
from moetrace.live.screen import WINDOWS, Window, lines
from moetrace.live.tail import Snapshot, Tails, keep_small
from moetrace.printable import printable


class Live:
    """Watch a recording: experts in use, tokens a second, what is lost, what is in force.

    It reads the trace's files; the server that is recorded does not notice. On a terminal it is drawn anew each second:
    w changes the window (last seconds, last hour, all), l and L go through the layers, d through the labels, s stops
    and starts the recording, p pauses the view, q ends. Elsewhere, and with --once, it is printed line by line. A page
    with the same, and metrics: moetrace serve.

      moetrace live t.moet
      moetrace live t.moet --every 10 >> watched.txt
      moetrace live t.moet --replay 10x
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", metavar="T.moet", help="a trace, recorded now or before")
        add_option(
            parser, "--model", metavar="NAME", help="of several models that are recorded, this one alone"
        )
        add_option(parser, "--every", type=float, default=1.0, metavar="S", help="seconds between looks")
        add_option(
            parser,
            "--replay",
            metavar="FACTOR",
            help="show a recording that has ended as it went, so many times as fast: 1x, 10x",
        )
        add_option(parser, "--once", action="store_true", help="look once, and end")
        add_option(parser, "--json", action="store_true", help="print each look as a line of JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Watch until q or Ctrl-C, or until the recording ends."""
        if not args.every > 0:
            raise UsageError("--every must be above 0", fix="give seconds, as 2.5")
        if args.replay and args.once:
            raise UsageError("--replay and --once contradict each other", fix="leave one out")
        tails = Tails(Path(args.trace), args.model, replay=_factor(args.replay), every=args.every)
        on_terminal = sys.stdout.isatty() and sys.stdin.isatty() and not (args.once or args.json)
        view = _View("counts" if args.once else "recent")
        with contextlib.closing(tails), _keys(on_terminal):
            now = tails.look()
            keep_small()
            while True:
                size = shutil.get_terminal_size((100, 40))
                height = size.lines - 2 if on_terminal else 200
                said = _said(now, view, min(size.columns, 200), height)
                if args.json:
                    print(json.dumps({name: each.to_json() for name, each in now.items()}, allow_nan=False))
                elif on_terminal:
                    foot = [view.said, view.keys] if view.said else [view.keys]
                    shown = "".join(f"{line}\x1b[K\r\n" for line in [*said[: height + 1 - len(foot)], *foot])
                    sys.stdout.write("\x1b[H" + shown + "\x1b[J")
                else:
                    sys.stdout.write("\n".join([time.strftime("%H:%M:%S"), *said, ""]) + "\n")
                sys.stdout.flush()
                if args.once or not any(each.live for each in now.values()):
                    return 0
                key = _key(args.every, on_terminal)
                if key == "q":
                    return 0
                if key == "s":
                    view.said = _toggled(Path(args.trace), args.model, now)
                elif key is not None:
                    view.press(key, now)
                tails.label = view.label
                if not view.paused:
                    now = tails.look()


@dataclass
class _View:
    """What is looked at, and what keys change of it."""

    window: Window
    layer: int | None = None
    label: str | None = None
    paused: bool = False
    said: str = ""

    @property
    def keys(self) -> str:
        """What can be typed."""
        pause = "go on" if self.paused else "pause"
        return f"w window   l layer   d label   s stop or start recording   p {pause}   q end"

    def press(self, key: str, now: dict[str, Snapshot]) -> None:
        """Change it; other keys do nothing."""
        self.said = ""
        windows: list[Window] = list(WINDOWS)
        if key == "p":
            self.paused = not self.paused
        elif key == "w":
            self.window = windows[(windows.index(self.window) + 1) % len(windows)]
        elif key in "lL":
            n = min(len(each.layers) for each in now.values())
            # all of them stand between the last and the first
            place = ((n if self.layer is None else self.layer) + (1 if key == "l" else -1)) % (n + 1)
            self.layer = None if place == n else place
        elif key == "d":
            labels = sorted({label for each in now.values() for label in each.by_domain if label})
            at = labels.index(self.label) + 1 if self.label in labels else 0
            self.label = labels[at] if at < len(labels) else None
            if not labels:
                self.said = "no request has a label yet"


def _toggled(trace: Path, model: str | None, now: dict[str, Snapshot]) -> str:
    """Stop the recording, or start it again if it is paused everywhere; what was done."""
    states = [context.state for each in now.values() for context in each.contexts if context.state != "ended"]
    paused = not (states and all(state == "paused" for state in states))
    try:
        return printable("; ".join(map(str, switched(trace, model, None, paused=paused))))
    except MoetraceError as e:
        return printable(e.what)


def _said(now: dict[str, Snapshot], view: _View, width: int, height: int) -> list[str]:
    """The lines of each model, one below the other; of several each under its name."""
    out: list[str] = []
    for name, each in now.items():
        if name:
            out.append(printable(f"── {name} "[: width - 1]).ljust(width, "─"))
        out += lines(
            each,
            view.window,
            layer=view.layer,
            label=view.label,
            width=width,
            height=max(height // len(now) - bool(name), 6),
            red=lambda text: paint(text, "31") if use_color(sys.stdout) else text,
        )
    return out[:height]


def _factor(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        factor = float(text.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise UsageError(f"--replay {text} is no factor", fix="write it like 10x")
    return factor


@contextlib.contextmanager
def _keys(on_terminal: bool) -> Iterator[None]:
    """Single keys without an echo, on a screen of their own."""
    if not on_terminal:
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(seconds: float, on_terminal: bool) -> str | None:
    """The key that was pressed meanwhile."""
    if not on_terminal:
        time.sleep(seconds)
        return None
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    # not through a buffer, in which the next key would wait unseen
    return os.read(sys.stdin.fileno(), 1).decode("ascii", "replace") if ready else None
