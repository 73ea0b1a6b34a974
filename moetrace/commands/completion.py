"""``moetrace completion``."""

from __future__ import annotations

import argparse
import sys


class Completion:
    """Print what makes a shell complete moetrace's commands and options when Tab is pressed.

    moetrace completion bash > ~/.local/share/bash-completion/completions/moetrace
    moetrace completion zsh > "${fpath[1]}/_moetrace"
    source <(moetrace completion bash)                  # in this shell only
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the argument."""
        parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="for which shell")

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        import shtab

        parser: argparse.ArgumentParser = args.make_parser()
        for each in (parser, *_below(parser)):
            for action in each._actions:
                if isinstance(action, argparse._SubParsersAction):
                    action.help = ""  # hidden in the help, which lists commands in groups
                # what names a file or a folder is completed as one
                if not action.choices and str(action.metavar).split("...")[0] in _FILES:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
        sys.stdout.write(shtab.complete(parser, args.shell))
        return 0


_FILES = ("FILE", "DIR", "T.moet", "None")


def _below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found: list[argparse.ArgumentParser] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found += [below, *_below(below)]
    return found
