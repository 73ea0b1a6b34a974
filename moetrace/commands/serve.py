"""``moetrace serve``."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.errors import MoetraceError, UsageError

_LOOPBACK = ("127.0.0.1", "localhost")


class Serve:
    """Serve a recording over HTTP while it goes on: metrics, a live page, the routed experts of requests.

    /metrics in OpenMetrics (counts, no text), / a page, /requests and /requests/ID/experts (JSON with base64, or .npy),
    /interventions. It reads the trace's files, and the server that is recorded does not notice. Only this machine is
    served unless another address is given, which takes a token.

      moetrace serve t.moet
      moetrace run --listen 127.0.0.1:9464 -o t.moet -- llama-server -m model.gguf
      moetrace serve t.moet --listen 0.0.0.0:9464 --token-file token.txt
      curl localhost:9464/requests/code-07/experts?format=npy -o routed.npy
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", metavar="T.moet", help="a trace, recorded now or before")
        add_option(
            parser, "--listen", default="127.0.0.1:9464", metavar="ADDRESS:PORT", help="where to serve it"
        )
        add_option(parser, "--model", metavar="NAME", help="of several models that are recorded, this one")
        add_option(
            parser,
            "--token-file",
            metavar="FILE",
            help="what clients must send (Authorization: Bearer); or MOETRACE_TOKEN",
        )
        add_option(
            parser, "--per-expert", action="store_true", help="metrics of each expert of each layer, too"
        )
        add_option(parser, "--per-label", action="store_true", help="metrics of each label, too")

    def run(self, args: argparse.Namespace) -> int:
        """Serve until Ctrl-C."""
        try:
            import uvicorn

            from moetrace.live.service import Service, secret
            from moetrace.live.tail import keep_small
        except ImportError as e:
            raise MoetraceError(
                "serving needs starlette, uvicorn and prometheus-client",
                why=str(e),
                fix="pip install 'moetrace[serve]'",
            ) from e
        host, port = address(args.listen)
        token = secret(args.token_file, os.environ.get)
        if host not in _LOOPBACK and token is None:
            raise UsageError(
                f"{host} can be reached by others",
                fix="give a token: --token-file FILE, or the variable MOETRACE_TOKEN",
            )
        service = Service(
            Path(args.trace),
            args.model,
            token=token,
            hosts=None if host in _LOOPBACK else ["*"],
            experts=args.per_expert,
            domains=args.per_label,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                service.app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )
        keep_small()
        print(f"http://{host}:{port}/  metrics: http://{host}:{port}/metrics", flush=True)
        try:
            server.run()
        except SystemExit:  # uvicorn's, when it cannot listen
            raise MoetraceError(
                f"{args.listen} cannot be listened on", fix="give another port: --listen"
            ) from None
        finally:
            service.close()
        return 0


def add_listen(parser: argparse.ArgumentParser) -> None:
    """Add ``--listen`` and ``--token-file`` of a recording that is served while it goes on."""
    add_option(
        parser, "--listen", metavar="ADDRESS:PORT", help="serve metrics and a live page there: moetrace serve"
    )
    add_option(parser, "--token-file", metavar="FILE", help="what clients of --listen must send")


@contextlib.contextmanager
def served(args: argparse.Namespace, trace: Path) -> Iterator[None]:
    """Serve a trace in a process of its own meanwhile, if ``--listen`` is given. What it says goes to standard error.

    Raises UsageError if the address is none.
    """
    if not args.listen:
        yield
        return
    address(args.listen)
    command = [sys.executable, "-m", "moetrace", "serve", os.fspath(trace), "--listen", args.listen]
    if args.token_file:
        command += ["--token-file", args.token_file]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        if process.poll() is None:
            process.kill()
            process.wait()


def address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``. Raises UsageError if it is none."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"{text!r} is no address", fix="write it like 127.0.0.1:9464")
    return host, int(port)
