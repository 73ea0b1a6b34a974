"""Fixtures that several test folders share: the llama.cpp runtime and small models."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moetrace.synthetic import write_model

ModelFile = Callable[..., Path]


@dataclass(frozen=True)
class Runtime:
    """The llama.cpp that llama-cpp-python brought: the package's folder, and its tools beside it."""

    package: Path
    tools: Path

    def tool(self, name: str) -> Path:
        path = self.tools / name
        if not path.is_file():
            pytest.skip(f"llama.cpp's {name} is not installed in {self.tools}")
        return path


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """Find llama_cpp without importing it: its libraries must stay out of the test process."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama_cpp is not importable in this interpreter")
    package = Path(spec.origin).parent
    tools = package.parent / "bin"
    if not tools.is_dir():
        pytest.skip(f"llama.cpp's tools are not installed in {tools}")
    return Runtime(package, tools)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """Return ``model_file(architecture, **sizes)``: the path of a model, written once per session."""
    folder = tmp_path_factory.mktemp("models")
    written: dict[tuple[Any, ...], Path] = {}

    def write(architecture: str = "gpt-oss", **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in written:
            name = "-".join([architecture, *(f"{name}={value}" for name, value in sorted(options.items()))])
            written[key] = write_model(folder / f"{name}.gguf", architecture, **options)
        return written[key]

    return write


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let reports say which host or device a test is of (docs/hosts.py)."""
    if mark := item.get_closest_marker("host"):
        item.user_properties.append(("host", mark.args[0]))


def pytest_configure(config: pytest.Config) -> None:
    """Where MOETRACE_HOSTS names a file, add to it what was tried."""
    path = os.environ.get("MOETRACE_HOSTS")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Hosts(Path(path)))


class _Hosts:
    """Counts the outcomes of tests by host; a host of which nothing ran now keeps what was found before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = dict(report.user_properties)
        if "host" not in said or (report.when != "call" and report.passed):
            return
        one = self._found.setdefault(
            str(said["host"]), {"passed": 0, "failed": 0, "skipped": 0, "why": "", "versions": []}
        )
        one[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            one["why"] = report.longrepr[2].removeprefix("Skipped: ")
        if (version := said.get("version")) and version not in one["versions"]:
            one["versions"].append(version)

    def pytest_sessionfinish(self) -> None:
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        ran = {
            name: one
            for name, one in self._found.items()
            if one["passed"] + one["failed"] or name not in before
        }
        self._path.write_text(json.dumps(dict(sorted((before | ran).items())), indent=1) + "\n")
