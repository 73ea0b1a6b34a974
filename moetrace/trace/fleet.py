"""Many traces at once: those that a pattern, a folder, or an address that fsspec knows, stands for."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from moetrace.errors import InputError, MoetraceError, TraceError, UsageError
from moetrace.trace import naming
from moetrace.trace.store import META_NAME, TraceStore
from moetrace.trace.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


class Traces(Sequence[Trace]):
    """Traces, open for reading: a sequence, which is what questions about several take.

    Attributes
    ----------
    names
        One per trace, all different: its folder's name, with as much of the path before it as tells it from others.
    left_out
        (path, reason) of each that could not be read, if such ones were to be left out.

    A context manager; :meth:`close` ends it.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        names: Sequence[str] | None = None,
        left_out: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._traces = tuple(traces)
        self.names = tuple(names) if names is not None else tuple(apart([trace.path for trace in traces]))
        self.left_out = tuple(left_out)

    @overload
    def __getitem__(self, which: int) -> Trace: ...
    @overload
    def __getitem__(self, which: slice) -> Traces: ...
    def __getitem__(self, which: int | slice) -> Trace | Traces:
        """Give one, or some as a set of their own."""
        if isinstance(which, slice):
            return Traces(self._traces[which], self.names[which])
        return self._traces[which]

    def __len__(self) -> int:
        return len(self._traces)

    @property
    def models(self) -> dict[str, Traces]:
        """The traces of each model, under what ``--model`` calls it; a number is added where two are called alike."""
        groups: list[list[int]] = []
        for i, trace in enumerate(self._traces):
            like = [g for g in groups if naming.same_model(self._traces[g[0]].facts, trace.facts)]
            if like:
                like[0].append(i)
            else:
                groups.append([i])
        out: dict[str, Traces] = {}
        for group in groups:
            title = name = naming.called(self._traces[group[0]].facts)
            n = 1
            while name in out:
                n += 1
                name = f"{title} ({n})"
            out[name] = Traces([self._traces[i] for i in group], [self.names[i] for i in group])
        return out

    @property
    def requests(self) -> pd.DataFrame:
        """:attr:`Trace.requests` of all, one under the other; the index is (name of the trace, number). A copy."""
        import pandas as pd

        return pd.concat(
            {name: t.requests for name, t in zip(self.names, self, strict=True)}, names=["trace", "request"]
        )

    def close(self) -> None:
        """Let go of the files."""
        for trace in self._traces:
            trace.close()

    def __enter__(self) -> Traces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        tokens = sum(len(trace) for trace in self._traces)
        models = ", ".join(f"{name} ({len(of)})" for name, of in self.models.items())
        return f"<Traces: {len(self):,} of {models or 'nothing'}, {tokens:,} tokens>"


