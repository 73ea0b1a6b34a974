"""Hold a wheel against what it promises: ``python packaging/check.py WHEEL PYTHON``.

Installs it into a clean environment of that Python, where no compiler can be run, and shows the recorded demo with it;
if a llama-server is found, it records with that, too. Of the library that goes into other programs: no symbol of a
glibc after 2.28, nothing exported but the hooks, and nothing linked but the C library's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

LINKED = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
EXPORTED = ("ggml_backend_sched_", "llama_", "gguf_init_from_file", "moetrace_")


def check_library(path: Path) -> None:
    """The preload library: what it needs, and what it shows to others."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        assert needed <= LINKED, f"{path.name} links {needed - LINKED}"
        for section in elf.iter_sections():
            if isinstance(section, GNUVerNeedSection):
                for _, versions in section.iter_versions():
                    for version in versions:
                        number = re.fullmatch(r"GLIBC_([\d.]+)", version.name)
                        assert number, f"{path.name} needs {version.name}"
                        assert tuple(map(int, number[1].split("."))) <= (2, 28), (
                            f"{path.name} needs {version.name}"
                        )
        shown = {
            symbol.name
            for symbol in elf.get_section_by_name(".dynsym").iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK")
        }
        assert shown, f"{path.name} exports nothing"
        assert all(name.startswith(EXPORTED) for name in shown), sorted(shown)[:20]


def main(wheel: Path, python: str) -> None:
    """Check it."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        check_library(Path(folder) / "moetrace" / "libmoetrace.so")
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
        bare = {**os.environ, "CC": "false", "CXX": "false", "PYTHONPATH": ""}
        subprocess.run(
            [
                f"{folder}/venv/bin/python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--only-binary",
                ":all:",
                str(wheel),
            ],
            check=True,
            env=bare,
        )
        run = subprocess.run(
            [f"{folder}/venv/bin/moetrace", "demo", "--recorded", "-o", f"{folder}/demo"],
            check=True,
            capture_output=True,
            text=True,
            env=bare,
            cwd=folder,
        )
        assert "specialists" in run.stdout
        assert Path(folder, "demo", "report", "report.html").is_file()
        subprocess.run(
            [f"{folder}/venv/bin/moetrace", "verify", f"{folder}/demo/demo.moet"], check=True, env=bare
        )
        server = shutil.which("llama-server")
        if server:  # one that is there shows that the library works in it
            subprocess.run(
                [f"{folder}/venv/bin/moetrace", "demo", "-o", f"{folder}/demo", "-t", "1"],
                check=True,
                env=bare,
                stdout=subprocess.DEVNULL,
            )
            subprocess.run(
                [f"{folder}/venv/bin/moetrace", "verify", f"{folder}/demo/demo.moet"], check=True, env=bare
            )
        library = subprocess.run(
            [f"{folder}/venv/bin/moetrace", "preload-path"],
            check=True,
            capture_output=True,
            text=True,
            env=bare,
        )
        assert Path(library.stdout.strip()).is_file()
    print(f"{wheel.name} holds with {python}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
