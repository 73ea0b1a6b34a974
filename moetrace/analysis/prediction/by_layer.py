"""Predictions of every layer, from a text and its traces' columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.special import expit

from moetrace.analysis.counts.attention import FEATURES, attention_features, attention_windows
from moetrace.analysis.counts.columns import TokenColumns
from moetrace.analysis.counts.counting import Progress
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.prediction.attended_experts import attended_experts
from moetrace.analysis.prediction.attention_prediction import attention_prediction
from moetrace.analysis.prediction.context_attention_routing import (
    FEWEST,
    attention_similarity,
    context_attention_routing,
    routing_similarity,
)
from moetrace.analysis.prediction.predict import Prediction, Problem, Scores, gain_tests
from moetrace.analysis.prediction.task_prediction import task_prediction
from moetrace.analysis.statistics import nulls
from moetrace.analysis.statistics.shapes import Floats, Ints
from moetrace.errors import MoetraceError, UsageError

Frames = tuple[pd.DataFrame, pd.DataFrame]


class RouterWeights(Protocol):
    """A router: logits = ``weight`` (E, D) @ gate input + ``bias`` (E,); ``selection_bias`` (E,) for choosing only."""

    @property
    def weight(self) -> npt.NDArray[np.float32]: ...
    @property
    def bias(self) -> npt.NDArray[np.float32] | None: ...
    @property
    def selection_bias(self) -> npt.NDArray[np.float32] | None: ...


def attention_by_layer(
    columns: TokenColumns,
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
    text = columns.text.some(max_tokens, (seed, 7))
    wanted = columns.wanted(layers)
    found: dict[int, Prediction] = {}
    for done, layer in enumerate(wanted):
        index = columns.index(layer)
        attention = columns.attention(text, layer)
        there = text.known(index) & attention.known
        if there.any():
            part = text.take(there)
            found[layer] = attention_prediction(
                _problem(part, index, seed),
                attention_features(attention)[there],
                columns.column("gate_input", part, index),
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


def attended_by_layer(
    columns: TokenColumns,
    layers: Iterable[int] | None = None,
    *,
    max_tokens: int = 4000,
    seed: int = 0,
    **options: Any,
) -> tuple[pd.DataFrame, int]:
    """:func:`~moetrace.analysis.prediction.attended_experts.attended_experts` of all layers that have attention.

    Raises ChannelMissingError without attention.
    """
    text = columns.text.some(max_tokens, (seed, 7), None)
    every = []
    for layer in columns.wanted(layers):
        index, attention = columns.index(layer), columns.attention(text, layer)
        there = text.known(index) & attention.known
        if there.any():
            every.append((index, text.take(there), attention_features(attention)[there]))
    return attended_experts(every, FEATURES, seed=seed, **options)


def task_by_layer(
    columns: TokenColumns,
    early_layer: int = 4,
    layers: Iterable[int] | None = None,
    *,
    routers: Mapping[int, RouterWeights] | None = None,
    max_tokens: int = 20_000,
    n_permutations: int = 199,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Frames:
    """:func:`~moetrace.analysis.task_prediction` of each layer after ``early_layer``.

    As :func:`attention_by_layer`. ``routers`` by layer number give the predictor ``gate``; it and ``hidden`` need
    gate inputs, and are left out without them. Raises UsageError if there is no such layer.
    """
    text = columns.text.some(max_tokens, (seed, 7))
    probe = early_index(columns, early_layer)
    wanted = [n for n in columns.wanted(layers) if n > early_layer]
    found: dict[int, Prediction] = {}
    # layers that are known at the same tokens are tested together
    alike: dict[bytes, list[int]] = {}
    for layer in wanted:
        alike.setdefault((text.known(columns.index(layer)) & text.known(probe)).tobytes(), []).append(layer)
    for mask, together in alike.items():
        part = text.take(np.frombuffer(mask, dtype=bool))
        if not len(part):
            continue
        early = part.member(probe)
        hidden = columns.column("gate_input", part, probe)
        problems = (_problem(part, columns.index(layer), seed) for layer in together)
        tests = gain_tests(problems, early, n_permutations=n_permutations, seed=seed)
        chosen = sparse.csr_array(early)  # few are not 0
        for layer, test in zip(together, tests, strict=True):
            problem = _problem(part, columns.index(layer), seed)
            gate = None if hidden is None or not routers else _routed(hidden, routers[layer])
            found[layer] = task_prediction(problem, chosen, hidden, gate, seed=seed, test=test, **options)
            if progress is not None:
                progress(len(found), len(wanted))
    if not found:
        raise UsageError(
            f"no layer after {early_layer} has routing of these tokens", fix="choose another phase"
        )
    return _joined({layer: found[layer] for layer in wanted if layer in found})


def contexts_by_layer(
    columns: TokenColumns,
    tokens: Sequence[int] = (),
    layers: Iterable[int] | None = None,
    *,
    n_tokens: int = 5,
    length: int = 16,
    max_contexts: int = 200,
    n_permutations: int = 999,
    seed: int = 0,
    progress: Progress | None = None,
) -> Frames:
    """:func:`~moetrace.analysis.context_attention_routing` of tokens in many prompts.

    Parameters
    ----------
    tokens
        Token ids; by default the ``n_tokens`` that stand in most prompts.
    length
        Keys that are compared; a context is the first place in a prompt where the token sees so many. At most
        ``max_contexts`` prompts are drawn.

    Returns two tables: one row per (token, layer), the fields of ContextTest and ``q_value`` over all rows; and, of
    the (token, layer) whose correlation is largest, both similarity matrices, one row per pair of contexts:
    ``token``, ``layer``, ``context``, ``other`` (prompts), ``attention``, ``routing``, ``positions`` apart. Raises
    ChannelMissingError without attention, UsageError if no token has enough contexts.
    """
    wanted, rng = columns.wanted(layers), np.random.default_rng((seed, 8))
    places = _contexts(columns, length, wanted[0])
    if not len(tokens):
        ids, counts = np.unique(columns.text.tokens[places], return_counts=True)
        ids, counts = ids[counts >= FEWEST], counts[counts >= FEWEST]
        tokens = ids[np.argsort(-counts, kind="stable")][:n_tokens].tolist()
    out: list[dict[str, Any]] = []
    strongest, most = pd.DataFrame(), -np.inf
    for done, token in enumerate(tokens):
        mine = places[columns.text.tokens[places] == token]
        if mine.size > max_contexts:
            mine = np.sort(rng.choice(mine, max_contexts, replace=False))
        part = columns.text.take(mine)
        for layer in wanted if mine.size >= FEWEST else []:
            index = columns.index(layer)
            windows = attention_windows(columns.attention(part, layer), length)
            there = part.known(index) & np.isfinite(windows).all(axis=(1, 2))
            if np.count_nonzero(there) >= FEWEST:
                alike = (
                    attention_similarity(windows[there]),
                    routing_similarity(part.experts[there, index], part.n_expert),
                )
                test = context_attention_routing(
                    *alike, part.positions[there], n_permutations=n_permutations, seed=seed
                )
                out.append({"token": token, "layer": layer, **asdict(test)})
                if test.partial > most:
                    most = test.partial
                    strongest = _pairs(token, layer, alike, part.take(there))
        if progress is not None:
            progress(done + 1, len(tokens))
    if not out:
        raise UsageError(
            f"no token stands in {FEWEST} prompts with {length} keys of attention",
            why="contexts of one prompt are not independent, so one of each is taken",
            fix="capture more prompts that share words, or lower --length",
        )
    frame = pd.DataFrame(out)
    return frame.assign(q_value=nulls.benjamini_hochberg(frame["p_value"])), strongest


def _pairs(token: int, layer: int, alike: tuple[Floats, Floats], part: RoutedText) -> pd.DataFrame:
    """Both similarity matrices of one case, pair by pair."""
    a, b = np.triu_indices(len(part), 1)
    names = [part.prompts[i] for i in part.owner.tolist()]
    return pd.DataFrame(
        {
            "token": token,
            "layer": layer,
            "context": [names[i] for i in a.tolist()],
            "other": [names[i] for i in b.tolist()],
            "attention": alike[0][a, b],
            "routing": alike[1][a, b],
            "positions": np.abs(part.positions[a] - part.positions[b]),
        }
    )


def early_index(columns: TokenColumns, layer: int) -> int:
    """The place of a layer that others follow. Raises UsageError if it is none."""
    have: list[int] = columns.text.layers.tolist()
    if len(have) < 2:
        raise UsageError("there is one MoE layer: none after it to predict", fix="capture two layers or more")
    if layer not in have[:-1]:
        raise UsageError(
            f"layer {layer} is no MoE layer with others after it",
            fix=f"choose --early-layer among: {', '.join(map(str, have[:-1]))}",
        )
    return have.index(layer)


def _problem(text: RoutedText, index: int, seed: int) -> Problem:
    return Problem.of(
        text.experts[:, index],
        text.n_expert,
        prompt=text.owner,
        run=text.runs,
        token=text.tokens,
        position=text.positions,
        seed=seed,
    )


def _contexts(columns: TokenColumns, length: int, layer: int) -> Ints:
    """The first place of every token id in every prompt at which it sees ``length`` keys."""
    attention = columns.attention(columns.text, layer)
    enough = np.flatnonzero(attention.known & (attention.n_keys >= length) & (columns.text.tokens >= 0))
    pair = (
        columns.text.owner[enough] * (int(columns.text.tokens.max(initial=0)) + 1)
        + columns.text.tokens[enough]
    )
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
