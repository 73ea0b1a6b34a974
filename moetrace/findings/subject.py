"""What is asked about: one or more traces of a model, the phase to look at, and the model where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.analysis.from_trace import Analysis, Phase, from_trace
from moetrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetrace.trace.trace import Trace

# Decode rows first: what was generated. A recording by others may not know its phases.
_PHASES: tuple[tuple[Phase, int], ...] = (("decode", 1), ("prefill", 0), ("unknown", 2))


class Subject:
    """Traces, taken together, and what else a question may need.

    Parameters
    ----------
    traces
        Of one model.
    names
        One per trace, for its requests without an id.
    phase
        Which rows to look at; None: decode where there are such rows, else prefill, else those of unknown
        phase. :attr:`phase` says which it is, :attr:`phase_note` why.
    model
        GGUF file, for questions that need it.
    model_options
        Keyword arguments of :class:`moetrace.host.llama.Llama`, for questions that run the model.
    seed
        Of permutations and bootstraps: the same seed gives the same numbers.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        *,
        names: Sequence[str] | None = None,
        phase: Phase | None = None,
        model: Path | None = None,
        model_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.traces = tuple(traces)
        self.model = model
        self.model_options = dict(model_options or {})
        self.seed = seed
        self._names = names
        self._phase = phase

    @property
    def trace(self) -> Trace:
        """The trace. Raises UsageError if there is not exactly one."""
        if len(self.traces) != 1:
            raise UsageError(
                f"this question takes one trace, not {len(self.traces)}",
                fix="ask about them one by one" if self.traces else "give a trace",
            )
        return self.traces[0]

    @cached_property
    def phase(self) -> Phase:
        """Which rows are looked at."""
        if self._phase is not None:
            return self._phase
        for name, code in _PHASES:
            if any(np.any(np.asarray(trace.phase) == code) for trace in self.traces):
                return name
        return "decode"

    @property
    def phase_note(self) -> str:
        """Which rows are looked at, and why, as a sentence."""
        chosen = {
            "decode": "These are generated tokens (decode).",
            "prefill": "These are prompt tokens (prefill).",
            "unknown": "The recording does not say which tokens are of the prompt: all are looked at together.",
            "all": "Prompt and generated tokens are pooled, although they route differently.",
        }[self.phase]
        if self._phase is None and self.phase == "prefill":
            chosen += " The trace has no generated ones."
        return chosen

    @cached_property
    def analysis(self) -> Analysis:
        """The analyses of these rows; counts are made once for all questions."""
        return from_trace(*self.traces, phase=self.phase, names=self._names)

    def in_phase(self, phase: Phase) -> Analysis:
        """The analyses of another phase's rows."""
        return (
            self.analysis if phase == self.phase else from_trace(*self.traces, phase=phase, names=self._names)
        )

    def need_model(self, what: str) -> Path:
        """The model's file. Raises UsageError, saying what needs it, if none was given."""
        if self.model is None:
            raise UsageError(f"{what} needs the model", fix="give it: -m model.gguf")
        return self.model
