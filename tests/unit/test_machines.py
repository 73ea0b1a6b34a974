"""Counting elsewhere: the same numbers in other processes, on Dask, and when a worker dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traces
from rings import make_layout

import moetrace
from moetrace.__main__ import main
from moetrace.analysis.counts import parts
from moetrace.errors import MoetraceError
from moetrace.findings import QUESTIONS, Subject, question

ALL = ("experts", "weights", "logits", "gate_input")
ASKED = tuple(name for name, asked in QUESTIONS.items() if not asked.needs_model and not asked.compares)
QUICK: dict[str, Any] = {"permutations": 49, "resamples": 20, "max_tokens": 400}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five traces, of 18 requests in all."""
    folder = tmp_path_factory.mktemp("fleet")
    layout = make_layout(layers=(1, 2, 5), n_expert=(8, 8, 6), channels=ALL)
    records, owner = traces.labelled_records(layout, np.random.default_rng(3), n_prompts=6)
    requests = np.arange(18)
    return [
        traces.write_labelled(folder / f"{i}.moet", layout, records, owner, requests[i::5]) for i in range(5)
    ]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


def answers(paths: list[Path], executor: Executor | None = None, **options: Any) -> dict[str, str]:
    """Everything that every question says, to the last digit."""
    opened = [moetrace.open(path) for path in paths]
    subject = Subject(opened, executor=executor, **options)
    subject.settle()
    assert subject.executor is None
    found = {}
    for name in ASKED:
        asked = question(name)
        given = {k: v for k, v in QUICK.items() if k in asked.__dataclass_fields__ and name != "persistence"}
        found[name] = asked(**given).ask(subject).to_json()
    for trace in opened:
        trace.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"phase": "prefill", "group_key": "id"}, marks=pytest.mark.slow),
        pytest.param({"layers": [2, 5]}, marks=pytest.mark.slow),
    ],
)
def test_every_answer_is_the_same_in_other_processes(
    options: dict[str, Any], fleet: list[Path], pool: Executor
) -> None:
    here = answers(fleet, **options)
    assert sum('"not_answered": null' in text for text in here.values()) > 10
    for order in (fleet, fleet[::-1]):
        assert answers(order, pool, **options) == here


class Here(Executor):
    """Does what it is asked at once, and keeps the sizes of the blocks."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.blocks.append(len(args[1]))
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65, 300])
def test_parts_are_taken_in_order_and_added_whatever_the_blocks(n: int) -> None:
    executor = Here()
    assert list(parts.each(str, range(n), executor)) == [str(i) for i in range(n)]
    assert sum(executor.blocks) == n
    assert len(executor.blocks) <= 64
    assert parts.total(lambda i: [i], range(n), executor) == list(range(n))
    assert parts.total(lambda i: [i], range(n)) == list(range(n))


def test_groups_that_stand_for_prompts_are_the_same(
    fleet: list[Path], pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more prompts than there is room for, counts are of groups, and neighbours and texts of some."""
    from moetrace.analysis.counts import from_trace as adapter

    monkeypatch.setattr(adapter, "_TABLE_BYTES", 8 * 3 * 2 * 8 * 9)
    monkeypatch.setattr(adapter, "_TEXT_BYTES", 6000)
    monkeypatch.setattr(adapter, "_TOKEN_BYTES", 8 * 3 * 8 * 6)
    here = answers(fleet)
    assert "Groups stand for prompts" in here["specialists"]
    assert answers(fleet, pool) == here


# -- Dask ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_a_worker_of_dask_that_is_killed_changes_nothing(fleet: list[Path]) -> None:
    distributed = pytest.importorskip("distributed")
    here = answers(fleet)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor(pure=False)
        assert answers(fleet, executor) == here
        dying = Mortal(executor, next(worker.pid for worker in cluster.workers.values()))
        assert answers(fleet, dying) == here
        assert dying.killed


class Mortal(Executor):
    """Another executor, one of whose processes is killed when it has its third task."""

    def __init__(self, executor: Executor, pid: int) -> None:
        self._executor, self._pid, self._n, self.killed = executor, pid, 0, False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._executor.submit(fn, *args, **kwargs)
        self._n += 1
        if self._n == 3:
            os.kill(self._pid, signal.SIGKILL)
            self.killed = True
        return future


# -- the command -----------------------------------------------------------------------------------------


def test_stats_prints_the_same_wherever_it_counts(
    fleet: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for on in ([], ["--on", "local:2"]):
        only = "overview,specialists,persistence,generation-dynamics"
        assert main(["stats", *map(str, fleet), "--no-keep", "--only", only, "--format", "json", *on]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_places_that_are_not_there(
    fleet: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    command = ["stats", str(fleet[0]), "--no-keep", "--only", "overview", "--on"]
    for nowhere in ("mars", "local:0", "dask:two"):
        assert main([*command, nowhere]) == 2
        assert f"--on {nowhere!r} is no place" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([*command, "dask"]) == 1
    assert "pip install 'moetrace[dask]'" in capsys.readouterr().err


def test_a_killed_process_is_said(fleet: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from moetrace.commands import machines

    real = machines.machines

    @contextmanager
    def mortal(where: str | None) -> Iterator[Executor | None]:
        with real(where) as executor:
            assert executor is not None
            executor.submit(os._exit, 1)
            yield executor

    monkeypatch.setattr(machines, "machines", mortal)
    with moetrace.open(fleet[0]) as trace, pytest.raises(MoetraceError, match="was killed"):
        machines.count_on("local", Subject(trace), lambda what: None)


def test_nothing_of_it_is_imported_unless_asked_for() -> None:
    code = (
        "import sys, moetrace.commands.stats, moetrace.commands.report; print('distributed' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_counts_are_sent_in_few_bytes_and_come_as_they_were(fleet: list[Path]) -> None:
    with moetrace.open(fleet[0]) as trace:
        routing = moetrace.analysis.from_trace(trace)
        for counts in (routing.counts, routing.token_counts):
            data = pickle.dumps(counts)
            again = pickle.loads(data)
            for name, value in vars(counts).items():
                if isinstance(value, np.ndarray):
                    assert getattr(again, name).dtype == value.dtype
                    np.testing.assert_array_equal(getattr(again, name), value)
        assert len(data) < len(pickle.dumps(vars(counts))) / 2
        assert (again.occurrences[0] != counts.occurrences[0]).nnz == 0
