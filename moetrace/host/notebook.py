"""``%load_ext moetrace``: ``%%moetrace`` records what a notebook's cell computes."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from moetrace.errors import MoetraceError, UsageError
from moetrace.host.record import model_of, new_rows, record, total, watch_llama_cpp
from moetrace.trace.trace import open_trace

HELP = """\
%%moetrace [TRACE] [-o FOLDER] [-m MODEL] [--capture CHANNELS] [-v NAME]

Runs the cell and records what llama-cpp-python computes in it, into a trace that is called NAME (trace) afterwards.
With TRACE, a folder that a server's recording is being written to: NAME is a list of the rows that came meanwhile.
MODEL is found from the notebook's Llama object, if there is one."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"%%moetrace: {message}", fix="see %%moetrace --help")


def _parser() -> _Parser:
    parser = _Parser(prog="%%moetrace", add_help=False)
    parser.add_argument("trace", nargs="?")
    parser.add_argument("-o", "--output")
    parser.add_argument("-m", "--model")
    parser.add_argument("--capture", default="experts,weights")
    parser.add_argument("-v", "--name", default="trace")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def load(shell: Any) -> None:
    """Register the cell magic with IPython; llama-cpp-python must not have been imported before."""
    try:
        watch_llama_cpp()
    except MoetraceError as e:
        print(f"cells that use llama_cpp cannot be recorded: {e.what}" + (f" ({e.fix})" if e.fix else ""))
    shell.register_magic_function(lambda line, cell: cell_magic(shell, line, cell), "cell", "moetrace")


def cell_magic(shell: Any, line: str, cell: str) -> None:
    """Run a cell, recorded. What the cell raises is shown as ever, and what was recorded until then is kept."""
    try:
        args = _parser().parse_args(shlex.split(line))
        if args.help:
            print(HELP)
        elif args.trace is None:
            _record(shell, args, cell)
        else:
            _listen(shell, args, cell)
    except MoetraceError as e:
        print(
            "\n".join(
                [f"error: {e.what}", *(f"  {k}: {v}" for k, v in (("why", e.why), ("fix", e.fix)) if v)]
            )
        )


def _record(shell: Any, args: argparse.Namespace, cell: str) -> None:
    space = shell.user_ns
    with record(args.output, model=args.model or model_of(space), channels=args.capture) as recording:
        shell.run_cell(cell)
    space[args.name] = recording.trace
    shell.run_cell(args.name)  # shown as any last line of a cell is


def _listen(shell: Any, args: argparse.Namespace, cell: str) -> None:
    trace = open_trace(args.trace)
    with new_rows(trace) as found:
        shell.run_cell(cell)
    shell.user_ns[args.name] = found
    print(f"{args.name}: {total(found):,} rows of {len(found)} contexts came meanwhile")
