"""Capture in this process: prompts in, a trace out."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, UsageError
from moetrace.host import llama
from moetrace.host.drain import Drain
from moetrace.host.intervene import Given, Interventions
from moetrace.host.model import store_models
from moetrace.host.options import CaptureOptions, CaptureSettings
from moetrace.host.prompts import MAX_TOKENS, Prompt, read_prompts
from moetrace.trace.labels import append_labels, request_line
from moetrace.trace.trace import Trace, open_trace
from moetrace.trace.writer import TraceWriter


@dataclass
class _Job:
    prompt: Prompt
    tokens: list[int]
    n_predict: int
    sequence: int
    from_ns: int
    done: int = 0  # prompt tokens that were computed
    generated: list[int] = field(default_factory=list)

    @property
    def n_left(self) -> int:
        return len(self.tokens) - self.done


class Generator:
    """Decodes several prompts at once, each in a sequence of its own, continuous-batching style.

    Parameters
    ----------
    model
        The loaded model.
    n_parallel
        Sequences at once.
    temperature, seed
        0: greedy. Otherwise tokens are drawn from the softmax of logits / temperature.
    all_outputs
        Ask for the logits of every token. Without it llama.cpp leaves the last layer's rows of all but each
        prompt's last token out, and the trace marks them so.
    interventions
        What to change about the routing while prompts are decoded.
    """

    def __init__(
        self,
        model: llama.Llama,
        *,
        n_parallel: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        all_outputs: bool = False,
        interventions: Interventions | None = None,
    ) -> None:
        self._model = model
        self._interventions = interventions
        self._n_parallel = n_parallel
        self._temperature = temperature
        self._random = np.random.default_rng(seed)
        self._all_outputs = all_outputs

    def run(
        self, prompts: Sequence[Prompt], n_predict: int, on_done: Callable[[dict[str, Any]], None]
    ) -> None:
        """Decode all prompts; ``on_done`` gets the label line (docs/format.md) of each when it is done."""
        waiting = [self._prepare(prompt, n_predict) for prompt in prompts]
        waiting.reverse()
        running: dict[int, _Job] = {}
        while waiting or running:
            for sequence in range(self._n_parallel):
                if sequence not in running and waiting:
                    job = waiting.pop()
                    job.sequence = sequence
                    self._model.forget(sequence)
                    job.from_ns = time.monotonic_ns()
                    running[sequence] = job
            if self._interventions is not None:
                self._interventions.assign({slot: job.prompt.id for slot, job in running.items()})
            self._step(running)
            for job in list(running.values()):
                if job.n_left == 0 and (len(job.generated) >= job.n_predict or self._ended(job)):
                    del running[job.sequence]
                    on_done(_label_line(job))
        if self._interventions is not None:
            self._interventions.end()

    def _prepare(self, prompt: Prompt, n_predict: int) -> _Job:
        tokens = prompt_tokens(self._model, prompt)
        n = n_predict if prompt.n_predict is None else prompt.n_predict
        if len(tokens) + n > self._model.n_ctx // self._n_parallel:
            raise MoetraceError(
                f"prompt {prompt.id} does not fit: {len(tokens)} tokens and {n} to generate",
                why=f"each of {self._n_parallel} sequences has {self._model.n_ctx // self._n_parallel} positions",
                fix=f"give a larger context (-c {(len(tokens) + n) * self._n_parallel})",
            )
        return _Job(prompt, tokens, n, -1, 0)

    def _ended(self, job: _Job) -> bool:
        return bool(job.generated) and self._model.is_end(job.generated[-1])

    def _step(self, running: dict[int, _Job]) -> None:
        entries: list[tuple[int, int, int, bool]] = []
        outputs: list[tuple[int, _Job]] = []
        # first who generates, then as much of the prompts as fits
        for job in sorted(running.values(), key=lambda job: job.n_left > 0):
            if job.n_left == 0:
                outputs.append((len(entries), job))
                entries.append(
                    (job.generated[-1], len(job.tokens) + len(job.generated) - 1, job.sequence, True)
                )
                continue
            for _ in range(min(job.n_left, self._model.n_batch - len(entries))):
                last = job.n_left == 1
                if last:
                    outputs.append((len(entries), job))
                entries.append((job.tokens[job.done], job.done, job.sequence, last or self._all_outputs))
                job.done += 1
        self._model.decode(entries)
        for index, job in outputs:
            if len(job.generated) < job.n_predict:
                job.generated.append(self._sample(self._model.logits(index)))

    def _sample(self, logits: NDArray[np.float32]) -> int:
        if self._temperature <= 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self._temperature
        p = np.exp(scaled - scaled.max())
        return int(self._random.choice(len(p), p=p / p.sum()))


def prompt_tokens(model: llama.Llama, prompt: Prompt) -> list[int]:
    """Give a prompt's token ids: as they stand, of the rendered messages, or of the text.

    Raises
    ------
    MoetraceError
        If it is empty, has a token that the model has not, or its messages cannot be rendered.
    """
    if prompt.tokens is not None:
        tokens = list(prompt.tokens)
        if max(tokens) >= model.n_vocab:
            raise MoetraceError(
                f"prompt {prompt.id}: token {max(tokens)} is not in the model's vocabulary",
                why=f"it has {model.n_vocab} tokens",
                fix="tokenize the prompt with this model",
            )
    elif prompt.messages is not None:
        tokens = model.tokenize(model.render(prompt.messages))
    else:
        tokens = model.tokenize(prompt.text or "")
    if not tokens:
        raise MoetraceError(f"prompt {prompt.id} is empty", fix="remove it from the prompts")
    return tokens


def _label_line(job: _Job) -> dict[str, Any]:
    return request_line(
        sequence=job.sequence,
        from_ns=job.from_ns,
        to_ns=time.monotonic_ns(),
        prompt_tokens=job.tokens,
        tokens=job.generated,
        n_generated=len(job.generated),
        id=job.prompt.id,
        label=job.prompt.label,
        prompt=job.prompt.text,
        extra=job.prompt.extra,
    )


@contextlib.contextmanager
def tracing(trace: TraceWriter, options: CaptureOptions, model: str) -> Iterator[Drain]:
    """Trace what llama.cpp computes in this process within the block, into ``trace``, and close that.

    A trace in which nothing was recorded is removed again.
    """
    drain = Drain(trace)
    try:
        llama.start(options.settings(trace.path))
        drain.start()
        try:
            yield drain
        finally:
            llama.stop()
            drain.stop()
    finally:
        if not trace.detached and (drain.contexts or not trace.discard()):
            try:
                store_models(trace, model)
            finally:
                trace.close()


def capture(
    model: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt],
    output: str | os.PathLike[str] | None = None,
    *,
    n_predict: int = 0,
    channels: str | Sequence[str] = ("experts", "weights"),
    n_parallel: int = 1,
    n_ctx: int | None = None,
    n_batch: int = 2048,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    n_cpu_moe: int = 0,
    repack: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    all_outputs: bool = False,
    force: bool = False,
    verbose: bool = False,
    intervene: Given = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[CaptureSettings],
) -> Trace:
    """Run prompts through a model in this process and record their routing.

    Parameters
    ----------
    model
        GGUF file.
    prompts
        A JSON-lines file, or a list of strings or of dicts with ``prompt``, ``messages`` or ``tokens``, and
        optionally ``id``, ``label`` and ``n_predict``.
    output
        Trace folder to make; by default one in the system's temporary folder.
    n_predict
        Tokens to generate per prompt; 0 records the prompt alone.
    channels, options
        See :class:`moetrace.host.options.CaptureOptions`.
    n_parallel
        Prompts decoded at once.
    n_ctx
        Positions of the whole context; by default as many as the longest prompt needs, for each sequence.
    all_outputs
        Compute the last layer for every token, not only for each prompt's last one. Costs the output matrix
        for every token.
    n_batch, n_ubatch, n_threads, n_gpu_layers, n_cpu_moe, repack
        See :class:`moetrace.host.llama.Llama`.
    temperature, seed
        Sampling; 0 is greedy.
    intervene
        What to change about the routing: one or several interventions, as text (``"ablate:7:3,12"``) or as
        :class:`moetrace.trace.intervention.Intervention`. ``@request=ID`` speaks of the prompt with that id.
    on_progress
        Called with (prompts done, prompts).

    Returns
    -------
    Trace
        The closed trace, opened.

    Raises
    ------
    MoetraceError
        If the model or a prompt does not fit, an intervention is refused, or the trace cannot be written. What
        was captured is kept; where nothing was, no trace is.
    UsageError
        If a number makes no sense, or ``n_parallel`` prompts do not fit into a batch.
    """
    chosen = CaptureOptions.of(channels, **options)
    _check_numbers(n_predict=n_predict, seed=seed)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"the temperature is {temperature}", fix="give 0 (greedy) or more")
    items = read_prompts(prompts)
    n_parallel = max(1, min(n_parallel, len(items)))
    if not Path(model).is_file():
        raise MoetraceError(f"there is no model {os.fspath(model)}", fix="check the path")
    llama.tracer()  # before anything imports llama_cpp
    folder = (
        Path(output) if output is not None else Path(tempfile.mkdtemp(prefix="moetrace-")) / "capture.moet"
    )
    # what the model cannot do is refused before anything happens
    interventions = Interventions(folder, intervene, os.fspath(model))
    n_ctx = n_ctx or _context_size(items, n_predict, n_parallel)
    llama.check_sizes(n_ctx=n_ctx, n_seq=n_parallel, n_batch=n_batch, n_ubatch=n_ubatch)
    trace = TraceWriter(
        folder, command=["moetrace", "capture"], model_path=str(model), prompts=len(items), force=force
    )
    done = 0
    trace.count_done(done)

    def on_done(line: dict[str, Any]) -> None:
        nonlocal done
        trace.stay()
        append_labels(trace.path, [line])
        done += 1
        trace.count_done(done)
        if on_progress is not None:
            on_progress(done, len(items))

    wide = "attention" in chosen.channels
    with (
        tracing(trace, chosen, str(model)) as drain,
        llama.Llama(
            model,
            n_ctx=n_ctx,
            n_seq=n_parallel,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            n_cpu_moe=n_cpu_moe,
            repack=repack,
            flash_attention=False if wide else None,
            verbose=verbose,
        ) as loaded,
    ):
        generator = Generator(
            loaded,
            n_parallel=n_parallel,
            temperature=temperature,
            seed=seed,
            all_outputs=all_outputs,
            interventions=interventions,
        )
        generator.run(items, n_predict, on_done)
    if not drain.contexts:
        raise MoetraceError(
            f"{os.fspath(model)} routed no token to an expert",
            why="it is a dense model, or the tracer does not understand this llama.cpp",
            fix="use a Mixture-of-Experts model; `moetrace doctor` checks llama.cpp",
        )
    return open_trace(trace.path)


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not 0 <= number <= MAX_TOKENS:
            raise UsageError(f"{name} is {number}", fix=f"give 0 to {MAX_TOKENS}")


def _context_size(prompts: Sequence[Prompt], n_predict: int, n_parallel: int) -> int:
    # a token takes at least a byte of text, chat templates a little more
    def bound(prompt: Prompt) -> int:
        n = n_predict if prompt.n_predict is None else prompt.n_predict
        if prompt.tokens is not None:
            return len(prompt.tokens) + n
        if prompt.messages is not None:
            return sum(len(m["content"].encode()) + 64 for m in prompt.messages) + 64 + n
        return len((prompt.text or "").encode()) + 8 + n

    longest = max(prompts, key=bound)
    size = (bound(longest) + 31) // 32 * 32 * n_parallel
    if size > MAX_TOKENS:
        raise UsageError(
            f"prompt {longest.id} and what it shall generate need a context of {size} positions",
            why=f"llama.cpp has {MAX_TOKENS} at most",
            fix="lower n_predict (-n)",
        )
    return size
