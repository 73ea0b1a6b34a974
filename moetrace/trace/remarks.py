"""What one must know of a trace that is whole and yet not what one may take it for."""

from __future__ import annotations

from moetrace.trace.labels import LABELS_NAME
from moetrace.trace.store import TraceStore
from moetrace.trace.trace import Trace


def remarks(store: TraceStore) -> list[str]:
    """Give a sentence for each such thing: labels that did not find their request."""
    said = [_labels(store)]
    return [text for text in said if text]


def _labels(store: TraceStore) -> str:
    if not store.context_names:
        return ""
    lack = Trace(store, 0).labelling.lack
    return f"{LABELS_NAME}: {lack}{', so far' if store.live else ''}" if lack else ""
