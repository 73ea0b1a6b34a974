"""A llama-server (or any other llama.cpp program) under the tracer."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from moetrace.errors import MoetraceError, RuntimeMissingError
from moetrace.host.client import ServerClient
from moetrace.host.drain import Drain
from moetrace.host.intervene import Given, begin, check_model, in_force, refuse_if_refused, restore, switch
from moetrace.host.model import store_model_paths, store_vocabulary
from moetrace.host.options import CaptureOptions
from moetrace.host.runtime import find_tool, loaded_libraries, preload_environment
from moetrace.trace.intervention import Intervention, parse_interventions
from moetrace.trace.labels import append_labels
from moetrace.trace.trace import Trace, open_trace
from moetrace.trace.writer import TraceWriter

_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class TracedProcess:
    """A program of llama.cpp that runs with the tracer loaded, and the drain that follows it.

    The program inherits standard input, output and error; its arguments are not touched. If this process dies,
    the program goes on.

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
        Where the program's output goes; by default where ours goes.
    intervene
        What to change about the routing from the first token on.
    on_error
        Called once, in the drain's thread, when draining fails while the program runs.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: str | os.PathLike[str],
        options: CaptureOptions,
        *,
        force: bool = False,
        log: IO[bytes] | None = None,
        intervene: Given = None,
        on_error: Callable[[MoetraceError], None] | None = None,
    ) -> None:
        program = find_tool(command[0])
        self.command = [str(program), *command[1:]]
        environment = preload_environment(os.environ)
        self._model_path = model_argument(command)
        interventions = parse_interventions(intervene)
        check_model(interventions, None if "--override-kv" in command else self._model_path)
        self.trace = TraceWriter(output, command=command, model_path=self._model_path, force=force)
        environment.update(options.environment(self.trace.path))
        self.intervention = begin(self.trace.path, interventions) if interventions else 0
        if self.intervention:
            environment["MOETRACE_INTERVENTION"] = str(self.intervention)
        self.drain = Drain(self.trace, on_error)
        self.drain.start()
        try:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)
        except OSError as e:
            self.drain.stop()
            self.trace.close(state="closed")
            raise RuntimeMissingError(
                f"cannot start {program}", why=str(e), fix="check the program's path"
            ) from e

    def wait(self) -> int:
        """Wait for the program; signals that reach us are passed on. Gives its exit code, 128 + n for signal n."""
        with self._signals():
            while True:
                try:
                    code = self.process.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    continue
        return code if code >= 0 else 128 - code

    def finish(self, exit_code: int | None) -> None:
        """Drain what is left and close the trace.

        Raises
        ------
        MoetraceError
            If draining failed: what was sealed is in the trace, the rest stays in the rings. Or if the host
            refused what it was to change about the routing.
        """
        refused: MoetraceError | None = None
        try:
            refuse_if_refused(self.trace.path, {self.intervention})
        except MoetraceError as e:
            refused = e
        try:
            self.drain.stop()
            store_model_paths(self.trace, self._model_path)
            store_vocabulary(self.trace.path, self._model_path)
        except MoetraceError:
            with contextlib.suppress(MoetraceError):
                self.trace.close(exit_code=exit_code, state="live")
            raise
        self.trace.close(exit_code=exit_code)
        if refused is not None:
            raise refused

    def nothing_seen(self) -> MoetraceError | None:
        """Give the reason why no context was recorded; None if one was."""
        if self.drain.contexts:
            return None
        libraries = loaded_libraries(Path(self.command[0]))
        if not any("ggml" in name or "llama" in name for name in libraries):
            return MoetraceError(
                f"{self.command[0]} computed nothing that the tracer could see",
                why="it does not load ggml as a shared library, so there is nothing to take over",
                fix="build llama.cpp with -DBUILD_SHARED_LIBS=ON; `moetrace doctor` checks a binary",
            )
        return MoetraceError(
            "no expert routing was seen",
            why="no graph with experts was computed: a dense model, no request, or an unknown llama.cpp",
            fix="check the model and the messages above; `moetrace doctor` checks the binary",
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def forward(number: int, _frame: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

        old = {number: signal.signal(number, forward) for number in _FORWARDED}
        # a Ctrl-C at the terminal reaches the program by itself
        old[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


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
        self.client = ServerClient(url)

    @property
    def trace(self) -> Trace:
        """The trace as it stands: everything computed before this call, opened anew each time."""
        self._process.drain.flush()
        return open_trace(self._process.trace.path)

    def label(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append label lines (docs/format.md, labels.jsonl)."""
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
            restore(trace, before)
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
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-n_lines:])

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
    **options: Any,
) -> TracedServer:
    """Start llama-server under the tracer and wait until it is ready.

    Parameters
    ----------
    model
        GGUF file.
    output
        Trace folder to make; by default one in the system's temporary folder.
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
        intervention.
    """
    if not Path(model).is_file():
        raise MoetraceError(f"there is no model {model}", fix="check the path")
    folder = Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="moetrace-")) / "serve.moet"
    number = port or free_port()
    command = [program, "-m", str(model), "--host", "127.0.0.1", "--port", str(number), *arguments]
    log_path = folder.with_name(folder.name + ".log")
    with log_path.open("wb") as log:
        process = TracedProcess(
            command,
            folder,
            CaptureOptions.of(channels, **options),
            force=force,
            log=log,
            intervene=intervene,
        )
    server = TracedServer(process, f"http://127.0.0.1:{number}", log_path)
    try:
        server.wait_ready(timeout)
        refuse_if_refused(folder, {process.intervention})
    except BaseException:
        server.stop()
        raise
    return server
