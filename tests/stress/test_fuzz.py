"""Fuzzing: the C++ that reads what others wrote, with libFuzzer; Python's readers and importers, with Hypothesis."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rings import make_layout, reseal, ring_bytes
from scale import ROOT, Figures, Size, size_of

import moetrace
from moetrace.errors import MoetraceError
from moetrace.host.prompts import read_prompts
from moetrace.trace.importers.writer import import_trace
from moetrace.trace.labels import read_labels
from moetrace.trace.ledger import read_header
from moetrace.trace.record import RING_HEADER
from moetrace.trace.ring import Ring
from moetrace.trace.rows import Layout, events_from_records, rows_from_records
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

TARGETS = ("batch", "graph", "layout", "ring", "text")
CORPUS = ROOT / "tests" / "cpp" / "fuzz" / "corpus"


def compiler() -> str:
    """Find a clang with libFuzzer."""
    for name in ("clang++", *(f"clang++-{version}" for version in range(22, 11, -1))):
        if path := shutil.which(name):
            return path
    pytest.skip("libFuzzer needs clang (apt-get install clang)")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the fuzz targets with libFuzzer, AddressSanitizer and UBSan."""
    folder = Path(os.environ.get("MOETRACE_FUZZ_BUILD", tmp_path_factory.mktemp("fuzz")))
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DMOETRACE_TESTS=ON", "-DMOETRACE_FUZZ=ON"]
    subprocess.run([*configure, f"-DCMAKE_CXX_COMPILER={compiler()}"], check=True, stdout=subprocess.DEVNULL)
    targets = [f"fuzz-{target}" for target in TARGETS]
    command = ["cmake", "--build", folder, "--parallel", "2", "--target", *targets]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "tests" / "cpp"


@pytest.mark.parametrize("target", TARGETS)
def test_cpp(
    target: str, size: Size, figures: Figures, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """GIVEN bytes that nobody meant WHEN the C++ reads them THEN no sanitizer says a word, and no check fails."""
    seconds = size("fuzz_seconds")
    if seconds == 0:
        pytest.skip("`make test-cpp` runs the stored inputs; fuzzing is for `make stress`")
    build: Path = request.getfixturevalue("build")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    command = [
        build / f"fuzz-{target}", corpus, CORPUS / target, f"-max_total_time={seconds}", "-timeout=60",
        "-rss_limit_mb=2048", "-print_final_stats=1", "-close_fd_mask=1",
    ]  # fmt: skip
    # rings are files: in memory, if there is room
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "TMPDIR": fast}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (executions,) = re.findall(r"stat::number_of_executed_units: (\d+)", run.stderr)
    inputs = len(list((CORPUS / target).iterdir()))
    figures(
        "fuzz",
        **{
            f"libFuzzer, {target}": f"{int(executions):,} executions in {seconds} s from {inputs} inputs, "
            f"{len(list(corpus.iterdir())):,} in the end; 0 crashes, hangs or reports"
        },
    )


# -- Python: nothing but a MoetraceError comes out of any reader ---------------------------------------------------

EXAMPLES = size_of("fuzz_examples")
many = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))

LAYOUT = make_layout()
RING = bytes(ring_bytes(LAYOUT, 4))

#: what the text formats are made of, so that a guess gets beyond the first look
PIECES = """
layer_id,expert_ids gate_input expert_ids domain,layer,expert,count domain code input_ids exp_ids label id n_predict
predicted_token_ids token layers experts prompt messages role content null true 0 1 2 31 -1 65536 1e9 nan inf 0.5 , é
{ } [ ] : "
"""
WORDS = st.sampled_from([*PIECES.split(), *(" ", "\t", "\n", "\r\n", "\ufeff", "\0", "9" * 20)])
TEXTS = st.one_of(
    st.lists(WORDS, max_size=60).map("".join).map(str.encode),
    st.lists(st.lists(WORDS, max_size=8).map(",".join), max_size=20).map("\n".join).map(str.encode),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6),
        max_leaves=20,
    ).map(json.dumps).map(str.encode),
    st.binary(max_size=300),
)  # fmt: skip


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    with contextlib.suppress(MoetraceError):
        yield


def test_rings(tmp_path: Path, figures: Figures) -> None:
    path = tmp_path / "ring"

    @many
    @given(
        edits=st.lists(
            st.tuples(st.integers(0, len(RING) - 1), st.binary(min_size=1, max_size=8)), max_size=6
        ),
        cut=st.integers(0, len(RING)) | st.none(),
        honest=st.booleans(),
    )
    def check(edits: Any, cut: int | None, honest: bool) -> None:
        data = bytearray(RING)
        for at, piece in edits:
            data[at : at + len(piece)] = piece[: len(data) - at]
        if honest:  # under a checksum that fits
            header = np.frombuffer(bytes(data[:640]), RING_HEADER)[0]
            ends = int(header["fields_offset"]) + 72 * int(header["n_fields"]), int(header["meta_offset"])
            if max(ends) < len(data):
                reseal(data)
        path.write_bytes(data[:cut])
        with only_our_errors(), Ring(path) as ring:
            _ = ring.counters, ring.status, ring.host_alive
            layout = Layout.from_context(ring.meta, ring.fields)
            with only_our_errors():
                records = ring.snapshot()[0]
                rows_from_records(records, layout)
                events_from_records(records, layout)
            with only_our_errors():
                ring.pending()

    check()
    figures("fuzz", **{"Hypothesis, rings": f"{EXAMPLES:,} examples; 0 crashes"})


def test_importers(tmp_path: Path, figures: Figures) -> None:
    folder = tmp_path / "import"

    @many
    @given(
        text=TEXTS,
        name=st.sampled_from(["x.csv", "x.log", "x.jsonl", "x.npy", "x.pkl", "counts.csv"]),
        kind=st.sampled_from([None, "token-json", "expert-log", "gate-log", "olmoe", "counts"]),
    )
    def check(text: bytes, name: str, kind: str | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an example that failed
        (folder / "domain" / "traces").mkdir(parents=True)
        if kind == "token-json":
            source = folder
            (folder / "domain" / "traces" / "token-00000.json").write_bytes(text)
        else:
            source = folder / name
            source.write_bytes(text)
        with only_our_errors():
            import_trace(source, folder / "out", format=kind)
        with only_our_errors():
            read_prompts(source)

    check()
    figures("fuzz", **{"Hypothesis, importers and prompts": f"{EXAMPLES:,} examples; 0 crashes"})


def test_files_of_a_trace(tmp_path: Path, figures: Figures) -> None:
    column = tmp_path / "x.npy"

    @many
    @given(text=TEXTS, header=st.binary(max_size=200))
    def check(text: bytes, header: bytes) -> None:
        (tmp_path / "labels.jsonl").write_bytes(text)
        (tmp_path / "meta.json").write_bytes(text)
        column.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + header)
        with only_our_errors():
            read_labels(tmp_path)
        with only_our_errors():
            read_header(column)
        column.write_bytes(header)
        with only_our_errors():
            read_header(column)
        with only_our_errors():
            moetrace.open(tmp_path)
        with only_our_errors():
            verify(tmp_path)

    check()
    figures("fuzz", **{"Hypothesis, files of a trace": f"{EXAMPLES:,} examples; 0 crashes"})
