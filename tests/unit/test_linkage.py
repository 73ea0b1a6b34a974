"""How a program comes by llama.cpp, and what doctor says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moetrace.__main__ import main
from moetrace.errors import RuntimeMissingError
from moetrace.host.linkage import Linkage, linkage
from moetrace.host.runtime import preload_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ELF")

SOURCE = """
int ggml_backend_sched_graph_compute_async(void) { return 1; }
int use(void) { return ggml_backend_sched_graph_compute_async(); }
"""


@pytest.mark.parametrize(
    ("text", "how"),
    [
        (b"#!/bin/sh\nexec llama-server\n", Linkage.SCRIPT),
        (b"\x7fELF, damaged, with ggml_backend_sched inside", Linkage.STATIC),
        (b"nothing of the kind", Linkage.NONE),
    ],
)
def test_files(text: bytes, how: Linkage, tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(text)
    assert linkage(path) is how


def test_a_library_that_calls_its_own_llama_cpp_by_name() -> None:
    assert linkage(preload_path()) is Linkage.OWN  # it exports the functions that it takes over
    assert linkage(Path(sys.executable).resolve()) is Linkage.NONE


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ([], Linkage.OWN),
        (["-Wl,-Bsymbolic"], Linkage.STATIC),
        (["-fvisibility=hidden"], Linkage.NONE),  # and no message of ggml tells of it
    ],
)
def test_linked_libraries(options: list[str], how: Linkage, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "lib.c").write_text(SOURCE)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-s", *options, "-o", tmp_path / "lib.so", tmp_path / "lib.c"],
        check=True,
    )
    assert linkage(tmp_path / "lib.so") is how


@pytest.mark.parametrize("text", [b"", None])
def test_what_cannot_be_read(text: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "program"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(RuntimeMissingError, match="cannot be read"):
        linkage(path)


def test_doctor_does_not_refuse_what_may_load_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--", sys.executable]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["program"] == [str(Path(sys.executable))]
    assert "try: moetrace run" in told["verdict"][0]
    assert main(["doctor", "--", sys.executable]) == 0
    assert "moetrace run -o t.moet --" in capsys.readouterr().out
