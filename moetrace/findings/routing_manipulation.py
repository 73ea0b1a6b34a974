"""Which inputs reach a given expert, and how far an edit changes the routing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.experts import manipulation
from moetrace.analysis.experts.manipulation import Edit, Path
from moetrace.analysis.published import experts as published
from moetrace.analysis.statistics import nulls
from moetrace.errors import UsageError
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.held_out import CHOSEN_NOTE
from moetrace.findings.subject import Subject
from moetrace.findings.wording import span
from moetrace.host.probe import RoutingProbe
from moetrace.model.file import ModelFile
from moetrace.numbers import number

_NORMAL_TOKEN = 1  # llama.cpp's LLAMA_TOKEN_TYPE_NORMAL
_PUBLISHED_POOL, _PUBLISHED_TEMPLATES = 49, ("{}", "The {}", "{} is", "What is {}?")


@dataclass(frozen=True)
class RoutingManipulation(Question):
    """Can inputs be found that reach a chosen expert, and how much of the routing does an edit change?

    Token sequences are searched for ones whose last token uses a target expert, or one expert in each of several
    layers; success is compared with random search of the same budget. Prompts of the trace are edited, and every
    token that the edit leaves as it is is compared with itself; and replacements of one token are looked for that
    change the routing of what follows most.

    Asked in the seed experiment "MoE dynamics", which did not complete it.
    """

    name: ClassVar[str] = "routing-manipulation"
    title: ClassVar[str] = "Routing manipulation"
    place: ClassVar[int] = 240
    needs_model: ClassVar[bool] = True

    target: str | None = parameter(
        None, "what to reach, LAYER:EXPERT, several joined by +, such as 3:17 or 2:5+7:30"
    )
    targets: int = parameter(24, "targets drawn at random where none is given")
    depth: int = parameter(3, "layers on such a target: one expert in each")
    length: int = parameter(6, "tokens of the searched input")
    free: str = parameter("all", "what the search may choose: every token, or only what comes before a drawn last one",
                          choices=["all", "context"])  # fmt: skip
    budget: int = parameter(256, "inputs that each search may try")
    prompts: int = parameter(12, "prompts of the trace to edit")
    misroute: int = parameter(
        16, "replacements of a token to try in each, for one that misroutes the rest; 0: none"
    )
    min_tokens: int = parameter(20, "tokens that an expert must be chosen at for its robustness")

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        path = subject.need_model("routing manipulation")
        rng = np.random.default_rng(subject.seed)
        with ModelFile(path) as model:
            kinds = np.asarray(
                model.field("tokenizer.ggml.token_type", [_NORMAL_TOKEN] * len(model.vocabulary))
            )
        words = np.flatnonzero(kinds == _NORMAL_TOKEN)
        said = subject.routing.request_column("prompt").items()
        texts = [(name, prompt) for name, prompt in said if isinstance(prompt, str)]
        texts = (
            [texts[i] for i in np.unique(np.linspace(0, len(texts) - 1, self.prompts).astype(int))]
            if texts
            else []
        )
        longest = max([len(text.encode()) * 2 + 16 for _, text in texts] + [self.length + 1, 64])
        with RoutingProbe(path, n_tokens=longest, n_parallel=16, **subject.model_options) as probe:
            layout = probe.layout
            targets = self._targets(layout.layers, layout.n_expert, rng)
            found, runs, inputs = self._searches(subject, probe, targets, words, rng)
            edits = _edits(probe, texts, words, rng)
            misled = _misrouting(probe, texts, words, self.misroute, rng, subject.progress)
            n_expert = max(layout.n_expert)
            first = targets[0][0]
            triggers, control = self._published_triggers(
                probe, np.concatenate([part.token_ids for part in subject.parts]), words, first[0]
            )
        counts = subject.routing.counts
        rates = counts.included.sum(axis=0) / np.maximum(counts.tokens.sum(axis=0), 1)[:, None]
        seen = {int(layer): rates[i] for i, layer in enumerate(counts.layers)}
        inputs["rarest_rate"] = [
            min(float(seen[layer][e]) if (layer := layout.layers[i]) in seen else np.nan for i, e in each)
            for each in targets
        ]
        tables = {
            "success": found,
            "targets": inputs,
            "searches": runs,
            "as_published_triggers": triggers,
            "as_published_control": control,
        }
        sentences = _search_sentences(found, self)
        caveats = [
            "Targets of one model are not independent of each other; intervals take them so."
            if not self.target
            else "One target was given: its success says nothing about others.",
            CHOSEN_NOTE,
            "The p-values of greedy and beam search allow for their being two.",
            "A sequence found is one of token ids; its text may be tokenised otherwise.",
        ]
        if edits:
            effect = manipulation.edit_effect(edits, n_expert, layers=layout.layers)
            robust = manipulation.expert_robustness(
                edits, n_expert, layers=layout.layers, min_tokens=self.min_tokens
            )
            changed, stability = published.as_published_robustness(edits, n_expert)
            tables |= {"edits": effect, "robustness": robust, "as_published_robustness": stability}
            sentences += _edit_sentences(effect, robust, changed, stability)
            if len(misled):
                tables["misrouting"] = misled
                sentences.append(_misrouting_sentence(misled, self.misroute))
        else:
            caveats.append(
                "The trace has no prompt texts to edit: record with `moetrace capture -f` or `moetrace drive`."
            )
        return self.finding(subject, sentences, tables, caveats, of_phase=False)

    def _targets(
        self, layers: tuple[int, ...], n_expert: tuple[int, ...], rng: np.random.Generator
    ) -> list[Path]:
        if self.target:
            pairs = []
            for part in self.target.split("+"):
                match = re.fullmatch(r"(\d+):(\d+)", part.strip())
                index = layers.index(int(match[1])) if match and int(match[1]) in layers else -1
                if match is None or index < 0 or int(match[2]) >= n_expert[index]:
                    raise UsageError(
                        f"--target {self.target!r} does not exist",
                        why=f"layers with experts: {', '.join(map(str, layers))}; {max(n_expert)} experts each",
                        fix="write it like 3:17, or 2:5+7:30",
                    )
                pairs.append((index, int(match[2])))
            return [tuple(pairs)]
        if not 1 <= self.depth <= len(layers) or self.targets < 2:
            raise UsageError(
                f"no target of {self.depth} layers, or fewer than 2 of them",
                fix=f"give --depth 1 to {len(layers)}, and --targets 2 or more",
            )
        return [
            tuple(
                (int(layer), int(rng.integers(n_expert[layer])))
                for layer in np.sort(rng.choice(len(layers), self.depth, replace=False))
            )
            for _ in range(self.targets)
        ]

    def _searches(
        self,
        subject: Subject,
        probe: RoutingProbe,
        targets: list[Path],
        words: npt.NDArray[Any],
        rng: np.random.Generator,
    ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Success by method, every search, and the best input for each target."""
        layout = probe.layout
        begin = [probe.model.bos] if probe.model.adds_bos else []
        rows, best = [], []
        for i, target in enumerate(targets):
            subject.progress(f"searching inputs: target {i + 1} of {len(targets)}")
            template = np.array([*begin, *[-1] * self.length])
            if self.free == "context":
                template[-1] = rng.choice(words)

            def score(tokens: npt.NDArray[np.int64], target: Path = target) -> npt.NDArray[np.float64]:
                scores = np.stack([routed.scores[-1] for routed in probe.route(list(tokens))])
                return manipulation.path_margin(scores, target, layout.n_expert_used)

            name = " + ".join(f"{layout.layers[layer]}:{expert}" for layer, expert in target)
            runs = {
                method: manipulation.search_input(
                    score, template, words, method=method, budget=self.budget, seed=int(rng.integers(1 << 32))
                )
                for method in manipulation.METHODS
            }
            for method, run in runs.items():
                rows.append(
                    {
                        "target": f"{i}: {name}",
                        "method": method,
                        "reached_at": np.nan if run.reached_at is None else run.reached_at,
                        "score": run.score,
                    }
                )
            winner = max(runs.values(), key=lambda run: run.score)
            best.append(
                {
                    "target": f"{i}: {name}",
                    "reached": winner.score > 0,
                    "score": winner.score,
                    "tokens": winner.tokens.tolist(),
                    "text": b"".join(probe.model.piece(int(t)) for t in winner.tokens).decode(
                        "utf-8", "replace"
                    ),
                }
            )
        table = pd.DataFrame(rows)
        return manipulation.routing_manipulation(table, budget=self.budget), table, pd.DataFrame(best)

    def _published_triggers(
        self, probe: RoutingProbe, tokens: npt.NDArray[Any], words: npt.NDArray[Any], layer: int
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The published trigger scores of one layer, with the most frequent tokens of the trace as the pool."""
        ids, count = np.unique(tokens, return_counts=True)
        ids = ids[np.argsort(-count, kind="stable")]
        ids = ids[np.isin(ids, words)]
        pieces = [probe.model.piece(int(t)).decode("utf-8", "replace").strip() for t in ids]
        pool = list(dict.fromkeys(word for word in pieces if word))[:_PUBLISHED_POOL]
        n = len(_PUBLISHED_TEMPLATES)
        routed = probe.route(
            [probe.model.tokenize(t.format(word)) for word in pool for t in _PUBLISHED_TEMPLATES]
        )
        chosen = np.zeros((len(routed), max(probe.layout.n_expert)), bool)
        for i, one in enumerate(routed):
            chosen[i, np.unique(one.experts[:, layer, : probe.layout.n_expert_used[layer]])] = True
        triggers = published.as_published_triggers(chosen.reshape(len(pool), n, -1))
        best = triggers.sort_values(["score", "specificity"], ascending=False).drop_duplicates("expert")
        control = []
        for token, expert in best[["token", "expert"]].to_numpy().tolist():
            hits = [
                published.as_published_control(one.experts[:, layer], one.weights[:, layer], expert)
                for one in routed[token * n : (token + 1) * n]
            ]
            control.append({"expert": expert, "trigger": pool[token], "success": float(np.mean(hits))})
        llama_layer = probe.layout.layers[layer]
        triggers["token"] = [pool[token] for token in triggers["token"]]
        triggers.insert(0, "layer", llama_layer)
        table = pd.DataFrame(control, columns=["expert", "trigger", "success"]).sort_values("expert")
        table.insert(0, "layer", llama_layer)
        return triggers, table.reset_index(drop=True)

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Success against budget, and what edits leave."""
        from moetrace import plot

        searches, budget = finding.tables["searches"], int(finding.parameters.get("budget", self.budget))
        figures = {
            "success": Figure(
                lambda ax: plot.success(searches, budget, ax=ax),
                "Share of the targets that each search reached, by the number of inputs tried.",
            )
        }
        if "edits" in finding.tables:
            edits = finding.tables["edits"]
            figures["edits"] = Figure(
                lambda ax: plot.kept(edits[edits["region"] == "after"], ax=ax),
                "How much of its routing a token keeps when the text before it is edited, by layer, with 95 % intervals"
                " over prompts.",
            )
        return figures


def _edits(
    probe: RoutingProbe, texts: list[tuple[str, str]], words: npt.NDArray[Any], rng: np.random.Generator
) -> list[Edit]:
    """Each text before and after each edit, routed; "substitute" replaces one token in the middle."""
    out = []
    tokenize: Callable[[str], list[int]] = probe.model.tokenize
    for name, text in texts:
        before = tokenize(text)
        changed = {kind: tokenize(new) for kind, new in manipulation.text_edits(text).items()}
        middle = len(before) // 2
        changed["substitute"] = [*before[:middle], int(rng.choice(words)), *before[middle + 1 :]]
        routed = probe.route([before, *changed.values()])
        for (kind, after), one in zip(changed.items(), routed[1:], strict=True):
            pairs, later = manipulation.align_tokens(before, after)
            out.append(Edit(name, kind, routed[0].experts, one.experts, pairs, later))
    return out


def _misrouting(
    probe: RoutingProbe,
    texts: list[tuple[str, str]],
    words: npt.NDArray[Any],
    n_tried: int,
    rng: np.random.Generator,
    progress: Callable[[str], None],
) -> pd.DataFrame:
    """Of each text, the replacement of one token after which the tokens behind it keep their experts least.

    It is chosen by every other one of these tokens, and judged by the others: the smallest of many is small by chance.
    """
    rows: list[tuple[object, ...]] = []
    n_expert = max(probe.layout.n_expert)
    for done, (name, text) in enumerate(texts if n_tried else ()):
        progress(f"looking for replacements that misroute: text {done + 1} of {len(texts)}")
        before = probe.model.tokenize(text)
        start = 1 if probe.model.adds_bos else 0
        places = np.arange(start, len(before) - 4)
        if not places.size:
            continue
        tried = [(int(rng.choice(places)), int(rng.choice(words))) for _ in range(n_tried)]
        changed = [[*before[:at], word, *before[at + 1 :]] for at, word in tried]
        plain, *routed = probe.route([before, *changed])
        kept = np.array(
            [
                manipulation.halves_kept(plain.experts[at + 1 :], one.experts[at + 1 :], n_expert)
                for (at, _), one in zip(tried, routed, strict=True)
            ]
        )
        worst = int(kept[:, 0].argmin())
        at, word = tried[worst]
        piece = [probe.model.piece(t).decode("utf-8", "replace") for t in (before[at], word)]
        rows.append((name, at, *piece, len(before) - at - 1, kept[worst, 1], kept[:, 1].mean()))
    columns = ["prompt", "place", "token", "replacement", "tokens_after", "kept", "kept_by_others"]
    return pd.DataFrame(rows, columns=columns).sort_values("kept", kind="stable").reset_index(drop=True)


def _misrouting_sentence(misled: pd.DataFrame, n_tried: int) -> str:
    less = misled["kept_by_others"] - misled["kept"]
    found = nulls.jackknife(less.mean(), (less.sum() - less) / max(len(less) - 1, 1))
    row = misled.iloc[0]
    return (
        f"The worst of {n_tried} replacements of one token leaves the tokens behind it {less.mean():.1%} less of their"
        f" experts than such replacements do on average ({found.low:.1%} to {found.high:.1%} over"
        f" {number(len(misled), 'text')}; chosen by other tokens than these); the worst of all, {row['token']!r} by"
        f" {row['replacement']!r} in {row['prompt']}, leaves {row['kept']:.0%} of them."
    )


def _search_sentences(found: pd.DataFrame, asked: RoutingManipulation) -> list[str]:
    by = found.set_index("method")
    out = []
    for method in by.index:
        row = by.loc[method]
        line = (
            f"{str(method).capitalize()} search reached {row['reached']:.0f} of {row['targets']:.0f} targets within"
            f" {asked.budget} inputs, {span(row['rate'], row['low'], row['high'], '.0%')}, after"
            f" {row['mean_evaluations']:.0f} on average"
        )
        if method != "random" and row["targets"] > 1:
            line += (
                f": fewer than random search by {span(row['saved'], row['saved_low'], row['saved_high'], '.0f')},"
                f" p = {row['p_family']:.2g}"
            )
        out.append(line + ".")
    return out


def _edit_sentences(
    effect: pd.DataFrame, robust: pd.DataFrame, changed: float, stability: pd.DataFrame
) -> list[str]:
    out = []
    before, after = effect[effect["region"] == "before"], effect[effect["region"] == "after"]
    if len(before):
        worst = before["jaccard"].min()
        out.append(
            "Tokens before an edit keep their experts"
            + (
                " exactly, as in a causal model they must."
                if worst == 1
                else f" up to rounding (Jaccard {worst:.4f})."
            )
        )
    for kind, part in after.groupby("kind"):
        least = part.iloc[int(part["jaccard"].argmin())]
        line = (
            f"After the edit “{kind}” unchanged tokens keep the least in layer {least['layer']:.0f}: Jaccard"
            f" {span(least['jaccard'], least['low'], least['high'], '.2f')}"
        )
        if np.isfinite(least["jaccard_other"]):
            line += f"; between different tokens {least['jaccard_other']:.2f}"
        out.append(line + ".")
    if len(robust):
        row = robust.iloc[int(robust["kept"].argmin())]
        out.append(
            f"Least robust of {len(robust)} (layer, expert) pairs is expert {row['expert']:.0f} of layer"
            f" {row['layer']:.0f}: kept at {span(row['kept'], row['low'], row['high'], '.0%')} of the tokens where"
            f" it was chosen; it serves {row['rate']:.0%} of all."
        )
    stable = int((stability["verdict"] == "stable").sum())
    out.append(
        f"As published: {changed:.0%} of the texts' unions of experts changed, {stable} of {len(stability)} expert ids"
        " are “stable”, layers pooled."
    )
    return out
