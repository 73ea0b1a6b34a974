"""Where traces are read and counted: in this process, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager

from moetrace.commands.options import add_option
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings import Subject

_SCHEMES = ("tcp://", "tls://", "ucx://", "ws://", "wss://")


def add_machines(parser: argparse.ArgumentParser) -> None:
    """Add ``--on``."""
    add_option(
        parser,
        "--on",
        metavar="WHERE",
        help="count traces on local (a process per core), local:N, dask, dask:N (a Dask cluster of this machine), or a"
        " Dask scheduler, tcp://HOST:8786, whose workers see the traces at the same paths; default: here",
    )


def count_on(where: str | None, subject: Subject, progress: Callable[[str], None]) -> None:
    """Read and count what questions need where ``--on`` says; they themselves are asked here."""
    if where is None:
        return
    with machines(where) as executor:
        progress(f"counting on {where}")
        subject.executor = executor
        subject.settle()


@contextmanager
def machines(where: str | None) -> Iterator[Executor | None]:
    """The executor that ``--on`` names; None: here.

    Raises UsageError if there is no such place, MoetraceError if Dask is not installed, or cannot be reached.
    """
    place, _, number = ("", "", "") if where is None else where.partition(":")
    if where is None:
        yield None
        return
    n = os.cpu_count() or 1
    if place in ("local", "dask") and number:
        if not number.isdecimal() or not int(number):
            raise UsageError(
                f"--on {where!r} is no place", fix=f"give {place}:N, N processes of this machine"
            )
        n = int(number)
    if place == "local":
        # not forked: questions are asked in forks of this process, and threads of a pool do not survive a fork
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(n, mp_context=context) as pool:
            try:
                yield pool
            except BrokenExecutor as e:
                raise MoetraceError(
                    "a process that counted was killed",
                    why="most likely for want of memory",
                    fix="--on dask starts such processes again; or free memory",
                ) from e
    elif place == "dask" or where.startswith(_SCHEMES):
        with _dask(where, n) as executor:
            yield executor
    else:
        raise UsageError(
            f"--on {where!r} is no place",
            fix="give local, dask, or the address of a scheduler: tcp://HOST:8786",
        )


@contextmanager
def _dask(where: str, n: int) -> Iterator[Executor]:
    try:
        from distributed import Client, LocalCluster
        from distributed.scheduler import KilledWorker
    except ImportError as e:
        raise MoetraceError(
            "Dask is not installed", why=f"--on {where} counts with it", fix="pip install 'moetrace[dask]'"
        ) from e
    with ExitStack() as stack:
        try:
            if not where.startswith(_SCHEMES):
                cluster = LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None)
                where = stack.enter_context(cluster).scheduler_address
            client = stack.enter_context(Client(where, timeout="30s"))
        except (OSError, ValueError) as e:
            raise MoetraceError(
                f"the scheduler {where} cannot be reached",
                why=str(e),
                fix="start it (dask scheduler), or give the address that it says",
            ) from e
        try:
            yield client.get_executor(pure=False)
        except KilledWorker as e:
            raise MoetraceError(
                "Dask gave a trace up",
                why=f"every worker that read it died, most likely for want of memory ({e})",
                fix="give workers more memory (dask worker --memory-limit)",
            ) from e
