"""Which experts could be one, and what merging them costs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.experts import merging
from moetrace.analysis.experts.outputs import expert_outputs, layer_rows
from moetrace.analysis.published.experts import as_published_similarity
from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.held_out import CHOSEN_NOTE, TEXT_HELP, compared_with
from moetrace.findings.subject import Subject
from moetrace.findings.wording import layer_list, listed, span
from moetrace.model.experts import LayerExperts
from moetrace.model.file import ModelFile
from moetrace.model.merged import write_merged
from moetrace.numbers import numbers

_OUTPUT_BYTES = 512 << 20  # of all experts' outputs of a layer
_ROUTING_TOKENS = 8192


@dataclass(frozen=True)
class ExpertMerging(Question):
    """Which experts of a layer are alike, and what does it cost to make one of them?

    Every pair of experts of a layer is compared by its weights (dequantised from the model file, hidden neurons
    matched), by what both compute from the same captured inputs, and by when they are chosen. Then files with fewer
    experts are written, merged by each criterion, at random, and with the least used left out, and evaluated with
    llama.cpp on held-out text.

    Asked in the seed experiment "MoE dynamics", which published "0 % mergeable" from a comparison of no pairs.
    """

    name: ClassVar[str] = "expert-merging"
    title: ClassVar[str] = "Expert merging"
    place: ClassVar[int] = 230
    channels: ClassVar[tuple[str, ...]] = ("gate_input",)
    needs_model: ClassVar[bool] = True

    counts: str | None = parameter(
        None, "experts per layer to go down to, such as 28,24,16; default: 7/8, 3/4 and 1/2 of them"
    )
    criteria: str = parameter(",".join(merging.CRITERIA), "what to merge by")
    in_place: bool = parameter(False, "also evaluate merging with the routers left as they are")
    tokens: int = parameter(512, "inputs to compare outputs on, per layer")
    pairs: int = parameter(0, "pairs to compare the weights of, per layer, nearest router rows first; 0: all")
    null: int = parameter(19, "null comparisons of weights, each as much work as the comparison; 0: none")
    threshold: float = parameter(0.8, "cosine of matched weights from which two experts are candidates")
    distance: float = parameter(0.5, "output distance below which two experts are candidates")
    text: str | None = parameter(None, TEXT_HELP)
    kl: bool = parameter(True, "measure KL divergence too: keeps logits in a temporary folder")
    keep: str | None = parameter(
        None, "keep the file merged by the first criterion to the first count here", metavar="FILE"
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it, for all layers."""
        path = subject.need_model("expert merging")
        criteria = [name.strip() for name in self.criteria.split(",") if name.strip()]
        if not criteria or set(criteria) - set(merging.CRITERIA):
            raise UsageError(
                f"--criteria {self.criteria!r} is not known",
                fix=f"choose among: {', '.join(merging.CRITERIA)}",
            )
        with ModelFile(path) as model:
            pairs, published, use, caveats = self._compare(subject, model)
            counts = self._counts(model)
            blocks = int(model.field("{arch}.expert_group_count", 1) or 1)
            n_expert, n_layers = model.n_expert, len(model.moe_layers)
        if pairs["output_distance"].isna().all() and "outputs" in criteria:
            criteria.remove("outputs")
        distances = {
            "outputs": _distances(pairs, "output_distance", n_expert),
            "weights": _distances(pairs.assign(d=1 - pairs["cosine_aligned"]), "d", n_expert),
            "routing": _distances(pairs.assign(d=1 - pairs["logit_correlation"]), "d", n_expert),
        }
        distances["dominant"] = distances["routing"]
        curve, notes = self._curve(subject, path, distances, use, counts, criteria, blocks)
        candidates = merging.merge_candidates(
            pairs, max_distance=self.distance, min_cosine=self.threshold
        ).reset_index(drop=True)
        compared = int(pairs["cosine_aligned"].notna().sum())
        possible = n_layers * n_expert * (n_expert - 1) // 2
        closest = pairs.iloc[int(pairs["cosine_aligned"].argmax())]
        sentences = [
            f"{compared:,} of {possible:,} pairs of experts were compared by weights, in {n_layers} layers;"
            f" {len(candidates)} are candidates for merging.",
            f"The most alike weights have experts {closest['expert_a']:.0f} and {closest['expert_b']:.0f} of layer"
            f" {closest['layer']:.0f}: cosine {closest['cosine_aligned']:.3f} with neurons matched,"
            f" {closest['cosine']:.3f} as they lie in the file"
            + (
                f"; unrelated experts reach {closest['null_max']:.3f} once matched."
                if np.isfinite(closest["null_max"])
                else "."
            ),
            *_curve_sentences(curve, n_expert),
        ]
        tables = {
            "curve": curve,
            "candidates": candidates,
            "pairs": pairs,
            "as_published": published,
        }
        caveats = [
            *caveats,
            *notes,
            CHOSEN_NOTE,
            "Experts that are far apart one by one can still be spared together, and the other way round: the curve"
            " is what counts. No training follows the merging.",
        ]
        return self.finding(subject, sentences, tables, caveats)

    def _counts(self, model: ModelFile) -> list[int]:
        n, least = model.n_expert, model.n_expert_used
        blocks = int(model.field("{arch}.expert_group_count", 1) or 1)
        if self.counts:
            counts = numbers(self.counts, "--counts")
            if not all(least <= count <= n and count % blocks == 0 for count in counts):
                raise UsageError(
                    f"--counts {self.counts} cannot be",
                    fix=f"give {least} to {n}" + (f", multiples of {blocks}" if blocks > 1 else ""),
                )
            return counts
        found = {int(n * part) // blocks * blocks for part in (7 / 8, 3 / 4, 1 / 2)}
        return sorted((count for count in found if least <= count < n), reverse=True)

    def _compare(
        self, subject: Subject, model: ModelFile
    ) -> tuple[pd.DataFrame, pd.DataFrame, dict[int, np.ndarray[Any, Any]], list[str]]:
        """All pairs of all layers; the published comparison; how often each expert was used."""
        routing = subject.routing
        numbers = [int(number) for number in routing.counts.layers]
        included = routing.counts.included.sum(axis=0)
        parts, published, use, caveats = [], [], {}, []
        unseen = sorted(set(model.moe_layers) - set(numbers))
        if unseen:
            caveats.append(
                f"Of layers {layer_list(unseen)} nothing was looked at: their experts are compared by weights only."
            )
        for layer in model.moe_layers:
            subject.progress(f"comparing the experts of layer {layer}")
            experts = LayerExperts(model, layer)
            chosen = self._chosen_pairs(model, layer)
            use[layer] = np.ones(len(experts))
            routed = outputs = None
            if layer in numbers:
                index = numbers.index(layer)
                use[layer] = np.asarray(included[index, : len(experts)], np.float64)
                rows = layer_rows(routing, index, _ROUTING_TOKENS)
                router = model.router(layer)
                logits = rows.gate_input @ router.weight.T + (0 if router.bias is None else router.bias)
                routed = (rows.experts, logits)
                if experts.reads_gate_input:
                    at = self._spread(len(rows.rows), len(experts) * rows.gate_input.shape[1])
                    made = expert_outputs(experts, rows.gate_input[at], experts.activation)
                    outputs = (made, rows.prompts[at])
            table = merging.expert_merging(
                experts,
                experts.activation,
                pairs=chosen,
                n_null=self.null,
                seed=subject.seed,
                routing=routed,
                outputs=outputs,
            )
            table.insert(0, "layer", layer)
            parts.append(table)
            old = as_published_similarity(experts, self.threshold)
            batched = as_published_similarity(experts, self.threshold, batched=True)
            published.append(
                {
                    "layer": layer,
                    "pairs_compared_published_code": len(batched),
                    "mergeable_published_code": int(batched["mergeable"].sum()),
                    "pairs_compared": len(old),
                    "mergeable": int(old["mergeable"].sum()),
                    "highest_cosine": old["cosine"].max(),
                }
            )
        if not LayerExperts(model, model.moe_layers[0]).reads_gate_input:
            caveats.append(
                f"In {model.architecture} the experts do not read what the router reads: their outputs are not"
                " compared."
            )
        return pd.concat(parts, ignore_index=True), pd.DataFrame(published), use, caveats

    def _spread(self, n: int, n_values: int) -> np.ndarray[Any, Any]:
        """Which of n inputs to compare outputs on, so that all outputs fit into memory."""
        most = max(1, min(self.tokens, n, _OUTPUT_BYTES // (4 * n_values)))
        return np.linspace(0, n - 1, most).astype(np.int64)

    def _chosen_pairs(self, model: ModelFile, layer: int) -> np.ndarray[Any, Any] | None:
        """Which pairs of a layer to compare by weights: those whose router rows are nearest; None: all."""
        rows = model.router(layer).weight.astype(np.float64)
        a, b = np.triu_indices(len(rows), 1)
        if not 0 < self.pairs < len(a):
            return None
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        nearest = np.sort(np.argsort(-(rows[a] * rows[b]).sum(axis=1), kind="stable")[: self.pairs])
        return np.stack([a[nearest], b[nearest]], axis=1)

    def _curve(
        self,
        subject: Subject,
        path: Path,
        distances: Mapping[str, Mapping[int, Any]],
        use: Mapping[int, Any],
        counts: list[int],
        criteria: list[str],
        blocks: int,
    ) -> tuple[pd.DataFrame, list[str]]:
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        with (
            compared_with(subject, self.text, kl=self.kl) as comparison,
            TemporaryDirectory(prefix="moetrace-merged-") as folder,
        ):
            first = True
            for count in counts:
                for criterion in criteria:
                    groups = merging.group_layers(
                        distances.get(criterion, {}),
                        use,
                        count,
                        criterion=criterion,
                        n_blocks=blocks,
                        seed=subject.seed,
                    )
                    for in_place in (False, True) if self.in_place and criterion != "prune" else (False,):
                        file = write_merged(
                            path,
                            Path(folder) / "merged.gguf",
                            groups,
                            merge=merging.merge,
                            keep_count=in_place,
                        )
                        found, apart = comparison.other(f"{count} experts, merged by {criterion}", file.path)
                        change = likelihood_change(
                            comparison.base.nll, found.nll, found.text, kl=apart.kl, same_top=apart.same_top
                        )
                        rows.append(
                            {
                                "criterion": criterion,
                                "n_expert": count,
                                "in_place": in_place,
                                "bytes": file.n_bytes,
                                "size": file.n_bytes / file.n_bytes_before,
                                "nll": found.mean,
                                **change.columns,
                            }
                        )
                        if file.types and not notes:
                            name, (before, now) = next(iter(file.types.items()))
                            notes.append(
                                f"Merged experts of type {before} are written as {now}, which gguf-py can write:"
                                f" {name} and {len(file.types) - 1} more. Sizes in the curve are of such files."
                            )
                        if first and self.keep:
                            shutil.copyfile(file.path, self.keep)
                            notes.append(f"The file merged by {criterion} to {count} experts is {self.keep}.")
                        first = False
        curve = pd.DataFrame(rows)
        # the model as it is stands at the end of the frontier: whatever is larger, or costs less than nothing
        curve["frontier"] = merging.frontier(np.append(curve["size"], 1.0), np.append(curve["change"], 0.0))[
            :-1
        ]
        return curve, notes

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Compression against quality, and how alike pairs are."""
        from moetrace import plot

        curve, pairs = finding.tables["curve"], finding.tables["pairs"]
        return {
            "curve": Figure(
                lambda ax: plot.file_curve(curve[~curve["in_place"].astype(bool)], "merged by", ax=ax),
                "Change in held-out negative log-likelihood against the size of the merged file, with 95 % intervals"
                " over texts, by what experts were merged by; stepped: the frontier.",
            ),
            "pairs": Figure(
                lambda ax: plot.alike(pairs, ax=ax),
                "Every pair of experts: distance of outputs against cosine of weights.",
            ),
        }


def _distances(pairs: pd.DataFrame, column: str, n_expert: int) -> dict[int, np.ndarray[Any, Any]]:
    return {
        int(str(layer)): merging.pair_matrix(part, column, n_expert) for layer, part in pairs.groupby("layer")
    }


def _curve_sentences(curve: pd.DataFrame, n_expert: int) -> list[str]:
    out = []
    removed = curve[~curve["in_place"].astype(bool)]
    for count, part in removed.groupby("n_expert", sort=False):
        best = part.iloc[int(part["change"].argmin())]
        line = (
            f"With {count} of {n_expert} experts per layer ({best['size']:.0%} of the file) the cheapest is"
            f" {_by(best['criterion'])}: {_change(best)}"
        )
        chance = part[part["criterion"] == "random"]
        if len(chance) and best["criterion"] != "random":
            line += f"; merging at random costs {_change(chance.iloc[0])}"
        out.append(line + ".")
    best_of = curve[curve["frontier"]].sort_values("size", ascending=False)
    if len(best_of):
        files = [f"{row.n_expert} by {row.criterion}" for row in best_of.itertuples()]
        out.append(
            f"On the frontier of size and quality, by point estimates: {listed(files)}"
            f" ({len(best_of)} of {len(curve)} files; none of the others is smaller without costing more)."
        )
    return out


def _by(criterion: str) -> str:
    return {
        "prune": "leaving out the least used",
        "random": "merging at random",
        "dominant": "merging into the most used",
    }.get(criterion, f"merging by {criterion}")


def _change(row: Any) -> str:
    return f"{span(row['change'], row['change_low'], row['change_high'], '+.3f')} nats per token"
