"""A llama-server (or any other llama.cpp program) under the tracer."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Unpack

from moetrace._native import SignalWatch
from moetrace.errors import MoetraceError, RuntimeMissingError
from moetrace.host.client import ServerClient
from moetrace.host.drain import Drain, tell
from moetrace.host.hosts import Process, llama_processes, running_hosts, starting_hosts
from moetrace.host.intervene import (
    Given,
    begin,
    check_model,
    in_force,
    refusal,
    refuse_if_refused,
    restore,
    switch,
)
from moetrace.host.linkage import Linkage, linkage
from moetrace.host.model import store_models
from moetrace.host.options import CaptureOptions, CaptureSettings
from moetrace.host.runtime import PRELOAD, find_tool, preload_environment
from moetrace.host.secrets import redacted
from moetrace.model.file import ModelFile
from moetrace.trace.intervention import Intervention, parse_interventions
from moetrace.trace.labels import append_labels
from moetrace.trace.ring import process_alive
from moetrace.trace.storage import disk_error, more_files
from moetrace.trace.trace import Trace, open_trace
from moetrace.trace.writer import TraceWriter

#: signals that are passed on to the program; those of the first line a terminal sends to it by itself
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_PASSED_ON = (*_FROM_TERMINAL, signal.SIGTERM, signal.SIGHUP)
#: how long the program may take to end of a signal that its whole process group may have got, seconds: a second one
#: would end llama-server at once
GRACE_SECONDS = 0.5
#: the same for a server that the program has left behind
GRACE_SECONDS_LEFT = 2.0
POLL_SECONDS = 0.05
#: how often processes are looked for, while nothing was recorded yet and after the program has ended
WATCH_SECONDS = 0.5
#: how long the program may take to load llama.cpp after whoever started it has ended
START_SECONDS = 5.0
#: how long a process that becomes another program may show no environment
EXEC_SECONDS = 0.2


class TracedProcess:
    """A program of llama.cpp that runs with the tracer loaded, and the drain that follows it.

    The program inherits standard input, output and error; its arguments are not touched. If this process dies,
    the program goes on. What the program starts is recorded, too.

    Parameters
    ----------
    command
        Program and arguments.
    output
        The trace folder to make.
    options
        What to record.
    force
        Replace an existing trace.
    log
        File that the program's output is appended to; by default it goes where ours goes.
    intervene
        What to change about the routing from the first token on.
    on_error, on_note
        See :class:`moetrace.host.drain.Drain`; also called for a program that runs without the tracer, and when it
        leaves a server behind.

    Attributes
    ----------
    trace
        What is written; its path is where the trace is now, should it have been moved.
    log_start
        Where in the log this program's output begins.

    Raises
    ------
    MoetraceError
        If the program or the trace cannot be had. Nothing is left behind then.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: str | os.PathLike[str],
        options: CaptureOptions,
        *,
        force: bool = False,
        log: Path | None = None,
        intervene: Given = None,
        on_error: Callable[[MoetraceError], None] = tell,
        on_note: Callable[[str], None] = tell,
    ) -> None:
        program = find_tool(command[0])
        self.command = [str(program), *command[1:]]
        environment = preload_environment(os.environ)
        self._model_path = model_argument(command)
        self._on_error, self._on_note = on_error, on_note
        self._signals_got: list[tuple[int, bool, float]] = []
        self._signal_sent = 0
        self._llama: dict[int, Process] = {}  # processes that have loaded llama.cpp
        self._untraced: MoetraceError | None = None
        self._next_watch = 0.0
        self._exit_code: int | None = None
        self._closed = False
        interventions = parse_interventions(intervene)
        check_model(interventions, None if "--override-kv" in command else self._model_path)
        self.trace = TraceWriter(output, command=redacted(command), model_path=self._model_path, force=force)
        with contextlib.ExitStack() as undo:
            undo.callback(self.trace.detach)
            undo.callback(self.trace.discard)
            environment.update(options.environment(self.trace.path))
            self.intervention = begin(self.trace.path, interventions) if interventions else 0
            if self.intervention:
                environment["MOETRACE_INTERVENTION"] = str(self.intervention)
            stream = None if log is None else undo.enter_context(_open_log(log))
            self.log_start = 0 if stream is None else stream.tell()
            try:
                self.process = subprocess.Popen(self.command, env=environment, stdout=stream, stderr=stream)
            except OSError as e:
                raise RuntimeMissingError(
                    f"cannot start {program}", why=e.strerror or str(e), fix="check the program's path"
                ) from e
            undo.pop_all()
            if stream is not None:
                stream.close()
        more_files()  # the program runs already, and keeps its own limit
        self.drain = Drain(self.trace, on_error, on_note)
        self.drain.start()

    def wait(self) -> int:
        """Wait for the program, and for servers that it leaves behind; signals that reach us are passed on.

        Gives the program's exit code, 128 + n for signal n.
        """
        with contextlib.closing(SignalWatch([int(number) for number in _PASSED_ON])) as signals:
            while (code := self.process.poll()) is None:
                self._pass_on(signals, [self.process.pid], GRACE_SECONDS)
                self._watch()
                time.sleep(POLL_SECONDS)
            self._exit_code = code if code >= 0 else 128 - code
            self._wait_for_left(signals)
        return self._exit_code

    def finish(self, exit_code: int | None) -> None:
        """Drain what is left and close the trace; one that holds nothing is removed again.

        Raises
        ------
        MoetraceError
            If draining failed: what was sealed is in the trace, the rest stays in the rings. Or if the host
            refused what it was to change about the routing, or a ring could not be read; the trace is closed then.
        """
        self._exit_code = exit_code
        try:
            self.drain.stop()
            if not self.drain.contexts and self.trace.discard():
                return
            self.trace.stay()
            store_models(self.trace, self._model_path)
            self.trace.close(exit_code=exit_code)
            self._closed = bool(self.drain.contexts)
        finally:
            self.trace.detach()
        for context in self.drain.contexts:
            number, why = context.refused
            if number and number == self.intervention:
                raise refusal(number, why)
        if self.drain.left_alone:
            raise self.drain.left_alone[0]

    @property
    def recorded(self) -> bool:
        """Whether the trace is closed and holds something."""
        return self._closed

    def nothing_seen(self) -> MoetraceError | None:
        """Give the reason why no context was recorded, as far as it is known; None if one was."""
        if self.drain.contexts:
            return None
        if self.drain.left_alone:
            return self.drain.left_alone[0]
        untraced = [process for process in self._llama.values() if not process.traced]
        if self._untraced is not None and len(untraced) == len(self._llama):
            return self._untraced
        if self._llama:
            process = next(process for process in self._llama.values() if process.traced)
            return MoetraceError(
                "no expert routing was seen",
                why=f"{process.name} (process {process.pid}) loaded llama.cpp and the tracer; the tracer refused what"
                " it saw (a line above that begins with `moetrace:` says why), or no graph with experts was"
                f" computed{_no_experts(self._model_path)}",
                fix="see its messages above; send it a request, use a Mixture-of-Experts model",
            )
        program = self.command[0]
        how = linkage(Path(program))
        if how in (Linkage.LIBRARY, Linkage.OWN) or self._exit_code:
            ended = f"it ended with exit code {self._exit_code}" if self._exit_code else "it ended"
            return MoetraceError(
                f"no expert routing was seen in {program}",
                why=f"{ended} before a graph with experts was computed{_no_experts(self._model_path)}",
                fix="see its messages above; `moetrace doctor` checks a binary",
            )
        if how is Linkage.STATIC:
            return MoetraceError(
                f"no expert routing was seen in {program}",
                why=how.value,
                fix="build llama.cpp with -DBUILD_SHARED_LIBS=ON, or use another build of it",
            )
        return MoetraceError(
            f"no expert routing was seen in {program}",
            why="neither it nor a program that it started was seen to load llama.cpp's libraries; what has llama.cpp "
            "inside (a static build, some Python extensions) cannot be recorded",
            fix="if it starts a server with another environment (sudo, env -i), put `moetrace run` behind that; "
            "`moetrace doctor -- FILE` checks a program or an extension",
        )

    # -- signals -----------------------------------------------------------------------------------------

    def _pass_on(self, signals: SignalWatch, pids: Collection[int], grace: float) -> None:
        """Pass on to these processes what reached us, and by then has not reached them."""
        now = time.monotonic()
        self._signals_got += [(*got, now) for got in signals.take()]
        for number, by_kernel, at in list(self._signals_got):
            apart = [pid for pid in pids if not _shares_group(pid)]
            if len(apart) < len(pids) and now - at < grace:
                continue
            self._signals_got.remove((number, by_kernel, at))
            by_terminal = by_kernel and number in _FROM_TERMINAL  # it went to the whole group
            _send(apart if by_terminal else pids, number)
            if not by_terminal:
                self._signal_sent = number

    def _wait_for_left(self, signals: SignalWatch) -> None:
        """Go on recording what the program has left behind, until it ends."""
        since = time.monotonic()
        hosts = self._left_behind(since)
        told = False
        while hosts:
            waited = time.monotonic() - since
            if self._signal_sent and waited > GRACE_SECONDS_LEFT:  # the program kept it to itself
                _send(hosts, self._signal_sent)
                self._signal_sent = 0
            elif not self._signal_sent and not told and waited > GRACE_SECONDS:
                told = True
                names = ", ".join(f"{name} (process {pid})" for pid, name in hosts.items())
                self._on_note(
                    f"{Path(self.command[0]).name} has ended with exit code {self._exit_code}; {names} runs on and is "
                    "recorded until it ends"
                )
            self._pass_on(signals, hosts, GRACE_SECONDS_LEFT)
            time.sleep(POLL_SECONDS)
            if not all(process_alive(pid) for pid in hosts) or time.monotonic() > self._next_watch:
                self._next_watch = time.monotonic() + WATCH_SECONDS
                hosts = running_hosts(self.trace.path)
        self._signal_sent = 0

    def _left_behind(self, since: float) -> dict[int, str]:
        """Give the servers that the program has left behind, which may yet have to load llama.cpp."""
        seen = since
        while True:
            # in this order: what loads llama.cpp between the two is found by the second
            starting = starting_hosts(self.trace.path)
            hosts = running_hosts(self.trace.path)
            now = time.monotonic()
            seen = now if starting else seen
            settled = bool(self.drain.contexts) or now - seen > EXEC_SECONDS
            if hosts or now - since > START_SECONDS or (not starting and settled):
                return hosts
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        """Note who loads llama.cpp, until something is recorded; say at once if it runs without the tracer."""
        now = time.monotonic()
        if self.drain.contexts or now < self._next_watch:
            return
        self._next_watch = now + WATCH_SECONDS
        for process in llama_processes(self.process.pid):
            if process.pid not in self._llama and not process.traced:
                self._untraced = _untraced(process, self.command)
                self._on_error(self._untraced)
            self._llama[process.pid] = process


