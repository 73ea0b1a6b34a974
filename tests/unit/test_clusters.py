"""Which requests are one observation, and among which of them tests exchange domains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import olmoe_line, write
from scipy.sparse.csgraph import connected_components
from scipy.stats import kruskal

import moetrace
from moetrace.__main__ import main
from moetrace.analysis import from_trace
from moetrace.analysis.counts.clusters import SHARED, WHOLE, text_clusters
from moetrace.analysis.domains.lengths import WIDTH, kruskal_wallis, length_classes
from moetrace.analysis.statistics.nulls import Domains
from moetrace.errors import UsageError
from moetrace.findings import Subject, ask
from moetrace.trace.importers import import_trace


def alike(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def referee(texts: list[list[int]], n_prompt: list[int], labels: list[str]) -> np.ndarray:
    """The definition, pair by pair."""
    n = len(texts)
    share = np.array([[alike(a, b) for b in texts] for a in texts])
    if len(set(labels)) > 1:
        template = [max(share[i, j] for j in range(n) if labels[j] != labels[i]) for i in range(n)]
    else:
        template = [
            max(k for k in range(len(texts[i]) + 1) if (share[i] >= k).sum() * 2 > n) for i in range(n)
        ]
    joined = np.zeros((n, n), dtype=bool)
    for i in range(n):
        own = n_prompt[i] - template[i]
        for j in range(n):
            whole = n_prompt[i] >= WHOLE and share[i, j] >= n_prompt[i]
            part = own >= SHARED and share[i, j] - template[i] >= max(SHARED, own / 2)
            joined[i, j] = labels[i] == labels[j] and (texts[i] == texts[j] or whole or part)
    return np.asarray(connected_components(joined | joined.T, directed=False)[1])


@st.composite
def families(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[str]]:
    """Texts that begin as others do: each takes a piece of an earlier one, and goes on by itself."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    opening = rng.integers(0, 5, rng.integers(0, 30)).tolist()
    texts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 24))):
        old = texts[rng.integers(len(texts))] if texts and rng.random() < 0.6 else opening
        keep = len(old) if rng.random() < 0.4 else int(rng.integers(0, len(old) + 1))
        texts.append(old[:keep] + rng.integers(0, 3, rng.integers(0, 40)).tolist() * int(rng.random() < 0.8))
    domains = draw(st.integers(1, 3))
    labels = [f"d{rng.integers(domains)}" for _ in texts]
    return texts, [int(rng.integers(0, len(text) + 1)) for text in texts], labels


@settings(max_examples=200, deadline=None)
@given(families())
def test_clusters_are_those_of_the_definition(made: tuple[list[list[int]], list[int], list[str]]) -> None:
    texts, n_prompt, labels = made
    found = text_clusters([np.array(text, dtype=np.int32) for text in texts], n_prompt, labels)
    expected = referee(texts, n_prompt, labels)
    assert len(set(zip(found.tolist(), expected.tolist(), strict=True))) == len(set(found.tolist()))
    assert len(set(found.tolist())) == len(set(expected.tolist()))


def imported(tmp_path: Path, copies: int = 1, **more: object) -> Path:
    """Four texts of each of two domains, ``copies`` lines each; ``more`` keys of a line, given its text's number."""
    rng = np.random.default_rng(1)
    lines = []
    for text in range(8):
        n = int(rng.integers(20, 30))
        experts = np.stack([rng.permutation(8)[:2] for _ in range(n * 3)]).reshape(n, 3, 2)
        line = json.loads(olmoe_line(experts.tolist(), label="ab"[text % 2]))
        line["input_ids"] = rng.integers(0, 99, n).tolist()
        lines += [json.dumps(line | {k: v(text) for k, v in more.items()})] * copies  # type: ignore[operator]
    import_trace(write(tmp_path / "texts.jsonl", *lines), tmp_path / "t.moet")
    return tmp_path / "t.moet"


def test_a_line_that_stands_three_times_is_one_observation(tmp_path: Path) -> None:
    with moetrace.open(imported(tmp_path, copies=3)) as trace:
        routing = from_trace(trace, phase="prefill")
        assert (routing.n_prompts, len(routing.prompts)) == (24, 8)
        assert routing.text.n_requests == 8
        assert routing.counts.tokens.sum() == len(trace) * 3  # all are counted, in three layers
        each = from_trace(trace, phase="prefill", group_key="id")
        assert len(each.prompts) == 24
        found = ask("overview", trace)
        assert found.tables["domains"]["prompts"].tolist() == [12, 12]
        assert found.tables["domains"]["independent"].tolist() == [4, 4]
        assert any("24 prompts are 8 independent texts" in caveat for caveat in found.caveats)
        separation = ask("domain-separation", trace)
        assert any("Tested with 8 prompts" in caveat for caveat in separation.caveats)
        assert any("24 prompts are 8 independent texts" in caveat for caveat in separation.caveats)


