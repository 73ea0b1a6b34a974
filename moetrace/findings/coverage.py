"""Which experts a calibration text reaches, and which texts reach the others."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.counts.from_trace import Routing
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.experts.coverage import Cover, greedy_cover
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import PHASE_NOTES, Subject
from moetrace.findings.written import write_text
from moetrace.model.file import ModelFile
from moetrace.model.imatrix import Imatrix, read_imatrix
from moetrace.numbers import number

_TAIL = 512  # tokens: llama-imatrix leaves a last chunk that is not whole unread
_NAMED = 6  # layers whose experts a sentence names


@dataclass(frozen=True)
class Coverage(Question):
    """Which experts has a calibration text never reached, and which prompts reach them?

    With --imatrix a file of llama-imatrix is read: which experts got no token, or few. Without it, the recorded prompts
    are looked at as if they were to be the calibration text. Then prompts are chosen (greedily, most needed tokens for
    their length) until every expert has its tokens, and their text is written for llama-imatrix -f. Prompts are read
    again there in another order and context, and routing changes a little: more tokens are aimed at than are needed,
    and the new file is to be looked at again.
    """

    name: ClassVar[str] = "coverage"
    title: ClassVar[str] = "Coverage of a calibration text"
    place: ClassVar[int] = 147

    imatrix: str = parameter("", "file of llama-imatrix", metavar="FILE")
    min_tokens: int = parameter(128, "tokens that every expert should get")
    margin: float = parameter(1.25, "so many times that is aimed at")
    write: str = parameter("", "write the chosen prompts' text here", metavar="FILE")
    max_tokens: int = parameter(20_000, "prompts are drawn until they hold so many tokens; 0: all of them")

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        if self.min_tokens < 1 or self.margin < 1:
            raise UsageError("--min-tokens and --margin cannot be below 1", fix="give more")
        had = self._imatrix(subject)
        routing = None if subject.table is not None else _prompts(subject)
        text = None if routing is None else routing.text.by_name()
        whole = 0 if text is None else text.n_requests
        if text is not None and self.max_tokens:
            text = text.some(self.max_tokens, subject.seed, None)
        if had is None and text is None:
            raise UsageError("there is no text to look at", fix="give a recording, or --imatrix FILE")
        if had is not None and text is not None:
            _refuse_other(had, text)
        layers = had.layers if had is not None else text.layers if text is not None else np.empty(0, np.int64)
        said: list[str] = []
        caveats: list[str] = []
        have = np.zeros((layers.size, 0))
        if had is not None:
            have = had.tokens
            said += self._reached(had)
            if np.isnan(have).any():
                caveats.append(
                    f"{had.path.name} is of the old format: it tells which experts got nothing, not how much the others"
                    " got."
                )
        cover = None
        if text is not None and routing is not None:
            if had is None:
                have = np.zeros((layers.size, text.n_expert))
            # of experts that an old file has data of, nothing more is known
            need = np.maximum(np.ceil(self.min_tokens * self.margin) - np.nan_to_num(have, nan=np.inf), 0)
            need[np.nan_to_num(have, nan=np.inf) >= self.min_tokens] = 0
            cover = greedy_cover(text, need)
            said += self._covered(cover, text, have)
            caveats.append(
                "Read again in another order, prompts route a little differently: make the new file, and ask about it"
                " with --imatrix."
            )
            caveats += subject.read
            if text.n_requests < whole:
                caveats.append(
                    f"{text.n_requests:,} of {whole:,} prompts were drawn to choose from (--max-tokens)."
                )
        table = _table(layers, have, cover)
        tables = {"experts": table}
        if cover is not None and text is not None and routing is not None:
            tables["chosen"] = pd.DataFrame(
                {
                    "prompt": [text.prompts[i] for i in cover.chosen.tolist()],
                    "label": [text.labels[i] for i in cover.chosen.tolist()],
                    "tokens": np.diff(text.starts)[cover.chosen],
                    "needed": cover.gained.astype(np.int64),
                }
            )
            if self.write:
                said.append(self._written(routing, text, cover))
        note = "" if routing is None else PHASE_NOTES[routing.phase]
        return replace(self.finding(subject, said, tables, caveats), phase_note=note)

    def _imatrix(self, subject: Subject) -> Imatrix | None:
        if not self.imatrix:
            return None
        n_expert = None
        if subject.model is not None:
            with ModelFile(subject.model) as model:
                n_expert = model.n_expert
        elif subject.table is None:
            n_expert = int(max(subject.routing.n_expert))
        return read_imatrix(self.imatrix, n_expert)

    def _reached(self, had: Imatrix) -> list[str]:
        of = ""
        if had.chunks > 0:
            of = f" ({number(had.chunks, 'chunk')}" + (
                f" of {had.chunk_size} tokens)" if had.chunk_size > 0 else ")"
            )
        n = had.missing.size
        none = int(had.missing.sum())
        first = (
            f"{had.path.name}{of} has no data for {none:,} of {n:,} experts{_named(had.layers, had.missing)}"
            if none
            else f"{had.path.name}{of} has data for all {n:,} experts"
        )
        if np.isnan(had.tokens).any():
            return [f"{first}."]
        few = int(((had.tokens < self.min_tokens) & ~had.missing).sum())
        return [
            f"{first}; {few:,} {'more ' if none else ''}got fewer than {self.min_tokens} tokens."
            if few
            else f"{first}{', and all others' if none else ', and all'} got {self.min_tokens} tokens or more."
        ]

    def _covered(self, cover: Cover, text: RoutedText, have: npt.NDArray[np.float64]) -> list[str]:
        tokens = int(np.diff(text.starts)[cover.chosen].sum())
        low = np.nan_to_num(have, nan=np.inf) < self.min_tokens
        still = low & (have + cover.added < self.min_tokens)
        chosen = f"{number(cover.chosen.size, 'prompt')} of {text.n_requests:,} ({number(tokens, 'token')})"
        if not low.any():
            return ["No expert needs more."]
        if not still.any():
            return [f"{chosen} bring every expert to {self.min_tokens} tokens."]
        return [
            f"{chosen} bring {int((low & ~still).sum()):,} of the {int(low.sum()):,} experts that have fewer to"
            f" {self.min_tokens} tokens; no prompt here brings the others enough: {int(still.sum()):,}"
            f"{_named(text.layers, still)}."
        ]

    def _written(self, routing: Routing, text: RoutedText, cover: Cover) -> str:
        order = cover.chosen.tolist()
        left = [i for i in range(text.n_requests) if i not in set(order)] + order
        filler: list[int] = []
        sizes = np.diff(text.starts)
        while order and sum(sizes[i] for i in filler) < _TAIL and left:
            filler.append(left.pop(0))
        parts = [_text_of(routing, text, i) for i in [*order, *filler]]
        # what a file of the new format holds, the tool adds to
        also = f" --in-file {self.imatrix}" if self.imatrix.endswith(".gguf") else ""
        write_text(self.write, "\n\n".join(parts) + "\n")
        return (
            f"Wrote {self.write}: these, and {number(len(filler), 'more prompt')} for the last chunk."
            f" Next: llama-imatrix -m MODEL -f {self.write}{also} -o new.gguf"
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """How many tokens experts get, sorted, by layer."""
        from moetrace import plot

        table = finding.tables["experts"]
        column = "tokens" if "added" not in table else "with_chosen"
        if table[column].isna().all():
            return {}
        return {
            "tokens": Figure(
                lambda ax: plot.tokens_of_experts(table, column, ax=ax),
                "Tokens that each layer's experts get, the least first.",
            )
        }


def _prompts(subject: Subject) -> Routing:
    """What llama-imatrix would read: the prompts; or whatever there is."""
    try:
        return subject.in_phase("prefill")
    except UsageError:
        return subject.routing


def _refuse_other(had: Imatrix, text: RoutedText) -> None:
    ours, theirs = (text.layers.size, text.n_expert), had.tokens.shape
    if ours != theirs or (text.layers != had.layers).any():
        raise UsageError(
            f"{had.path} is of another model: {theirs[0]} layers of {theirs[1]} experts, the recording has {ours[0]} of"
            f" {ours[1]}",
            fix="give a recording of the imatrix' model, with all of its layers",
        )


def _named(layers: npt.NDArray[np.int64], which: npt.NDArray[np.bool_]) -> str:
    """`` (layer 5: 21; layer 7: 3, 9)``, of few layers."""
    found = [
        f"layer {layer}: {', '.join(map(str, np.flatnonzero(mine).tolist()))}"
        for layer, mine in zip(layers.tolist(), which, strict=True)
        if mine.any()
    ]
    return f" ({'; '.join(found)})" if 0 < len(found) <= _NAMED and which.sum() <= 4 * _NAMED else ""


def _table(layers: npt.NDArray[np.int64], have: npt.NDArray[np.float64], cover: Cover | None) -> pd.DataFrame:
    n_layers, e = have.shape
    out = pd.DataFrame(
        {
            "layer": np.repeat(layers, e),
            "expert": np.tile(np.arange(e), n_layers),
            "tokens": have.ravel(),
        }
    )
    if cover is not None:
        out["added"] = cover.added.ravel().astype(np.int64)
        out["with_chosen"] = out["tokens"] + out["added"]
    return out


def _text_of(routing: Routing, text: RoutedText, request: int) -> str:
    """The prompt as the client sent it, where that is known; else its tokens' text."""
    rows = slice(int(text.starts[request]), int(text.starts[request + 1]))
    trace = routing.chosen[int(text.sources[rows.start])].trace
    asked = int(trace.request[int(text.rows[rows.start])])
    requests = trace.requests
    sent = requests["prompt"].get(asked) if "prompt" in requests else None
    if isinstance(sent, str) and sent:
        return sent
    words = routing.vocabulary
    pieces = [words[t] for t in text.tokens[rows].tolist() if 0 <= t < len(words)]
    return codecs.decode(b"".join(pieces), "utf-8", "replace")