def open_traces(
    paths: Sequence[Path], opener: Callable[[Path], Trace | None], *, leave_out: bool = False, where: str = ""
) -> Traces:
    """Open each; ``opener`` takes a path, and gives None where the trace does not hold what is looked for.

    Parameters
    ----------
    paths
        Of trace folders.
    leave_out
        Leave out those that cannot be read (:attr:`Traces.left_out`, which also has those that ``opener`` gave None
        of).
    where
        What stood for them, for errors.

    Raises
    ------
    TraceError
        If any cannot be read, and they are not to be left out; or none can. It names each.
    UsageError
        If none holds what is looked for.
    """
    opened: list[Trace] = []
    kept: list[Path] = []
    bad: list[tuple[str, str]] = []
    other: list[tuple[str, str]] = []
    for path in paths:
        try:
            trace = opener(path)
        except MoetraceError as e:
            bad.append((str(path), e.why or e.what))
            continue
        if trace is None:
            other.append((str(path), "it has no context of that model"))
        else:
            opened.append(trace)
            kept.append(path)
    if other and not opened and not bad:
        raise UsageError(
            f"none of {len(paths):,} traces has a context of that model",
            fix="leave out --model, or name another",
        )
    if bad and not (leave_out and opened):
        for trace in opened:
            trace.close()
        some = "; ".join(f"{path}: {why}" for path, why in bad[:5]) + (
            f"; and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        )
        raise TraceError(
            f"{len(bad):,} of {len(paths):,} traces{f' of {where}' if where else ''} cannot be read",
            why=some,
            fix="mend them (moetrace verify, moetrace recover), or leave them out: --leave-out-unreadable"
            " (in Python unreadable='leave out')",
        )
    return Traces(opened, apart(kept), [*bad, *other])


def is_many(where: str | os.PathLike[str]) -> bool:
    """Whether it stands for more than one folder or file: a pattern, a folder of traces, or an address."""
    text = os.fspath(where)
    path = Path(text)
    if path.exists():
        return path.is_dir() and not (path / META_NAME).exists() and any(_below(path))
    return "://" in text or glob.has_magic(text)


def found(where: str | os.PathLike[str]) -> list[Path]:
    """Find the traces that a pattern, a folder or an address stands for, in order of their names.

    Those of an address are copied into a temporary folder, which goes with the process.

    Raises
    ------
    InputError
        If there is none, or the address cannot be read.
    """
    text = os.fspath(where)
    if "://" in text and not Path(text).exists():
        paths = _fetched(text)
    elif Path(text).is_dir():
        paths = list(_below(Path(text)))
    else:
        hits = map(Path, glob.glob(text, recursive=True))  # noqa: PTH207  (a pattern may be absolute)
        paths = [trace for hit in hits for trace in ([hit] if (hit / META_NAME).exists() else _below(hit))]
    if not paths:
        raise InputError(
            f"{text} holds no trace", fix="give a trace's folder, a folder of traces, or a pattern"
        )
    return sorted(set(paths))


def apart(paths: Sequence[Path]) -> list[str]:
    """Name paths by their ends, as long as they must be for no two to be the same; ``.moet`` is left out."""
    whole = [path.absolute().with_suffix("") if path.suffix == ".moet" else path.absolute() for path in paths]
    out = [path.name for path in whole]
    n = 1
    while len(set(out)) < len(set(whole)):
        n += 1
        out = [
            "/".join(path.parts[-n:]) if out.count(old) > 1 else old
            for path, old in zip(whole, out, strict=True)
        ]
    return out


def _below(folder: Path) -> Iterator[Path]:
    """The traces in a folder, however deep; in a trace there is none."""
    try:
        children = sorted(
            child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
        )
    except OSError:
        return
    for child in children:
        if (child / META_NAME).exists():
            if _says_trace(child):
                yield child
        else:
            yield from _below(child)


def _says_trace(folder: Path) -> bool:
    """Whether it is a trace, damaged or not, rather than something else that has a meta.json."""
    try:
        TraceStore(folder, check=False)
    except TraceError as e:
        return "its format is" not in (e.why or "")
    return True


def _fetched(address: str) -> list[Path]:
    try:
        import fsspec
    except ImportError as e:
        raise MoetraceError(
            f"{address} needs fsspec", why=str(e), fix="pip install 'moetrace[remote]'"
        ) from e
    folder = Path(tempfile.mkdtemp(prefix="moetrace-"))
    weakref.finalize(_KEEP, shutil.rmtree, folder, ignore_errors=True)
    try:
        files, root = fsspec.core.url_to_fs(address)
        hits = files.glob(root) if glob.has_magic(root) else [root]
        metas = [m for hit in hits for m in files.find(hit) if m.rsplit("/", 1)[-1] == META_NAME]
        out = []
        for meta in metas:
            trace = meta.rsplit("/", 1)[0]
            if any(
                f"{other.rsplit('/', 1)[0]}/" in f"{trace}/"
                for other in metas
                if other != meta and len(other) < len(meta)
            ):
                continue  # within another trace
            mine = folder / trace.strip("/")
            for file in files.find(trace):
                target = mine / file[len(trace) :].lstrip("/")
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{address} cannot be read", why=f"{file} would be written elsewhere")
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(file, str(target))
            if _says_trace(mine):
                out.append(mine)
        return out
    except (OSError, ValueError, ImportError) as e:
        raise InputError(
            f"{address} cannot be read",
            why=str(e),
            fix="see that fsspec can: its package for this kind of address is installed, and may read there",
        ) from e


class _Keep:
    """What temporary folders live as long as."""


_KEEP: Any = _Keep()
