"""Which model a context is of: what its context.json says, and what people call it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]

#: what a model says of itself; contexts that differ in any of it are of different models
_SAYS = ("name", "architecture", "description", "n_layer", "n_embd", "n_vocab", "n_params")
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


def said(facts: Facts) -> dict[str, Any]:
    """Give what the model says of itself: the object ``model`` of context.json."""
    model = facts.get("model")
    return dict(model) if isinstance(model, dict) else {}


def role(facts: Facts) -> str:
    """Give what the context is for: ``main``, ``mtp``, ``draft`` or ``other``."""
    return str(facts.get("role") or "other")


def model_files(facts: Facts) -> list[str]:
    """Give the model files that the context may be of: its own if that is known, else all that its process read."""
    own, opened = facts.get("model_path"), facts.get("model_files")
    if isinstance(own, str) and own:
        return [own]
    return list(dict.fromkeys(p for p in opened if isinstance(p, str))) if isinstance(opened, list) else []


def fingerprint(facts: Facts, what: str) -> str:
    """Give a digest of the model's file (:attr:`moetrace.model.file.ModelFile.fingerprint`), "" if it is not known."""
    told = facts.get("fingerprint")
    digest = told.get(what) if isinstance(told, Mapping) else None
    return digest if isinstance(digest, str) else ""


def same_model(a: Facts, b: Facts) -> bool:
    """Whether two contexts are of one model: they say the same of it, and nothing says that their files differ.

    Where both files' fingerprints are known these decide, wherever the files lie.
    """
    if any(said(a).get(key) != said(b).get(key) for key in _SAYS):
        return False
    mine, theirs = (fingerprint(facts, "weights") for facts in (a, b))
    if mine and theirs:
        return mine == theirs
    if all(isinstance(f.get("model_path"), str) for f in (a, b)):
        return bool(a["model_path"] == b["model_path"])
    opened, others = set(model_files(a)), set(model_files(b))
    if any(isinstance(f.get("model_path"), str) for f in (a, b)):
        return not opened or not others or opened <= others or others <= opened
    return not opened or not others or opened == others


def differences(a: Facts, b: Facts) -> list[str]:
    """Give in what two contexts' models differ: ``name (a and b)``, of that which both say."""
    pairs: list[tuple[str, Any, Any]] = [(key, said(a).get(key), said(b).get(key)) for key in _SAYS]
    for what in ("routers", "tokens"):
        pairs.append((f"{what}' fingerprint", fingerprint(a, what), fingerprint(b, what)))
    return [f"{key} ({_plain(x)} and {_plain(y)})" for key, x, y in pairs if x and y and x != y]


def names(facts: Facts) -> list[str]:
    """Give what the model is called: its name, its server's aliases for it, its file; empty if nothing is known."""
    alias = facts.get("alias")
    aliases = [part.strip() for part in alias.split(",")] if isinstance(alias, str) else []
    file = _one_file(facts)
    found = [str(said(facts).get("name") or ""), *aliases, *([_stem(file)] if file else [])]
    return list(dict.fromkeys(name for name in found if name))


def is_called(facts: Facts, text: str) -> bool:
    """Whether ``text`` is the model's name, an alias, or its file: by path, by name, or by name without ``.gguf``."""
    file = _one_file(facts)
    if file is not None:
        path = _PART.sub("", file)
        asked = _PART.sub("", text)
        if asked in (file, path, Path(path).name, Path(path).stem):
            return True
        if os.path.realpath(asked) == os.path.realpath(path):
            return True
    return text in names(facts)


def may_be_called(facts: Facts, text: str) -> bool:
    """Whether ``text`` may be the model's name: it is (:func:`is_called`), or neither alias nor files are known."""
    known = bool(facts.get("alias")) or bool(model_files(facts))
    return not known or is_called(facts, text)


def _plain(value: object) -> str:
    # what a file says of itself must not steer a terminal
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))


def called(facts: Facts) -> str:
    """Name the model as ``--model`` takes it, if it has a name; else as :func:`title` does."""
    return next(iter(names(facts)), title(facts))


def title(facts: Facts) -> str:
    """Name the model for people, as far as it is known."""
    architecture = str(said(facts).get("architecture") or "")
    return (
        _plain(" · ".join(dict.fromkeys(part for part in [*names(facts), architecture] if part)))
        or "an unknown model"
    )


def _one_file(facts: Facts) -> str | None:
    """The model's file, the first part of a split one, if it is known for sure."""
    files = model_files(facts)
    return files[0] if len({_PART.sub("", file) for file in files}) == 1 else None


def _stem(file: str) -> str:
    return Path(_PART.sub("", file)).stem
