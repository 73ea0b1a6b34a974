"""What a trace keeps of the model file, so that it can be read where the model is not."""

from __future__ import annotations

from pathlib import Path

from moetrace.errors import MoetraceError
from moetrace.model.file import ModelFile
from moetrace.model.identity import identify
from moetrace.trace.store import write_vocabulary
from moetrace.trace.writer import TraceWriter


def store_model_paths(trace: TraceWriter, model_path: str | None) -> None:
    """Say in each context's facts which file its model was read from; None where that is not certain.

    Call it when the contexts are closed: large files take seconds to look at.

    Parameters
    ----------
    model_path
        What the command names as the model, for contexts that do not say which files their process opened.
    """
    for context in trace.contexts:
        opened = context.meta.get("model_files")
        candidates = opened if isinstance(opened, list) else [model_path] if model_path else []
        context.set_model_path(identify((c for c in candidates if isinstance(c, str)), context.meta))


def store_vocabulary(trace: Path, model_path: str | None) -> None:
    """Store the text of each token id in the trace; does nothing if the model file is not at hand."""
    if model_path is None or not Path(model_path).is_file():
        return
    try:
        with ModelFile(model_path) as model:
            vocabulary = model.vocabulary
    except MoetraceError:
        return  # llama.cpp read it, and we cannot: the trace then has no text, and says so
    if vocabulary:
        write_vocabulary(trace, vocabulary)
