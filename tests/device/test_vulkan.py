"""llama.cpp's Vulkan backend on Mesa's lavapipe, which computes on the CPU: its own fusions and its own reordering."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from devices import LAVAPIPE, Ran, build_vulkan, run_host
from real import check_architecture
from test_routing_on_device import MOE

pytestmark = [pytest.mark.runtime, pytest.mark.slow]

N_TRIES = 4


@pytest.fixture(scope="session")
def vulkan(runtime: Any) -> dict[str, str]:
    """The environment in which llama.cpp has lavapipe as its device."""
    return {
        "GGML_BACKEND_PATH": str(build_vulkan(runtime)),
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
    check_architecture(name, model_file(name), tmp_path, vulkan, run)
