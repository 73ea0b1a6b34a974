"""Writing to disks that may be full, slow or broken."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path

from moetrace.errors import DiskError, MoetraceError, TraceError

#: what a recorder wants free before it tries a full disk again, bytes
ROOM = 1 << 20


def free_space(path: Path) -> str:
    """Say how much room the file system of ``path`` has left."""
    try:
        stat = os.statvfs(path if path.exists() else path.parent)
    except OSError:
        return "its file system does not answer"
    return f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB free on its file system"


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``, which :func:`os.write` need not; raises OSError as it does."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def disk_error(path: Path, error: OSError) -> MoetraceError:
    """Turn an OSError of a write into an error that names the disk and the fix: a DiskError if it is the disk's."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return files_error(path, error)
    fixes = {
        errno.ENOSPC: "free some space there, or write the trace to another disk with -o",
        errno.EDQUOT: "your disk quota is used up: free some space, or write to another disk with -o",
        errno.EROFS: "that file system is read-only: write to another disk with -o",
        errno.EACCES: "you may not write there: choose another place with -o",
        errno.EPERM: "you may not write there: choose another place with -o",
        errno.EEXIST: "it exists already: choose another name, or give --force",
        errno.EFBIG: "files may not grow further: raise the limit (ulimit -f) before you start it",
        errno.ENOENT: "the folder is not there any more: record into another one with -o",
        errno.EIO: "the disk reports an error: check it (dmesg), and write to another one with -o",
    }
    return DiskError(
        f"cannot write {path}",
        why=f"{error.strerror or error} ({free_space(path)})",
        fix=fixes.get(error.errno or 0, "write the trace to another disk with -o"),
    )


def files_error(path: Path, error: OSError) -> MoetraceError:
    """Say that this process may open no more files."""
    return MoetraceError(
        f"cannot open {path}",
        why=f"{error.strerror}: each column of each llama context takes one",
        fix="raise the limit before you start it: ulimit -n 65536",
    )


def more_files() -> bool:
    """Let this process open as many files as it may at all; gives whether these are more than before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return False
    return True


def try_disk(folder: Path) -> None:
    """Reserve :data:`ROOM` bytes in a folder, and give them back.

    Raises
    ------
    OSError
        If the disk does not have them.
    """
    path = folder / f".room.{os.getpid()}"
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, ROOM)
        else:
            write_at(fd, bytes(ROOM), 0)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def lock_folder(path: Path) -> int:
    """Lock a trace's folder for whoever writes to it; gives the descriptor that holds the lock.

    The lock goes when the descriptor is closed, and with the process. File systems that know no locks let anyone
    have it.

    Raises
    ------
    TraceError
        If another process, or another part of this one, has it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno == errno.EWOULDBLOCK:
            os.close(fd)
            raise TraceError(
                f"{path} is being recorded",
                why="another process has locked it",
                fix="stop that recording first, or choose another name",
            ) from e
    return fd


def is_locked(path: Path) -> bool:
    """Whether somebody writes to a trace's folder; False where that cannot be told."""
    try:
        os.close(lock_folder(path))
    except TraceError:
        return True
    except OSError:
        pass
    return False


def refuse_links(folder: Path) -> None:
    """Refuse a folder with links to other folders in it: what is written there would go elsewhere.

    Raises
    ------
    TraceError
        If there is one. Links to files are not followed where files are opened.
    """
    for path in folder.iterdir():
        if path.is_symlink() and path.is_dir():
            raise TraceError(
                f"{path} is a link",
                why="a trace is never written through links",
                fix="put the folder itself there",
            )


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; short writes are continued.

    Raises
    ------
    OSError
        As ``os.pwrite``; also ENOSPC if nothing more can be written.
    """
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view, offset)
        if n <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[n:]
        offset += n
