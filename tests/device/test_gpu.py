"""The GPU that llama.cpp was built for, where ``MOETRACE_TEST_GPU=1`` says that there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checks import DEFAULT, PLACEMENTS, WIDE
from devices import run_host
from real import check_architecture
from running import MOE

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.slow,
    pytest.mark.host("CUDA"),
    pytest.mark.skipif(not os.environ.get("MOETRACE_TEST_GPU"), reason="MOETRACE_TEST_GPU is not set"),
]


@pytest.mark.parametrize("name", MOE)
def test_what_is_recorded_is_right_and_nothing_is_changed(
    name: str, runtime: Any, model_file: Any, tmp_path: Path
) -> None:
    check_architecture(
        name, model_file(name), tmp_path, run_host, kinds={**DEFAULT, **WIDE}, placements=tuple(PLACEMENTS)
    )
