"""The trace as its users see it: numpy views and pandas frames.

:func:`open_trace` (``moetrace.open``) gives a :class:`Trace`.
"""

from __future__ import annotations

import os
from functools import cached_property
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, TraceError, UsageError
from moetrace.trace.attention import Attention
from moetrace.trace.columns import Table
from moetrace.trace.intervention import described
from moetrace.trace.labels import read_labels, resolve_labels
from moetrace.trace.loss import Loss, count_loss
from moetrace.trace.record import Counter, EventCode
from moetrace.trace.requests import REQUEST_TABLE, Phase, RequestAssigner, allot_again, replay
from moetrace.trace.ring import peek_counters
from moetrace.trace.rows import Columns, Layout
from moetrace.trace.selection import Rows
from moetrace.trace.store import ContextStore, TraceStore, read_vocabulary

if TYPE_CHECKING:
    import pandas as pd


def open_trace(path: str | os.PathLike[str], context: str | int | None = None) -> Trace:
    """Open a trace for reading; also while it is being recorded (see :meth:`Trace.refresh`).

    Parameters
    ----------
    path
        The trace's folder.
    context
        Which llama context to show: its name or its index. Default: the main one (a draft model's or MTP's
        context is another).

    Raises
    ------
    TraceError
        If it is no trace, newer than this moetrace, or damaged.
    UsageError
        If it has no such context.
    """
    return Trace(TraceStore(path), context)


