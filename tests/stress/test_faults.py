"""Calls that fail: each allocation, mapping and write in turn, in the host and in the drain."""

from __future__ import annotations

import errno
import importlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_reader import read_trace
from rings import Producer, make_layout
from scale import Figures, Size
from traces import server_records

from moetrace.errors import MoetraceError
from moetrace.host.drain import Drain
from moetrace.host.runtime import preload_path
from moetrace.trace.record import OnFull, RecordKind
from moetrace.trace.recover import recover
from moetrace.trace.ring import Ring, ring_is_ready
from moetrace.trace.verify import verify
from moetrace.trace.writer import TraceWriter

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

# -- the host: a program of llama.cpp, its calls made to fail by a preloaded library ---------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run of the host did: the logits that it wrote, byte for byte, and what the tracer said."""

    logits: bytes
    code: int
    said: list[str]
    calls: int


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile faults.c."""
    out = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", out, "-ldl"], check=True)
    return out


Host = Callable[..., Outcome]


@pytest.fixture
def host(shim: Path, runtime: Any, model_file: Any, tmp_path: Path) -> Host:
    """Return ``host(call, nth, errno)``: runs the program under the tracer with one failing call."""
    program, model = runtime.tool("llama-results"), model_file("qwen3moe")
    out = tmp_path / "logits"
    command = [program, "-m", model, "-p", "Hello there, my friend", "-t", "1", "-c", "256", "-o", out]

    def run(call: str | None, nth: int = 0, error: str = "ENOMEM", only: str = "libmoetrace") -> Outcome:
        trace, log = tmp_path / "trace", tmp_path / "calls"
        shutil.rmtree(trace, ignore_errors=True)
        trace.mkdir()
        log.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "LD_PRELOAD": f"{shim}:{preload_path()}",
            "MOETRACE_TRACE": str(trace),
            "MOETRACE_RING_SIZE": "65536",
            "MOETRACE_BLOCK_MS": "1",
            "FAULT_LOG": str(log),
            "FAULT_NTH": str(nth),
            "FAULT_ERRNO": error,
            "FAULT_ONLY": only,
        }
        if call is None:
            environment = dict(os.environ)
        else:
            environment["FAULT_CALL"] = call
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line.startswith("moetrace:")]
        calls = int(log.read_text()) if log.exists() else -1
        for ring in trace.glob("ctx*/ring"):
            if ring_is_ready(ring):
                with Ring(ring) as opened:
                    n = opened.counters
                    assert (
                        n["rows_produced"] == n["rows_committed"] + n["rows_lost_full"] + n["rows_lost_error"]
                    )
        return Outcome(out.read_bytes(), done.returncode, said, calls)

    return run


def picks(n: int, wanted: int) -> list[int]:
    """Choose which of n calls are to fail: all, or some, the same in every run."""
    numbers = list(range(1, n + 1))
    return numbers if n <= wanted else sorted(random.Random(3).sample(numbers, wanted))


@pytest.mark.runtime
def test_allocations_of_the_host(host: Host, size: Size, figures: Figures) -> None:
    """GIVEN an allocation of the tracer that fails WHEN it does THEN one line, and the program is as without us."""
    plain, counted = host(None), host("malloc")
    assert plain.code == counted.code == 0
    assert plain.logits == counted.logits
    assert counted.said == []
    assert counted.calls > 100
    chosen = picks(counted.calls, size("faults_of_host"))
    n_told = 0
    for nth in chosen:
        failed = host("malloc", nth)
        assert (failed.logits, failed.code) == (plain.logits, plain.code), nth
        assert len(failed.said) <= 1, (nth, failed.said)
        n_told += len(failed.said)
    assert n_told > 0
    figures(
        "faults",
        **{
            "allocations of the host that failed": f"{len(chosen):,} of {counted.calls:,}: same logits and exit code; "
            f"{n_told:,} told in one line, the rest not needed"
        },
    )


@pytest.mark.runtime
def test_calls_of_the_host(host: Host, figures: Figures) -> None:
    """GIVEN a call that makes the ring and fails WHEN it does THEN one line says which and why, and nothing stays."""
    plain = host(None)
    n_failed = 0
    for call, errors in {
        "mkdir": ("ENOSPC", "EACCES", "EIO"),
        "open": ("ENOSPC", "EACCES", "EIO", "EINTR"),
        "fallocate": ("ENOSPC", "EIO", "EINTR"),
        "mmap": ("ENOMEM", "EIO"),
    }.items():
        calls = host(call, only="/trace/").calls
        assert calls > 0
        for nth in range(1, calls + 1):
            for error in errors:
                failed = host(call, nth, error, only="/trace/")
                assert (failed.logits, failed.code) == (plain.logits, plain.code), (call, error)
                n_failed += 1
                if error == "EINTR" and not failed.said:
                    continue  # tried again
                assert len(failed.said) == 1, (call, error, failed.said)
                assert os.strerror(getattr(errno, error)) in failed.said[0]
    figures(
        "faults",
        **{"calls of the host that failed": f"{n_failed:,}: same logits and exit code, told in one line"},
    )


# -- the drain: the functions that it calls, replaced ------------------------------------------------------------

make_folder = os.mkdir  # the host's own, which does not fail here
LAYOUT = make_layout()
RECORDS = server_records(LAYOUT, np.random.default_rng(4), n_requests=6)

#: what may fail, and with what; Python itself tries again after EINTR (PEP 475)
DRAIN_CALLS: dict[str, tuple[int | str, ...]] = {
    "os.open": (errno.ENOSPC, errno.EACCES, errno.EIO),
    "os.mkdir": (errno.ENOSPC, errno.EACCES),
    "os.pwrite": (errno.ENOSPC, errno.EIO, "short", "none"),
    "os.write": (errno.ENOSPC, errno.EIO, "short"),
    "os.ftruncate": (errno.EIO,),
    "os.fdatasync": (errno.EIO, errno.ENOSPC),
    "os.fsync": (errno.EIO,),
    "os.replace": (errno.ENOSPC, errno.EIO),
    "os.rename": (errno.ENOSPC,),
    "os.unlink": (errno.EIO,),
    "mmap.mmap": (errno.ENOMEM,),
}


@dataclass
class Faults:
    """Counts the calls of a function, and makes one of them fail."""

    name: str
    fault: int | str = 0
    nth: int = 0
    calls: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        module_name, _, function = self.name.partition(".")
        module = importlib.import_module(module_name)
        real = getattr(module, function)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls != self.nth:
                return real(*arguments, **options)
            if self.fault == "none":
                return 0
            if self.fault == "short":
                return real(arguments[0], bytes(arguments[1])[: (len(arguments[1]) + 1) // 2], *arguments[2:])
            assert isinstance(self.fault, int)
            raise OSError(self.fault, os.strerror(self.fault))

        patch.setattr(module, function, call)


def record(folder: Path) -> list[MoetraceError]:
    """Record a host that has ended already, as `moetrace run` would; gives the errors that were told."""
    told: list[MoetraceError] = []
    trace = TraceWriter(folder, fsync=True)
    make_folder(folder / "ctx0")
    producer = Producer(LAYOUT, 256, OnFull.BLOCK)
    producer.write(RECORDS)
    data = producer.data
    data[140] = 1  # closed
    (folder / "ctx0" / "ring").write_bytes(data)
    drain = Drain(trace, told.append)
    drain.start()
    try:
        drain.stop()
        trace.close(exit_code=0)
    except MoetraceError as e:
        if e not in told:
            told.append(e)
    trace.detach()
    return told


def cases(tmp_path: Path) -> Iterator[tuple[str, int | str, int]]:
    """Every call of every function, with every way to fail."""
    for name, faults in DRAIN_CALLS.items():
        with pytest.MonkeyPatch.context() as patch:
            counter = Faults(name)
            counter.install(patch)
            assert record(tmp_path / "counted") == []
        shutil.rmtree(tmp_path / "counted")
        for fault in faults:
            for nth in range(1, counter.calls + 1):
                yield name, fault, nth


def test_calls_of_the_drain(tmp_path: Path, size: Size, figures: Figures) -> None:
    """GIVEN a call that fails WHEN recording THEN one error says what and how to go on, and no row is lost."""
    every = list(cases(tmp_path))
    chosen = (
        every
        if len(every) <= size("faults_of_drain")
        else random.Random(2).sample(every, size("faults_of_drain"))
    )
    n_told = n_survived = 0
    expected = RECORDS["serial"][RECORDS["kind"] == RecordKind.ROW]
    for name, fault, nth in chosen:
        folder = tmp_path / "t"
        told: list[MoetraceError] = []
        with pytest.MonkeyPatch.context() as patch:
            Faults(name, fault, nth).install(patch)
            try:
                told = record(folder)
            except MoetraceError as e:  # nothing could be made, so nothing runs
                told = [e]
        where = f"{name} {fault} {nth}"
        assert len(told) <= 1, where
        if told:
            assert told[0].what, where
            assert told[0].why, where
            assert told[0].fix, where
            if isinstance(fault, int):
                assert re.search(re.escape(os.strerror(fault)), str(told[0])), (where, str(told[0]))
        if (folder / "ctx0" / "ring").exists() or (folder / "ctx0" / "rows").exists():
            if told:
                recover(folder)
            assert verify(folder).findings == (), where
            rows = read_trace(folder)["contexts"]["ctx0"]["rows"]
            np.testing.assert_array_equal(rows["serial"], expected, err_msg=where)
        n_told += len(told)
        n_survived += not told
        shutil.rmtree(folder, ignore_errors=True)
    assert n_told > 0
    figures(
        "faults",
        **{
            "calls of the drain that failed": f"{len(chosen):,} of {len(every):,}: {n_told:,} told once with the fix, "
            f"{n_survived:,} made good at once; every row recovered"
        },
    )
