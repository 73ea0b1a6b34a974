"""Interventions of every kind where the device fuses and reorders: what is asked for happens, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checks import (
    ABLATED,
    INTERVENED,
    PLACEMENTS,
    Problems,
    check_choice,
    check_rows,
    check_same_columns,
    interventions_of,
    prompts_of,
    runs_of,
)
from devices import Host, Ran, Setup, run_host
from running import MOE

import moetrace
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.record import State

pytestmark = [pytest.mark.runtime, pytest.mark.host("device")]

QUICK = [
    ("llama4", Setup("random:2"), ("all",)),  # the weights' sigmoid reads the scores after the top-k
    ("deepseek2-v3", Setup("random:4"), ("all",)),
    ("qwen3moe", Setup("vulkan", count=2), ("some-experts",)),
]
CASES = [
    *(pytest.param(name, setup, placements, id=f"{name}-{setup}-quick") for name, setup, placements in QUICK),
    *(
        pytest.param(
            name,
            Setup(order, count=1 + i % 2),
            tuple(PLACEMENTS),
            id=f"{name}-{order}",
            marks=pytest.mark.slow,
        )
        for i, name in enumerate(MOE)
        for order in ("vulkan", "metal", f"random:{i}")
        if not ARCHITECTURES[name].encoder
    ),
]


def replays_of(placement: str) -> dict[str, dict[str, Any]]:
    return {
        f"again-{name}": {"channels": INTERVENED, "intervene": [f"replay:FOLDER/{placement}_{name}.moet"]}
        for name in ("base", "changed")
    }


def check_slot(trace: moetrace.Trace, base: moetrace.Trace) -> None:
    """Only the rows of the slot are changed; those that came first have the routing that they had."""
    chosen = trace.sequence == 1
    np.testing.assert_array_equal(trace.intervened, chosen)
    present = np.asarray(trace.state) == State.PRESENT
    used = (np.asarray(trace.experts) == ABLATED).any(axis=-1) & present
    assert not used[chosen].any()
    assert used[~chosen].any()
    # the first request of every other slot: the same tokens, the same routing
    first = np.asarray(base.request) < 4
    same = (base.sequence != 1) & first
    np.testing.assert_array_equal(
        np.asarray(trace.experts)[same[: len(trace)]], np.asarray(base.experts)[same]
    )


def check_same_routing(trace: moetrace.Trace, base: moetrace.Trace) -> None:
    for column in ("token", "position", "sequence", "state", "experts"):
        np.testing.assert_array_equal(
            np.asarray(trace.column(column)), np.asarray(base.column(column)), column
        )


def refused(ran: Ran) -> bool:
    """Whether it was refused, and for the one reason that there is: scores that are copied between devices."""
    if ran.error is None:
        return False
    assert "did not take intervention" in ran.error, ran.error
    assert "copied" in ran.error or "scores" in ran.error, ran.error
    assert "router" in str(ran.trace), "only where the router lies on another device than its experts"
    return True


@pytest.mark.parametrize(("name", "setup", "placements"), CASES)
def test_what_is_asked_for_happens(
    name: str, setup: Setup, placements: tuple[str, ...], on_device: Host, model_file: Any
) -> None:
    arch, model, prompts = ARCHITECTURES[name], model_file(name), prompts_of(name)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    runs = runs_of(name, placements, interventions_of(arch))
    for placement in placements:
        runs |= runs_of(name, (placement,), replays_of(placement))
    ran = on_device(setup, model, prompts, runs, traced=True)
    problems = Problems()
    for placement in placements:
        traces = {
            kind: problems(f"{placement}_{kind}", check_rows, ran[f"{placement}_{kind}"])
            for kind in ("base", "changed", "one-slot", "again-base", "again-changed")
            if not problems(f"{placement}_{kind}", refused, ran[f"{placement}_{kind}"])
        }
        if traces.get("changed") is not None:
            problems(f"{placement}_changed", check_choice, traces["changed"], arch, stored)
        if traces.get("one-slot") is not None and traces.get("base") is not None:
            problems(f"{placement}_one-slot", check_slot, traces["one-slot"], traces["base"])
        for kind in ("base", "changed"):
            again = traces.get(f"again-{kind}")
            if again is not None and traces.get(kind) is not None:
                problems(f"{placement}_again-{kind}", check_same_routing, again, traces[kind])
    problems.none()


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, marks=() if (name, order) == ("gpt-oss", "metal") else pytest.mark.slow)
        for i, name in enumerate(MOE)
        for order in ("metal", f"random:{i}")
        if not ARCHITECTURES[name].encoder
    ],
)
def test_the_same_bytes_as_on_the_cpu(
    name: str, order: str, on_device: Host, model_file: Any, tmp_path: Path
) -> None:
    arch, model, prompts = ARCHITECTURES[name], model_file(name), prompts_of(name)
    placements = ("all", "some-experts") if order == "metal" else tuple(PLACEMENTS)
    kinds = interventions_of(arch)
    on_cpu = run_host(model, tmp_path / "cpu", prompts, kinds, traced=True)
    setup = Setup(order, count=2, fuse=False, stream="lazy")
    ran = on_device(setup, model, prompts, runs_of(name, placements, kinds), traced=True)
    problems = Problems()
    for kind in kinds:
        expected = check_rows(on_cpu[kind])
        for placement in placements:
            run = f"{placement}_{kind}"
            if problems(run, refused, ran[run]):
                continue
            trace = problems(run, check_rows, ran[run])
            if trace is not None:
                problems(run, check_same_columns, trace, expected)
    problems.none()
