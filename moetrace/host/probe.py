"""How a loaded model routes given tokens: asked again and again, without a trace on disk.

The tracer's ring is read here, in the process that fills it, right after each batch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError
from moetrace.host import llama
from moetrace.host.options import CaptureOptions
from moetrace.model.file import ModelFile
from moetrace.trace.record import RecordKind, State
from moetrace.trace.ring import Ring, ring_is_ready, ring_paths
from moetrace.trace.rows import Layout, rows_from_records


@dataclass(frozen=True)
class Routed:
    """The routing of one sequence of n tokens. L layers with experts, k chosen, E experts.

    Attributes
    ----------
    experts
        (n, L, k) ids in the router's order; the layout's sentinel where a layer was not computed.
    weights
        (n, L, k) float32, their mixing weights; NaN where a layer was not computed.
    scores
        (n, L, E) float32, what top-k selected on; masked experts −inf, NaN where a layer was not computed.
    """

    experts: NDArray[np.integer[Any]]
    weights: NDArray[np.float32]
    scores: NDArray[np.float32]


class RoutingProbe:
    """A loaded model that is asked how it routes.

    Parameters
    ----------
    model
        GGUF file.
    n_tokens
        Tokens of the longest sequence that will be asked about.
    n_parallel
        Sequences computed together.
    n_threads, n_gpu_layers, n_cpu_moe, repack, verbose
        See :class:`moetrace.host.llama.Llama`.

    Raises
    ------
    MoetraceError
        If the model cannot be loaded, or has no experts.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_tokens: int,
        n_parallel: int = 32,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        n_cpu_moe: int = 0,
        repack: bool = True,
        verbose: bool = False,
    ) -> None:
        with ModelFile(model) as file:
            if not file.n_expert:
                raise MoetraceError(f"{file.path} has no experts", fix="use a Mixture-of-Experts model")
            row = 256 + file.n_layer * (4 * file.n_expert + 8 * file.n_expert_used + 8)
        self.n_parallel = n_parallel
        self._n_batch = n_tokens * n_parallel
        self._layout: Layout | None = None
        self._ring: Ring | None = None
        self._stack = contextlib.ExitStack()
        llama.tracer()  # before anything imports llama_cpp
        try:
            self._folder = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="moetrace-probe-"))
            )
            options = CaptureOptions(
                channels=("experts", "weights", "scores"),
                ring_size=max(16 << 20, 2 * row * (self._n_batch + n_parallel)),
            )
            llama.start(options.settings(self._folder))
            self._stack.callback(llama.stop)
            self.model = self._stack.enter_context(
                llama.Llama(
                    model,
                    n_ctx=self._n_batch,
                    n_seq=n_parallel,
                    n_batch=self._n_batch,
                    n_threads=n_threads,
                    n_gpu_layers=n_gpu_layers,
                    n_cpu_moe=n_cpu_moe,
                    repack=repack,
                    verbose=verbose,
                )
            )
        except BaseException:
            self.close()
            raise

    @property
    def layout(self) -> Layout:
        """Layers, experts and experts chosen per token, of the layers that have any."""
        return self._known

    @property
    def _known(self) -> Layout:
        if self._layout is None:
            self.route([[0]])
        assert self._layout is not None  # route attached it or raised
        return self._layout

    def route(self, sequences: Sequence[Sequence[int] | NDArray[np.integer[Any]]]) -> list[Routed]:
        """Compute sequences of token ids, each by itself from an empty context.

        Raises
        ------
        MoetraceError
            If one is longer than ``n_tokens``, llama.cpp fails, or a row cannot be told apart.
        """
        out: list[Routed] = []
        for i in range(0, len(sequences), self.n_parallel):
            out += self._batch(sequences[i : i + self.n_parallel])
        return out

    def _batch(self, sequences: Sequence[Sequence[int] | NDArray[np.integer[Any]]]) -> list[Routed]:
        sizes = [len(tokens) for tokens in sequences]
        if sum(sizes) > self._n_batch or min(sizes) < 1:
            raise MoetraceError(
                f"sequences of {min(sizes)} to {max(sizes)} tokens do not fit",
                why=f"the probe was made for {self._n_batch // self.n_parallel}",
                fix="make it with a larger n_tokens",
            )
        for sequence in range(self.n_parallel):
            self.model.forget(sequence)
        self.model.decode(
            [
                (int(token), position, sequence, True)
                for sequence, tokens in enumerate(sequences)
                for position, token in enumerate(tokens)
            ]
        )
        columns = self._take()
        where = np.cumsum([0, *sizes])[columns["sequence"]] + columns["position"]
        if len(where) != sum(sizes) or len(np.unique(where)) != len(where):
            raise MoetraceError(
                f"{len(where)} rows came back for {sum(sizes)} tokens",
                why="rows were lost, or their sequence is uncertain",
                fix="make the probe with fewer sequences in parallel",
            )
        order = np.argsort(where)
        experts, weights, scores = (columns[name][order] for name in ("experts", "weights", "scores"))
        pieces = (slice(end - n, end) for end, n in zip(np.cumsum(sizes), sizes, strict=True))
        return [Routed(experts[piece], weights[piece], scores[piece]) for piece in pieces]

    def _take(self) -> dict[str, NDArray[Any]]:
        """Take the rows that the last batch left in the ring."""
        if self._ring is None:
            for path in ring_paths(self._folder):
                if ring_is_ready(path):
                    self._ring = self._stack.enter_context(Ring(path, claim=True))
                    self._layout = Layout.from_context(self._ring.meta, self._ring.fields)
            if self._ring is None:
                raise MoetraceError(
                    "the model routed no token to an expert",
                    why="the tracer does not understand this llama.cpp",
                    fix="`moetrace doctor` checks llama.cpp",
                )
        segments = self._ring.pending()
        parts = [rows_from_records(s[s["kind"] == RecordKind.ROW], self._known) for s in segments]
        self._ring.release(sum(map(len, segments)))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if (columns["state"] == State.LOST).any():
            raise MoetraceError("routing was lost on the way", fix="make the probe with fewer sequences")
        return columns

    def close(self) -> None:
        """Free the model and stop tracing."""
        self._stack.close()

    def __enter__(self) -> RoutingProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
