"""Which experts to leave out, and what it costs."""

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
from moetrace.analysis.experts.importance import CRITERIA, ExpertImportance
from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.analysis.statistics.shapes import Floats
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.held_out import CHOSEN_NOTE, TEXT_HELP, compared_with
from moetrace.findings.importance import SAID, importance_of
from moetrace.findings.subject import Subject
from moetrace.findings.wording import layer_list, listed, span
from moetrace.host.options import human_size, parse_size
from moetrace.model.file import ModelFile
from moetrace.model.grouping import Grouping
from moetrace.model.merged import write_merged
from moetrace.numbers import numbers


@dataclass(frozen=True)
class Pruning(Question):
    """Which experts can be left out for texts like these, and what does the model lose?

    Files are written that keep the most important experts of each layer (router rows and matrices of the others are
    removed; those that stay keep their bytes), by uses, by mixing weight, by mean and summed saliency (if the channel
    outputs was captured) and at random, and evaluated with llama.cpp on held-out text against the model as it is:
    change of the negative log-likelihood with an interval over texts, KL divergence, agreement on the next token. No
    training follows.
    """

    name: ClassVar[str] = "pruning"
    title: ClassVar[str] = "Pruning"
    place: ClassVar[int] = 225
    needs_model: ClassVar[bool] = True

    keep: str = parameter("", "experts per layer to keep, as 28,24; default: 7/8, 3/4 and 1/2 of them")
    target: str = parameter("", "size that the file shall have at most, as 12GiB: keeps as many as fit")
    by: str = parameter("", "what to rank experts by, as saliency,weight; default: all that was captured")
    random: bool = parameter(True, "also leave experts out at random: what a ranking must beat")
    text: str | None = parameter(None, TEXT_HELP)
    kl: bool = parameter(True, "measure KL divergence too: keeps logits in a temporary folder")
    write: str | None = parameter(
        None, "write the cheapest file of the first count here, random ones left aside", metavar="FILE"
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        path = subject.need_model("pruning")
        found, caveats = importance_of(subject)
        with ModelFile(path) as model:
            counts = self._counts(model)
            blocks = int(model.field("{arch}.expert_group_count", 1) or 1)
            n_expert, size = model.n_expert, model.n_bytes
            unseen = sorted(set(model.moe_layers) - set(subject.routing.layers.tolist()))
        if unseen:
            raise UsageError(
                f"nothing is known of the experts of layers {layer_list(unseen)}",
                fix="record all layers, and leave out --layers",
            )
        ranked = self._rankings(found, subject.seed)
        curve, kept = self._curve(subject, path, ranked, counts, blocks)
        written = self._cheapest(curve)
        said = []
        for count, part in curve.groupby("n_expert", sort=False):
            best = part.iloc[int(part["change"].argmin())]
            line = (
                f"With {count} of {n_expert} experts a layer ({human_size(best['bytes'])} of {human_size(size)}) the"
                f" cheapest is to keep the most important by {_by(str(best['criterion']))}: {_change(best)}"
            )
            others = [row for _, row in part.iterrows() if row["criterion"] != best["criterion"]]
            if others:
                line += f"; {listed([f'by {_by(str(row.criterion))} {_change(row)}' for row in others], sep='; ')}"
            said.append(line + ".")
        worst = curve[curve["criterion"] != "random"]
        said.append(
            f"Of next tokens that the model thinks likeliest, {worst['same_top'].min():.1%} to"
            f" {worst['same_top'].max():.1%} stay the same over these rankings."
        )
        if self.write:
            said.append(
                f"Wrote {self.write}: {written['n_expert']} experts a layer, by {_by(str(written['criterion']))}."
            )
        return self.finding(
            subject,
            said,
            {"curve": curve, "kept": kept, "importance": found.experts, "stability": found.stability},
            [
                *caveats,
                CHOSEN_NOTE,
                "The held-out text decides: give one that is like what the model shall be used for (--text).",
                *subject.read,
            ],
        )

    def _counts(self, model: ModelFile) -> list[int]:
        n, least = model.n_expert, model.n_expert_used
        blocks = int(model.field("{arch}.expert_group_count", 1) or 1)
        possible = range(-(-least // blocks) * blocks, n + 1, blocks)
        if self.keep and self.target:
            raise UsageError("--keep and --target both say how many", fix="give one of them")
        if self.keep:
            counts = numbers(self.keep, "--keep")
            if not all(count in possible and count < n for count in counts):
                raise UsageError(
                    f"--keep {self.keep} cannot be",
                    why=f"the model has {n} experts a layer, of which a token uses {least}",
                    fix=f"give {possible.start} to {n - 1}"
                    + (f", multiples of {blocks}" if blocks > 1 else ""),
                )
            return counts
        if self.target:
            each = sum(model.expert_bytes(layer) for layer in model.moe_layers)
            fits = [
                count for count in possible if model.n_bytes - (n - count) * each <= parse_size(self.target)
            ]
            if not fits:
                least_bytes = model.n_bytes - (n - possible.start) * each
                raise UsageError(
                    f"no file of {self.target} can be had",
                    why=f"with {possible.start} experts a layer, as many as a token needs, it still has"
                    f" {human_size(least_bytes)}",
                )
            if fits[-1] == n:
                raise UsageError(
                    f"the model has {human_size(model.n_bytes)} already: nothing is to be left out"
                )
            return [fits[-1]]
        found = {int(n * part) // blocks * blocks for part in (7 / 8, 3 / 4, 1 / 2)}
        return sorted((count for count in found if count in possible and count < n), reverse=True)

    def _rankings(self, found: ExpertImportance, seed: int) -> dict[str, dict[int, Floats]]:
        """Criterion -> layer -> (E,) how important each expert is."""
        have = [name for name in CRITERIA if CRITERIA[name] in found.experts]
        by = [name.strip() for name in self.by.split(",") if name.strip()] or have
        ranked = {name: found.values(name) for name in by}
        if self.random:
            rng = np.random.default_rng(seed)
            ranked["random"] = {
                layer: rng.random(values.size) for layer, values in next(iter(ranked.values())).items()
            }
        return ranked

    def _curve(
        self,
        subject: Subject,
        path: Path,
        ranked: Mapping[str, Mapping[int, Floats]],
        counts: list[int],
        blocks: int,
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        rows: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        with (
            compared_with(subject, self.text, kl=self.kl) as comparison,
            TemporaryDirectory(prefix="moetrace-pruned-") as folder,
        ):
            for count in counts:
                for criterion, values in ranked.items():
                    groups = {
                        layer: merging.drop_experts(value, count, n_blocks=blocks)
                        for layer, value in values.items()
                    }
                    file = write_merged(path, Path(folder) / "pruned.gguf", groups, merge=merging.merge)
                    evaluated, apart = comparison.other(f"{count} experts by {criterion}", file.path)
                    change = likelihood_change(
                        comparison.base.nll,
                        evaluated.nll,
                        evaluated.text,
                        kl=apart.kl,
                        same_top=apart.same_top,
                    )
                    rows.append(
                        {
                            "criterion": criterion,
                            "n_expert": count,
                            "bytes": file.n_bytes,
                            "size": file.n_bytes / file.n_bytes_before,
                            "nll": evaluated.mean,
                            **change.columns,
                        }
                    )
                    best = self._cheapest(pd.DataFrame(rows))
                    if self.write and (best["criterion"], best["n_expert"]) == (criterion, count):
                        _copy(file.path, self.write)
                    kept += [_kept(criterion, count, layer, group) for layer, group in groups.items()]
        curve = pd.DataFrame(rows)
        # the model as it is stands at the end of the frontier
        curve["frontier"] = merging.frontier(np.append(curve["size"], 1.0), np.append(curve["change"], 0.0))[
            :-1
        ]
        return curve, pd.DataFrame(kept)

    @staticmethod
    def _cheapest(curve: pd.DataFrame) -> dict[str, Any]:
        """The file of the first count that loses least, random ones aside."""
        first = curve[curve["n_expert"] == curve["n_expert"].iloc[0]]
        ranked = first[first["criterion"] != "random"]
        return {str(k): v for k, v in ranked.iloc[int(ranked["change"].argmin())].items()}

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Size against quality."""
        from moetrace import plot

        curve = finding.tables["curve"]
        return {
            "curve": Figure(
                lambda ax: plot.file_curve(curve, "kept by", ax=ax),
                "Change in held-out negative log-likelihood against the size of the pruned file, with 95 % intervals"
                " over texts, by what experts were kept for; stepped: the frontier.",
            )
        }


def _kept(criterion: str, count: int, layer: int, grouping: Grouping) -> dict[str, Any]:
    stays = np.flatnonzero(grouping.group >= 0)
    return {
        "criterion": criterion,
        "n_expert": count,
        "layer": layer,
        "experts": " ".join(map(str, stays.tolist())),
    }


def _copy(path: Path, to: str) -> None:
    try:
        shutil.copyfile(path, to)
    except OSError as e:
        raise MoetraceError(f"{to} cannot be written", why=e.strerror or str(e)) from e


def _by(criterion: str) -> str:
    return SAID.get(criterion, "chance")


def _change(row: Any) -> str:
    return f"{span(row['change'], row['change_low'], row['change_high'], '+.3f')} nats per token"
