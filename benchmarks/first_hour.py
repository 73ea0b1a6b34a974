"""Three new users, from nothing to the first picture: how many commands, and how many seconds each of them takes.

    python benchmarks/first_hour.py [--server LLAMA_SERVER]

Each user has a fresh virtual environment and a folder of their own, and finds no moetrace and no llama.cpp on PATH, but
for the one who has a llama-server (``--server``; that user is left out without it). What they type is what README and
docs/quickstart.md say. Prints a Markdown table. Packages come from wherever pip gets them; the first run fills its
cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class User:
    """Somebody who types commands into a shell; what fails ends the play."""

    def __init__(self, name: str, folder: Path, tools: str = "") -> None:
        self.name, self.folder = name, folder
        self.typed: list[tuple[str, float]] = []
        system = os.pathsep.join(["/usr/local/bin", "/usr/bin", "/bin"])
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("VIRTUAL_ENV", "MOETRACE"))
        }
        self.environment["PATH"] = os.pathsep.join(filter(None, [str(folder / "env" / "bin"), tools, system]))

    def type(self, command: str, meanwhile: Callable[[], None] | None = None) -> None:
        """Run one command line; ``meanwhile`` is what happens beside it, at the end of which it gets Ctrl-C."""
        begun = time.perf_counter()
        with (self.folder / "said.txt").open("ab") as said:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdout=said,
                stderr=said,
            )
            if meanwhile is not None:
                meanwhile()
                process.send_signal(2)
            code = process.wait(1800)
        if code:
            sys.exit(
                f"{self.name}: {command!r} ended with {code}: {(self.folder / 'said.txt').read_text()[-2000:]}"
            )
        self.typed.append((command, time.perf_counter() - begun))

    def install(self) -> None:
        """The first two commands of everybody."""
        self.type(f"{sys.executable} -m venv env")
        self.type(f"pip install --quiet {ROOT}")

    def picture(self, page: str) -> None:
        """What they came for must be there."""
        if (self.folder / page).stat().st_size < 100_000:
            sys.exit(f"{self.name}: {page} is no report")


def researcher(folder: Path) -> User:
    """What do experts do? No llama.cpp here."""
    user = User("researcher, no llama.cpp", folder)
    user.install()
    user.type("moetrace demo --recorded")
    user.picture("demo/report/report.html")
    return user


def pruner(folder: Path) -> User:
    """Which experts matter? Has what a colleague recorded."""
    user = User("pruning engineer, a recording", folder)
    user.install()
    unpack = "from moetrace import data; from moetrace.commands.demo import unpack; from pathlib import Path"
    subprocess.run(
        ["python", "-c", f"{unpack}; unpack(data.recorded_demo(), Path('.'))"],
        cwd=folder, env=user.environment, check=True,
    )  # fmt: skip
    user.type("moetrace analyze importance demo.moet -o answers")
    if not (folder / "answers" / "figures" / "importance-carried.png").is_file():
        sys.exit(f"{user.name}: there is no picture")
    return user


def tinkerer(folder: Path, server: Path, port: int = 18791) -> User:
    """Which experts go on the GPU? Has a llama-server."""
    user = User("tinkerer, a llama-server", folder, str(server.parent))
    user.install()
    shutil.copy(ROOT / "moetrace" / "data" / "demo.gguf", folder / "model.gguf")
    user.type(f"moetrace doctor -- {server.name}")

    def ask() -> None:
        body = json.dumps({"prompt": "def main():", "n_predict": 64}).encode()
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                for _ in range(4):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/completion", body, timeout=60).read()
                return
            except OSError:
                time.sleep(0.2)
        sys.exit("the server does not answer")

    user.type(f"moetrace run -o t.moet -- {server.name} -m model.gguf --port {port}", ask)
    user.type("moetrace report t.moet")
    user.picture("t-report/report.html")
    return user


def main() -> None:
    """Play all of them, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", type=Path, help="a llama-server that somebody has")
    args = parser.parse_args()
    plays: list[Callable[[Path], User]] = [researcher, pruner]
    if args.server is not None:
        plays.append(lambda folder: tinkerer(folder, args.server.resolve()))
    print("| user | commands | seconds to the first picture | of these pip |")
    print("| --- | ---: | ---: | ---: |")
    for play in plays:
        with tempfile.TemporaryDirectory(prefix="moetrace-user-") as folder:
            user = play(Path(folder))
        pip = sum(seconds for command, seconds in user.typed if command.startswith("pip "))
        total = sum(seconds for _, seconds in user.typed)
        print(f"| {user.name} | {len(user.typed)} | {total:.0f} | {pip:.0f} |", flush=True)


if __name__ == "__main__":
    main()
