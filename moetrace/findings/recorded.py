"""Running a subject's model in this process, for questions that need texts of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.analysis.counts.from_trace import Routing, from_trace

if TYPE_CHECKING:
    from moetrace.findings.subject import Subject


@contextmanager
def recorded(
    subject: Subject,
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]],
    n_predict: int = 0,
) -> Iterator[Routing]:
    """Give the routing of prompts run through the subject's model: of the generated tokens, or without any
    (``n_predict`` 0) of the prompts'. The recording is deleted afterwards.

    Raises MoetraceError as :func:`moetrace.capture` does, and UsageError if there is no model.
    """
    from moetrace.host.inprocess import capture

    model = subject.need_model("running prompts")
    with tempfile.TemporaryDirectory(prefix="moetrace-") as folder:
        trace = capture(
            model,
            prompts,
            Path(folder) / "t.moet",
            n_predict=n_predict,
            n_parallel=16,
            all_outputs=True,
            **subject.model_options,
        )
        with trace:
            rows = trace if subject.layers is None else trace.sel(layer=subject.layers)
            yield from_trace(rows, phase="decode" if n_predict else "prefill")
