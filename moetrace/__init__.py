"""Which experts does this Mixture-of-Experts model really use, and what does that mean?

``moetrace.open`` reads a trace, or another program's recording as one; ``moetrace.ask`` answers a question about
it; ``moetrace.capture``, ``moetrace.record`` and ``moetrace.serve`` record one; ``moetrace.evaluate`` says how well a
model predicts texts. Everything is loaded when first used, so that importing moetrace costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moetrace.errors import (
    ChannelMissingError,
    InputError,
    MoetraceError,
    RuntimeMissingError,
    TraceError,
    UsageError,
)

if TYPE_CHECKING:
    from moetrace.findings import ask
    from moetrace.host.evaluate import Evaluator, divergence, evaluate
    from moetrace.host.inprocess import capture
    from moetrace.host.record import record, watch_llama_cpp
    from moetrace.host.server import serve
    from moetrace.trace.importers import open_source as open  # noqa: A004
    from moetrace.trace.intervention import Intervention
    from moetrace.trace.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "ChannelMissingError",
    "Evaluator",
    "InputError",
    "Intervention",
    "MoetraceError",
    "RuntimeMissingError",
    "Trace",
    "TraceError",
    "UsageError",
    "__version__",
    "ask",
    "capture",
    "divergence",
    "evaluate",
    "open",
    "record",
    "serve",
    "watch_llama_cpp",
]

_LAZY = {
    "Trace": ("moetrace.trace.trace", "Trace"),
    "ask": ("moetrace.findings", "ask"),
    "open": ("moetrace.trace.importers", "open_source"),
    "capture": ("moetrace.host.inprocess", "capture"),
    "divergence": ("moetrace.host.evaluate", "divergence"),
    "evaluate": ("moetrace.host.evaluate", "evaluate"),
    "Evaluator": ("moetrace.host.evaluate", "Evaluator"),
    "Intervention": ("moetrace.trace.intervention", "Intervention"),
    "record": ("moetrace.host.record", "record"),
    "serve": ("moetrace.host.server", "serve"),
    "watch_llama_cpp": ("moetrace.host.record", "watch_llama_cpp"),
}


# rooms that are there without an import of their own
_ROOMS = ("analysis", "findings", "plot")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"moetrace.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'moetrace' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def load_ipython_extension(ipython: Any) -> None:
    """Do what ``%load_ext moetrace`` asks for: the cell magic ``%%moetrace``."""
    importlib.import_module("moetrace.host.notebook").load(ipython)


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
