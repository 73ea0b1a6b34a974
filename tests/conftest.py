"""Fixtures that several test folders share: the llama.cpp runtime and small models."""

from __future__ import annotations

import importlib.util
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
