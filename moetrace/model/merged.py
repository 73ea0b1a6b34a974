"""Model files with fewer experts: a GGUF file copied, its layers' experts grouped."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, UsageError
from moetrace.model.experts import Activation, Expert, LayerExperts
from moetrace.model.file import ModelFile
from moetrace.model.grouping import Grouping

#: one expert from several, by their shares: :func:`moetrace.analysis.experts.merging.merge`
Merge = Callable[[Sequence[Expert], NDArray[np.float64], Activation], Expert]

# what has one entry per expert on its outermost axis
_PER_EXPERT = re.compile(
    r"blk\.(\d+)\.(?:ffn_(gate|up|down|gate_up)_exps\.(weight|bias)|(ffn_gate_inp)\.(?:weight|bias)"
    r"|(exp_probs_b)(?:\.bias)?)"
)
# what would have to change with the experts in a way that is not known here
_UNKNOWN = re.compile(r"blk\.\d+\.(ffn_\w+_exps\.(?:input_)?scale|ffn_gate_tid2eid.*|ffn_\w+_chexps.*)")


@dataclass(frozen=True)
class MergedFile:
    """A written model.

    Attributes
    ----------
    path
        The file.
    n_expert
        Experts per layer in it.
    n_bytes, n_bytes_before
        Its size, and that of the source.
    types
        Tensor -> (type before, type now), where the experts' type could not be kept: gguf-py cannot write it, so
        that they are F16 now.
    """

    path: Path
    n_expert: int
    n_bytes: int
    n_bytes_before: int
    types: Mapping[str, tuple[str, str]]


def write_merged(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    groups: Mapping[int, Grouping],
    *,
    merge: Merge,
    keep_count: bool = False,
) -> MergedFile:
    """Copy a model with the experts of each layer grouped.

    The experts of a group become one, as ``merge`` makes it of its members (the most used one first) and their
    shares in its use. Its router row (bias, selection bias) is the average of theirs by use. Experts that are alone
    in their group keep their bytes; merged ones are quantised to the type that they had, or, where gguf-py cannot,
    the whole tensor becomes F16.
    A model in parts becomes one file. Memory: about twice the largest tensor.

    Parameters
    ----------
    groups
        llama.cpp's layer number -> grouping, for every layer with experts and with the same number of experts each.
    merge
        Makes one expert of several: :func:`moetrace.analysis.experts.merging.merge`.
    keep_count
        Write each group's expert in the place of all its members instead, and leave the routers as they are: the
        file stays as large, and shows what merging costs if tokens go on to be routed as before.

    Raises
    ------
    UsageError
        If the groupings do not fit the model, or leave fewer experts than a token uses.
    MoetraceError
        If the model has tensors that would have to change in an unknown way, or the file cannot be written.
    """
    import gguf

    path = Path(path)
    with ModelFile(source) as model:
        n_expert = _check(model, groups, keep_count)
        n_bytes_before = model.n_bytes
        plan = _Plan(model, groups, merge, keep_count)
        partial = path.with_name(path.name + ".partial")
        writer: Any = gguf.GGUFWriter(partial, model.architecture)
        try:
            _copy_fields(writer, model, n_expert)
            for name, (shape, dtype, n_bytes, kind) in plan.layout.items():
                writer.add_tensor_info(name, shape, dtype, n_bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in plan.layout:
                writer.write_tensor_data(plan.data(name))
            writer.close()
            partial.replace(path)
        except OSError as e:
            raise MoetraceError(f"{path} cannot be written", why=e.strerror or str(e)) from e
        finally:
            writer.close()
            partial.unlink(missing_ok=True)
    return MergedFile(path, n_expert, path.stat().st_size, n_bytes_before, plan.changed)


def _check(model: ModelFile, groups: Mapping[int, Grouping], keep_count: bool) -> int:
    """Give the number of experts afterwards."""
    if not isinstance(model.field("{arch}.expert_count", 0), int) or not model.n_expert:
        raise MoetraceError(
            f"{model.path} has no single number of experts", why="it is dense, or its layers differ"
        )
    odd = [name for name in model.tensor_names if _UNKNOWN.fullmatch(name)]
    if odd:
        raise MoetraceError(
            f"experts of {model.path} cannot be taken out",
            why=f"{odd[0]} goes with them in a way that is not known",
        )
    if set(groups) != set(model.moe_layers):
        raise UsageError(
            f"groupings of layers {sorted(groups)}, experts in layers {model.moe_layers}",
            fix="give one grouping for each layer with experts",
        )
    if any(g.group.shape != (model.n_expert,) for g in groups.values()):
        raise UsageError(f"every grouping must be of {model.n_expert} experts, which {model.path} has")
    if keep_count:
        if any((g.group < 0).any() for g in groups.values()):
            raise UsageError("experts that are left out have no place to keep", fix="keep_count=False")
        return model.n_expert
    sizes = sorted({g.n_expert for g in groups.values()})
    if len(sizes) != 1:
        raise UsageError(
            f"every layer must go to the same number of experts, not to {sizes}",
            why="a model file has one number of experts",
            fix="group all layers into equally many, or keep_count=True",
        )
    (n_expert,) = sizes
    blocks = int(model.field("{arch}.expert_group_count", 1) or 1)
    if n_expert < model.n_expert_used or n_expert % blocks:
        raise UsageError(
            f"{model.path} cannot have {n_expert} experts",
            why=f"a token uses {model.n_expert_used}"
            + (f", and they stand in {blocks} groups of equal size" if blocks > 1 else ""),
            fix=f"keep at least {model.n_expert_used}" + (f", a multiple of {blocks}" if blocks > 1 else ""),
        )
    return n_expert


def _copy_fields(writer: Any, model: ModelFile, n_expert: int) -> None:
    import gguf

    array = gguf.GGUFValueType.ARRAY
    for field in model.fields:
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == f"{model.architecture}.expert_count":
            value = n_expert
        elif field.name == "general.name":
            value = f"{value}, {n_expert} experts a layer"
        sub = field.types[-1] if field.types[0] == array else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub)


class _Plan:
    """What each tensor of the new file is."""

    def __init__(
        self, model: ModelFile, groups: Mapping[int, Grouping], merge: Merge, keep_count: bool
    ) -> None:
        self._model = model
        self._groups = groups
        self._merge = merge
        self._keep_count = keep_count
        self._merged_of: tuple[int, dict[int, Expert]] = (-1, {})
        self.changed: dict[str, tuple[str, str]] = {}
        self.layout: dict[str, tuple[tuple[int, ...], Any, int, Any]] = {}
        for name in model.tensor_names:
            self.layout[name] = self._stored_form(name)

    def _stored_form(self, name: str) -> tuple[tuple[int, ...], Any, int, Any]:
        import gguf

        raw, kind = self._model.stored(name)
        match = _PER_EXPERT.fullmatch(name)
        if match is None:
            return raw.shape, raw.dtype, raw.nbytes, kind
        n = len(self._places(int(match[1])))
        if match[3] == "weight" and self._is_merging(int(match[1])) and not _can_pack(kind):
            self.changed[name] = (kind.name, "F16")
            shape = (n, *self._model.shape(name)[1:])
            return shape, np.dtype(np.float16), int(np.prod(shape)) * 2, gguf.GGMLQuantizationType.F16
        return (n, *raw.shape[1:]), raw.dtype, raw[0].nbytes * n, kind

    def _places(self, layer: int) -> list[int]:
        """The group of each expert of the new file."""
        grouping = self._groups[layer]
        return grouping.group.tolist() if self._keep_count else list(range(grouping.n_expert))

    def _is_merging(self, layer: int) -> bool:
        group = self._groups[layer].group
        return bool(len(np.unique(group[group >= 0])) < (group >= 0).sum())

    def data(self, name: str) -> NDArray[Any]:
        """Give a tensor as it is stored."""
        import gguf

        raw, _ = self._model.stored(name)
        match = _PER_EXPERT.fullmatch(name)
        if match is None:
            return np.ascontiguousarray(raw)
        layer, matrix, part = int(match[1]), match[2], match[3]
        grouping = self._groups[layer]
        shape, dtype, _, kind = self.layout[name]
        out = np.empty(shape, dtype)
        for place, group in enumerate(self._places(layer)):
            members = grouping.members(group)
            if matrix is None and self._keep_count:
                out[place] = raw[place]
            elif matrix is None:
                rows = np.stack([self._model.tensor(name, int(e)) for e in members])
                row = np.tensordot(grouping.shares(group), rows, 1).astype(np.float32)
                out[place] = gguf.quants.quantize(row, kind) if row.ndim else row
            elif len(members) > 1:
                values = _part(self._merged(layer, group), matrix, part)
                out[place] = gguf.quants.quantize(values, kind) if values.ndim > 1 else values
            elif name in self.changed:
                out[place] = self._model.tensor(name, int(members[0]))
            else:
                out[place] = raw[int(members[0])]
        return out

    def _merged(self, layer: int, group: int) -> Expert:
        """The merged expert of a group; those of one layer are kept until another layer is asked for."""
        if self._merged_of[0] != layer:
            self._merged_of = (layer, {})
        kept = self._merged_of[1]
        if group not in kept:
            experts, grouping = LayerExperts(self._model, layer), self._groups[layer]
            members = [experts[int(e)] for e in grouping.members(group)]
            kept[group] = self._merge(members, grouping.shares(group), experts.activation)
        return kept[group]


def _part(expert: Expert, matrix: str, part: str) -> NDArray[np.float32]:
    ending = "" if part == "weight" else "_bias"
    if matrix == "gate_up":
        return np.concatenate([getattr(expert, f"gate{ending}"), getattr(expert, f"up{ending}")])
    values: NDArray[np.float32] = getattr(expert, f"{matrix}{ending}")
    return values


def _can_pack(kind: Any) -> bool:
    import gguf

    block = gguf.GGML_QUANT_SIZES[kind][0]
    try:
        gguf.quants.quantize(np.zeros((1, block), np.float32), kind)
    except NotImplementedError:
        return False
    return True
