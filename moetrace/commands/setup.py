"""``moetrace setup``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from moetrace.errors import RuntimeMissingError
from moetrace.host import runtime


class Setup:
    """Build the pinned llama.cpp into this Python's environment: its libraries, llama-server and the other tools.

    Takes minutes, once: pip keeps what was built. Needs a C++17 compiler. Whoever has a llama-server with shared
    libraries needs none of it: moetrace doctor says whether it will do.

      moetrace setup
      moetrace setup cuda
      CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native moetrace setup cuda
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the argument."""
        parser.add_argument(
            "backend",
            nargs="?",
            default="cpu",
            choices=["cpu", "cuda", "metal", "vulkan"],
            help="what it computes on beside the CPU (default: cpu, nothing else)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Build it; the build's own messages say what fails."""
        script = Path(runtime.__file__).with_name("install-llama.sh")
        code = subprocess.run(["sh", str(script), args.backend, sys.executable], check=False).returncode
        if code:
            raise RuntimeMissingError(
                "the pinned llama.cpp was not installed",
                why="see above",
                fix="install what is missing, or use a llama-server of your own: moetrace doctor -- PATH",
            )
        print(f"llama-server is {runtime.find_tool('llama-server')}")
        return 0
