"""Held-out text for questions that run the model, and what models make of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moetrace import data
from moetrace.findings.subject import Subject
from moetrace.host.evaluate import Divergence, Evaluation, Evaluator, divergence

TEXT_HELP = "JSON lines of held-out text; default: the shipped texts, which suit the demo model"

CHOSEN_NOTE = (
    "What is named as the most or the least was chosen for being that; its interval does not allow for that."
)


def held_out(text: str | None) -> str | os.PathLike[str]:
    """The file that a question's parameter ``text`` names."""
    return text or data.prompts("heldout-text")


@dataclass
class Comparison:
    """A model's evaluation of some texts, and a place to compare others with it."""

    base: Evaluation
    _text: str | os.PathLike[str]
    _folder: Path
    _kl: bool
    _subject: Subject
    _options: dict[str, Any]

    def other(
        self, what: str, model: str | os.PathLike[str], **options: Any
    ) -> tuple[Evaluation, Divergence]:
        """Evaluate another model, or the same one otherwise; ``options`` are the Evaluator's, ``what`` names it."""
        self._subject.progress(f"evaluating {what}")
        kept = self._folder / "other.npy"
        with Evaluator(model, **{**self._options, **options}) as evaluator:
            found = evaluator.evaluate(self._text, logits=kept if self._kl else None)
        apart = divergence(self.base, found)
        kept.unlink(missing_ok=True)
        return found, apart

    def again(self, what: str, **given: Any) -> Evaluation:
        """Evaluate the subject's own model with what ``given`` tells :meth:`Evaluator.evaluate`."""
        self._subject.progress(f"evaluating {what}")
        with Evaluator(self._subject.need_model("evaluation"), **self._options) as evaluator:
            return evaluator.evaluate(self._text, **given)


@contextmanager
def compared_with(subject: Subject, text: str | None, *, kl: bool, **options: Any) -> Iterator[Comparison]:
    """Evaluate the subject's model on the text, and give what compares others with it.

    ``kl`` keeps logits in a temporary folder (4 bytes × vocabulary per token, twice). ``options`` are the
    Evaluator's, for all that is compared, where they are not the subject's. Raises UsageError if there is
    no model.
    """
    with TemporaryDirectory(prefix="moetrace-evaluate-") as folder:
        path = held_out(text)
        subject.progress("evaluating the model as it is")
        options = {**subject.model_options, **options}
        with Evaluator(subject.need_model("evaluation"), **options) as evaluator:
            base = evaluator.evaluate(path, logits=Path(folder) / "base.npy" if kl else None)
        yield Comparison(base, path, Path(folder), kl, subject, options)
