"""In one process, on a device that fuses, reorders and answers late: what is recorded is right, and nothing changes.

The device (device.cpp) gives the CPU's numbers, to the bit, where it fuses nothing: what is recorded there must be
what is recorded on the CPU, byte for byte. Where it fuses, a fusion that is undone moves the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import Host, Ran, Setup, run_host
from test_capture import MOE
from test_synthetic_models import TEXT, check_routing, mixing_weights

import moetrace
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.record import RowFlag, State
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

#: more than an ubatch, so that experts on the CPU are offloaded; several sequences that begin and end
PROMPTS = [
    {"id": str(i), "prompt": TEXT[30 * i : 30 * i + n], "n_predict": 4}
    for i, n in enumerate((150, 40, 9, 70, 25))
]
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all": {"n_gpu_layers": 99},
    "part": {"n_gpu_layers": 2},
    "cpu-moe": {"n_gpu_layers": 99, "on_cpu": [EXPERTS]},
    "some-experts": {"n_gpu_layers": 99, "on_cpu": [rf"blk\.[01]{EXPERTS}"]},
    "router": {"n_gpu_layers": 99, "on_cpu": [r"ffn_gate_inp\."]},
}
ROUTER = "experts,weights,logits,scores,gate_input"
#: collector and channels; what must change nothing
DEFAULT: dict[str, dict[str, Any]] = {
    "auto": {},
    "tap": {"collector": "tap"},
    "callback": {"collector": "callback"},
}
WIDE: dict[str, dict[str, Any]] = {
    "tap-router": {"collector": "tap", "channels": ROUTER},
    "callback-router": {"collector": "callback", "channels": ROUTER},
    "auto-router": {"channels": ROUTER},
    "attention": {"channels": "experts,weights,attention"},
    "named": {"channels": "experts,weights,tensor:ffn_moe_out-*"},
    "tap-named": {"collector": "tap", "channels": "experts,weights,tensor:ffn_moe_out-*"},
}
FUSIONS = ("topk_moe", "norm_mul", "matrix_add", "fused_nodes")

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


def prompts_of(name: str) -> list[dict[str, Any]]:
    if not ARCHITECTURES[name].encoder:
        return PROMPTS
    # an encoder takes a sequence at once and generates nothing
    return [{**prompt, "prompt": prompt["prompt"][:40], "n_predict": 0} for prompt in PROMPTS]


def runs_of(
    name: str, placements: tuple[str, ...], recordings: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    shape = {"n_parallel": 1} if ARCHITECTURES[name].encoder else {}
    return {
        f"{placement}_{recording}": {**shape, **PLACEMENTS[placement], **options}
        for placement in placements
        for recording, options in recordings.items()
    }


def check_rows(ran: Ran) -> moetrace.Trace:
    """Rows are the tokens that were decoded, none is lost or unsure, and verify agrees."""
    assert ran.error is None, ran.error
    result = verify(ran.trace)
    assert result.exit_code == 0, result
    trace = moetrace.open(ran.trace)
    rows = np.stack([np.asarray(trace.column(c)) for c in ("token", "position", "sequence")], axis=1)
    assert sorted(rows.tolist()) == sorted(ran.sent)
    flags = np.asarray(trace.column("flags"))
    assert not (flags & (RowFlag.SEQUENCE_UNCERTAIN | RowFlag.UNIDENTIFIED)).any()
    loss = trace.loss
    assert loss.rows_lost == loss.lost == 0
    # only the last layer may be left out, and exactly for the rows that are no outputs
    state = np.asarray(trace.state)
    assert (state[:, :-1] == State.PRESENT).all(), (
        f"{(state[:, :-1] != State.PRESENT).sum()} entries are missing"
    )
    left_out = state[:, -1] != State.PRESENT
    if left_out.any():
        np.testing.assert_array_equal(left_out, (flags & 1) == 0)
    return trace


def check_same_columns(a: moetrace.Trace, b: moetrace.Trace) -> None:
    assert set(a.column_names) == set(b.column_names)
    for column in set(a.column_names) - {"time_ns"}:
        assert a.column(column).tobytes() == b.column(column).tobytes(), column


def check_numbers(trace: moetrace.Trace, name: str, model: Path) -> None:
    """Ids, scores and weights follow in numpy from the gate input and the model's router."""
    check_routing(trace, name, model)
    for i in range(len(trace.layers)):
        present = np.asarray(trace.state)[:, i] == State.PRESENT
        ids, logits, weights = (
            np.asarray(c)[present, i] for c in (trace.experts, trace.logits, trace.weights)
        )
        expected = mixing_weights(ARCHITECTURES[name], logits, ids.astype(int))
        np.testing.assert_allclose(weights, expected, rtol=2e-4, atol=1e-6)


class Problems:
    """What is wrong in which run: all of it is told, not the first."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __call__(self, run: str, check: Any, *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except (AssertionError, moetrace.MoetraceError) as e:
            self.found[f"{run}: {check.__name__}"] = str(e).strip()[:300]
            return None

    def none(self) -> None:
        assert not self.found, "\n".join(f"{run}: {what}" for run, what in self.found.items())


def same_computation(ran: Ran, plain: Ran) -> None:
    """The same logits as without the tracer, bit for bit, and as many fusions."""
    assert {kind: ran.counts[kind] for kind in FUSIONS} == {kind: plain.counts[kind] for kind in FUSIONS}
    same_logits(ran, plain)


def same_logits(ran: Ran, plain: Ran) -> None:
    assert ran.sent == plain.sent, "other tokens were generated"
    difference = np.abs(ran.logits - plain.logits).max(initial=0)
    assert ran.logits.tobytes() == plain.logits.tobytes(), f"logits moved by up to {difference}"


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
