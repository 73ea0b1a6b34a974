"""How well a model predicts given texts: negative log-likelihood per token, and divergence between two runs.

Everything comes from llama.cpp's logits, computed in this process. Two evaluations of the same texts line up
token by token, whatever was changed in between (the model file, experts per token, an intervention), so that
differences are paired; :mod:`moetrace.analysis.statistics.likelihood` gives them with their standard errors.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError, MoetraceError, UsageError
from moetrace.host import llama
from moetrace.host.inprocess import prompt_tokens, tracing
from moetrace.host.intervene import Given, Interventions
from moetrace.host.options import CaptureOptions, CaptureSettings
from moetrace.host.prompts import Prompt, read_prompts
from moetrace.model.file import ModelFile
from moetrace.trace.labels import append_labels, request_line
from moetrace.trace.trace import Trace, open_trace
from moetrace.trace.writer import TraceWriter

#: logits that are worked on at once: 64 MiB as float64
_BLOCK = 1 << 23

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """What a model made of some texts; one entry per scored token, in reading order.

    Attributes
    ----------
    nll
        float64 (n,): −ln p(token | what came before it in its window), nats.
    token
        int32 (n,): the token that was to be predicted.
    top
        int32 (n,): the token that the model held most likely there.
    text
        int64 (n,): number of the text, from 0. Texts are the units that a standard error should rest on.
    window
        int64 (n,): number of the window that it was computed in, over all texts.
    position
        int64 (n,): index of the token among its text's tokens.
    logits
        A ``.npy`` file, float32 (n, vocabulary): the logits that each entry was scored from. None if they were
        not kept.
    """

    nll: Floats
    token: NDArray[np.int32]
    top: NDArray[np.int32]
    text: Ints
    window: Ints
    position: Ints
    logits: Path | None = None

    @property
    def n_tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.nll)

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return float(self.nll.mean())

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return float(np.exp(self.mean))

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model held most likely."""
        return float(np.mean(self.top == self.token))


@dataclass(frozen=True)
class Divergence:
    """How two evaluations of the same texts differ; one entry per scored token.

    Attributes
    ----------
    change
        float64 (n,): NLL of the other less NLL of the base, nats.
    kl
        float64 (n,): KL(base ‖ other) = Σ p ln(p/q) over the vocabulary, nats; None if either run's logits were
        not kept.
    same_top
        bool (n,): both hold the same token most likely.
    text, window
        int64 (n,): as in :class:`Evaluation`.
    """

    change: Floats
    kl: Floats | None
    same_top: NDArray[np.bool_]
    text: Ints
    window: Ints


def divergence(base: Evaluation, other: Evaluation) -> Divergence:
    """Hold two evaluations against each other, token by token.

    Raises
    ------
    InputError
        If they did not score the same tokens of the same texts, or their kept logits have different shapes.
    """
    same = base.n_tokens == other.n_tokens and all(
        np.array_equal(getattr(base, name), getattr(other, name))
        for name in ("text", "window", "position", "token")
    )
    if not same:
        raise InputError(
            "the two evaluations do not score the same tokens",
            why=f"one has {base.n_tokens} of them, the other {other.n_tokens}",
            fix="evaluate both on the same texts, with the same context and models of one vocabulary",
        )
    kl = None
    if base.logits is not None and other.logits is not None:
        kl = kl_divergence(np.load(base.logits, mmap_mode="r"), np.load(other.logits, mmap_mode="r"))
    return Divergence(other.nll - base.nll, kl, base.top == other.top, base.text, base.window)


def kl_divergence(base: NDArray[np.float32], other: NDArray[np.float32]) -> Floats:
    """KL(softmax(base) ‖ softmax(other)) of each row, nats; (n, V) each, maps of files are read in blocks.

    Raises
    ------
    InputError
        If the shapes differ.
    """
    if base.shape != other.shape:
        raise InputError(
            f"logits of shapes {base.shape} and {other.shape} cannot be compared",
            fix="compare models of one vocabulary on the same texts",
        )
    out = np.empty(len(base))
    for rows in _blocks(*base.shape):
        p, q = _log_softmax(base[rows]), _log_softmax(other[rows])
        # p = 0 adds nothing, also where q = 0
        with np.errstate(invalid="ignore"):
            out[rows] = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=1)
    return out


