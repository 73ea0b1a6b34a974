"""Errors that a user can act on.

Every one of them carries what happened, why, and the exact fix. The command line prints it without a
traceback and leaves with ``exit_code``; from Python it is an ordinary exception.
"""

from __future__ import annotations


class MoetraceError(Exception):
    """Base of all errors that moetrace raises on purpose.

    Parameters
    ----------
    what
        What happened, one sentence.
    why
        The reason, if it is known.
    fix
        What to do about it: a command or an option, as exact as possible.
    exit_code
        The exit code of the command line: 1 for an error, 2 for wrong usage.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "", exit_code: int = 1) -> None:
        self.what = what
        self.why = why
        self.fix = fix
        self.exit_code = exit_code
        super().__init__(what)

    def __str__(self) -> str:
        lines = (self.what, self.why and f"  why: {self.why}", self.fix and f"  fix: {self.fix}")
        return "\n".join(line for line in lines if line)


class UsageError(MoetraceError):
    """The call itself is wrong: an unknown option, channel, layer or format (exit code 2)."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix, exit_code=2)


class TraceError(MoetraceError):
    """A trace or ring cannot be read: not ours, newer, truncated or corrupt."""


class GoneError(TraceError):
    """The folder of a trace that is being written is no longer there."""


class DiskError(MoetraceError):
    """A write failed for a reason that may pass: a full disk, a quota, a disk that does not answer."""


class InputError(MoetraceError):
    """An input file (prompts, imported logs, count tables) is malformed; names file, line and field."""


class RuntimeMissingError(MoetraceError):
    """llama.cpp, or a part of it that is needed, was not found or does not fit."""


class ChannelMissingError(MoetraceError):
    """An analysis needs a channel that the trace does not have; the fix names the ``--capture`` option."""
