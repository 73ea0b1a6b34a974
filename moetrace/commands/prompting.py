"""Prompts on the command line: files and texts."""

from __future__ import annotations

import argparse

from moetrace.commands.options import Collect, add_option
from moetrace.errors import UsageError
from moetrace.host.prompts import Prompt, read_files


def add_prompts(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """Add ``-f`` and ``-p``; ``otherwise`` says what is taken without either."""
    add_option(
        parser,
        "-f",
        "--file",
        action=Collect,
        default=[],
        nargs="+",
        metavar="FILE",
        help="prompts: JSON lines; of any other text the whole file is one prompt, labelled as its folder is called"
        " if there are several" + (f"; default: {otherwise}" if otherwise else ""),
    )
    add_option(
        parser, "-p", "--prompt", action=Collect, default=[], metavar="TEXT", help="a prompt; repeatable"
    )


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """Give the prompts of the files, then the texts; none if none were given.

    Raises
    ------
    InputError
        If a file cannot be read, or a line is no prompt.
    """
    files = [file for given in args.file for file in ([given] if isinstance(given, str) else given)]
    found = read_files(files) if files else []
    names = {prompt.id for prompt in found}
    for i, text in enumerate(args.prompt):
        name = str(i)
        while name in names:
            name = f"p{name}"
        found.append(Prompt(name, text))
    return found


def needed_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The same. Raises UsageError if there are none."""
    found = prompts_of(args)
    if not found:
        raise UsageError("there are no prompts", fix='give some: -f prompts.jsonl, or -p "a text"')
    return found
