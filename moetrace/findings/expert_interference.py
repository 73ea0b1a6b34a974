"""What other numbers of experts per token do, and whether experts pull the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.experts import interference
from moetrace.analysis.experts.outputs import chosen_outputs, layer_rows
from moetrace.analysis.published import experts as published
from moetrace.analysis.statistics import nulls
from moetrace.errors import ChannelMissingError, UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.held_out import CHOSEN_NOTE, TEXT_HELP, compared_with
from moetrace.findings.subject import Subject
from moetrace.findings.wording import of_layers, span
from moetrace.host.llama import Llama
from moetrace.model.experts import LayerExperts
from moetrace.model.file import ModelFile
from moetrace.numbers import numbers

_TOO_FAR = 0.05  # quantised activations cost about 1 %


@dataclass(frozen=True)
class ExpertInterference(Question):
    """Do the experts that a token uses help or hinder each other, and what does another number of them cost?

    The same held-out text is evaluated with k = 1, 2, 4, … experts per token (llama.cpp's own override of
    expert_used_count). Within a layer, what each chosen expert contributes is computed from captured inputs and
    dequantised weights: whether the sum is what llama.cpp computed, whether its terms add up or cancel, and which
    pairs pull the same way.

    Asked in the seed experiment "MoE dynamics", which compared lengths of generated texts.
    """

    name: ClassVar[str] = "expert-interference"
    title: ClassVar[str] = "Expert interference"
    place: ClassVar[int] = 220
    channels: ClassVar[tuple[str, ...]] = ("gate_input", "tensor:ffn_moe_out-*")
    needs_model: ClassVar[bool] = True

    k: str | None = parameter(
        None, "experts per token to try, such as 1,2,4; default: powers of 2 up to twice the model's own"
    )
    tokens: int = parameter(1024, "tokens per layer to compute contributions of")
    min_tokens: int = parameter(20, "tokens that must use both experts of a pair")
    null: int = parameter(199, "null arrangements")
    text: str | None = parameter(None, TEXT_HELP)
    kl: bool = parameter(True, "measure KL divergence too: keeps logits in a temporary folder")
    generate: int = parameter(
        30, "tokens to generate for the published comparison of lengths; 0: leave it out"
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        path = subject.need_model("expert interference")
        with ModelFile(path) as model:
            default, ks = model.n_expert_used, self._ks(model)
            layers, pairs, caveats = self._contributions(subject, model)
        nll, kl, same_top = {}, {}, {}
        with compared_with(subject, self.text, kl=self.kl) as comparison:
            base = comparison.base
            for k in ks:
                if k == default:
                    nll[k], kl[k], same_top[k] = (
                        base.nll,
                        np.zeros_like(base.nll),
                        np.ones(base.n_tokens, bool),
                    )
                    continue
                found, apart = comparison.other(f"k = {k}", path, n_expert_used=k)
                nll[k], same_top[k] = found.nll, apart.same_top
                kl[k] = np.full(base.n_tokens, np.nan) if apart.kl is None else apart.kl
        table = interference.expert_interference(
            nll, base.text, default, kl=kl if self.kl else None, same_top=same_top
        )
        tables = {
            "k": table,
            "layers": layers,
            "pairs": pairs,
            "texts": interference.better_with(nll, base.text, default),
        }
        if self.generate:
            lengths = self._lengths(subject, path, ks)
            if lengths is None:
                caveats.append("The published comparison needs prompts, and k = 1 among the k tried.")
            else:
                tables["as_published_lengths"] = published.as_published_interference(lengths, default)
        sentences = [*_k_sentences(table, default), *_layer_sentences(layers, pairs)]
        caveats = [
            "A model was trained with its own k. Where mixing weights are not normalised over the chosen experts, fewer"
            " experts also mean a smaller output.",
            CHOSEN_NOTE,
            "Some tokens are predicted better with another k by chance alone.",
            *caveats,
        ]
        return self.finding(subject, sentences, tables, caveats)

    def _ks(self, model: ModelFile) -> list[int]:
        default, most = model.n_expert_used, model.n_expert
        if self.k:
            chosen = set(numbers(self.k, "--k"))
            if not all(1 <= k <= most for k in chosen):
                raise UsageError(f"--k {self.k} cannot be", fix=f"give 1 to {most}")
        else:
            chosen = {1 << i for i in range(16) if 1 << i <= min(most, 2 * default)}
        return sorted(chosen | {default})

    def _contributions(
        self, subject: Subject, model: ModelFile
    ) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
        trace, rows, pairs, caveats = subject.trace, [], [], []
        numbers = [int(number) for number in subject.routing.counts.layers]
        if not LayerExperts(model, numbers[0]).reads_gate_input:
            trace.gate_input  # noqa: B018  # raises ChannelMissingError
            names = [
                "layer",
                "tokens",
                "gain",
                "low",
                "high",
                "p_value",
                "q_value",
                "error_median",
                "error_max",
            ]
            return (
                pd.DataFrame(columns=names),
                pd.DataFrame(columns=["layer", "expert_a", "expert_b"]),
                [
                    f"In {model.architecture} the experts do not read what the router reads: what they contribute is"
                    " not computed."
                ],
            )
        checked = True
        for index, layer in enumerate(numbers):
            subject.progress(f"what the experts of layer {layer} contribute")
            experts, chosen = LayerExperts(model, layer), layer_rows(subject.routing, index, self.tokens)
            parts = chosen_outputs(
                experts,
                chosen.gate_input,
                chosen.experts,
                chosen.weights,
                experts.activation,
                weights_before=experts.weights_before,
            )
            row: dict[str, Any] = {"layer": layer}
            row |= interference.combination(
                parts, chosen.experts, chosen.prompts, n_null=self.null, seed=subject.seed
            )
            try:
                captured = trace.tensor(f"ffn_moe_out-{layer}", chosen.rows)
                error = interference.linearity(parts, captured)
                row |= {"error_median": float(np.nanmedian(error)), "error_max": float(np.nanmax(error))}
            except ChannelMissingError as e:
                row |= {"error_median": np.nan, "error_max": np.nan}
                if checked:
                    caveats.append(
                        f"The sums were not held against llama.cpp's own: {e.what}; {e.fix}.".replace(
                            f"ffn_moe_out-{layer}", "ffn_moe_out-*"
                        )
                    )
                checked = False
            rows.append(row)
            found = interference.pair_compatibility(
                parts,
                chosen.experts,
                chosen.prompts,
                min_tokens=self.min_tokens,
                n_null=self.null,
                seed=subject.seed,
            )
            found.insert(0, "layer", layer)
            pairs.append(found)
        table = pd.DataFrame(rows)
        wrong = table[table["error_median"] > _TOO_FAR]
        if len(wrong):
            caveats.append(
                f"The sums do not fit {of_layers(wrong['layer'], len(table))}: {model.architecture} computes something"
                " else there than is assumed, or its activations are rounded hard. Do not rely on what is said of"
                " contributions."
            )
        table.insert(6, "q_value", nulls.benjamini_hochberg(table["p_value"]))
        return table, pd.concat(pairs, ignore_index=True), caveats

    def _lengths(self, subject: Subject, path: Path, ks: Sequence[int]) -> dict[int, list[int]] | None:
        """Characters that the model writes with each k after the first five prompts of the trace."""
        trace = subject.trace
        request, phase = np.asarray(trace.request), np.asarray(trace.phase)
        prompts = []
        for number in trace.requests.index[:5]:
            rows = np.flatnonzero((request == number) & (phase != 1))
            prompts.append(trace.token_ids[rows[np.argsort(trace.positions[rows])]].tolist())
        prompts = [tokens for tokens in prompts if tokens]
        if not prompts or 1 not in ks:
            return None
        with ModelFile(path) as model:
            key = f"{model.architecture}.expert_used_count"
        lengths = {}
        for k in ks:
            with Llama(
                path,
                n_ctx=max(map(len, prompts)) + self.generate,
                **{**subject.model_options, "overrides": {key: k}},
            ) as loaded:
                lengths[k] = [len(_greedy(loaded, tokens, self.generate)) for tokens in prompts]
        return lengths

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """NLL by k, and whether experts add up, by layer."""
        from moetrace import plot

        k, layers = finding.tables["k"], finding.tables["layers"]
        return {
            "k": Figure(
                lambda ax: plot.change_by_k(k, ax=ax),
                "Change in held-out negative log-likelihood with k experts per token instead of the model's own number,"
                " with 95 % intervals over texts.",
            ),
            "gain": Figure(
                lambda ax: plot.gain(layers, ax=ax),
                "Whether the contributions of a token's experts add up (above 1) or cancel (below), by layer, with 95 %"
                " intervals over prompts.",
            ),
        }


def _greedy(model: Llama, tokens: Sequence[int], n: int) -> str:
    """Text of up to ``n`` tokens that the model writes after ``tokens``, greedily."""
    model.forget(0)
    model.decode([(token, i, 0, i == len(tokens) - 1) for i, token in enumerate(tokens)])
    out: list[int] = []
    index = len(tokens) - 1
    while len(out) < n:
        token = int(np.argmax(model.logits(index)))
        if model.is_end(token):
            break
        out.append(token)
        if len(out) < n:
            model.decode([(token, len(tokens) + len(out) - 1, 0, True)])
            index = 0
    return b"".join(model.piece(token) for token in out).decode("utf-8", "replace")


def _k_sentences(table: pd.DataFrame, default: int) -> list[str]:
    own = table[table["k"] == default].iloc[0]
    out = [
        f"With its own k = {default} the model needs {own['nll']:.3f} nats per token on {own['texts']:.0f} held-out"
        f" texts ({own['tokens']:,.0f} tokens)."
    ]
    for row in table[table["k"] != default].to_dict("records"):
        kl = f", KL {row['kl']:.3f}" if np.isfinite(row["kl"]) else ""
        out.append(
            f"k = {row['k']:.0f}: {span(row['change'], row['change_low'], row['change_high'], '+.3f')} nats per"
            f" token{kl}; the same most likely token at {row['same_top']:.1%} of positions;"
            f" {row['better_texts']:.0%} of the texts are predicted better."
        )
    return out


def _layer_sentences(layers: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    if not len(layers):
        return []
    high, low = layers.iloc[int(layers["gain"].argmax())], layers.iloc[int(layers["gain"].argmin())]
    related = layers[layers["q_value"] <= 0.05]
    out = [
        f"What a token's experts contribute adds up most in layer {high['layer']:.0f} (‖sum‖² over the"
        f" sum of ‖·‖²: {span(high['gain'], high['low'], high['high'], '.2f')}) and least in layer"
        f" {low['layer']:.0f}: {span(low['gain'], low['low'], low['high'], '.2f')}; 1 is at right angles. In"
        f" {len(related)} of {len(layers)} layers it differs from what unrelated experts would do (FDR 5 %).",
    ]
    found = pairs[pairs["p_family"] <= 0.05] if len(pairs) else pairs
    if len(pairs):
        line = f"{len(found)} of {len(pairs)} pairs that enough tokens use are more than unrelated"
        if len(found):
            together, against = (
                found.iloc[int(found["cosine"].argmax())],
                found.iloc[int(found["cosine"].argmin())],
            )
            line += (
                f": from {_pair(against)} to {_pair(together)}" if len(found) > 1 else f": {_pair(together)}"
            )
        out.append(line + ".")
    if layers["error_max"].notna().any():
        out.append(
            "Each layer's output is the weighted sum of its experts' outputs: computed independently, it differs from"
            f" llama.cpp's by {layers['error_median'].median():.1e} of its length in the median,"
            f" {layers['error_max'].max():.1e} at most."
        )
    return out


def _pair(row: Any) -> str:
    return (
        f"experts {row['expert_a']:.0f} and {row['expert_b']:.0f} of layer {row['layer']:.0f}, cosine"
        f" {span(row['cosine'], row['low'], row['high'], '+.2f')}"
    )
