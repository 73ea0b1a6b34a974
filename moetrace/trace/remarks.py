"""What one must know of a trace that is whole and yet not what one may take it for."""

from __future__ import annotations

import numpy as np

from moetrace.numbers import number
from moetrace.trace.labels import LABELS_NAME
from moetrace.trace.loss import LOST_EVENT_COUNTERS
from moetrace.trace.record import RowFlag
from moetrace.trace.store import ContextStore, TraceStore
from moetrace.trace.trace import Trace


def remarks(store: TraceStore) -> list[str]:
    """Give a sentence for each such thing.

    They are: prompts that were not captured, rows that nobody can be told to own, events that were lost, graphs of
    another llama.cpp in the process, channels that llama.cpp did not have or that changed how a device computes, labels
    that did not find their request.
    """
    said = [
        _prompts(store),
        *(_unidentified(context) for context in store.contexts),
        *(_events_lost(context) for context in store.contexts),
        *(_elsewhere(context) for context in store.contexts),
        *(_absent(context) for context in store.contexts),
        *(_unfused(context) for context in store.contexts),
        _labels(store),
    ]
    return [text for text in said if text]


def _prompts(store: TraceStore) -> str:
    asked = store.meta.get("asked")
    if not isinstance(asked, dict) or type(asked.get("prompts")) is not int:
        return ""
    prompts, done = asked["prompts"], asked.get("done")
    if type(done) is not int:
        if store.live:
            return f"{prompts:,} prompts are to be captured; how many are done, it says when it is closed"
        return f"interrupted: of {prompts:,} prompts asked for only those listed were captured, its recorder died"
    if done < prompts:
        return f"interrupted: {done:,} of {prompts:,} prompts were captured"
    return ""


def _unidentified(context: ContextStore) -> str:
    flags = context.rows["flags"]
    n = int(np.count_nonzero(flags & np.uint32(RowFlag.UNIDENTIFIED)))
    context.rows.close()  # a map holds a file, and there may be a thousand contexts
    if not n:
        return ""
    if n < len(flags):
        return (
            f"{n:,} of {len(flags):,} rows of {context.name} have no sequence and no request: the tracer could not "
            "tell which tokens of the batch they are"
        )
    return (
        f"none of the {n:,} rows of {context.name} has a sequence or a request: llama.cpp was called past the tracer, "
        "as llama-cpp-python does (ctypes looks functions up by itself). Call moetrace.watch_llama_cpp() before "
        "llama_cpp is imported, or use moetrace.capture or llama-server"
    )


def _counted(context: ContextStore, *names: str) -> int:
    counters = context.facts.get("counters")
    counters = counters if isinstance(counters, dict) else {}
    return sum(counters[name] for name in names if type(counters.get(name)) is int)


def _elsewhere(context: ContextStore) -> str:
    n = _counted(context, "graphs_elsewhere")
    if n <= 0:
        return ""
    graphs = f"{number(n, 'graph')} or more"
    return (
        f"beside {context.name}, another llama.cpp in the same process computed {graphs}, of which nothing is "
        "recorded: the first that is used is, and no other"
    )


def _absent(context: ContextStore) -> str:
    asked = context.facts.get("channels")
    have = {*(field.name for field in context.layout.fields), "attention"}
    absent = [name for name in asked if name not in have] if isinstance(asked, list) else []
    absent = [
        name for name in absent if not str(name).startswith("tensor:")
    ]  # their refusal is told elsewhere
    if not absent:
        return ""
    names = " and ".join(map(str, absent))
    return (
        f"{context.name} was to have {names}, and has none: the tracer finds none in this llama.cpp's graphs"
    )


def _unfused(context: ContextStore) -> str:
    names = context.facts.get("may_unfuse")
    if not isinstance(names, list) or not names:
        return ""
    return (
        f"{context.name}: to read {' and '.join(map(str, names))}, fusions on the device are undone: logits may differ"
        " in their last digits from those of the server without the tracer"
    )


def _events_lost(context: ContextStore) -> str:
    n = _counted(context, *LOST_EVENT_COUNTERS)
    if n <= 0:
        return ""
    certain = (
        "what is not certain of requests is marked" if context.layout.numbered else "requests may be mixed up"
    )
    events = number(n, "event")
    return f"{context.name}: {events} of slots and their memory lost, by the counters; {certain}"


def _labels(store: TraceStore) -> str:
    if not store.context_names:
        return ""
    lack = Trace(store, 0).labelling.lack
    return f"{LABELS_NAME}: {lack}{', so far' if store.live else ''}" if lack else ""
