"""What a trace keeps of the model file, so that it can be read where the model is not."""

from __future__ import annotations

from pathlib import Path

from moetrace.errors import MoetraceError
from moetrace.trace.jsonfile import write_json
from moetrace.trace.model import ModelFile
from moetrace.trace.store import CONTEXT_NAME, VOCABULARY_NAME, TraceStore, write_vocabulary
from moetrace.trace.vocabulary import model_path


def store_vocabulary(trace: Path) -> None:
    """Keep what each context's model file says: which file it is, and the text of each token id.

    Written once per model, and named in context.json; call it when the contexts are closed. A context whose file is
    not at hand, or of which several may be the one, is left as it is: it has no text, and says so.

    Raises
    ------
    MoetraceError
        If the disk is full or fails.
    """
    store = TraceStore(trace)
    names: dict[str, str] = {}
    for context in store.contexts:
        path = model_path(store, context)
        if path is None:
            continue
        if path not in names:
            try:
                with ModelFile(path) as model:
                    vocabulary = model.vocabulary
            except MoetraceError:
                continue  # llama.cpp read it, and we cannot
            names[path] = (
                "" if not vocabulary else VOCABULARY_NAME if not names else f"vocabulary-{len(names)}.json"
            )
            if vocabulary:
                write_vocabulary(trace, vocabulary, names[path])
        named = {"vocabulary": names[path]} if names[path] else {}
        write_json(context.path / CONTEXT_NAME, {**context.facts, "model_path": path, **named})