def test_texts_that_are_too_many_are_not_compared_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = imported(tmp_path, copies=3)
    monkeypatch.setattr("moetrace.analysis.counts.from_trace.MOST_TOKENS", 100)
    with moetrace.open(path) as trace:
        assert len(from_trace(trace, phase="prefill").prompts) == 24
        assert any("were not compared" in caveat for caveat in ask("overview", trace).caveats)
    monkeypatch.undo()
    with moetrace.open(path) as trace:
        assert not any("were not compared" in caveat for caveat in ask("overview", trace).caveats)


def test_what_clients_call_a_group_is_one_observation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = imported(tmp_path, group=lambda text: text // 4, writer=lambda text: f"w{text % 3}")
    with moetrace.open(path) as trace:
        assert trace.requests["group"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert len(from_trace(trace, phase="prefill").prompts) == 4  # two groups in each of two domains
        assert len(from_trace(trace, phase="prefill", group_key="writer").prompts) == 6
        with pytest.raises(UsageError, match="no request has 'editor'"):
            from_trace(trace, phase="prefill", group_key="editor")
        assert Subject(trace, group_key="writer").looked_at != Subject(trace).looked_at
    assert main(["stats", str(path), "--only", "domain-separation", "--group-key", "writer"]) == 0
    assert "8 prompts are 6 independent texts: those with the same `writer` are one" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["stats", str(path), "--only", "domain-separation", "--strata", "writer"]) == 0
    assert "exchanged among those with the same `writer`" in " ".join(capsys.readouterr().out.split())


def test_texts_without_token_ids_are_not_taken_for_copies(tmp_path: Path) -> None:
    path = imported(tmp_path, copies=2)
    with moetrace.open(path) as trace:

        class Mute:
            """The trace of a source that does not say its tokens."""

            token_ids = np.full(len(trace), -1, dtype=np.int32)

            def __getattr__(self, name: str) -> object:
                if name == "parts":
                    raise AttributeError(name)
                return getattr(trace, name)

        assert len(from_trace(Mute(), phase="prefill").prompts) == 16


# -- lengths ---------------------------------------------------------------------------------------------


def test_domains_alike_in_length_need_no_classes() -> None:
    tokens = [50, 60, 70, 80, 55, 65, 75, 85]
    assert length_classes(tokens, ["a", "b"] * 4) is None
    always = length_classes(tokens, ["a", "b"] * 4, always=True)
    assert always is not None
    assert always.codes.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert length_classes([7] * 4, ["a", "b"] * 2, always=True) is None


def test_ranks_are_compared_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    for high in (4, 1000):
        values, labels = rng.integers(0, high, 30), rng.choice(list("abc"), 30)
        expected = kruskal(*(values[labels == name] for name in "abc")).pvalue
        assert kruskal_wallis(values, Domains.of(labels)) == pytest.approx(expected)
    assert kruskal_wallis([3] * 30, Domains.of(labels)) == 1


def test_classes_hold_prompts_about_as_long_and_name_domains_that_stand_alone() -> None:
    rng = np.random.default_rng(0)
    tokens = np.concatenate((rng.integers(5, 16, 12), rng.integers(40, 121, 24)))
    found = length_classes(tokens, np.repeat(["short", "b", "c"], 12))
    assert found is not None
    assert found.alone == ("short",)
    for code in np.unique(found.codes):
        own = tokens[found.codes == code]
        assert own.max() <= WIDTH * own.min()
    assert (np.diff(found.codes[np.argsort(tokens)]) >= 0).all()


def test_what_cannot_be_told_from_length_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    lines = []
    for text in range(12):
        n = 8 + text // 2 if text % 2 else 60 + text
        experts = np.stack([rng.permutation(8)[:2] for _ in range(n)]).reshape(n, 1, 2)
        line = json.loads(olmoe_line(experts.tolist(), label="ab"[text % 2]))
        lines.append(json.dumps(line | {"input_ids": rng.integers(0, 99, n).tolist()}))
    import_trace(write(tmp_path / "texts.jsonl", *lines), tmp_path / "t.moet")
    with moetrace.open(tmp_path / "t.moet") as trace:
        found = ask("domain-separation", trace)
        assert not found.concludes
        assert "cannot be told from the length of their prompts" in found.sentences[0]
        assert found.tables["domain_test"]["p_value"].isna().all()
        free = Subject(trace, strata="none").domain_test(n_permutations=19)
        assert free.testable
