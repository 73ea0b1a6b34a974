"""How many bits the experts of each layer shall have, and whether that is better than the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.experts.bits import allocate, expert_energy
from moetrace.analysis.statistics.likelihood import likelihood_change
from moetrace.analysis.statistics.shapes import Floats
from moetrace.errors import MoetraceError, UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.held_out import TEXT_HELP, Comparison, compared_with
from moetrace.findings.importance import outputs_of
from moetrace.findings.subject import Subject
from moetrace.findings.wording import layer_list, span
from moetrace.findings.written import write_text
from moetrace.host.options import human_size, parse_size
from moetrace.host.quantize import block_of, quantization_errors, type_lines, write_quantized
from moetrace.model.file import ModelFile

_SUPER = 256  # values in a block of llama.cpp's k-quants
_OF_SUPER, _OF_BLOCKS = "q2_k,q3_k,q4_k,q5_k,q6_k,q8_0", "q4_0,q4_1,q5_0,q5_1,q8_0"
_LOOKED_AT = 8  # experts of each layer whose matrices are tried
#: what plans are called
_SAID = {"share": "by what experts add", "kl": "by the measured KL of each layer", "random": "at random"}


@dataclass(frozen=True)
class _Tensors:
    """The expert matrices of a model: U units with B types each."""

    names: list[str]
    layer: list[int]
    types: list[str]
    n_bytes: Floats
    now: list[str]
    like: str

    def uniform(self, kind: str) -> float:
        return float(self.n_bytes[:, self.types.index(kind)].sum())


@dataclass(frozen=True)
class Bits(Question):
    """Which layers' experts deserve more bits, in a file of a given size, and is such a plan better than a uniform one?

    For each expert matrix the relative error of each type is measured with llama.cpp's own quantisation, and weighed
    with what the layer's experts add for these texts (squares of mixing weight × norm of the output, from the channel
    outputs) as a share of what the experts of all layers so far have added: about how large an error becomes beside
    what it is added to. Types are chosen so that the summed squares are small and the file is no larger than one whose
    experts all have one type (--like), or than a given size (--target). The plan, the uniform file and one with layers
    exchanged at random are made with llama-quantize and evaluated on held-out text: KL divergence from the model as it
    is, with intervals over texts, and its paired difference.
    """

    name: ClassVar[str] = "bits"
    title: ClassVar[str] = "Bits per layer"
    place: ClassVar[int] = 226
    needs_model: ClassVar[bool] = True

    like: str = parameter(
        "", "the uniform type to be as small as; default: q4_k, or q5_0 where k-quants do not fit"
    )
    target: str = parameter("", "size that the file shall have at most, as 12GiB, instead of --like")
    types: str = parameter(
        "", f"types to choose from; default: {_OF_SUPER}, or {_OF_BLOCKS} where those do not fit"
    )
    by: str = parameter(
        "share,random", "share, kl (each layer alone is quantised and evaluated: slow), random"
    )
    others: str = parameter("Q8_0", "type of what is not an expert, for llama-quantize")
    imatrix: str | None = parameter(None, "importance matrix for llama-quantize", metavar="FILE")
    text: str | None = parameter(None, TEXT_HELP)
    write: str | None = parameter(
        None, "write the plan here, for llama-quantize --tensor-type-file", metavar="FILE"
    )

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        path = subject.need_model("bits")
        by = [name.strip() for name in self.by.split(",") if name.strip()]
        if not set(by) <= set(_SAID) or not by or by == ["random"]:
            raise UsageError(f"--by {self.by} names no plan", fix=f"choose among: {', '.join(_SAID)}")
        text, outputs, weighed = outputs_of(subject)
        if outputs is None:
            raise UsageError(
                "what experts add is not known",
                why="the recording has no channel outputs",
                fix="capture with --capture experts,weights,outputs",
            )
        energy = expert_energy(text, outputs, weighed=weighed)
        with ModelFile(path) as model:
            tensors = self._tensors(model)
            unseen = sorted(set(tensors.layer) - set(energy["layer"]))
        if unseen:
            raise UsageError(
                f"nothing is known of the experts of layers {layer_list(unseen)}",
                fix="record all layers, and leave out --layers",
            )
        rng = np.random.default_rng(subject.seed)
        looked = {
            layer: rng.choice(len(share), _LOOKED_AT, p=share).tolist()
            for layer, share in zip(energy["layer"].tolist(), energy["by_expert"].tolist(), strict=True)
        }
        subject.progress("measuring the error of types")
        errors = quantization_errors(
            path,
            {name: looked[layer] for name, layer in zip(tensors.names, tensors.layer, strict=True)},
            tensors.types,
        )
        error = errors.pivot(index="tensor", columns="type", values="error")
        squares = error.loc[tensors.names, tensors.types].to_numpy(np.float64) ** 2
        like, budget = self._budget(subject, path, tensors)
        energy["share"] = energy["energy"] / energy["energy"].cumsum()
        of_layer = energy.set_index("layer")["share"]
        with (
            # the same arithmetic for every type: laid out anew, some are computed otherwise
            compared_with(subject, self.text, kl=True, repack=False) as comparison,
            TemporaryDirectory(prefix="moetrace-bits-") as folder,
        ):
            work = _Work(
                subject, path, Path(folder) / "made.gguf", tensors, comparison, self.others, self.imatrix
            )
            files = [work.file(f"all {like}", np.full(len(tensors.names), tensors.types.index(like)))]
            plans = {}
            for name in by:
                weight = self._weights(name, of_layer, tensors, squares, work, rng)
                plans[name] = allocate(tensors.n_bytes, weight[:, None] * squares, budget)
                files.append(work.file(name, plans[name]))
        return self._finding(subject, tensors, energy, errors, plans, files, like)

    def _tensors(self, model: ModelFile) -> _Tensors:
        names = [name for name in model.tensor_names if "_exps." in name and name.endswith(".weight")]
        if not names:
            raise UsageError(
                f"{model.path} has no stacked experts", fix="convert it again with a recent llama.cpp"
            )
        widths = {name: model.shape(name)[-1] for name in names}
        fits = all(width % _SUPER == 0 for width in widths.values())
        types = [t.strip().lower() for t in (self.types or (_OF_SUPER if fits else _OF_BLOCKS)).split(",")]
        like = self.like.lower() or ("q4_k" if fits else "q5_0")
        if like not in types and not self.target:
            types.append(like)
        blocks = {kind: block_of(kind) for kind in types}
        wrong = sorted({k for k, (n, _) in blocks.items() if any(width % n for width in widths.values())})
        if wrong:
            raise UsageError(
                f"experts cannot be {', '.join(wrong)}",
                why=f"their rows have {', '.join(map(str, sorted(set(widths.values()))))} values, which is no multiple"
                " of the type's block",
                fix=f"choose among: {_OF_BLOCKS} (--types, --like)",
            )
        n_bytes = [
            [int(np.prod(model.shape(name))) // n * size for n, size in (blocks[kind] for kind in types)]
            for name in names
        ]
        return _Tensors(
            names,
            [int(name.split(".")[1]) for name in names],
            types,
            np.array(n_bytes, np.float64),
            sorted({model.stored(name)[1].name for name in names}),
            like,
        )

    def _budget(self, subject: Subject, path: Path, tensors: _Tensors) -> tuple[str, float]:
        """The uniform type, and the bytes that the experts may have."""
        if not self.target:
            return tensors.like, tensors.uniform(tensors.like)
        if self.like:
            raise UsageError("--like and --target both say how large", fix="give one of them")
        subject.progress("measuring what is not an expert")
        with TemporaryDirectory(prefix="moetrace-bits-") as folder:
            smallest = int(np.argmin(tensors.n_bytes.sum(axis=0)))
            types = dict.fromkeys(tensors.names, tensors.types[smallest])
            size = write_quantized(path, Path(folder) / "least.gguf", types, self.others, self.imatrix)
        budget = parse_size(self.target) - (size - float(tensors.n_bytes[:, smallest].sum()))
        fitting = [kind for kind in tensors.types if tensors.uniform(kind) <= budget]
        if not fitting:
            raise UsageError(
                f"no file of {self.target} can be had",
                why=f"the smallest has {human_size(size)}",
                fix="name smaller types: --types",
            )
        return max(fitting, key=tensors.uniform), budget

    @staticmethod
    def _weights(
        name: str,
        share: pd.Series[float],
        tensors: _Tensors,
        squares: Floats,
        work: _Work,
        rng: np.random.Generator,
    ) -> Floats:
        """(U,) what the squared relative error of each matrix costs."""
        layers = sorted(set(tensors.layer))
        if name == "share":
            found = share.to_dict()
        elif name == "random":
            found = dict(zip(layers, rng.permutation([share[layer] for layer in layers]), strict=True))
        else:  # the KL that the coarsest type of one layer's experts makes, for its squared error
            least, most = (
                int(np.argmin(tensors.n_bytes.sum(axis=0))),
                int(np.argmax(tensors.n_bytes.sum(axis=0))),
            )
            found = {}
            for layer in layers:
                mine = np.array(tensors.layer) == layer
                alone = work.file(f"layer {layer} alone", np.where(mine, least, most))
                found[layer] = max(alone["kl"], 0.0) / squares[mine, least].sum()
        return np.array([found[layer] for layer in tensors.layer])

    def _finding(
        self,
        subject: Subject,
        tensors: _Tensors,
        energy: pd.DataFrame,
        errors: pd.DataFrame,
        plans: Mapping[str, Any],
        made: list[dict[str, Any]],
        like: str,
    ) -> Finding:
        first = next(iter(plans))
        table = pd.DataFrame({"tensor": tensors.names, "layer": tensors.layer})
        for name, plan in plans.items():
            table[name] = [tensors.types[i] for i in plan]
        chosen = tensors.n_bytes[np.arange(len(plans[first])), plans[first]]
        table["bits"] = 8 * chosen / [_values(tensors, u) for u in range(len(tensors.names))]
        kl = [file.pop("per_token") for file in made]
        rows = []
        for file, per_token in zip(made, kl, strict=True):
            apart = likelihood_change(kl[0], per_token, file["text"]).change
            rows.append(
                {k: v for k, v in file.items() if k != "text"}
                | {"kl_less": -apart.estimate, "kl_less_low": -apart.high, "kl_less_high": -apart.low}
            )
        files = pd.DataFrame(rows)
        uniform, planned = rows[0], rows[1]
        types = table[first].value_counts()
        said = [
            f"With all experts {like} ({human_size(uniform['bytes'])}) the KL divergence from the model as it is"
            f" is {span(uniform['kl'], uniform['kl_low'], uniform['kl_high'], '.4f')} nats per token; with the"
            f" types chosen {_SAID[first]} ({human_size(planned['bytes'])}) it is"
            f" {span(planned['kl'], planned['kl_low'], planned['kl_high'], '.4f')}."
        ]
        low, high = planned["kl_less_low"], planned["kl_less_high"]
        less = span(planned["kl_less"], low, high, "+.4f")
        if np.isfinite(low) and low > 0:
            said.append(f"The plan is better than the same type for all: {less} nats per token less.")
        elif np.isfinite(high) and high < 0:
            said.append(
                f"The plan is worse than the same type for all ({less} nats per token less): use {like}."
            )
        else:
            said.append(
                f"That the plan is better than the same type for all is not shown: {less} nats per token less."
            )
        for row in rows[2:]:
            said.append(
                f"A plan {_SAID[row['plan']]} has"
                f" {span(row['kl'], row['kl_low'], row['kl_high'], '.4f')} nats per token."
            )
        said.append(f"The plan has {', '.join(f'{n} matrices in {kind}' for kind, n in types.items())}.")
        if self.write:
            write_text(self.write, type_lines(dict(zip(tensors.names, table[first], strict=True))))
            said.append(
                f"Wrote {self.write}: llama-quantize --tensor-type-file {self.write} MODEL OUT {self.others}"
            )
        caveats = [
            "What experts add is a heuristic: it knows nothing of what later layers make of an error; --by kl measures"
            " that. The evaluation decides, for texts like the held-out ones.",
        ]
        quantised = [kind for kind in tensors.now if kind not in ("F32", "F16", "BF16")]
        if quantised:
            caveats.append(
                f"The model's experts are {', '.join(quantised)} already: quantise from the original if there is one."
            )
        layers = energy.drop(columns="by_expert")
        return self.finding(
            subject,
            said,
            {"files": files, "plan": table, "layers": layers, "errors": errors},
            [*caveats, *subject.read],
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """The plan."""
        from moetrace import plot

        plan = finding.tables["plan"]
        kind = plan["tensor"].str.extract(r"ffn_(\w+)_exps")[0]
        values = plan.assign(kind=kind).pivot(index="layer", columns="kind", values="bits")
        values.columns.name = "matrices"
        return {
            "plan": Figure(
                lambda ax: plot.heatmap(values, label="bits per weight", ax=ax),
                "Bits per weight of each layer's expert matrices in the plan.",
            )
        }


@dataclass
class _Work:
    """Makes files and evaluates them, one at a time."""

    subject: Subject
    model: Path
    target: Path
    tensors: _Tensors
    comparison: Comparison
    others: str
    imatrix: str | None

    def file(self, name: str, plan: Any) -> dict[str, Any]:
        types = {n: self.tensors.types[i] for n, i in zip(self.tensors.names, plan.tolist(), strict=True)}
        self.subject.progress(f"quantising: {name}")
        n_bytes = write_quantized(self.model, self.target, types, self.others, self.imatrix)
        self._check(types)
        evaluated, apart = self.comparison.other(name, self.target)
        change = likelihood_change(
            self.comparison.base.nll, evaluated.nll, evaluated.text, kl=apart.kl, same_top=apart.same_top
        )
        return {
            "plan": name,
            "bytes": n_bytes,
            "nll": evaluated.mean,
            **change.columns,
            "per_token": apart.kl,
            "text": evaluated.text,
        }

    def _check(self, types: Mapping[str, str]) -> None:
        """That llama-quantize did what it was told: it changes types that it cannot make without failing."""
        with ModelFile(self.target) as made:
            wrong = [n for n, kind in types.items() if made.stored(n)[1].name.lower() != kind]
            if wrong:
                raise MoetraceError(
                    f"llama-quantize made {wrong[0]} {made.stored(wrong[0])[1].name} instead of {types[wrong[0]]}",
                    fix="leave the type out: --types",
                )


def _values(tensors: _Tensors, unit: int) -> float:
    """Numbers in a matrix stack."""
    n, size = block_of(tensors.types[0])
    return float(tensors.n_bytes[unit, 0]) / size * n
