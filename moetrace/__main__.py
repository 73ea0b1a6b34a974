"""The command line: ``moetrace COMMAND ...``, also as ``python -m moetrace``."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import keyword
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import moetrace
from moetrace.commands.options import Command, add_subparser, red
from moetrace.errors import MoetraceError, UsageError
from moetrace.printable import printable

#: subcommands by what one does with them, in the order of use; each is a class in moetrace/commands
GROUPS = {
    "record": {"demo": "Demo", "run": "Run", "drive": "Drive", "capture": "Capture"},
    "while it records": {
        "status": "Status",
        "start": "Start",
        "stop": "Stop",
        "intervene": "Intervene",
        "resume": "Resume",
        "live": "Live",
        "serve": "Serve",
    },
    "look": {"info": "Info", "show": "Show", "verify": "Verify", "recover": "Recover", "dump": "Dump"},
    "ask": {
        "stats": "Stats",
        "report": "Report",
        "analyze": "Analyze",
        "compare": "Compare",
        "place": "Place",
        "prune": "Prune",
        "bits": "Bits",
        "coverage": "Coverage",
    },
    "bring in, take out": {"import": "Import", "export": "Export"},
    "set up": {
        "doctor": "Doctor",
        "setup": "Setup",
        "preload-path": "PreloadPath",
        "completion": "Completion",
    },
}
#: subcommand -> the class in moetrace/commands/SUBCOMMAND.py (import_.py)
COMMANDS = {name: kind for group in GROUPS.values() for name, kind in group.items()}

_EXAMPLES = """\
moetrace doctor -- llama-server                              will it work?
moetrace run -o t.moet -- llama-server -m model.gguf         serve as ever, and record
moetrace capture -m model.gguf -f prompts.jsonl -o t.moet    or without a server
moetrace report t.moet                                       a page to look at, figures, tables
moetrace stats 'fleet/*.moet' --only specialists             one question, of many traces"""


def load(name: str) -> Command:
    """Import one subcommand; the others stay unread, which keeps the start fast."""
    module = importlib.import_module(f"moetrace.commands.{_file(name)}")
    command: Command = getattr(module, COMMANDS[name])()
    return command


def _file(name: str) -> str:
    return name.replace("-", "_") + ("_" if keyword.iskeyword(name) else "")


_CHOICE = re.compile(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", re.DOTALL)
_KINDS = {"COMMAND": "command", "NAME": "question"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        see = f"see {self.prog} --help"
        if found := _CHOICE.fullmatch(message):
            argument, given, choices = found.groups()
            near = _near(given, [choice.strip("' ") for choice in choices.split(",")])
            if argument in _KINDS:
                message = f"there is no {_KINDS[argument]} {given!r}"
            raise UsageError(message, fix=f"did you mean {near}? Or {see}" if near else see)
        raise UsageError(message, fix=see)


def _near(given: str, known: Iterable[str]) -> str:
    """The one that was most likely meant; empty if none is like it."""
    return next(iter(difflib.get_close_matches(given, list(known), 1, 0.6)), "")


def _refuse(name: str, extra: list[str], parser: argparse.ArgumentParser, passthrough: bool) -> None:
    """Say what to do with arguments that the command does not know. Raises UsageError."""
    shown = " ".join(extra)
    if passthrough and not extra[0].startswith("-"):
        fix = f"what is not moetrace's stands behind --: moetrace {name} -- {shown}"
    else:
        options = [option for action in parser._actions for option in action.option_strings]
        near = _near(extra[0].split("=")[0], options)
        fix = f"{f'did you mean {near}? Or ' if near else ''}see {parser.prog} --help"
    raise UsageError(f"unrecognized arguments: {shown}", fix=fix)


def make_parser(name: str | None = None) -> argparse.ArgumentParser:
    """Make the parser; only the subcommand ``name`` is filled in (None: all; "": none)."""
    parser = _Parser(
        prog="moetrace",
        usage="moetrace COMMAND ...",
        description=(moetrace.__doc__ or "").split("\n")[0],
        epilog=None if name else _overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moetrace {moetrace.__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS, prog="moetrace"
    )
    for each in COMMANDS:
        if name is None or each == name:
            command = load(each)
            sub = add_subparser(subparsers, each, command)
            command.prepare_parser(sub)
            sub.set_defaults(run=command.run, passthrough=command.passthrough, parser=sub)
        else:
            subparsers.add_parser(each)
    return parser


def _overview() -> str:
    """All subcommands, by what one does with them, and examples."""
    width = min(100, shutil.get_terminal_size().columns) - 2
    lines = []
    for title, names in GROUPS.items():
        lines.append(f"{title}:")
        for each in names:
            first, *others = textwrap.wrap(summary(each), max(20, width - 16))
            lines += [f"  {each:<14}{first}", *(f"{'':16}{line}" for line in others)]
    return "\n".join([*lines, "", "examples:", textwrap.indent(_EXAMPLES, "  ")])


def summary(name: str) -> str:
    """What a subcommand does, in one sentence: its docstring's first, without importing it."""
    tree = ast.parse((Path(__file__).parent / "commands" / f"{_file(name)}.py").read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == COMMANDS[name])
    return (ast.get_docstring(next(classes)) or "").split("\n")[0]


def split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Split at the first ``--``: what is right of it is not ours. None if there is none."""
    argv = list(argv)
    if "--" not in argv:
        return argv, None
    i = argv.index("--")
    return argv[:i], argv[i + 1 :]


def run(argv: Sequence[str]) -> int:
    """Parse and run; MoetraceErrors come out as they are."""
    ours, rest = split(argv)
    name = ours[0] if ours and ours[0] in COMMANDS else ""
    args, extra = make_parser(name).parse_known_args(ours)
    if extra:
        _refuse(args.command, extra, args.parser, args.passthrough and rest is None)
    if rest is not None and not args.passthrough:
        raise UsageError(f"moetrace {args.command} takes nothing after --", fix="leave it out")
    args.rest, args.make_parser = rest or [], make_parser
    code: int = args.run(args)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code, and never lets a traceback of ours reach the user."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except MoetraceError as e:
        first, *others = printable(str(e), keep="\n").split("\n")
        print("\n".join([f"{red('error:', sys.stderr)} {first}", *others]), file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # whoever read stdout has gone (`dump t.moet | head`); the interpreter must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
