"""What a trace keeps of the model file, so that it can be read where the model is not."""

from __future__ import annotations

from pathlib import Path

from moetrace.errors import MoetraceError
from moetrace.model.file import ModelFile
from moetrace.trace.store import write_vocabulary


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
