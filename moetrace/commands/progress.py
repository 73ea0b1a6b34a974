"""How far long work has come, on standard error, on a terminal only."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator

from moetrace.commands.options import use_color


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that takes (done, total); shows nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, no_color=not use_color(sys.stderr))
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=10) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Give a function that takes what is being done now; shows nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return

    def show(what: str) -> None:
        width = shutil.get_terminal_size().columns - 2
        # gone again before something else is printed
        print(f"\r\x1b[K{what[:width]} …" if what else "\r\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def of_questions(show: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Show on such a line what is being asked, and how many of how many are answered."""
    return lambda asked, done, total: show(f"{done} of {total} answered; now {asked}" if asked else "")
