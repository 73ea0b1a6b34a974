"""Published and sound definitions side by side: expert interference, expert merging, routing manipulation.

    python tests/stats/published_experts.py [--write docs/published.md]

Runs llama.cpp on the demo model and on models written here, one of them with random routing and random experts, and
prints Markdown sections; with --write puts each between its marks in that page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

sys.path[:0] = [str(Path(__file__).parents[2])]

import moetrace  # noqa: E402
from moetrace.data import demo_model, prompts  # noqa: E402
from moetrace.findings import Finding, Subject, question  # noqa: E402
from moetrace.synthetic import digit_tokens, distinct_tokens, write_planted  # noqa: E402

N_VOCAB = 4096
CHANNELS = ["experts", "weights", "gate_input", "tensor:ffn_moe_out-*"]


class Models:
    """The demo model, one without anything to find, and one with something planted; each with a trace and texts."""

    def __init__(self, folder: Path) -> None:
        sizes: dict[str, Any] = {"n_expert": 16, "n_expert_used": 4, "n_vocab": N_VOCAB}
        digits = digit_tokens(N_VOCAB)
        self.random = write_planted(folder / "random.gguf", **sizes).path
        planted: dict[str, Any] = {
            "twins": [(layer, 2, 5) for layer in range(4)],
            "dead": [(layer, 6) for layer in range(4)],
            "fires_on": {(2, 9): digits},
        }
        self.planted = write_planted(folder / "planted.gguf", **planted, **sizes).path
        lines = distinct_tokens(24, 80, N_VOCAB)
        texts = distinct_tokens(16, 80, N_VOCAB, seed=1)
        self.texts = folder / "texts.jsonl"
        self.texts.write_text("".join(json.dumps(line) + "\n" for line in texts))
        own = [json.loads(line) for line in prompts("domains").read_text().splitlines()]
        self.subjects = {
            "random": self._subject(folder, self.random, lines, 0),
            "planted": self._subject(folder, self.planted, lines, 0),
            "demo": self._subject(folder, demo_model(), own, 24),
        }
        words = [{"id": line["id"], "prompt": line["prompt"]} for line in own[::5]]
        self.random_text = self._subject(folder, self.random, words, 0, "text")

    @staticmethod
    def _subject(folder: Path, model: Path, lines: list[dict[str, Any]], n: int, name: str = "") -> Subject:
        trace = moetrace.capture(
            model,
            lines,
            folder / f"{model.stem}{name}.moet",
            n_predict=n,
            n_threads=1,
            all_outputs=True,
            channels=CHANNELS,
        )
        return Subject([trace], model=model, model_options={"n_threads": 1})

    def ask(self, name: str, model: str, **options: Any) -> Finding:
        """The finding of a question; held-out texts are the model's own."""
        if model != "demo" and name != "routing-manipulation":
            options["text"] = str(self.texts)
        subject = (
            self.random_text if (name, model) == ("routing-manipulation", "random") else self.subjects[model]
        )
        return question(name)(**options).answer(subject)


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def span(row: Any, name: str, form: str = "+.3f") -> str:
    return f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"


def interference(models: Models) -> str:
    found = {name: models.ask("expert-interference", name) for name in ("demo", "random")}
    rows = []
    for name, finding in found.items():
        old = finding.tables["as_published_lengths"].set_index("k")
        for row in finding.tables["k"].to_dict("records"):
            k = int(row["k"])
            change = "—" if k == 4 else span(row, "change")
            rows.append(
                (
                    f"{name}, k = {k}" + (" (its own)" if k == 4 else ""),
                    f"{old['quality'][k]:.2f}",
                    old["interference"][k],
                    change,
                    f"{row['kl']:.3f}",
                    f"{row['same_top']:.1%}",
                )
            )
    lines = [
        table(
            (
                "model",
                "published “quality”",
                "published interference cases of 5",
                "change in NLL, nats per token",
                "KL",
                "same top token",
            ),
            rows,
        ),
        "",
        table(
            (
                "model",
                "layers where experts are not unrelated (q ≤ .05)",
                "pairs not unrelated (p ≤ .05 per layer)",
                "largest difference of the sum from llama.cpp's",
            ),
            (
                (
                    name,
                    f"{(f.tables['layers']['q_value'] <= 0.05).sum()} of {len(f.tables['layers'])}",
                    f"{(f.tables['pairs']['p_family'] <= 0.05).sum()} of {len(f.tables['pairs'])}",
                    f"{f.tables['layers']['error_max'].max():.1e}",
                )
                for name, f in found.items()
            ),
        ),
    ]
    return "\n".join(lines)


