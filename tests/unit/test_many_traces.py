"""A thousand traces at once, under the usual limit of 1,024 open files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import traces

import moetrace
from moetrace.findings import Subject, ask_all

CODE = """
import resource, sys
import moetrace
from moetrace.findings import Subject, question

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
opened = [moetrace.open(path) for path in sys.argv[1:]]
finding = question("load-balance")().answer(Subject(opened, names=[str(i) for i in range(len(opened))]))
print(len(opened), int(finding.tables["load_balance"]["tokens"].iloc[0]))
"""


@pytest.mark.slow
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


def test_the_order_in_which_traces_are_named_does_not_matter(tmp_path: Path) -> None:
    """Not to the last digit, of no question that takes several traces."""
    paths = [traces.labelled_trace(tmp_path / f"{name}.moet", seed=i) for i, name in enumerate("zay")]
    for i, path in enumerate(paths):
        lines = (path / "labels.jsonl").read_text().replace('"p', f'"{i}-p')
        (path / "labels.jsonl").write_text(lines)
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        subject = Subject([moetrace.open(paths[i]) for i in order], names=[paths[i].stem for i in order])
        found.append(list(ask_all(subject, workers=1)))
    for one, two in zip(*found, strict=True):
        assert (one.sentences, one.caveats, one.not_answered) == (
            two.sentences,
            two.caveats,
            two.not_answered,
        )
        for name, table in one.tables.items():
            pd.testing.assert_frame_equal(two.tables[name], table, check_exact=True)
    assert sum(f.not_answered is None for f in found[0]) >= 10
