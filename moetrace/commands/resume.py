"""``moetrace resume``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from moetrace.commands.capturing import report_trace
from moetrace.commands.options import add_option, typed
from moetrace.commands.run import note, warn
from moetrace.errors import MoetraceError
from moetrace.host.resume import ResumedRecording


class Resume:
    """Take up the recording of a server that runs on after moetrace was killed.

    The same trace goes on, with all that the ring still holds. It ends with the server. Ctrl-C lets go of the
    server, which serves on; resume takes it up again. If the server has ended, too, see moetrace recover.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="the trace folder that was being recorded")
        add_option(parser, "-q", "--quiet", action="store_true", help="print nothing but errors and loss")

    def run(self, args: argparse.Namespace) -> int:
        """Take it up."""
        path = Path(args.trace)

        def let_go(number: int, _frame: FrameType | None) -> None:
            raise _LetGo(number)

        recording = ResumedRecording(path, warn, note)
        if not args.quiet:
            rows = f"{recording.rows_caught_up:,} rows were waiting"
            print(f"Recording {path} again: {rows}", file=sys.stderr, flush=True)
        old = {n: signal.signal(n, let_go) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            recording.wait()
        except _LetGo:
            for number in old:
                signal.signal(number, signal.SIG_IGN)
            if recording.host_alive:
                recording.detach()
                if not args.quiet:
                    print(
                        f"The server runs on. Next: {typed()} resume {recording.trace.path}", file=sys.stderr
                    )
                return 0
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        try:
            recording.finish()
        except MoetraceError as e:
            if e is not recording.drain.error:
                raise
            return e.exit_code  # it has been said
        if not args.quiet:
            report_trace(recording.trace.path)
        return 0


class _LetGo(Exception):  # noqa: N818
    """A signal asks to end."""