def _open_log(path: Path) -> IO[bytes]:
    """Open a log to append to it; never through a link."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        stream = os.fdopen(os.open(path, flags, 0o600), "ab")
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise MoetraceError(
                f"cannot write the log {path}",
                why="it is a link, and a log is never written through links",
                fix="remove it, or choose another name for the trace",
            ) from e
        raise disk_error(path, e) from e
    stream.seek(0, os.SEEK_END)
    return stream


def _shares_group(pid: int) -> bool:
    """Whether a process is in our process group."""
    try:
        return os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        return True


def _send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _untraced(process: Process, command: Sequence[str]) -> MoetraceError:
    program = Path(command[0]).name
    if process.told:
        why = (
            "its environment names the tracer, and the dynamic linker did not load it: another architecture or C "
            "library, or a program with more rights than its user's"
        )
        fix = "`moetrace doctor` checks a binary"
    else:
        why = f"{program} started it with another environment, without {PRELOAD} (as env -i, sudo and su do)"
        fix = f"put `moetrace run` behind that: {program} ... moetrace run -o ... -- {process.name} ..."
    return MoetraceError(
        f"{process.name} (process {process.pid}) runs without the tracer: nothing of it is recorded",
        why=why,
        fix=fix,
    )


def _no_experts(model: str | None) -> str:
    """Say that the model has no experts, if that is known."""
    if model is None:
        return ""
    try:
        with ModelFile(model) as file:
            return "" if file.n_expert else f": {model} has no experts"
    except MoetraceError:
        return ""


def model_argument(command: Sequence[str]) -> str | None:
    """Give the model file that llama.cpp's arguments name, if they do."""
    for flag, value in itertools.pairwise(command):
        if flag in ("-m", "--model"):
            return value
    for argument in command:
        if argument.startswith("--model="):
            return argument.partition("=")[2]
    return os.environ.get("LLAMA_ARG_MODEL")


