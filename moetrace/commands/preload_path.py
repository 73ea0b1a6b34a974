"""``moetrace preload-path``."""

from __future__ import annotations

import argparse

from moetrace.host.runtime import preload_path


class PreloadPath:
    """Print the path of the tracer's library, for service files and containers.

    mkdir /var/lib/t.moet
    LD_PRELOAD=$(moetrace preload-path) MOETRACE_TRACE=/var/lib/t.moet llama-server ...
    moetrace resume /var/lib/t.moet

    The server writes rings into MOETRACE_TRACE, an existing folder, once it has computed something; moetrace resume
    makes a trace of them, and goes on until the server ends. When the server has ended, moetrace recover takes what
    the rings still hold. The options of moetrace run are variables there: MOETRACE_CAPTURE, MOETRACE_LAYERS,
    MOETRACE_COLLECTOR, MOETRACE_ON_FULL, MOETRACE_RING_SIZE (bytes), MOETRACE_BLOCK_MS, MOETRACE_PAUSED (0 or 1).
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add no options."""

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        print(preload_path())
        return 0
