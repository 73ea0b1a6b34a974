"""The text of token ids: what a trace keeps of it, context by context, or what a model file says."""

from __future__ import annotations

from moetrace.model.file import ModelFile
from moetrace.model.identity import identify
from moetrace.trace import naming
from moetrace.trace.jsonfile import read_json
from moetrace.trace.store import CONTEXT_NAME, ContextStore, TraceStore, read_vocabulary


def vocabulary_of(store: TraceStore, context: ContextStore) -> list[bytes] | None:
    """Give the text of each token id of a context's model, as bytes; None if neither trace nor model file tells.

    Raises
    ------
    TraceError
        If the file that context.json names is damaged.
    """
    name = context.facts.get("vocabulary")
    if isinstance(name, str):
        return read_vocabulary(store.path, name)
    if _is_main(store, context) and (stored := read_vocabulary(store.path)) is not None:
        return stored
    path = model_path(store, context)
    if path is None:
        return None
    with ModelFile(path) as file:
        return file.vocabulary


def model_path(store: TraceStore, context: ContextStore) -> str | None:
    """Find the model file of a context: of those that its process read, or that the trace names, the one that fits."""
    named = store.meta.get("model_path")
    opened = naming.model_files(context.facts) or ([named] if isinstance(named, str) else [])
    return identify(opened, context.facts)


def _is_main(store: TraceStore, context: ContextStore) -> bool:
    """Whether the trace's one vocabulary is of this context's model: in a trace of which no context names its own."""
    every = [read_json(store.path / name / CONTEXT_NAME) for name in store.context_names]
    if any("vocabulary" in facts for facts in every):
        return False
    main = [facts for facts in every if naming.role(facts) == "main"] or every
    return naming.same_model(context.facts, main[0])
