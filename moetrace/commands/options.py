"""What all subcommands share: options with MOETRACE_ variables, and telling people things."""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moetrace.errors import UsageError

_FALSE = ("", "0", "false", "no", "off")


class Command(Protocol):
    """One subcommand. The docstring is its help: the first line what it does, the rest the details.

    ``passthrough`` says that what stands right of ``--`` belongs to it; others refuse it.
    """

    passthrough: bool

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; gives the exit code. ``args.rest`` is what stands right of ``--``; ``args.make_parser()`` gives all
        parsers."""


def add_subparser(subparsers: Any, name: str, documented: object) -> argparse.ArgumentParser:
    """Add a parser whose help is a docstring: the first line in the list of all, the whole in its own."""
    text = inspect.cleandoc(documented.__doc__ or "")
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=text.split("\n")[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *names: str, **spec: Any) -> None:
    """Add an option that also has an environment variable: ``--on-full`` is ``MOETRACE_ON_FULL``.

    The command line wins over the variable, the variable over the default. The help shows all three. A flag's
    variable counts as given unless it is empty, 0, false, no or off.
    """
    long = next(name for name in names if name.startswith("--"))
    variable = "MOETRACE_" + long[2:].upper().replace("-", "_")
    default = spec.get("default")
    shown = f" (default: {default})" if default not in (None, False) else ""
    spec["help"] = f"{spec.get('help', '')}{shown} [{variable}]".replace("%", "%%").strip()
    action = parser.add_argument(*names, **spec)
    value = os.environ.get(variable)
    if value is not None:
        given = _from_environment(action, variable, value)
        action.default = [given] if isinstance(action, Collect) else given
        action.required = False


def typed() -> str:
    """Give what is typed to run moetrace again: its name if the shell finds it, else where it lies."""
    called, found = Path(sys.argv[0]), shutil.which("moetrace")
    if called.name != "moetrace" or not called.is_file():
        return "moetrace" if found else f"{sys.executable} -m moetrace"
    if found and Path(found).resolve() == called.resolve():
        return "moetrace"
    here = os.path.relpath(called)
    return str(called) if here.startswith("..") else here


class Collect(argparse.Action):
    """Values of an option that may be given several times; those given replace the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add one."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), values])


def _from_environment(action: argparse.Action, variable: str, value: str) -> Any:
    if action.nargs == 0:
        on = value.strip().lower() not in _FALSE
        return action.const if on else not action.const if isinstance(action.const, bool) else None
    try:
        converted = action.type(value) if callable(action.type) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError) as e:
        raise UsageError(f"the environment variable {variable} is {value!r}", why=str(e)) from None
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise UsageError(f"the environment variable {variable} is {value!r}", fix=f"choose among: {choices}")
    return converted


def use_color(stream: Any, environment: Mapping[str, str] = os.environ) -> bool:
    """Say whether to print colours: on a terminal, unless NO_COLOR is set."""
    return not environment.get("NO_COLOR") and bool(getattr(stream, "isatty", lambda: False)())


def paint(text: str, code: str, stream: Any = None) -> str:
    """Give ``text`` in a colour (an ANSI code such as ``31``), if the stream shows colours."""
    return f"\x1b[{code}m{text}\x1b[0m" if use_color(stream or sys.stdout) else text


def red(text: str, stream: Any = None) -> str:
    """Give ``text`` in red, bold: for loss and errors."""
    return paint(text, "1;31", stream)
