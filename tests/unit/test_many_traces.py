"""A thousand traces at once, under the usual limit of 1,024 open files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import traces

CODE = """
import resource, sys
import moetrace
from moetrace.findings import Subject, question

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
opened = [moetrace.open(path) for path in sys.argv[1:]]
finding = question("load-balance")().answer(Subject(opened, names=[str(i) for i in range(len(opened))]))
print(len(opened), int(finding.tables["load_balance"]["tokens"].iloc[0]))
"""


def test_a_thousand_traces_are_one(tmp_path: Path) -> None:
    first = traces.small_trace(tmp_path / "0.moet")
    paths = [first, *(tmp_path / f"{i}.moet" for i in range(1, 1000))]
    for path in paths[1:]:
        shutil.copytree(first, path, copy_function=os.link)
    found = []
    for some in (paths[:1], paths):
        run = subprocess.run(
            [sys.executable, "-c", CODE, *map(str, some)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        found.append([int(n) for n in run.stdout.split()])
    (one, tokens), (many, sum_of_tokens) = found
    assert (one, many) == (1, 1000)
    assert sum_of_tokens == 1000 * tokens
