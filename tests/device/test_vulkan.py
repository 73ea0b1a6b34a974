"""llama.cpp's Vulkan backend on Mesa's lavapipe, which computes on the CPU: its own fusions and its own reordering."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
from devices import LAVAPIPE, Ran, build_vulkan, run_host
from test_interventions_on_device import check_choice, interventions_of
from test_routing_on_device import (
    DEFAULT,
    MOE,
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

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

N_TRIES = 4


@pytest.fixture(scope="session")
def vulkan(runtime: Any) -> dict[str, str]:
    """The environment in which llama.cpp has lavapipe as its device."""
    return {
        "GGML_BACKEND_PATH": str(build_vulkan(runtime)),
        "GGML_VK_VISIBLE_DEVICES": "0",  # one that computes on the CPU is taken only where it is named
        "VK_ICD_FILENAMES": LAVAPIPE,
        "VK_DRIVER_FILES": LAVAPIPE,
    }


def run(model: Path, folder: Path, *arguments: Any, **options: Any) -> dict[str, Ran]:
    """Run host.py; lavapipe before Mesa 23 crashes by itself at times, and then it is run again, and said."""
    for attempt in range(N_TRIES):
        try:
            return run_host(model, folder / str(attempt), *arguments, **options)
        except AssertionError as e:
            if attempt + 1 == N_TRIES or "code -" not in str(e):
                raise
            warnings.warn(f"lavapipe crashed, tried again: {str(e)[:80]}", pytest.PytestWarning, stacklevel=1)
    raise AssertionError


@pytest.mark.filterwarnings("default::pytest.PytestWarning")
@pytest.mark.parametrize("name", MOE)
def test_what_is_recorded_is_right_and_nothing_is_changed(
    name: str, vulkan: dict[str, str], model_file: Any, tmp_path: Path
) -> None:
    arch, model, prompts = ARCHITECTURES[name], model_file(name), prompts_of(name)
    placements = ("all", "some-experts")
    plain = run(
        model,
        tmp_path / "plain",
        prompts,
        runs_of(name, placements, {"": {}}),
        traced=False,
        environment=vulkan,
        device="Vulkan0",
    )
    kinds = {**DEFAULT, **WIDE, **({} if arch.encoder else {"changed": interventions_of(arch)["changed"]})}
    ran = run(
        model,
        tmp_path / "traced",
        prompts,
        runs_of(name, placements, kinds),
        traced=True,
        environment=vulkan,
        device="Vulkan0",
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
