"""Where a trace meets the analyses that tell one thing about a token from another: columns in, arrays out.

The other half of :mod:`moetrace.analysis.access.from_trace`, which gives it as :attr:`Analysis.predictions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit

from moetrace.analysis.counts.counting import Progress
from moetrace.analysis.placement import cache
from moetrace.analysis.prediction.attention import (
    FEATURES,
    AttentionRows,
    attention_features,
    attention_windows,
)
from moetrace.analysis.prediction.attention_prediction import attention_prediction
from moetrace.analysis.prediction.context_attention_routing import (
    FEWEST,
    attention_similarity,
    context_attention_routing,
    routing_similarity,
)
from moetrace.analysis.prediction.predict import Prediction, Problem, Scores
from moetrace.analysis.prediction.task_prediction import task_prediction
from moetrace.analysis.published import prediction as published
from moetrace.analysis.statistics import nulls
from moetrace.analysis.text.routed import RoutedText
from moetrace.errors import MoetraceError, UsageError

Ints = npt.NDArray[np.int64]
Frames = tuple[pd.DataFrame, pd.DataFrame]


class RouterWeights(Protocol):
    """A router: logits = ``weight`` (E, D) @ gate input + ``bias`` (E,); ``selection_bias`` (E,) for choosing only."""

    @property
    def weight(self) -> npt.NDArray[np.float32]: ...
    @property
    def bias(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def selection_bias(self) -> npt.NDArray[np.float32] | None: ...


class Predictions:
    """What one thing about a token tells about another.

    Parameters
    ----------
    traces
        Of one model.
    text
        The chosen tokens; ``sources`` numbers the traces that they are from.
    """

    def __init__(self, traces: Sequence[Any], text: RoutedText) -> None:
        self._traces, self.text = traces, text

    def attention_prediction(
        self,
        layers: Iterable[int] | None = None,
        *,
        max_tokens: int = 20_000,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> Frames:
        """:func:`~moetrace.analysis.attention_prediction` of each layer, and what it needs.

        Gives ``recall`` and ``gains`` with a column ``layer``, ``q_value`` over layers among them. Layers without
        routing or attention of these tokens are left out. Whole prompts are drawn until they hold ``max_tokens``.
        From the gate inputs too where the trace has them. Raises ChannelMissingError without attention.
        """
        text = self.text.some(max_tokens, (seed, 7))
        wanted = self._wanted(layers)
        found: dict[int, Prediction] = {}
        for done, layer in enumerate(wanted):
            index = self._index(layer)
            attention = self._attention(text, layer)
            there = text.known(index) & attention.known
            if there.any():
                part = text.take(there)
                found[layer] = attention_prediction(
                    self._problem(part, index, seed),
                    attention_features(attention)[there],
                    self._column("gate_input", part, index),
                    kinds=FEATURES,
                    seed=seed,
                    **options,
                )
            if progress is not None:
                progress(done + 1, len(wanted))
        if not found:
            raise MoetraceError(
                "the recording has the channel attention, and no row of it",
                why="flash attention computes none, or their keys' positions are not known",
                fix="capture it again with -fa off",
            )
        return _joined(found)

    def task_prediction(
        self,
        early_layer: int = 4,
        layers: Iterable[int] | None = None,
        *,
        routers: Mapping[int, RouterWeights] | None = None,
        max_tokens: int = 20_000,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> Frames:
        """:func:`~moetrace.analysis.task_prediction` of each layer after ``early_layer``.

        As :meth:`attention_prediction`. ``routers`` by layer number give the predictor ``gate``; it and ``hidden`` need
        gate inputs, and are left out without them. Raises UsageError if there is no such layer.
        """
        text = self.text.some(max_tokens, (seed, 7))
        probe = self._early(early_layer)
        wanted = [n for n in self._wanted(layers) if n > early_layer]
        found: dict[int, Prediction] = {}
        for done, layer in enumerate(wanted):
            index = self._index(layer)
            part = text.take(text.known(index) & text.known(probe))
            if len(part):
                hidden = self._column("gate_input", part, probe)
                gate = None if hidden is None or not routers else _routed(hidden, routers[layer])
                found[layer] = task_prediction(
                    self._problem(part, index, seed),
                    part.member(probe),
                    hidden,
                    gate,
                    seed=seed,
                    **options,
                )
            if progress is not None:
                progress(done + 1, len(wanted))
        if not found:
            raise UsageError(
                f"no layer after {early_layer} has routing of these tokens", fix="choose another phase"
            )
        return _joined(found)

    def context_attention_routing(
        self,
        tokens: Sequence[int] = (),
        layers: Iterable[int] | None = None,
        *,
        n_tokens: int = 5,
        length: int = 16,
        max_contexts: int = 200,
        n_permutations: int = 999,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """:func:`~moetrace.analysis.context_attention_routing` of tokens in many prompts.

        Parameters
        ----------
        tokens
            Token ids; by default the ``n_tokens`` that stand in most prompts.
        length
            Keys that are compared; a context is the first place in a prompt where the token sees so many. At most
            ``max_contexts`` prompts are drawn.

        Returns one row per (token, layer): the fields of ContextTest, and ``q_value`` over all rows. Raises
        ChannelMissingError without attention, UsageError if no token has enough contexts.
        """
        wanted, rng = self._wanted(layers), np.random.default_rng((seed, 8))
        places = self._contexts(length, wanted[0])
        if not len(tokens):
            ids, counts = np.unique(self.text.tokens[places], return_counts=True)
            ids, counts = ids[counts >= FEWEST], counts[counts >= FEWEST]
            tokens = ids[np.argsort(-counts, kind="stable")][:n_tokens].tolist()
        out: list[dict[str, Any]] = []
        for done, token in enumerate(tokens):
            mine = places[self.text.tokens[places] == token]
            if mine.size > max_contexts:
                mine = np.sort(rng.choice(mine, max_contexts, replace=False))
            part = self.text.take(mine)
            for layer in wanted if mine.size >= FEWEST else []:
                index = self._index(layer)
                windows = attention_windows(self._attention(part, layer), length)
                there = part.known(index) & np.isfinite(windows).all(axis=(1, 2))
                if np.count_nonzero(there) >= FEWEST:
                    test = context_attention_routing(
                        attention_similarity(windows[there]),
                        routing_similarity(part.experts[there, index], part.n_expert),
                        part.positions[there],
                        n_permutations=n_permutations,
                        seed=seed,
                    )
                    out.append({"token": token, "layer": layer, **asdict(test)})
            if progress is not None:
                progress(done + 1, len(tokens))
        if not out:
            raise UsageError(
                f"no token stands in {FEWEST} prompts with {length} keys of attention",
                why="contexts of one prompt are not independent, so one of each is taken",
                fix="capture more prompts that share words, or lower --length",
            )
        frame = pd.DataFrame(out)
        return frame.assign(q_value=nulls.benjamini_hochberg(frame["p_value"]))

    def expert_cache(
        self, slots: Sequence[int] = (), *, max_tokens: int = 5_000, seed: int = 0, **options: Any
    ) -> cache.CacheSimulation:
        """:func:`moetrace.analysis.placement.cache.expert_cache`; 0 ``max_tokens``: all of them."""
        text = self.text if max_tokens == 0 else self.text.some(max_tokens, (seed, 7))
        return cache.expert_cache(text, slots, seed=seed, **options)

    def as_published_attention_prediction(self) -> Frames:
        """:func:`moetrace.analysis.published.prediction.as_published_attention_prediction` of these tokens.

        Of the first, middle and last layer that have routing of them. Raises ChannelMissingError without attention
        or weights.
        """
        known = [n for n in self.text.layers.tolist() if self.text.known(self._index(n)).any()]
        chosen = (
            [self._index(n) for n in sorted({known[0], known[len(known) // 2], known[-1]})] if known else []
        )
        if not chosen:
            raise UsageError("these tokens have no routing", fix="choose another phase")
        attention = self._attention(self.text, int(self.text.layers[-1]))
        there = np.logical_and.reduce([attention.known, *(self.text.known(i) for i in chosen)])
        features = np.stack(
            [published.head_mean_features(attention.row(int(i))) for i in np.flatnonzero(there)]
        )
        part = self.text.take(there)
        routing = [
            published.LayerRouting(int(part.layers[i]), part.experts[:, i], self._need("weights", part, i))
            for i in chosen
        ]
        return published.as_published_attention_prediction(features, routing, part.owner, part.n_expert)

    def as_published_context_attention_routing(self, token: int) -> pd.DataFrame:
        """:func:`moetrace.analysis.published.prediction.as_published_context_attention_routing`, layer by layer.

        Of the first, middle and last layer, in every prompt that has the token: where it stands first.
        """
        text, layers = self.text, self.text.layers.tolist()
        first = np.flatnonzero(text.tokens == token)
        first = first[np.unique(text.owner[first], return_index=True)[1]]
        last = np.zeros(text.n_requests, dtype=np.int64)
        np.maximum.at(last, text.owner, text.positions)
        part = text.take(first)
        attention = self._attention(part, layers[-1])
        out = []
        for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
            index = self._index(layer)
            contexts = []
            for i in np.flatnonzero(part.known(index) & attention.known):
                row, start = attention.row(int(i)).mean(axis=0), int(attention.first_position[i])
                whole = np.zeros(max(int(last[part.owner[i]]) + 1, start + row.size))
                whole[start : start + row.size] = row
                ids = part.experts[i, index]
                contexts.append(published.Context(whole, tuple(ids[ids < part.n_expert].tolist())))
            if len(contexts) >= 2:
                found = published.as_published_context_attention_routing(contexts)
                out.append({"token": token, "layer": layer, **found})
        return pd.DataFrame(out)

    def as_published_task_prediction(self, early_layer: int = 4, *, seed: int = 0) -> pd.DataFrame:
        """:func:`moetrace.analysis.published.prediction.as_published_task_prediction` of these tokens.

        From the mean of the early layer's gate inputs (the original: of the layer's input, before attention), to
        the second half of the layers. Raises ChannelMissingError without gate inputs.
        """
        early = self._early(early_layer)
        targets = list(range(self.text.layers.size // 2, self.text.layers.size))
        text = self.text
        targets = [i for i in targets if text.known(i).any()]
        part = text.take(np.logical_and.reduce([text.known(early), *(text.known(i) for i in targets)]))
        hidden = self._need("gate_input", part, early)
        edges = np.flatnonzero(np.diff(part.owner)) + 1
        features = np.stack([published.probe_features(h) for h in np.split(hidden, edges)])
        experts = {int(text.layers[i]): np.split(part.experts[:, i], edges) for i in targets}
        if len(features) < 2 or not experts:
            raise UsageError("there are fewer than two prompts with routing", fix="capture more prompts")
        return published.as_published_task_prediction(features, experts, part.n_expert, seed=seed)

    # -- columns -------------------------------------------------------------------------------------

    def _wanted(self, layers: Iterable[int] | None) -> list[int]:
        have = self.text.layers.tolist()
        wanted = have if layers is None else sorted(set(layers))
        unknown = sorted(set(wanted) - set(have))
        if unknown:
            raise UsageError(
                f"there is no MoE layer {unknown[0]}", fix=f"choose among: {', '.join(map(str, have))}"
            )
        return wanted

    def _early(self, layer: int) -> int:
        have: list[int] = self.text.layers.tolist()
        if layer not in have[:-1]:
            raise UsageError(
                f"layer {layer} is no MoE layer with others after it",
                fix=f"choose --early-layer among: {', '.join(map(str, have[:-1]))}",
            )
        return have.index(layer)

    def _index(self, layer: int) -> int:
        have: list[int] = self.text.layers.tolist()
        return have.index(layer)

    def _problem(self, text: RoutedText, index: int, seed: int) -> Problem:
        return Problem.of(
            text.experts[:, index],
            text.n_expert,
            prompt=text.owner,
            run=text.runs,
            token=text.tokens,
            position=text.positions,
            seed=seed,
        )

    def _column(self, name: str, text: RoutedText, index: int) -> npt.NDArray[np.float32] | None:
        """A column's entries of one layer, (n, ...); None if a trace lacks it."""
        try:
            return self._need(name, text, index)
        except (AttributeError, MoetraceError):
            return None

    def _need(self, name: str, text: RoutedText, index: int) -> npt.NDArray[np.float32]:
        def take(trace: Any, mine: Ints) -> npt.NDArray[np.float32]:
            return np.asarray(getattr(trace, name)[mine, index], dtype=np.float32)

        return self._gather(text, take)

    def _gather(
        self, text: RoutedText, take: Callable[[Any, Ints], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """Values of each trace's rows, put together in the order of ``text``."""
        out: npt.NDArray[np.float32] | None = None
        for source in np.unique(text.sources):
            mine = text.sources == source
            values = take(self._traces[source], text.rows[mine])
            if out is None:
                out = np.empty((len(text), *values.shape[1:]), dtype=values.dtype)
            out[mine] = values
        return np.empty((0,), dtype=np.float32) if out is None else out

    def _attention(self, text: RoutedText, layer: int) -> AttentionRows:
        """Attention of tokens in a layer. Raises ChannelMissingError if it was not captured."""
        sources = np.unique(text.sources).tolist() or [0]
        names = ("offset", "n_keys", "first_position", "n_heads")
        columns = {name: np.full(len(text), -1, dtype=np.int64) for name in names}
        values = []
        for source in sources:
            trace = self._traces[source]
            attention = getattr(trace, "trace", trace).attention  # a selection's trace
            values.append(attention.values)
            mine = np.flatnonzero(text.sources == source)
            at = attention.find(np.asarray(trace.serial)[text.rows[mine]], layer)
            there = at >= 0
            for name, column in columns.items():
                column[mine[there]] = np.asarray(attention.index[name])[at[there]]
        heads = np.unique(columns["n_heads"][columns["n_heads"] >= 0])
        if heads.size > 1:
            raise MoetraceError(f"layer {layer} has rows of {heads[0]} and of {heads[-1]} heads")
        return AttentionRows(
            values,
            columns["offset"],
            columns["n_keys"],
            columns["first_position"],
            int(heads[0]) if heads.size else 1,
            text.positions,
            np.searchsorted(sources, text.sources),
        )

    def _contexts(self, length: int, layer: int) -> Ints:
        """The first place of every token id in every prompt at which it sees ``length`` keys."""
        attention = self._attention(self.text, layer)
        enough = np.flatnonzero(attention.known & (attention.n_keys >= length) & (self.text.tokens >= 0))
        pair = self.text.owner[enough] * (int(self.text.tokens.max(initial=0)) + 1) + self.text.tokens[enough]
        first: Ints = np.sort(np.unique(pair, return_index=True)[1])
        return enough[first]


def _routed(hidden: npt.NDArray[np.float32], router: RouterWeights) -> Scores:
    """What the router would choose by, had it read ``hidden`` (n, D): (n, E)."""
    logits: Scores = hidden @ router.weight.T
    if router.bias is not None:
        logits = logits + router.bias
    return logits if router.selection_bias is None else expit(logits) + router.selection_bias


def _joined(found: Mapping[int, Prediction]) -> Frames:
    recall = pd.concat([f.recall.assign(layer=n) for n, f in found.items()], ignore_index=True)
    gains = pd.concat([f.gains.assign(layer=n) for n, f in found.items()], ignore_index=True)
    gains["q_value"] = nulls.benjamini_hochberg(gains["p_value"])
    return tuple(f[["layer", *[c for c in f if c != "layer"]]] for f in (recall, gains))  # type: ignore[return-value]
