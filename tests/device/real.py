"""What holds on a device that is not of our making: its own fusions, its own order, its own rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from checks import (
    DEFAULT,
    Problems,
    check_choice,
    check_rows,
    check_same_columns,
    interventions_of,
    prompts_of,
    runs_of,
    same_logits,
)
from devices import Ran

import moetrace
from moetrace.synthetic import ARCHITECTURES, Architecture
from moetrace.trace.record import State

Run = Callable[..., dict[str, Ran]]


def check_top_k(trace: moetrace.Trace, arch: Architecture) -> None:
    """The ids are the top-k of the scores; how these follow from the gate input, in half precision, is not asked."""
    for i in range(len(trace.layers)):
        present = np.asarray(trace.state)[:, i] == State.PRESENT
        ids, scores = np.asarray(trace.experts)[present, i].astype(int), np.asarray(trace.scores)[present, i]
        best = -np.sort(-scores, axis=1)[:, : arch.n_expert_used]
        np.testing.assert_array_equal(np.take_along_axis(scores, ids, axis=1), best)


def check_architecture(
    name: str,
    model: Path,
    folder: Path,
    run: Run,
    *,
    kinds: Mapping[str, Mapping[str, Any]],
    placements: tuple[str, ...] = ("all",),
    **options: Any,
) -> None:
    """Rows are the tokens, ids the top-k of scores, interventions kept; the default channels change no logit."""
    arch, prompts = ARCHITECTURES[name], prompts_of(name)
    untraced = runs_of(name, placements, {"": {}})
    plain = run(model, folder / "plain", prompts, untraced, traced=False, **options)
    recordings = {kind: dict(asked) for kind, asked in kinds.items()}
    if not arch.encoder:
        recordings["changed"] = interventions_of(arch)["changed"]
    runs = runs_of(name, placements, recordings)
    ran = run(model, folder / "traced", prompts, runs, traced=True, **options)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    problems = Problems()
    for placement in placements:
        traces: dict[str, moetrace.Trace | None] = {}
        for kind in recordings:
            of = f"{placement}_{kind}"
            if kind == "changed" and placement == "router":
                continue  # scores that are copied between devices cannot be changed: refused, with the reason
            traces[kind] = trace = problems(of, check_rows, ran[of])
            if kind in DEFAULT and ran[of].error is None:
                problems(of, same_logits, ran[of], plain[f"{placement}_"])
            if trace is not None and kind in DEFAULT and traces["auto"] is not None:
                problems(of, check_same_columns, trace, traces["auto"])
            if trace is not None and kind.endswith("router"):
                problems(of, check_top_k, trace, arch)
            if trace is not None and kind == "changed":
                problems(of, check_choice, trace, arch, stored)
    problems.none()
