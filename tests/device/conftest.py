"""Fixtures of the tests on devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from devices import BUILD, Host, Ran, Runs, Setup, build, run_host

if TYPE_CHECKING:
    from conftest import Runtime


@pytest.fixture(scope="session")
def device(runtime: Runtime) -> Path:
    """The device as a shared library for ``GGML_BACKEND_PATH``."""
    return build(runtime, BUILD / "libtest-device.so")


@pytest.fixture
def on_device(device: Path, tmp_path: Path) -> Host:
    """``on_device(setup, model, prompts, runs, traced=…)``: run host.py on a device of that kind."""

    def run(
        setup: Setup, model: Path, prompts: list[dict[str, Any]], runs: Runs, *, traced: bool
    ) -> dict[str, Ran]:
        folder = tmp_path / f"{'traced' if traced else 'plain'}-{setup}".replace(":", "")
        environment = setup.environment(device, folder / "counts.json")
        return run_host(model, folder, prompts, runs, traced=traced, environment=environment, device="Test0")

    return run