class Trace(Rows):
    """A trace, open for reading; one llama context of it (:attr:`contexts` names all).

    Columns are read-only views of mapped files: nothing is loaded before it is touched. A context manager;
    :meth:`close` ends it, views that are still held stay good.
    """

    def __init__(self, store: TraceStore | str | os.PathLike[str], context: str | int | None = None) -> None:
        self.store = store = store if isinstance(store, TraceStore) else TraceStore(store)
        self._trace = self
        self._rows = slice(None)
        self._layer_index = slice(None)
        self.name = self._find_context(context)
        self.store_context: ContextStore = store.context(self.name)

    def _find_context(self, context: str | int | None) -> str:
        names = self.store.context_names
        if not names:
            raise TraceError(
                f"{self.store.path} holds nothing",
                why="the host ended before it made a llama context",
                fix="look at what the host printed, and capture again",
            )
        if context is None:
            main = [n for n in names if self.store.context(n).facts.get("role") == "main"]
            context = (main or names)[0]
        if isinstance(context, int) and -len(names) <= context < len(names):
            context = names[context]
        if context not in names:
            raise UsageError(
                f"{self.store.path} has no context {context}", fix=f"choose among: {', '.join(names)}"
            )
        return str(context)

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
        """This context's layout and facts: context.json (docs/format.md)."""
        return self.store_context.facts

    @property
    def layout(self) -> Layout:
        """The meaning of the columns."""
        return self.store_context.layout

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of all llama contexts in the trace."""
        return tuple(self.store.context_names)

    def in_context(self, context: str | int) -> Trace:
        """Give the same trace with another context shown."""
        return Trace(self.store, context)

    @property
    def live(self) -> bool:
        """True if the trace was not closed: it still grows (see :meth:`refresh`), or its recorder died."""
        return self.store.live

    @property
    def channels(self) -> list[str]:
        """What was captured, as ``--capture`` names it."""
        names = [field.name for field in self.layout.fields if field.name != "state"]
        names += ["attention"] * (self.store_context.path / "attention").is_dir()
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
        """Add to :attr:`time_ns` to get nanoseconds since the epoch."""
        return int(self.facts.get("epoch_ns", 0))

    # -- tables --------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request of this context; the index is its number.

        Columns: ``id``, ``label`` and ``prompt`` as the client gave them (None where it did not), ``slot``,
        ``n_prompt`` (cached and computed; NA where either is not known), ``n_generated`` (as the client counted;
        NA where it did not: the last token is never decoded), ``n_cached``, ``n_prefill``,
        ``n_decode``, ``n_lost``, ``n_rejected``, ``n_shifts``, ``first_serial``, ``last_serial``,
        ``start_ns``, ``end_ns`` and ``running``; then whatever else the client said. docs/format.md explains
        them. A new frame, not a view.
        """
        import pandas as pd

        columns = self._request_columns()
        order = np.argsort(columns["request"], kind="stable")
        frame = pd.DataFrame({name: column[order] for name, column in columns.items()})
        frame = frame.drop_duplicates("request").set_index("request")
        labels = self._labels
        said = [labels.get(number, {}) for number in frame.index.tolist()]
        cached = frame["n_cached"].astype("Int64").mask(frame["n_cached"] < 0)
        result = pd.DataFrame(index=frame.index)
        for name in ("id", "label", "prompt"):
            result[name] = pd.Series([s.get(name) for s in said], index=frame.index, dtype=object)
        result["slot"] = frame["sequence"]
        result["n_prompt"] = (cached + frame["n_prefill"]).mask(frame["n_lost"] > 0)
        generated = [n if type(n := s.get("n_generated")) is int else None for s in said]
        result["n_generated"] = pd.array(generated, dtype="Int64")
        result["n_cached"] = cached
        names = ["n_prefill", "n_decode", "n_lost", "n_rejected", "n_shifts", "n_unrecorded", "n_events_lost"]
        for name in [*names, "first_serial", "last_serial", "start_ns", "end_ns", "running"]:
            result[name] = frame[name]
        for name in sorted({key for s in said for key in s} - set(result.columns)):
            result[name] = pd.Series([s.get(name) for s in said], index=frame.index, dtype=object)
        return result

    def _request_columns(self) -> Columns:
        """Give this context's requests: the ended ones from their table, the running ones from rows."""
        number = self.store.context_names.index(self.name)
        table = self.store.requests
        mine = np.flatnonzero(table["context"] == number)
        columns = {
            # -1: a trace of format 1.0 does not say
            name: np.asarray(table[name])[mine] if name in table else np.full(len(mine), -1, dtype)
            for name, (dtype, _) in REQUEST_TABLE.items()
        }
        columns["running"] = np.zeros(len(mine), bool)
        if self.live:
            rows, events = self.store_context.rows, self.store_context.events
            assigner = RequestAssigner(number, allot_again(rows["request"]))
            for _ in replay(assigner, rows, events):
                pass
            rest = assigner.finish()
            missing = ~np.isin(rest["request"], columns["request"])
            columns = {
                name: np.concatenate(
                    [column, rest[name][missing] if name in rest else np.ones(missing.sum(), bool)]
                )
                for name, column in columns.items()
            }
        return columns

    @cached_property
    def _labels(self) -> dict[int, dict[str, Any]]:
        return resolve_labels(read_labels(self.path)[0], self._request_columns())

    def label_codes(self, request: NDArray[np.int64]) -> tuple[NDArray[np.int32], list[str]]:
        """Give the label of each of these request numbers: codes (n,), int32, -1 for none; and the labels."""
        said = {n: str(keys["label"]) for n, keys in self._labels.items() if keys.get("label") is not None}
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
        """What happened to sequences between rows: serial, time_ns, event, sequence, p0, p1, arg."""
        import pandas as pd

        table = self.store_context.events
        names = {code.value: code.name.lower() for code in EventCode}
        frame = pd.DataFrame({name: np.asarray(table[name]) for name in table})
        frame.insert(
            2, "event", [names.get(code, f"unknown ({code})") for code in frame.pop("code").tolist()]
        )
        return frame

    @property
    def interventions(self) -> pd.DataFrame:
        """Which interventions were in force when: one row for each time that one was.

        Columns: ``number``, ``rules`` (as they were given; missing if their file is gone), ``first_serial`` and
        ``end_serial`` (of the rows computed meanwhile; the end excluded), ``from_ns`` and ``to_ns`` (nanoseconds
        since the epoch). ``end_serial`` and ``to_ns`` are -1 where it was in force to the end. Which of these rows
        it concerned says :attr:`intervened`.
        """
        import pandas as pd

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
        )

    @cached_property
    def loss(self) -> Loss:
        """What became of everything that the model computed in this context."""
        return count_loss(self.store_context, self.counters, int(self.requests["n_cached"].sum()))

    @property
    def total_loss(self) -> Loss:
        """The sum of :attr:`loss` over all contexts."""
        return sum((self.in_context(name).loss for name in self.contexts[1:]), self.in_context(0).loss)

    @property
    def counters(self) -> dict[str, int]:
        """The host's counters by name, from context.json or the live ring; empty if neither is there."""
        stored = self.facts.get("counters")
        if isinstance(stored, dict) and stored:
            return {str(name): value for name, value in stored.items() if type(value) is int}
        live = peek_counters(self.store_context.ring)
        return {} if live is None else {c.name.lower(): n for c, n in zip(Counter, live, strict=False)}

    # -- attention -----------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> Attention:
        """The attention rows, by (serial, layer); an index is built in memory, the values stay mapped.

        Raises
        ------
        ChannelMissingError
            If attention was not captured.
        """
        folder = self.store_context.path
        if not (folder / "attention").is_dir():
            raise self._no_channel("attention")
        index, values = Table(folder / "attention"), Table(folder / "attention_values")
        return Attention({name: np.asarray(index[name]) for name in index}, values["value"])

    # -- text ----------------------------------------------------------------------------------------

    @cached_property
    def vocabulary(self) -> list[bytes] | None:
        """The text of each token id, as bytes; None if neither the trace nor a model file tells."""
        stored = read_vocabulary(self.path)
        model = self.meta.get("model_path")
        if stored is None and isinstance(model, str) and Path(model).is_file():
            from moetrace.model.file import ModelFile
            from moetrace.model.identity import differences

            with ModelFile(model) as file:
                return None if differences(file, self.facts) else file.vocabulary
        return stored

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
        """Look again: rows sealed meanwhile appear. Views given out keep their length."""
        self.store = TraceStore(self.path)
        self.store_context = self.store.context(self.name)
        for name in ("requests", "loss", "attention", "_labels", "vocabulary", "_texts"):
            self.__dict__.pop(name, None)

    def close(self) -> None:
        """Let go of the files. Views that are still held keep their own maps."""
        for context in self.store.contexts:
            context.rows.close()
            context.events.close()
        self.store.requests.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def summary(self) -> list[tuple[str, str]]:
        """Give the trace in a few lines: (name, sentence) pairs, for `info` and notebooks."""
        told = self.facts.get("model")
        model = told if isinstance(told, dict) else {}
        used = sorted(set(self.n_expert_used.tolist()))
        experts = sorted(set(self.n_expert.tolist()))
        layers = self.layers.tolist()
        loss = self.loss
        lost = "nothing lost" if not loss.rows_lost and not loss.lost else f"{loss.rows_lost:,} rows lost"
        if loss.rows_waiting:
            lost += f", {loss.rows_waiting:,} not sealed yet"
        return [
            ("trace", f"{self.path} ({self.meta.get('state')})"),
            (
                "model",
                " · ".join(str(model[key]) for key in ("name", "architecture") if model.get(key))
                or "unknown",
            ),
            ("context", f"{self.name} of {len(self.contexts)}" if len(self.contexts) > 1 else self.name),
            (
                "tokens",
                f"{len(self):,} ({int(np.count_nonzero(self.phase == Phase.DECODE)):,} of them decoded)",
            ),
            ("layers", f"{len(layers)} ({layers[0]} to {layers[-1]})"),
            ("experts", f"top-{'/'.join(map(str, used))} of {'/'.join(map(str, experts))}"),
            ("channels", ", ".join(self.channels)),
            ("requests", f"{len(self.requests):,}"),
            ("completeness", lost),
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