class TracedServer:
    """A running llama-server under the tracer; made by :func:`serve`.

    Attributes
    ----------
    url
        Where it listens.
    client
        A client for it.
    """

    def __init__(self, process: TracedProcess, url: str, log: Path) -> None:
        self._process = process
        self._log = log
        self.url = url
        # llama-server takes its key from there, too
        self.client = ServerClient(url, api_key=os.environ.get("LLAMA_API_KEY", "").split(",")[0] or None)

    @property
    def trace(self) -> Trace:
        """The trace as it stands: everything computed before this call, opened anew each time."""
        self._process.drain.flush()
        return open_trace(self._process.trace.path)

    def label(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append label lines (docs/format.md, labels.jsonl)."""
        self._process.trace.stay()
        append_labels(self._process.trace.path, lines)

    @contextlib.contextmanager
    def intervene(self, *interventions: str | Intervention) -> Iterator[int]:
        """Change the routing of every token that is computed within the block; gives the trace's number for it.

        Outside of it holds what held before. Tokens of a request that runs when the block begins or ends are
        intervened on within it only; the row's flag says which.

        Raises
        ------
        UsageError
            If the model cannot do it. Then nothing has changed.
        TraceError
            If the server has not computed anything yet (it was started with ``--no-warmup``).
        MoetraceError
            At the end, if the server refused it: nothing was changed within the block.
        """
        trace = self._process.trace.path
        before = in_force(trace)
        number = switch(trace, interventions)
        try:
            yield number
        finally:
            restore(before)
        refuse_if_refused(trace, {number})

    def wait_ready(self, timeout: float) -> None:
        """Wait until the model is loaded.

        Raises
        ------
        MoetraceError
            If the server ends or does not answer in time; shows the end of its log.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.process.poll() is not None:
                raise MoetraceError(
                    f"llama-server ended with exit code {self._process.process.returncode} while starting",
                    why=self.log_tail(),
                    fix="check the model and the arguments",
                )
            if self.client.is_ready():
                return
            time.sleep(0.05)
        raise MoetraceError(f"llama-server was not ready after {timeout:.0f} s", why=self.log_tail())

    def log_tail(self, n_lines: int = 8) -> str:
        """Give the last lines of the server's log."""
        with self._log.open("rb") as log:
            log.seek(self._process.log_start)
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-n_lines:])

    def count_prompts(self, asked: int) -> None:
        """Note in the trace how many prompts shall be sent, so that it can tell whether all were."""
        self._process.trace.count_prompts(asked)

    def count_done(self, done: int) -> None:
        """Note how many of them were answered."""
        self._process.trace.count_done(done)

    def stop(self, timeout: float = 30.0) -> None:
        """Stop the server and close the trace."""
        process = self._process.process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        deadline = time.monotonic() + timeout
        number = signal.SIGINT  # what the program started and left behind
        while hosts := running_hosts(self._process.trace.path):
            _send(hosts, number)
            while any(process_alive(pid) for pid in hosts) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            time.sleep(POLL_SECONDS)
            number = signal.SIGKILL
        self._process.finish(process.returncode)

    def __enter__(self) -> TracedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """Give a port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class ServeSettings(CaptureSettings, total=False):
    """What :func:`serve` takes beside the model, where to write, and llama-server's arguments."""

    channels: str | Sequence[str]
    program: str
    port: int | None
    intervene: Given
    force: bool
    timeout: float


