"""Makes a report in which every question is answered, of a small model: ``python whole_report.py FOLDER``.

Writes FOLDER/report.html, and FOLDER/tables.json: question -> table -> rows and columns. In a process of its own,
as questions that run the model load llama.cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from running import TEXT

import moetrace
from moetrace.findings import QUESTIONS, Finding, Subject, question
from moetrace.report.captured import captured
from moetrace.report.page import render_page
from moetrace.synthetic import write_model

#: parameters of questions that have them: as little work as gives an answer
QUICK: dict[str, Any] = {
    "permutations": 39, "resamples": 50, "null": 9, "counts": "6", "criteria": "prune", "kl": False, "k": "2",
    "generate": 0, "targets": 2, "depth": 1, "budget": 32, "prompts": 2, "length": 3, "min_tokens": 3,
}  # fmt: skip
CHANNELS = ["experts", "weights", "gate_input", "outputs", "attention", "tensor:ffn_moe_out-*"]


def main(folder: Path) -> None:
    model = write_model(folder / "m.gguf", "qwen3moe", n_layer=3, n_expert=8, n_expert_used=3)
    prompts = [
        {
            "id": f"p{i}",
            "label": "abc"[i % 3],
            "prompt": f"{TEXT[37 * i : 37 * i + 40 + 3 * i]} the sea",
            "n_predict": 14,
        }
        for i in range(12)
    ]
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": TEXT[100 * i : 100 * i + 120]}) + "\n" for i in range(3)))
    how: dict[str, Any] = {"n_threads": 1, "n_parallel": 2, "all_outputs": True}
    trace = moetrace.capture(model, prompts, folder / "t.moet", channels=CHANNELS, **how)
    other = moetrace.capture(model, prompts, folder / "other.moet", intervene=["ablate:1:3"], **how)
    alone = Subject([trace], model=model, model_options={"n_threads": 1})
    # a model that was not trained repeats no word: the contexts of one are those of the prompts
    of_prompts = Subject([trace], phase="prefill")
    subjects = {"compare": Subject([trace, other]), "context-attention-routing": of_prompts}
    findings = [ask(name, subjects.get(name, alone), texts) for name in QUESTIONS]
    page = render_page(alone, findings, captured(alone))
    (folder / "report.html").write_text(page, encoding="utf-8")
    sizes = {f.name: {name: list(table.shape) for name, table in f.tables.items()} for f in findings}
    (folder / "tables.json").write_text(json.dumps(sizes))


def ask(name: str, subject: Subject, texts: Path) -> Finding:
    asked = question(name)
    given = {**QUICK, "text": str(texts)}
    if name in ("attention-prediction", "task-prediction"):
        given["max_tokens"] = 300
    return asked(**{k: v for k, v in given.items() if k in asked.__dataclass_fields__}).ask(subject)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