def token_nll(logits: NDArray[np.float32], token: NDArray[np.int32]) -> Floats:
    """−ln softmax(logits)[token] of each row: (n, V) and (n,) give float64 (n,), nats."""
    out = np.empty(len(logits))
    for rows in _blocks(*logits.shape):
        log_p = _log_softmax(logits[rows])
        out[rows] = -np.take_along_axis(log_p, token[rows, None].astype(np.int64), axis=1)[:, 0]
    return out


def _blocks(n: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(width, 1))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _log_softmax(logits: NDArray[np.float32]) -> Floats:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


@dataclass(frozen=True)
class _Window:
    """A run of a text's tokens that is computed from an empty context."""

    text: int
    start: int  # of its first token, within the text
    tokens: list[int]
    first: int  # the first token whose logits count; they predict the next one

    @property
    def n_scored(self) -> int:
        return len(self.tokens) - 1 - self.first


def _windows(texts: Sequence[list[int]], context: int, chunks: bool, bos: int | None) -> Iterator[_Window]:
    def window(text: int, start: int, first: int) -> _Window:
        tokens = texts[text][start : start + context]
        # as llama-perplexity does: what a window's first token was is not predicted, so BOS may stand there
        return _Window(text, start, tokens if bos is None else [bos, *tokens[1:]], first)

    for text, tokens in enumerate(texts):
        if chunks:
            for start in range(0, len(tokens) - context + 1, context):
                yield window(text, start, context // 2)
            continue
        yield _Window(text, 0, tokens[:context], 0)
        step = context // 2
        for start in range(step, len(tokens) - (context - step), step):
            yield window(text, start, context - step - 1)


class EvaluatorSettings(CaptureSettings, total=False):
    """What :class:`Evaluator` takes beside the model."""

    context: int
    n_expert_used: int | None
    overrides: Mapping[str, int] | None
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_gpu_layers: int
    n_cpu_moe: int
    verbose: bool
    trace: str | os.PathLike[str] | None
    channels: str | Sequence[str]
    force: bool


class Evaluator:
    """A loaded model that texts are evaluated with, as often as wanted.

    Parameters
    ----------
    model
        GGUF file.
    context
        Tokens in a window at most. A longer text is cut into windows that overlap by half, so that every token
        but the first ``context`` ones is predicted from at least ``context // 2`` tokens before it.
    n_expert_used
        Experts per token instead of the model's own number: llama.cpp's
        ``--override-kv ARCH.expert_used_count=int:N``.
    overrides
        Other keys of the model to override, as ``--override-kv`` (numbers only).
    n_batch, n_ubatch, n_threads, n_gpu_layers, n_cpu_moe, repack, verbose
        See :class:`moetrace.host.llama.Llama`. ``n_batch`` tokens' logits are in memory at once; texts that fit
        together are computed together.
    trace
        Trace folder to record the routing into while texts are evaluated: each window is a request, whose label
        line has the text's ``id`` and ``label`` and the numbers ``text`` and ``window``.
    channels, force, options
        What to record: see :class:`moetrace.host.options.CaptureOptions`; ``force`` replaces a trace.

    Raises
    ------
    MoetraceError
        If the model cannot be loaded, or the trace cannot be written.
    UsageError
        If the model cannot use so many experts.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        context: int = 512,
        n_expert_used: int | None = None,
        overrides: Mapping[str, int] | None = None,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        n_cpu_moe: int = 0,
        repack: bool = True,
        verbose: bool = False,
        trace: str | os.PathLike[str] | None = None,
        channels: str | Sequence[str] = ("experts", "weights"),
        force: bool = False,
        **options: Unpack[CaptureSettings],
    ) -> None:
        if context < 4:
            raise UsageError(f"a context of {context} tokens is too small", fix="give at least 4")
        if not Path(model).is_file():
            raise MoetraceError(f"there is no model {os.fspath(model)}", fix="check the path")
        keys = dict(overrides or {})
        if n_expert_used is not None:
            keys[_expert_used_key(model, n_expert_used)] = n_expert_used
        self.context = context
        self._model_path = os.fspath(model)
        self._n_expert_used = n_expert_used
        self._n_seq = min(_SEQUENCES, n_batch)
        self._stack = contextlib.ExitStack()
        self._folder: Path | None = None
        llama.tracer()  # before anything imports llama_cpp
        try:
            if trace is not None:
                chosen = CaptureOptions.of(channels, **options)
                writer = TraceWriter(
                    trace, command=["moetrace", "evaluate"], model_path=self._model_path, force=force
                )
                self._folder = writer.path
                self._stack.enter_context(tracing(writer, chosen, self._model_path))
                self._control = writer.path
            else:
                self._control = self._stack.enter_context(_watching())
            self.model = self._stack.enter_context(
                llama.Llama(
                    model,
                    n_ctx=max(context, n_batch),
                    n_seq=self._n_seq,
                    n_batch=n_batch,
                    n_ubatch=n_ubatch,
                    n_threads=n_threads,
                    n_gpu_layers=n_gpu_layers,
                    n_cpu_moe=n_cpu_moe,
                    repack=repack,
                    overrides=keys,
                    verbose=verbose,
                )
            )
        except BaseException:
            self.close()
            raise

    def evaluate(
        self,
        texts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]],
        *,
        chunks: bool = False,
        logits: str | os.PathLike[str] | None = None,
        intervene: Given = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Score texts.

        Parameters
        ----------
        texts
            A JSON-lines file, or a list of strings or of dicts, as for :func:`moetrace.capture`. Every text is
            scored from its second token on (its first with a BOS token before it, if the model adds one).
        chunks
            Cut as ``llama-perplexity`` does: windows of exactly ``context`` tokens that do not overlap, of which
            the second half is scored; what is left at the end of a text is dropped.
        logits
            A ``.npy`` file to keep the logits in, 4 bytes × vocabulary per scored token; written as they come.
        intervene
            What to change about the routing meanwhile: see :func:`moetrace.capture`.
        on_progress
            Called with (tokens computed, tokens).

        Raises
        ------
        InputError
            If there is no token to score.
        UsageError
            If the model cannot do what ``intervene`` asks for.
        MoetraceError
            If llama.cpp fails, or its graph does not allow the intervention.
        """
        interventions = Interventions(self._control, intervene, self._model_path, self._n_expert_used)
        prompts = read_prompts(texts)
        bos = self.model.bos if self.model.adds_bos else None
        windows = list(_windows([prompt_tokens(self.model, p) for p in prompts], self.context, chunks, bos))
        n = sum(w.n_scored for w in windows)
        if n == 0:
            raise InputError(
                "the texts have no token to score",
                why=f"chunks have {self.context} tokens each" if chunks else "they have one token each",
                fix="give longer texts, or a smaller context",
            )
        out = Evaluation(
            nll=np.empty(n),
            token=np.concatenate([np.array(w.tokens[w.first + 1 :], np.int32) for w in windows]),
            top=np.empty(n, np.int32),
            text=np.repeat([w.text for w in windows], [w.n_scored for w in windows]),
            window=np.repeat(np.arange(len(windows)), [w.n_scored for w in windows]),
            position=np.concatenate(
                [w.start + np.arange(w.first + 1, len(w.tokens), dtype=np.int64) for w in windows]
            ),
            logits=None if logits is None else Path(logits),
        )
        kept: NDArray[np.float32] | None = None
        if logits is not None:
            kept = np.lib.format.open_memmap(
                Path(logits), mode="w+", dtype=np.float32, shape=(n, self.model.n_vocab)
            )
        done = computed = 0
        n_tokens = sum(len(w.tokens) for w in windows)
        try:
            for group, first in _packed(windows, self.model.n_batch):
                interventions.assign({slot: prompts[w.text].id for slot, w in enumerate(group)})
                for rows, fed in self._compute(group, first, prompts):
                    span = slice(done, done + len(rows))
                    out.nll[span] = token_nll(rows, out.token[span])
                    out.top[span] = rows.argmax(axis=1)
                    if kept is not None:
                        kept[span] = rows
                    done += len(rows)
                    computed += fed
                    if on_progress is not None:
                        on_progress(computed, n_tokens)
        finally:
            interventions.end()
        return out

    def _compute(
        self, windows: Sequence[_Window], number: int, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[NDArray[np.float32], int]]:
        """Compute windows that go together; gives (logits that count, tokens computed) piece by piece."""
        for sequence in range(self._n_seq):  # also those that this group does not use: their cells count
            self.model.forget(sequence)
        start = time.monotonic_ns()
        entries = [
            (token, position, sequence, position >= window.first)
            for sequence, window in enumerate(windows)
            for position, token in enumerate(window.tokens)
        ]
        last = {sequence: len(window.tokens) - 1 for sequence, window in enumerate(windows)}
        for i in range(0, len(entries), self.model.n_batch):
            piece = entries[i : i + self.model.n_batch]
            self.model.decode(piece)
            # a window's last token has logits too, so that the last layer's routing is computed, but no successor
            counts = np.array([e[1] != last[e[2]] for e in piece if e[3]], bool)
            yield self.model.outputs(len(counts))[counts], len(piece)
        if self._folder is not None:
            end = time.monotonic_ns()
            append_labels(
                self._folder,
                [
                    request_line(
                        sequence=sequence,
                        from_ns=start,
                        to_ns=end,
                        prompt_tokens=window.tokens,
                        tokens=(),
                        id=prompts[window.text].id,
                        label=prompts[window.text].label,
                        extra={"text": window.text, "window": number + sequence},
                    )
                    for sequence, window in enumerate(windows)
                ],
            )

    def close(self) -> None:
        """Free the model, and close the trace if there is one."""
        self._stack.close()

    @property
    def trace(self) -> Trace:
        """What was recorded, opened; call it after :meth:`close`.

        Raises
        ------
        UsageError
            If nothing is recorded.
        """
        if self._folder is None:
            raise UsageError("this evaluation is not recorded", fix="give Evaluator(..., trace=FOLDER)")
        return open_trace(self._folder)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


#: texts computed together at most
_SEQUENCES = 16


def _packed(windows: Sequence[_Window], n_batch: int) -> Iterator[tuple[list[_Window], int]]:
    """Give windows that fit into a batch together, and the number of the first; a longer one comes alone."""
    group: list[_Window] = []
    size = 0
    for i, window in enumerate(windows):
        if group and (size + len(window.tokens) > n_batch or len(group) == _SEQUENCES):
            yield group, i - len(group)
            group, size = [], 0
        group.append(window)
        size += len(window.tokens)
    if group:
        yield group, len(windows) - len(group)


_watched: tuple[tempfile.TemporaryDirectory[str], int] | None = None  # and how many evaluators need it


@contextlib.contextmanager
def _watching() -> Iterator[Path]:
    """Trace without recording, so that routing can be intervened on; evaluators that record nothing share it."""
    global _watched
    folder, users = _watched or (tempfile.TemporaryDirectory(prefix="moetrace-"), 0)
    if users == 0:
        options = CaptureOptions(collector="callback", on_full="drop", ring_size=1 << 16, paused=True)
        llama.start(options.settings(Path(folder.name)))
    _watched = folder, users + 1
    try:
        yield Path(folder.name)
    finally:
        users = _watched[1] - 1
        _watched = (folder, users) if users else None
        if users == 0:
            llama.stop()
            folder.cleanup()


def _expert_used_key(model: str | os.PathLike[str], n: int) -> str:
    with ModelFile(model) as file:
        if not 1 <= n <= file.n_expert:  # llama.cpp ends the process
            raise UsageError(
                f"{os.fspath(model)} cannot use {n} experts per token",
                why=f"it has {file.n_expert} per layer",
                fix=f"give 1 to {file.n_expert}" if file.n_expert else "use a Mixture-of-Experts model",
            )
        return f"{file.architecture}.expert_used_count"


def evaluate(
    model: str | os.PathLike[str],
    texts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]],
    *,
    chunks: bool = False,
    logits: str | os.PathLike[str] | None = None,
    intervene: Given = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[EvaluatorSettings],
) -> Evaluation:
    """Load a model, score texts, and let go of it: :meth:`Evaluator.evaluate` with :class:`Evaluator`'s options."""
    with Evaluator(model, **options) as evaluator:
        return evaluator.evaluate(
            texts, chunks=chunks, logits=logits, intervene=intervene, on_progress=on_progress
        )
