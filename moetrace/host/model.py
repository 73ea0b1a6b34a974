"""What a trace keeps of its model files, so that it can be read where they are not."""

from __future__ import annotations

from moetrace.errors import MoetraceError
from moetrace.model.file import ModelFile
from moetrace.model.identity import identify
from moetrace.trace.store import VOCABULARY_NAME, write_vocabulary
from moetrace.trace.writer import TraceWriter


def store_models(trace: TraceWriter, model_path: str | None) -> None:
    """Say in each context's facts which file its model was read from, its fingerprint, and keep the tokens' text.

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
    known: dict[str | None, tuple[str | None, dict[str, str] | None]] = {None: (None, None)}
    for context in trace.contexts:
        opened = context.meta.get("model_files")
        candidates = opened if isinstance(opened, list) else [model_path] if model_path else []
        path = identify((c for c in candidates if isinstance(c, str)), context.meta)
        if path is not None and path not in known:
            n_others = sum(name is not None for name, _ in known.values())
            known[path] = _read(trace, path, n_others)
        context.set_model(path, *known[path])


def _read(trace: TraceWriter, path: str, n_others: int) -> tuple[str | None, dict[str, str] | None]:
    """Store the text of a model's tokens; gives that file's name and the model's fingerprint, None if unreadable."""
    try:
        with ModelFile(path) as model:
            vocabulary, fingerprint = model.vocabulary, model.fingerprint
    except MoetraceError:
        return None, None  # llama.cpp read it, and we cannot: the trace then has no text, and says so
    if not vocabulary:
        return None, fingerprint
    name = f"vocabulary-{n_others}.json" if n_others else VOCABULARY_NAME
    write_vocabulary(trace.path, vocabulary, name)
    return name, fingerprint
