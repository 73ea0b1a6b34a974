"""``moetrace live``."""

from __future__ import annotations

import argparse
import contextlib
import select
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from moetrace.commands.options import add_option, paint, use_color
from moetrace.errors import UsageError
from moetrace.live.screen import WINDOWS, Window, lines
from moetrace.live.tail import Snapshot, Tails
from moetrace.printable import printable


class Live:
    """Watch a recording: experts in use, tokens a second, what is lost, what is in force.

    It reads the trace's files; the server that is recorded does not notice. On a terminal it is drawn anew each second:
    w changes the window (last seconds, last hour, all), p pauses, q ends. Elsewhere, and with --once, it is printed
    line by line. A page with the same, and metrics: moetrace serve.

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

    def run(self, args: argparse.Namespace) -> int:
        """Watch until q or Ctrl-C, or until the recording ends."""
        if not args.every > 0:
            raise UsageError("--every must be above 0", fix="give seconds, as 2.5")
        if args.replay and args.once:
            raise UsageError("--replay and --once contradict each other", fix="leave one out")
        tails = Tails(Path(args.trace), args.model, replay=_factor(args.replay))
        on_terminal = sys.stdout.isatty() and sys.stdin.isatty() and not args.once
        windows: list[Window] = list(WINDOWS)
        window, paused = windows[-1] if args.once else windows[0], False
        with contextlib.closing(tails), _keys(on_terminal):
            while True:
                if not paused:
                    now = tails.look()
                size = shutil.get_terminal_size((100, 40))
                height = size.lines - 2 if on_terminal else 200
                said = _said(now, window, min(size.columns, 200), height)
                if on_terminal:
                    keys = f"w window   p {'go on' if paused else 'pause'}   q end"
                    sys.stdout.write(
                        "\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in [*said, keys]) + "\x1b[J"
                    )
                else:
                    sys.stdout.write("\n".join([time.strftime("%H:%M:%S"), *said, ""]) + "\n")
                sys.stdout.flush()
                if args.once or not any(each.live for each in now.values()):
                    return 0
                key = _key(args.every, on_terminal)
                if key == "q":
                    return 0
                if key == "p":
                    paused = not paused
                if key == "w":
                    window = windows[(windows.index(window) + 1) % len(windows)]


def _said(now: dict[str, Snapshot], window: Window, width: int, height: int) -> list[str]:
    """The lines of each model, one below the other; of several each under its name."""
    out: list[str] = []
    for name, each in now.items():
        if name:
            out.append(printable(f"── {name} "[: width - 1]).ljust(width, "─"))
        out += lines(
            each,
            window,
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
    return sys.stdin.read(1) if ready else None
