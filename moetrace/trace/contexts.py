"""Which contexts of a trace are read together: those of one model, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from moetrace.errors import TraceError, UsageError
from moetrace.model.identity import identify
from moetrace.trace import naming
from moetrace.trace.store import ContextStore, TraceStore

HOW = "--context NAME or --model NAME (in Python context= or model=)"


def choose(
    store: TraceStore, context: str | int | None = None, model: str | None = None
) -> list[ContextStore]:
    """Choose contexts of a trace to be read as one.

    Parameters
    ----------
    context
        The name or index of a single one. Default: all main ones; where there are none, all there are.
    model
        Only contexts of this model: its name, its alias, its file's name or path, or a file with the same facts.

    Returns
    -------
    list of ContextStore
        At least one, in the order of the trace; of one model and role, and of one layout.

    Raises
    ------
    TraceError
        If the trace holds nothing.
    UsageError
        If there is no such context or model, or if what is left is of several models, or does not fit together. It
        names each context and what is different.
    """
    if not store.context_names:
        raise holds_nothing(store)
    if context is not None:
        chosen = [store.context(_name_of(store, context))]
        if model is not None and not of_model(chosen, model):
            raise UsageError(
                f"{chosen[0].name} of {store.path} is not of the model {model}",
                why=described(chosen),
                fix="leave out --context or --model",
            )
        return chosen
    chosen = store.contexts
    if model is not None:
        chosen = of_model(chosen, model)
        if not chosen:
            raise UsageError(
                f"{store.path} has no context of the model {model}",
                why=f"it holds {described(store.contexts)}",
                fix=f"choose with {HOW}",
            )
    chosen = [c for c in chosen if naming.role(c.facts) == "main"] or chosen
    first, others = chosen[0], chosen[1:]
    if not all(is_alike(first, other) for other in others):
        one = all(naming.same_model(first.facts, other.facts) for other in others)
        raise UsageError(
            f"{store.path} holds contexts of different {'roles' if one else 'models'}",
            why=described(chosen),
            fix=f"choose with {HOW}",
        )
    for other in others:
        if differences := misfits(first, other):
            raise UsageError(
                f"{store.path} holds contexts of one model that do not fit together",
                why=f"{described(chosen)}. {other.name} differs from {first.name} in {differences}",
                fix="choose one with --context NAME (in Python context=)",
            )
    return chosen


def holds_nothing(store: TraceStore) -> TraceError:
    """Give the error that a trace without contexts is, with what may be the reason."""
    if store.live:
        why = "no graph with experts has been computed yet, or its recorder died before one was"
        fix = "send a request, and look again; or end the recording, and see what the host printed"
    else:
        why = "no graph with experts was computed: the host ended first, served nobody, or the model has no experts"
        fix = "see what the host printed (`moetrace doctor` checks it), and capture again"
    return TraceError(f"{store.path} holds nothing", why=why, fix=fix)


def is_alike(a: ContextStore, b: ContextStore) -> bool:
    """Whether two contexts are of one model and one role."""
    return naming.role(a.facts) == naming.role(b.facts) and naming.same_model(a.facts, b.facts)


def misfits(a: ContextStore, b: ContextStore) -> str:
    """Say in what the layouts of two contexts differ, so that their rows cannot stand in one table; empty: nothing."""
    pairs = [(f.name, getattr(a.layout, f.name), getattr(b.layout, f.name)) for f in fields(a.layout)]
    told = [f"{name} ({_short(x)} and {_short(y)})" for name, x, y in pairs if x != y and name != "fields"]
    channels = [[*(field.name for field in c.layout.fields), *_attention(c)] for c in (a, b)]
    if channels[0] != channels[1]:
        told.append(f"channels ({', '.join(channels[0])} and {', '.join(channels[1])})")
    if not told and a.layout.row_columns != b.layout.row_columns:
        told.append("the shapes of their columns")
    return ", ".join(told)


def described(contexts: Sequence[ContextStore]) -> str:
    """Say of each context what model it is of, what it is for, and how many rows it has."""
    return "; ".join(
        f"{c.name}: {naming.title(c.facts)} ({naming.role(c.facts)}, {c.rows.n_rows:,} rows)"
        for c in contexts
    )


def of_model(contexts: Sequence[ContextStore], model: str) -> list[ContextStore]:
    """Give the contexts of a model: those that it is called so in; if none, those that the file of this path fits."""
    called = [c for c in contexts if naming.is_called(c.facts, model)]
    return called or [c for c in contexts if identify([model], c.facts)]


def _name_of(store: TraceStore, context: str | int) -> str:
    names = store.context_names
    if isinstance(context, int) and -len(names) <= context < len(names):
        return names[context]
    if context not in names:
        raise UsageError(f"{store.path} has no context {context}", fix=f"choose among: {', '.join(names)}")
    return str(context)


def _attention(context: ContextStore) -> list[str]:
    return ["attention"] * (context.path / "attention").is_dir()


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    kinds = list(dict.fromkeys(map(str, value)))
    many = len(value) > 4
    return (
        "/".join(kinds)
        if many and len(kinds) <= 4
        else ", ".join(map(str, value[:8])) + " …" * (len(value) > 8)
    )
