"""Is this file the model that a trace is of? By what both say of it: sizes, names and routers, not quantisation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moetrace.errors import InputError
from moetrace.model.file import ModelFile

_NAME_BYTES = 250  # the tracer cuts longer names off about here


def differences(model: ModelFile, facts: Mapping[str, Any]) -> list[str]:
    """Say what a file contradicts of a context's facts; empty if it can be the context's model.

    Compared is what both tell: architecture, name, layers, width, vocabulary, and the number of experts of every layer
    that has some; if all of that is the same, the routers and tokens themselves, by their fingerprints. None of it
    depends on how the file is quantised, split or called.

    Parameters
    ----------
    facts
        context.json, or a ring's JSON text (docs/format.md).
    """
    found = _compare(model, facts)[0]
    prints = facts.get("fingerprint")
    if found or not isinstance(prints, Mapping):
        return found
    for what in ("routers", "tokens"):
        ours, theirs = model.fingerprint[what], prints.get(what)
        if theirs and ours != theirs:
            found.append(f"{what}' fingerprint: {ours} in the file, {theirs} in the trace")
    return found


def refuse_other_model(model: ModelFile, facts: Mapping[str, Any], trace: object) -> None:
    """Refuse a file that is not the model that a trace is of.

    Raises
    ------
    InputError
        If it is another model's, saying what differs.
    """
    found = differences(model, facts)
    if found:
        raise InputError(
            f"{model.path} is not the model of {trace}",
            why="; ".join(found[:4]),
            fix="give the file that the trace was recorded with, or another quantisation of the same model",
        )


def identify(candidates: Iterable[str | os.PathLike[str]], facts: Mapping[str, Any]) -> str | None:
    """Tell which of the files that a process opened is a context's model.

    LoRA adapters, multimodal projectors, vocabularies without tensors, dense models and files that cannot be read are
    none.

    Parameters
    ----------
    candidates
        Paths of GGUF files; parts of one model count once.
    facts
        context.json, or a ring's JSON text.

    Returns
    -------
    str | None
        The path, of a model in parts the first one's; None if no file fits, or several do equally well.
    """
    told = facts.get("model")
    if not (isinstance(told, Mapping) and told.get("architecture")):
        return None  # nothing to tell models apart by
    best: list[Path] = []
    most = 0
    for candidate in dict.fromkeys(map(Path, candidates)):
        if not candidate.is_file():
            continue
        try:
            with ModelFile(candidate) as model:
                first = model.parts[0]
                kind = model.field("general.type", "model")
                found, agreed = _compare(model, facts)
                n_params, has_name = told.get("n_params"), _has_name(model, told)
                if kind != "model" or not model.moe_layers or found or not has_name:
                    continue
                if (
                    n_params and n_params != model.n_params
                ):  # converters may leave out what follows from the rest
                    continue
        except InputError:
            continue
        if agreed > most:
            best, most = [first], agreed
        elif agreed == most and not any(first.samefile(other) for other in best):
            best.append(first)
    return os.fspath(best[0]) if len(best) == 1 else None


def _compare(model: ModelFile, facts: Mapping[str, Any]) -> tuple[list[str], int]:
    """Give what differs, and how many facts are the same."""
    told = facts.get("model")
    told = told if isinstance(told, Mapping) else {}
    wrong: list[str] = []
    n_same = 0

    def hold(what: str, ours: tuple[Any, ...], theirs: Any) -> None:
        nonlocal n_same
        if not theirs or not any(ours):
            return  # one of them does not say
        if theirs in ours:
            n_same += 1
        else:
            wrong.append(f"{what}: {ours[0]} in the file, {theirs} in the trace")

    hold("architecture", (model.architecture,), told.get("architecture"))
    name = told.get("name")
    hold("name", (name if _is_name(model.name, name) else model.name,), name)
    # llama.cpp does not count the layers that predict further tokens; older releases did
    n_layer, n_further = (_int(model, "{arch}." + key) for key in ("block_count", "nextn_predict_layers"))
    hold("layers", (n_layer, n_layer - n_further), told.get("n_layer"))
    hold("width", (_int(model, "{arch}.embedding_length"),), told.get("n_embd"))
    hold("vocabulary", (model.n_vocab,), told.get("n_vocab"))
    is_import = facts.get("collector") == "import"
    for layer, n_expert in _experts(facts).items():
        n = model.experts_of(layer)
        if n == n_expert or (is_import and n > n_expert):  # which may know only those that it saw
            n_same += 1
        else:
            wrong.append(f"experts of layer {layer}: {n or 'none'} in the file, {n_expert} in the trace")
    return wrong, n_same


def _experts(facts: Mapping[str, Any]) -> dict[int, int]:
    """Layer -> its number of experts, of every layer that the facts tell of."""
    pairs: list[tuple[Any, Any]] = []
    layers, counts, routers = (facts.get(key) for key in ("layers", "n_expert", "routers"))
    if isinstance(routers, list):
        pairs += [(r[0], r[1]) for r in routers if isinstance(r, list) and len(r) > 1]
    if isinstance(layers, list) and isinstance(counts, list) and len(layers) == len(counts):
        pairs += zip(layers, counts, strict=True)
    return {layer: n for layer, n in pairs if type(layer) is int and type(n) is int and n > 0}


def _is_name(name: str, told: Any) -> bool:
    cut = isinstance(told, str) and len(told.encode("utf-8", "replace")) >= _NAME_BYTES
    return name == told or (cut and name.startswith(told[:-1]))


def _has_name(model: ModelFile, told: Mapping[str, Any]) -> bool:
    """Whether the name is the one that llama.cpp read: its own file has it, or has none where it read none."""
    return "name" not in told or _is_name(model.name, told["name"])


def _int(model: ModelFile, key: str) -> int:
    value = model.field(key, 0)
    return value if isinstance(value, int) else 0
