"""In one process, on a device that fuses, reorders and answers late: what is recorded is right, and nothing changes.

The device (device.cpp) gives the CPU's numbers, to the bit, where it fuses nothing: what is recorded there must be
what is recorded on the CPU, byte for byte. Where it fuses, a fusion that is undone moves the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import (
    DEFAULT,
    FUSIONS,
    PLACEMENTS,
    PROMPTS,
    WIDE,
    Problems,
    check_numbers,
    check_rows,
    check_same_columns,
    prompts_of,
    runs_of,
    same_computation,
)
from devices import Host, Ran, Setup, run_host
from running import MOE

import moetrace
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.remarks import remarks

pytestmark = [pytest.mark.runtime, pytest.mark.host("device")]


SETUPS = [
    Setup("vulkan"),
    Setup("metal", count=2),
    Setup("random:1"),
    Setup("random:2", count=3, stream="lazy"),
    Setup("", stream="lazy"),
]
QUICK = [
    ("qwen3moe", Setup("metal", count=2), ("all", "cpu-moe")),
    ("deepseek2-v3", Setup("vulkan"), ("all", "some-experts")),
    ("gpt-oss", Setup("random:1", stream="lazy"), ("all", "router")),
]
CASES = [
    *(pytest.param(name, setup, placements, id=f"{name}-{setup}-quick") for name, setup, placements in QUICK),
    *(
        pytest.param(name, setup, tuple(PLACEMENTS), id=f"{name}-{setup}", marks=pytest.mark.slow)
        for name in MOE
        for setup in SETUPS
    ),
]


def check_told(trace: moetrace.Trace, ran: Ran, plain: Ran, default: bool) -> None:
    """What undoes a fusion says so in the trace; the channels that are recorded by default undo none."""
    told = trace.facts["may_unfuse"]
    assert not (default and told)
    undone = {
        kind: (ran.counts[kind], plain.counts[kind])
        for kind in FUSIONS
        if ran.counts[kind] != plain.counts[kind]
    }
    assert told or not undone, undone
    assert bool(told) == any("fusions on the device are undone" in text for text in remarks(trace.store))


@pytest.mark.parametrize(("name", "setup", "placements"), CASES)
def test_what_is_recorded_is_right_and_nothing_is_changed(
    name: str, setup: Setup, placements: tuple[str, ...], on_device: Host, model_file: Any, tmp_path: Path
) -> None:
    model, prompts = model_file(name), prompts_of(name)
    quick = placements != tuple(PLACEMENTS)
    wide = {k: v for k, v in WIDE.items() if not quick or k in ("tap-router", "callback-router")}
    plain = on_device(setup, model, prompts, runs_of(name, placements, {"": {}}), traced=False)
    ran = on_device(setup, model, prompts, runs_of(name, placements, {**DEFAULT, **wide}), traced=True)
    problems = Problems()
    for placement in placements:
        if setup.order:
            assert plain[f"{placement}_"].counts["moved"] > 0, "the device reordered nothing"
        traces = {}
        for recording in (*DEFAULT, *wide):
            run = f"{placement}_{recording}"
            traces[recording] = problems(run, check_rows, ran[run])
            if recording in DEFAULT and ran[run].error is None:
                problems(run, same_computation, ran[run], plain[f"{placement}_"])
            if (trace := traces[recording]) is not None:
                problems(run, check_told, trace, ran[run], plain[f"{placement}_"], recording in DEFAULT)
        for recording, trace in traces.items():
            run = f"{placement}_{recording}"
            if trace is not None and recording in DEFAULT and traces["callback"] is not None:
                problems(run, check_same_columns, trace, traces["callback"])
            if trace is not None and recording.endswith("router"):
                problems(run, check_numbers, trace, name, model)
    problems.none()


def test_the_last_layer_is_that_of_the_rows_that_were_asked_for(model_file: Any, tmp_path: Path) -> None:
    """Which rows these are stands in memory that llama.cpp gives away before the graph has ended."""
    options = {"a": WIDE["tap-router"], "b": WIDE["callback-router"]}
    ran = run_host(model_file("lfm2moe"), tmp_path / "cpu", PROMPTS, options, traced=True)
    check_same_columns(check_rows(ran["a"]), check_rows(ran["b"]))


UNFUSED = [
    pytest.param("deepseek2-v3", Setup("random:3", fuse=False), id="deepseek2-v3-quick"),
    *(
        pytest.param(
            name,
            Setup(order, count=1 + i % 3, fuse=False, stream="lazy" if i % 2 else "50"),
            id=f"{name}-{order}",
            marks=pytest.mark.slow,
        )
        for i, name in enumerate(MOE)
        for order in ("metal", "vulkan", f"random:{i}")
    ),
]


@pytest.mark.parametrize(("name", "setup"), UNFUSED)
def test_the_same_bytes_as_on_the_cpu(
    name: str, setup: Setup, on_device: Host, model_file: Any, tmp_path: Path
) -> None:
    """Every recording on the device that fuses nothing is that of the CPU, whatever lies where."""
    model, prompts = model_file(name), prompts_of(name)
    quick = setup.order == "random:3"
    recordings = (
        {"tap": DEFAULT["tap"], "callback-router": WIDE["callback-router"]} if quick else {**DEFAULT, **WIDE}
    )
    placements = ("all", "cpu-moe") if quick else tuple(PLACEMENTS)
    shape = {"n_parallel": 1} if ARCHITECTURES[name].encoder else {}
    on_cpu = run_host(
        model, tmp_path / "cpu", prompts, {k: {**shape, **v} for k, v in recordings.items()}, traced=True
    )
    ran = on_device(setup, model, prompts, runs_of(name, placements, recordings), traced=True)
    problems = Problems()
    for recording in recordings:
        expected = check_rows(on_cpu[recording])
        for placement in placements:
            run = f"{placement}_{recording}"
            trace = problems(run, check_rows, ran[run])
            if trace is not None:
                problems(run, check_same_columns, trace, expected)
            if ran[run].error is not None:
                continue
            difference = np.abs(ran[run].logits - on_cpu[recording].logits).max(initial=0)
            if difference and recording != "attention":  # which turns flash attention off
                problems.found[f"{run}: logits"] = f"moved by {difference}"
    problems.none()