def serve(
    model: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    channels: str | Sequence[str] = ("experts", "weights"),
    arguments: Sequence[str] = (),
    program: str = "llama-server",
    port: int | None = None,
    intervene: Given = None,
    force: bool = False,
    timeout: float = 600.0,
    **options: Unpack[CaptureSettings],
) -> TracedServer:
    """Start llama-server under the tracer and wait until it is ready.

    Parameters
    ----------
    model
        GGUF file.
    output
        Trace folder to make; by default one in the system's temporary folder. The server's output is appended to a
        file ``.log`` beside it.
    channels, options
        See :class:`moetrace.host.options.CaptureOptions`.
    arguments
        Further arguments of llama-server, for example ``["-np", "4", "-c", "8192"]``.
    program
        llama-server, by name or path.
    port
        By default a free one.
    intervene
        What to change about the routing from the first token on: one or several interventions, as text
        (``"ablate:7:3,12@slot=1"``) or as :class:`moetrace.trace.intervention.Intervention`. See also
        :meth:`TracedServer.intervene`.

    Returns
    -------
    TracedServer
        A context manager: ``with moetrace.serve(...) as server:`` stops the server and closes the trace.

    Raises
    ------
    MoetraceError
        If the server cannot be started, does not get ready within ``timeout`` seconds, or refuses the
        intervention. No trace is left behind then unless something was recorded.
    """
    if not Path(model).is_file():
        raise MoetraceError(f"there is no model {model}", fix="check the path")
    folder = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="moetrace-")) / "serve.moet"
    number = port or free_port()
    command = [program, "-m", str(model), "--host", "127.0.0.1", "--port", str(number), *arguments]
    log_path = folder.with_name(folder.name + ".log")
    process = TracedProcess(
        command,
        folder,
        CaptureOptions.of(channels, **options),
        force=force,
        log=log_path,
        intervene=intervene,
    )
    server = TracedServer(process, f"http://127.0.0.1:{number}", log_path)
    try:
        server.wait_ready(timeout)
        refuse_if_refused(folder, {process.intervention})
    except BaseException:
        with contextlib.suppress(MoetraceError):
            server.stop()
        raise
    return server
