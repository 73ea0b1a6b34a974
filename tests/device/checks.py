"""What is recorded on a device, in which ways, and what has to hold of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from devices import Ran
from router_math import check_routing, choice, mixing_weights, scores_of
from running import ROUTER, TEXT

import moetrace
from moetrace.synthetic import ARCHITECTURES, Architecture
from moetrace.trace.record import RowFlag, State
from moetrace.trace.verify import verify

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
INTERVENED = "experts,weights,logits,scores"
#: experts
ABLATED, FORCED, BIASED = 3, 5, 0
FUSIONS = ("topk_moe", "norm_mul", "matrix_add", "fused_nodes")


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


def same_computation(ran: Ran, plain: Ran) -> None:
    """The same logits as without the tracer, bit for bit, and as many fusions."""
    assert {kind: ran.counts[kind] for kind in FUSIONS} == {kind: plain.counts[kind] for kind in FUSIONS}
    same_logits(ran, plain)


def same_logits(ran: Ran, plain: Ran) -> None:
    assert ran.sent == plain.sent, "other tokens were generated"
    difference = np.abs(ran.logits - plain.logits).max(initial=0)
    assert ran.logits.tobytes() == plain.logits.tobytes(), f"logits moved by up to {difference}"


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


def interventions_of(arch: Architecture) -> dict[str, dict[str, Any]]:
    layers = list(arch.moe_layers)
    changes = [f"ablate:*:{ABLATED}", f"force:{layers[-1]}:{FORCED}", f"bias:{layers[0]}:{BIASED}=+0.3"]
    return {
        "base": {"channels": INTERVENED},
        "changed": {"channels": INTERVENED, "intervene": changes},
        "one-slot": {"channels": INTERVENED, "intervene": [f"ablate:*:{ABLATED}@slot=1"]},
    }


def check_choice(trace: moetrace.Trace, arch: Architecture, stored: dict[str, np.ndarray]) -> None:
    """What was chosen and how it is weighted follows in numpy from the logits."""
    assert trace.intervened.all()
    layers = list(arch.moe_layers)
    for i, layer in enumerate(layers):
        present = np.asarray(trace.state)[:, i] == State.PRESENT
        assert present.any()
        ids = np.asarray(trace.experts)[present, i].astype(int)
        logits, scores, weights = (
            np.asarray(c)[present, i] for c in (trace.logits, trace.scores, trace.weights)
        )
        assert not (ids == ABLATED).any(), f"layer {layer}: an ablated expert is used"
        expected = choice(
            arch,
            scores_of(arch, logits) + stored.get(f"blk.{layer}.exp_probs_b.bias", 0),
            ablated=[ABLATED],
            forced=[FORCED] if layer == layers[-1] else [],
            bias=[(BIASED, 0.3)] if layer == layers[0] else [],
        )
        assert (ids == expected).all(axis=1).mean() > 0.97, (
            f"layer {layer}"
        )  # the order of near-ties is rounding
        np.testing.assert_allclose(weights, mixing_weights(arch, logits, ids), rtol=2e-4, atol=1e-6)
        best = -np.sort(-scores, axis=1)[:, : arch.n_expert_used]
        np.testing.assert_array_equal(np.take_along_axis(scores, ids, axis=1), best)
