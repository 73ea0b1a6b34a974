"""What moetrace ships besides code: prompts, a small trained model and a recording of it (README.md in this folder)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from moetrace.errors import UsageError

PROMPT_SETS = ("domains", "heldout", "heldout-text", "semantic", "questions")


def demo_model() -> Path:
    """Path of the demo model, an OLMoE with 8 layers of 32 experts, 4 per token (GGUF, F16, under 8 MB)."""
    return _path("demo.gguf")


def recorded_demo() -> Path:
    """Path of a recorded trace of the demo model, ``demo.moet``, packed as tar.xz.

    60 prompts of five domains (:func:`prompts`) and their answers, with experts and weights.
    """
    return _path("demo.moet.tar.xz")


def prompts(name: str = "domains") -> Path:
    """Path of a prompt set: JSONL, one object with ``id``, ``label`` (the domain) and ``prompt`` per line.

    Parameters
    ----------
    name
        ``domains``: 12 prompts in each of code, math, creative, factual and mixed, matched in length.
        ``heldout``: 12 others of each, for evaluation. ``heldout-text``: 12 texts of each from the corpus of
        the demo model that it was not trained on, for the likelihood that it gives them. ``semantic``: 12
        sentences of each of synonyms, antonyms, analogies, arithmetic. ``questions``: 12 of each of four kinds of
        sums, each with the ``answer`` that a right output holds.

    Raises
    ------
    UsageError
        If there is no set of that name.
    """
    if name not in PROMPT_SETS:
        raise UsageError(f"there is no prompt set {name!r}", fix=f"choose one of: {', '.join(PROMPT_SETS)}")
    return _path("prompts", f"{name}.jsonl")


def _path(*parts: str) -> Path:
    resource = files(__name__).joinpath(*parts)
    if not isinstance(resource, Path):  # a zip: llama.cpp needs a real file
        raise UsageError("moetrace runs from a zip file", fix="install it with pip")
    return resource
