"""What a trace keeps of its model files, so that it can be read where they are not."""

from __future__ import annotations

from moetrace.errors import MoetraceError
from moetrace.model.file import ModelFile
from moetrace.model.identity import identify
from moetrace.trace.store import VOCABULARY_NAME, write_vocabulary
from moetrace.trace.writer import TraceWriter


def store_models(trace: TraceWriter, model_path: str | None) -> None:
    """Say in each context's facts which file its model was read from, and keep the text of the model's tokens.

    Nothing is said where it is not certain. A vocabulary is written once per model, and named by its contexts. Call it
    when the contexts are closed: large files take seconds to look at.

    Parameters
    ----------
    model_path
        What the command names as the model, for contexts that do not say which files their process opened.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    names: dict[str, str | None] = {}
    for context in trace.contexts:
        opened = context.meta.get("model_files")
        candidates = opened if isinstance(opened, list) else [model_path] if model_path else []
        path = identify((c for c in candidates if isinstance(c, str)), context.meta)
        if path is not None and path not in names:
            names[path] = _store_vocabulary(trace, path, sum(name is not None for name in names.values()))
        context.set_model(path, None if path is None else names[path])


def _store_vocabulary(trace: TraceWriter, path: str, n_others: int) -> str | None:
    """Store the text of a model's tokens; gives the file's name, None if the model has none that we can read."""
    try:
        with ModelFile(path) as model:
            vocabulary = model.vocabulary
    except MoetraceError:
        return None  # llama.cpp read it, and we cannot: the trace then has no text, and says so
    if not vocabulary:
        return None
    name = f"vocabulary-{n_others}.json" if n_others else VOCABULARY_NAME
    write_vocabulary(trace.path, vocabulary, name)
    return name
