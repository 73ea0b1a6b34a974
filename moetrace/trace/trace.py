"""The trace as its users see it: numpy views and pandas frames.

:func:`open_trace` (``moetrace.open``) gives a :class:`Trace`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import cache, cached_property
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, TraceError, UsageError
from moetrace.trace import naming
from moetrace.trace.attention import Attention
from moetrace.trace.chain import Chain
from moetrace.trace.columns import Table
from moetrace.trace.contexts import choose, is_alike, misfits, of_model
from moetrace.trace.intervention import described
from moetrace.trace.labels import LabelFile, Labelling, Recorded, is_number, resolve_labels
from moetrace.trace.loss import Loss, count_loss
from moetrace.trace.record import COUNTERS, EventCode
from moetrace.trace.requests import (
    REQUEST_TABLE,
    UNCERTAIN,
    Following,
    Phase,
    cut_off,
)
from moetrace.trace.ring import peek_counters
from moetrace.trace.rows import Columns, Layout
from moetrace.trace.selection import Selectable, Selection
from moetrace.trace.store import ContextStore, TraceStore
from moetrace.trace.vocabulary import vocabulary_of

if TYPE_CHECKING:
    import pandas as pd


def open_trace(
    path: str | os.PathLike[str], context: str | int | None = None, model: str | None = None
) -> Trace:
    """Open a trace for reading; also while it is being recorded (see :meth:`Trace.refresh`).

    Parameters
    ----------
    path
        The trace's folder.
    context
        Which llama context to show: its name or its index. Default: the main ones, taken together; they must be of
        one model (a draft model's or MTP's context is never among them).
    model
        Only contexts of this model: its name, its server's alias for it, or its file (path, name, or any file with
        the same facts).

    Raises
    ------
    TraceError
        If it is no trace, newer than this moetrace, or damaged, or holds nothing.
    UsageError
        If it has no such context or model; or if several contexts are left that are of different models, or whose
        layouts do not fit.
    """
    return Trace(TraceStore(path), context, model)


class Trace(Selectable):
    """A trace, open for reading: one llama context of it, or several of one model (:attr:`shown`) as if they were one.

    Of several contexts the rows follow each other, context by context, and so do events and requests; ``context``
    names each one's. :attr:`serial` counts within a context: (context, serial) is unique, serial alone is not.

    Columns are read-only views of mapped files: nothing is loaded before it is touched. With several contexts a
    property copies its column together; :meth:`column`, iterators and selections within one context still look at
    nothing but their piece, and :attr:`parts` gives the contexts one by one. A context manager; :meth:`close` ends
    it, views that are still held stay good.
    """

    def __init__(
        self,
        store: TraceStore | str | os.PathLike[str],
        context: str | int | None = None,
        model: str | None = None,
    ) -> None:
        self.store = store = store if isinstance(store, TraceStore) else TraceStore(store)
        self._trace = self
        self._rows = slice(None)
        self._layer_index = slice(None)
        self._asked = context, model
        self._following: dict[str, Following] = {}  # of contexts that are being recorded
        self._labels = LabelFile(store.path)
        self._whole: Trace | None = None  # of the same trace: whose labelling this one shares
        self._show(choose(store, context, model))

    def _show(self, contexts: list[ContextStore]) -> None:
        self._stores = tuple(contexts)
        self.chain = Chain([context.rows for context in contexts])

    # -- facts ---------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The trace's folder."""
        return self.store.path

    @property
    def meta(self) -> dict[str, Any]:
        """What was captured, by what, on what: meta.json (docs/format.md)."""
        return self.store.meta

    @property
    def facts(self) -> dict[str, Any]:
        """Layout and facts of the first context shown: context.json (docs/format.md).

        The model's facts and the layout are those of all contexts shown; what else there is (pid, status, counters)
        each of :attr:`parts` has for itself.
        """
        return self._stores[0].facts

    @property
    def layout(self) -> Layout:
        """The meaning of the columns."""
        return self._stores[0].layout

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of all llama contexts in the trace."""
        return tuple(self.store.context_names)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the contexts that are shown."""
        return tuple(context.name for context in self._stores)

    @property
    def model_name(self) -> str:
        """What the model is called: its name, its server's alias, its file, its architecture, as far as known."""
        return naming.title(self.facts)

    @property
    def shown_as(self) -> str:
        """Which contexts are shown, in words: ``ctx0, ctx2 of 3, taken together``."""
        of = f" of {len(self.contexts)}" if len(self.contexts) > 1 else ""
        return f"{', '.join(self.shown)}{of}{', taken together' if len(self.shown) > 1 else ''}"

    @property
    def left_out(self) -> tuple[str, ...]:
        """A sentence for each context of the trace that is not shown: what it is, and how to see it."""
        shown = set(self.shown)
        return tuple(self._not_shown(name) for name in self.contexts if name not in shown)

    def _not_shown(self, name: str) -> str:
        try:
            context = self.store.context(name)
        except TraceError as e:
            return f"{name} cannot be read and is not shown: {e.why or e.what}"
        what = f"{naming.role(context.facts)}, {naming.title(context.facts)}, {context.rows.n_rows:,} rows"
        return f"{name} ({what}) is not shown: --context {name}"

    @property
    def parts(self) -> tuple[Trace, ...]:
        """The contexts shown, each as a trace of its own, whose columns are views; of one, this trace itself."""
        return (self,) if len(self._stores) == 1 else self._parts

    @cached_property
    def _parts(self) -> tuple[Trace, ...]:
        return tuple(self.in_context(name) for name in self.shown)

    @property
    def store_context(self) -> ContextStore:
        """The tables of the context shown. Raises UsageError if several are: ask :attr:`parts`."""
        if len(self._stores) > 1:
            raise UsageError(f"{self.path} is open with several contexts", fix="ask each of Trace.parts")
        return self._stores[0]

    def in_context(self, context: str | int) -> Trace:
        """Give the same trace with one context shown: this one."""
        part = Trace(self.store, context)
        part._following = self._following
        part._whole = self if self._whole is None else self._whole
        return part

    @property
    def live(self) -> bool:
        """True if the trace was not closed: it still grows (see :meth:`refresh`), or its recorder died."""
        return self.store.live

    @property
    def channels(self) -> list[str]:
        """What was captured, as ``--capture`` names it."""
        names = [field.name for field in self.layout.fields if field.name != "state"]
        names += ["attention"] * (self._stores[0].path / "attention").is_dir()
        return [f"tensor:{name[7:]}" if name.startswith("tensor.") else name for name in names]

    @property
    def consumers(self) -> list[list[str]]:
        """For each layer: the matrices that consumed its ids, as ``ffn_gate``, ``ffn_up``, ``ffn_down``."""
        raw = self.facts.get("consumers")
        n = len(self.layout.layers)
        if not (isinstance(raw, list) and len(raw) == n and all(isinstance(c, list) for c in raw)):
            raise MoetraceError(
                f"{self.path} does not say which matrices consumed the routing",
                fix="use activations(components=False)",
            )
        return [[str(name).removesuffix("_exps") for name in layer] for layer in raw]

    @property
    def epoch_ns(self) -> int:
        """Add to :attr:`time_ns` to get nanoseconds since the epoch; as the first context shown measured it."""
        return int(self.facts.get("epoch_ns", 0))

    # -- tables --------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request of the contexts shown; the index is its number, which is unique in the trace.

        Columns: ``id``, ``label`` and ``prompt`` as the client gave them (None where it did not), ``slot``,
        ``context``,
        ``n_prompt`` (cached and computed; NA where either is not known, or the end of the prompt may be missing),
        ``n_generated`` (as the client counted; NA where it did not: the last token is never decoded),
        ``n_cached``, ``n_prefill``,
        ``n_decode``, ``n_lost``, ``n_rejected``, ``n_recomputed``, ``n_undecided``, ``n_shifts``,
        ``n_unrecorded``, ``n_events_lost``, ``first_serial``, ``last_serial``,
        ``start_ns``, ``end_ns``, ``running`` and ``label_unsure`` (a client's label may be this request's, but also
        another's, so that neither has it); then whatever else the client's prompt file said, a key that is one of
        these as ``extra.KEY``. docs/format.md explains them. What is not certain because events were lost, or not
        recorded, is NA. One frame, not a view: copy it before you change it.
        """
        import pandas as pd

        columns = self._request_columns()
        order = np.argsort(columns["request"], kind="stable")
        order = order[np.diff(columns["request"][order], prepend=-(1 << 62)) > 0]  # the first of each number
        raw = {name: column[order] for name, column in columns.items()}
        index = pd.Index(raw["request"], name="request")
        labels = self.labelling
        said = [labels.said.get(number, {}) for number in index.tolist()]
        lost_events = raw["n_events_lost"] > 0
        missing = {name: (raw[name] < 0) | lost_events for name in UNCERTAIN}
        missing["n_events_lost"] = raw["n_events_lost"] < 0
        # a request that generated nothing, and lacks its end, may lack a piece of its prompt
        part_only = raw["cut_off"] & (raw["n_decode"] == 0)
        unrecorded = (raw["n_unrecorded"] > 0) & ~missing["n_unrecorded"]
        in_part = (raw["n_lost"] > 0) | unrecorded | part_only
        generated = [n if is_number(n := s.get("n_generated")) else None for s in said]
        counts = [name for name in REQUEST_TABLE if name.startswith("n_")]

        def texts(values: list[Any]) -> pd.Series[Any]:
            return pd.Series(values, index=index, dtype=object)

        def whole(values: NDArray[Any], unknown: NDArray[np.bool_]) -> Any:
            return pd.arrays.IntegerArray(values.astype(np.int64), unknown)

        n_prompt = raw["n_cached"].astype(np.int64) + raw["n_prefill"]
        result: dict[str, Any] = {
            **{name: texts([s.get(name) for s in said]) for name in ("id", "label", "prompt")},
            "slot": raw["sequence"],
            "context": np.array(self.contexts, object)[raw["context"]],
            "n_prompt": whole(n_prompt, missing["n_cached"] | in_part),
            "n_generated": pd.array(generated, dtype="Int64"),
            **{name: whole(raw[name], missing[name]) if name in missing else raw[name] for name in counts},
            **{name: raw[name] for name in ("first_serial", "last_serial", "start_ns", "end_ns", "running")},
            "label_unsure": index.isin(list(labels.unsure)),
        }
        own = [labels.extra.get(number, {}) for number in index.tolist()]
        others = sorted({key for keys in own for key in keys})
        ours = {"request", *result}
        for key in others:
            name = key
            while name in ours or (name != key and name in others):
                name = f"extra.{name}"
            ours.add(name)
            result[name] = texts([keys.get(key) for keys in own])
        return pd.DataFrame(result, index=index)

    @property
    def n_requests(self) -> int:
        """How many requests the contexts shown had: the length of :attr:`requests`."""
        return np.unique(self._request_columns()["request"]).size

    def _request_columns(self) -> Columns:
        """Give the requests shown: the ended ones from their table, the running ones from rows."""
        if len(self.parts) > 1:
            each = [part._request_columns() for part in self.parts]
            return {name: np.concatenate([columns[name] for columns in each]) for name in each[0]}
        number = self.store.context_names.index(self.store_context.name)
        table = self.store.requests
        mine = np.flatnonzero(table["context"] == number)
        columns = {
            # -1: a trace of format 1.0 does not say
            name: np.asarray(table[name])[mine] if name in table else np.full(len(mine), -1, dtype)
            for name, (dtype, _) in REQUEST_TABLE.items()
        }
        columns["running"] = np.zeros(len(mine), bool)
        if self.live:
            name = self.store_context.name
            following = self._following.setdefault(name, Following(number))
            rest = following.requests(self.store_context.rows, self.store_context.events, columns["request"])
            rest["running"] = np.ones(len(rest["request"]), bool)
            columns = {name: np.concatenate([column, rest[name]]) for name, column in columns.items()}
        serial, events = self.store_context.rows["serial"], self.store_context.events
        counted = self.counters.get("rows_produced", 0)
        columns["cut_off"] = cut_off(columns, serial, events, max(counted, int(serial[-1:].sum()) + 1))
        return columns

    @cached_property
    def labelling(self) -> Labelling:
        """What clients said of requests, of all contexts; and how much of it did not find its request."""
        if self._whole is not None:
            return self._whole.labelling
        lines = self._labels.read()[0]
        if all(line.request is not None for line in lines):
            return resolve_labels(lines, [])
        return resolve_labels(lines, [self.in_context(name)._recorded() for name in self.contexts])

    def _recorded(self) -> Recorded:
        facts = self.facts
        return Recorded(
            self._request_columns(),
            self.store_context.rows,
            self.store_context.events,
            main=naming.role(facts) not in ("draft", "mtp"),
            host=facts.get("pid"),
            called=cache(lambda name: naming.may_be_called(facts, name)),
        )

    def label_codes(self, request: NDArray[np.int64]) -> tuple[NDArray[np.int32], list[str]]:
        """Give the label of each of these request numbers: codes (n,), int32, -1 for none; and the labels."""
        told = self.labelling.said.items()
        said = {n: str(keys["label"]) for n, keys in told if keys.get("label") is not None}
        labels = sorted(set(said.values()))
        code_of = {label: code for code, label in enumerate(labels)}
        numbers = np.array(sorted(said), np.int64)
        codes = np.array([*(code_of[said[n]] for n in numbers.tolist()), -1], np.int32)
        asked = np.asarray(request)
        at = np.searchsorted(numbers, asked)
        known = np.append(numbers, -1)[at] == asked
        return np.where(known & (asked >= 0), codes[at], np.int32(-1)), labels

    @property
    def events(self) -> pd.DataFrame:
        """What happened to sequences between rows: serial, time_ns, event, sequence, p0, p1, arg, context."""
        import pandas as pd

        if len(self.parts) > 1:
            return pd.concat([part.events for part in self.parts], ignore_index=True)
        table = self.store_context.events
        names = {code.value: code.name.lower() for code in EventCode}
        frame = pd.DataFrame({name: np.asarray(table[name]) for name in table})
        frame.insert(
            2, "event", [names.get(code, f"unknown ({code})") for code in frame.pop("code").tolist()]
        )
        return frame.assign(context=self.store_context.name)

    @property
    def interventions(self) -> pd.DataFrame:
        """Which interventions were in force when: one row for each time that one was.

        Columns: ``number``, ``rules`` (as they were given; missing if their file is gone), ``first_serial`` and
        ``end_serial`` (of the rows computed meanwhile; the end excluded), ``from_ns`` and ``to_ns`` (nanoseconds
        since the epoch), and ``context``. ``end_serial`` and ``to_ns`` are -1 where it was in force to the end. Which
        of these rows it concerned says :attr:`intervened`.
        """
        import pandas as pd

        if len(self.parts) > 1:
            return pd.concat([part.interventions for part in self.parts], ignore_index=True)
        events = self.events
        events = events[events["event"] == EventCode.INTERVENE.name.lower()]
        serial, number = events["serial"].tolist(), events["arg"].tolist()
        time_ns = (events["time_ns"] + self.epoch_ns).tolist()
        rules = described(self.path)
        columns = ("number", "rules", "first_serial", "end_serial", "from_ns", "to_ns")
        return pd.DataFrame(
            [
                (n, rules.get(n), first, end, start, stop)
                for n, first, end, start, stop in zip(
                    number, serial, [*serial[1:], -1], time_ns, [*time_ns[1:], -1], strict=False
                )
                if n > 0
            ],
            columns=columns,
        ).assign(context=self.store_context.name)

    @cached_property
    def loss(self) -> Loss:
        """What became of everything that the model computed in the contexts shown."""
        if len(self.parts) > 1:
            return sum((part.loss for part in self.parts[1:]), self.parts[0].loss)
        columns = self._request_columns()
        known = (columns["n_cached"] >= 0) & (columns["n_events_lost"] <= 0)
        return count_loss(self.store_context, self.counters, int(columns["n_cached"][known].sum()))

    @property
    def total_loss(self) -> Loss:
        """The sum of :attr:`loss` over all contexts of the trace, shown or not."""
        return sum((self.in_context(name).loss for name in self.contexts[1:]), self.in_context(0).loss)

    @property
    def counters(self) -> dict[str, int]:
        """The host's counters by name, from context.json or the live ring; empty if neither is there.

        Of several contexts their sums; empty if one has none.
        """
        if len(self.parts) > 1:
            each = [part.counters for part in self.parts]
            names = [name for name in each[0] if all(name in counters for counters in each)]
            return {name: sum(counters[name] for counters in each) for name in names}
        stored = self.facts.get("counters")
        if isinstance(stored, dict) and stored:
            return {str(name): value for name, value in stored.items() if type(value) is int}
        live = peek_counters(self.store_context.ring)
        return {} if live is None else dict(zip(COUNTERS, live, strict=False))

    # -- attention -----------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> Attention:
        """The attention rows, by (serial, layer); an index is built in memory, the values stay mapped.

        Of several contexts each has its own serials: see :meth:`Attention.of`.

        Raises
        ------
        ChannelMissingError
            If attention was not captured.
        """
        if len(self.parts) > 1:
            return Attention.together({part.shown[0]: part.attention for part in self.parts})
        folder = self.store_context.path
        if not (folder / "attention").is_dir():
            raise self._no_channel("attention")
        index, values = Table(folder / "attention"), Table(folder / "attention_values")
        columns = {name: np.asarray(index[name]) for name in index}
        return Attention(columns, values["value"], self.store_context.name)

    # -- text ----------------------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> list[bytes] | None:
        """The text of each token id, as bytes; None if neither the trace nor a model file tells."""
        told = (vocabulary_of(self.store, context) for context in self._stores)
        return next((vocabulary for vocabulary in told if vocabulary is not None), None)

    @cached_property
    def _texts(self) -> NDArray[np.object_] | None:
        if self.vocabulary is None:
            return None
        return np.array([*(piece.decode("utf-8", "replace") for piece in self.vocabulary), None], object)

    def text(self, tokens: NDArray[np.int32]) -> NDArray[np.object_]:
        """Give the text of each of these token ids, (n,), object; None where it is not known."""
        if self._texts is None:
            return np.full(len(tokens), None, object)
        n = len(self._texts) - 1
        return self._texts[np.where((tokens >= 0) & (tokens < n), tokens, n)]

    # -- life ----------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look again: rows sealed meanwhile appear, and new contexts that are like those shown.

        Views given out keep their length. Contexts of another model stay out (:attr:`left_out`).
        """
        first, shown, (context, model) = self._stores[0], self.shown, self._asked
        self.store, self._whole = TraceStore(self.path), None
        asked = self.store.contexts if model is None else of_model(self.store.contexts, model)
        like = [] if context is not None else [c.name for c in asked if is_alike(first, c)]
        self._show(
            [c for c in self.store.contexts if c.name in shown or (c.name in like and not misfits(first, c))]
        )
        for name in ("_parts", "requests", "loss", "attention", "labelling", "vocabulary", "_texts"):
            self.__dict__.pop(name, None)

    def follow(self, every: float = 0.5) -> Iterator[Selection]:
        """Give the rows as they come, those that are there first; ends when the recording does.

        Each time something is new, :meth:`refresh` is called and the new rows of one context are given, a
        :class:`~moetrace.trace.selection.Selection` whose arrays stay as they are. Rows appear when they are sealed,
        at most half a second after they were computed.

        Parameters
        ----------
        every
            Seconds between looks.
        """
        seen: dict[str, int] = {}
        while True:
            live = self.live
            if live:
                self.refresh()
            for part in self.parts:
                name, n = part.shown[0], len(part)
                if n > seen.get(name, 0):
                    yield Selection(part, slice(seen.get(name, 0), n), slice(None))
                    seen[name] = n
            if not live:
                return
            time.sleep(every)

    def close(self) -> None:
        """Let go of the files. Views that are still held keep their own maps."""
        self.store.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, a trace is where it lies and what of it is shown: it is opened again, wherever that is."""
        context, model = (self.shown[0], None) if len(self.shown) == 1 else self._asked
        return open_trace, (str(self.path.absolute()), context, model)

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def summary(self) -> list[tuple[str, str]]:
        """Give the trace in a few lines: (name, sentence) pairs, for `info` and notebooks."""
        used = sorted(set(self.n_expert_used.tolist()))
        experts = sorted(set(self.n_expert.tolist()))
        layers = self.layers.tolist()
        decoded = sum(int(np.count_nonzero(part.phase == Phase.DECODE)) for part in self.parts)
        left_out = self.left_out
        return [
            ("trace", f"{self.path} ({self.meta.get('state')})"),
            ("model", self.model_name),
            ("context", self.shown_as),
            *([("not shown", "; ".join(left_out))] if left_out else []),
            ("tokens", f"{len(self):,} ({decoded:,} of them decoded)"),
            ("layers", f"{len(layers)} ({layers[0]} to {layers[-1]})"),
            ("experts", f"top-{'/'.join(map(str, used))} of {'/'.join(map(str, experts))}"),
            ("channels", ", ".join(self.channels)),
            ("requests", f"{self.n_requests:,}"),
            ("completeness", f"{self.loss.told} of what is shown" if left_out else self.loss.told),
        ]

    def __repr__(self) -> str:
        used, experts = self.n_expert_used.max(), self.n_expert.max()
        return (
            f"<Trace {self.path}: {len(self):,} tokens × {len(self.layers)} layers × "
            f"top-{used} of {experts}, {self.meta.get('state')}>"
        )

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in self.summary()
        )
        return f"<table>{cells}</table>"