def _alike(best: Any) -> str:
    lies, unrelated = f"as it lies {best['cosine']:.3f}", f"unrelated {best['null_max']:.3f}"
    return f"{best['cosine_aligned']:.3f} ({lies}, {unrelated})"


def _least(name: str, kind: Any, region: str, low: Any) -> tuple[str, str, str]:
    what = f"{name}, {kind}: tokens {region} the edit"
    return what, f"{low['jaccard']:.2f} ({low['low']:.2f} to {low['high']:.2f})", f"layer {low['layer']}"


def merging(models: Models) -> str:
    options: dict[str, dict[str, Any]] = {
        "random": {"counts": "15", "criteria": "weights,random"},
        "planted": {"counts": "15", "criteria": "weights,random,prune", "in_place": True},
        "demo": {},
    }
    found = {name: models.ask("expert-merging", name, **more) for name, more in options.items()}
    rows = []
    for name, finding in found.items():
        old, pairs = finding.tables["as_published"], finding.tables["pairs"]
        best = pairs.iloc[int(pairs["cosine_aligned"].argmax())]
        rows.append(
            (
                name,
                old["pairs_compared_published_code"].sum(),
                old["mergeable"].sum(),
                pairs["cosine_aligned"].notna().sum(),
                len(finding.tables["candidates"]),
                _alike(best),
            )
        )
    curves = []
    for name in ("planted", "demo"):
        for row in found[name].tables["curve"].to_dict("records"):
            place = ", in place" if row["in_place"] else ""
            what = f"{name}, {row['n_expert']} experts, {row['criterion']}{place}"
            costs = (span(row, "change"), f"{row['kl']:.3f}", f"{row['same_top']:.1%}")
            curves.append((what, f"{row['size']:.0%}", *costs))
    lines = [
        table(
            (
                "model",
                "pairs the published code compared",
                "mergeable by its formula",
                "pairs compared here",
                "candidates here",
                "most alike, neurons matched",
            ),
            rows,
        ),
        "",
        table(
            ("model, experts left per layer, merged by", "size", "change in NLL", "KL", "same top token"),
            curves,
        ),
    ]
    return "\n".join(lines)


def manipulation(models: Models) -> str:
    options: dict[str, dict[str, Any]] = {
        "random": {"depth": 2},
        "planted": {"target": "2:9", "budget": 512},
        "demo": {},
    }
    found = {name: models.ask("routing-manipulation", name, **more) for name, more in options.items()}
    rows = []
    for name, finding in found.items():
        for row in finding.tables["success"].to_dict("records"):
            saved = "—" if pd.isna(row["p_value"]) else f"{row['saved']:.0f}, p = {row['p_value']:.2g}"
            if row["targets"] == 1:
                saved = "—"
            rate = f"{row['reached']} of {row['targets']} ({row['low']:.0%} to {row['high']:.0%})"
            rows.append((f"{name}, {row['method']}", rate, f"{row['mean_evaluations']:.0f}", saved))
    edits = []
    for name in ("random", "demo"):
        finding = found[name]
        effect, old = finding.tables["edits"], finding.tables["as_published_robustness"]
        said = next(s for s in finding.sentences if s.startswith("As published"))
        edits.append(
            (
                f"{name}, published: unions of texts",
                said.split(" of the texts")[0].split()[-1] + " changed",
                f"{(old['verdict'] == 'stable').sum()} of {len(old)} expert ids “stable”",
            )
        )
        for region in ("before", "after"):
            for kind, part in effect[effect["region"] == region].groupby("kind"):
                low = part.iloc[int(part["jaccard"].argmin())]
                edits.append(_least(name, kind, region, low))
    lines = [
        table(("model, search", "targets reached", "inputs needed, mean", "fewer than random search"), rows),
        "",
        table(("model, what is compared", "Jaccard of the least stable layer", ""), edits),
    ]
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Models], str]] = {
    "expert-interference": interference,
    "expert-merging": merging,
    "routing-manipulation": manipulation,
}


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a section."""
    whole = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = whole.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{page} has no marks {start} … {end}")
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--only", choices=SECTIONS)
    args = parser.parse_args()
    with TemporaryDirectory(prefix="moetrace-published-") as folder:
        models = Models(Path(folder))
        for name in [args.only] if args.only else list(SECTIONS):
            text = SECTIONS[name](models)
            print(f"{name}\n\n{text}\n", flush=True)
            if args.write:
                put(args.write, name, text)
