"""What holds on a device that is not of our making: its own fusions, its own order, its own rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
from devices import Ran
from test_interventions_on_device import check_choice, interventions_of
from test_routing_on_device import (
    DEFAULT,
    WIDE,
    Problems,
    check_numbers,
    check_rows,
    check_same_columns,
    prompts_of,
    runs_of,
    same_logits,
)

from moetrace.synthetic import ARCHITECTURES

Run = Callable[..., dict[str, Ran]]


def check_architecture(
    name: str,
    model: Path,
    folder: Path,
    environment: Mapping[str, str],
    run: Run,
    placements: tuple[str, ...] = ("all", "some-experts"),
) -> None:
    """Rows are the tokens, ids follow from scores and these from the model; the default channels change no logit."""
    arch, prompts = ARCHITECTURES[name], prompts_of(name)
    plain = run(
        model,
        folder / "plain",
        prompts,
        runs_of(name, placements, {"": {}}),
        traced=False,
        environment=environment,
    )
    kinds = {**DEFAULT, **WIDE, **({} if arch.encoder else {"changed": interventions_of(arch)["changed"]})}
    ran = run(
        model,
        folder / "traced",
        prompts,
        runs_of(name, placements, kinds),
        traced=True,
        environment=environment,
    )
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    problems = Problems()
    for placement in placements:
        traces = {}
        for kind in kinds:
            of = f"{placement}_{kind}"
            traces[kind] = trace = problems(of, check_rows, ran[of])
            if kind in DEFAULT and ran[of].error is None:
                problems(of, same_logits, ran[of], plain[f"{placement}_"])
            if trace is not None and kind in DEFAULT and traces["auto"] is not None:
                problems(of, check_same_columns, trace, traces["auto"])
            if trace is not None and kind.endswith("router"):
                problems(of, check_numbers, trace, name, model)
            if trace is not None and kind == "changed":
                problems(of, check_choice, trace, arch, stored)
    problems.none()
