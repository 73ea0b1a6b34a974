"""``moetrace preload-path``."""

from __future__ import annotations

import argparse

from moetrace.host.runtime import preload_path


class PreloadPath:
    """Print the path of the tracer's library, for service files and containers.

    LD_PRELOAD=$(moetrace preload-path) MOETRACE_TRACE=/var/lib/t.moet llama-server ...

    The server then writes rings into MOETRACE_TRACE, which must exist. The options of moetrace run are
    variables there: MOETRACE_CAPTURE, MOETRACE_LAYERS, MOETRACE_COLLECTOR, MOETRACE_ON_FULL, MOETRACE_RING_SIZE
    (bytes), MOETRACE_BLOCK_MS, MOETRACE_PAUSED (0 or 1).
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add no options."""

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        print(preload_path())
        return 0
