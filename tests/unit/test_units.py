"""Prompts that stand together, prompts that are drawn: what is said of very many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import traces

import moetrace
from moetrace.analysis.counts import from_trace, units
from moetrace.findings import Subject, question


def test_groups_are_of_one_domain_and_of_a_size() -> None:
    domains = np.array(["a"] * 6000 + ["b"] * 3000 + [""] * 1000)[
        np.random.default_rng(1).permutation(10_000)
    ]
    group = units.taken_together(domains.tolist(), 4096)
    sizes = np.bincount(group)
    assert sizes.size <= units.ENOUGH
    assert sizes.max() - sizes.min() <= 1
    assert all(np.unique(domains[group == g]).size == 1 for g in range(sizes.size))
    # not by their order
    assert np.corrcoef(group[domains == "a"], np.arange(6000))[0, 1] == pytest.approx(0, abs=0.06)


def test_few_prompts_stay_alone() -> None:
    assert units.taken_together(["a", "b", "a"], 3).tolist() == [0, 1, 2]


def test_a_rare_domain_keeps_groups_enough_as_far_as_there_is_room() -> None:
    domains = ["a"] * 9960 + ["b"] * 40
    for at_most, fewest in ((8192, 20), (4096, 13), (2048, 8)):
        group = units.taken_together(domains, at_most)
        assert np.unique(group[9960:]).size == fewest
        assert np.unique(group).size <= at_most


def test_as_many_of_each_domain_are_drawn() -> None:
    domains = np.array(["a"] * 900 + ["b"] * 90 + ["c"] * 9)
    drawn = units.evenly(domains.tolist(), 100, np.random.default_rng(0))
    assert drawn.sum() == 100
    assert [int((domains[drawn] == d).sum()) for d in "abc"] == pytest.approx([45, 46, 9], abs=1)


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Subject, Subject]]:
    path = traces.labelled_trace(tmp_path / "t.moet", ("a", "b"), n_prompts=40)
    with moetrace.open(path) as one, moetrace.open(path) as two:
        whole, small = Subject([one]), Subject([two])
        _ = whole.counts, whole.routing.each_apart, whole.routing.text, whole.routing.token_counts
        monkeypatch.setattr(from_trace, "_TABLE_BYTES", 8 * len(one.layers) * 2 * int(max(one.n_expert)) * 40)
        monkeypatch.setattr(from_trace, "_TEXT_BYTES", 20_000)
        monkeypatch.setattr(from_trace, "_PAIRED", 20)
        monkeypatch.setattr(units, "ENOUGH", 20)
        monkeypatch.setattr(units, "FEWEST", 4)
        yield whole, small


def test_sums_do_not_change_when_prompts_stand_together(subjects: tuple[Subject, Subject]) -> None:
    whole, small = subjects
    a, b = whole.labelled, small.labelled
    assert a.prompts.size == 80 > b.prompts.size
    assert b.n_prompts.sum() == 80
    assert b.n_prompts.max() > 1
    for label in ("a", "b"):
        for name in ("tokens", "included", "top1"):
            mine, theirs = (getattr(c, name)[c.labels == label].sum(axis=0) for c in (a, b))
            np.testing.assert_array_equal(mine, theirs)
    # prompts counted by themselves are those prompts
    some = small.prompt_counts
    where = np.searchsorted(whole.prompt_counts.prompts, some.prompts)
    assert 1 < some.prompts.size < 80
    np.testing.assert_array_equal(some.lag_shared, whole.prompt_counts.lag_shared[where])


def test_texts_and_words_are_of_whole_prompts_drawn(subjects: tuple[Subject, Subject]) -> None:
    whole, small = subjects
    text, all_of_it = small.routing.text, whole.routing.text
    assert 1 <= text.n_requests < all_of_it.n_requests == len(small.routing.texts.prompts)
    assert len(small.routing.texts) == len(all_of_it)
    for i, name in enumerate(text.prompts):
        j = all_of_it.prompts.index(name)
        np.testing.assert_array_equal(
            text.experts[text.starts[i] : text.starts[i + 1]],
            all_of_it.experts[all_of_it.starts[j] : all_of_it.starts[j + 1]],
        )
    counts = small.routing.token_counts
    assert (counts.labels == "a").sum() == (counts.labels == "b").sum() == 10


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("load-balance", "Groups stand for prompts: 80 prompts in"),
        ("specialists", "Groups stand for prompts: 80 prompts in"),
        ("domain-separation", "groups of prompts of 2 domains"),
        ("persistence", "of 80 prompts, drawn at random"),
        ("transitions", "of 80 prompts, drawn at random"),
        ("expert-circuits", "of 80 prompts"),
        ("cold-experts", "of 80 prompts, drawn at random, were read"),
        ("generation-dynamics", "of 80 prompts, drawn at random, were read"),
        ("matched-separation", "Words were compared in 20 of 80 prompts"),
    ],
)
def test_sentences_say_so(subjects: tuple[Subject, Subject], name: str, said: str) -> None:
    whole, small = subjects
    asked = question(name)()
    finding = asked.ask(small)
    assert finding.not_answered is None
    assert any(said in text for text in (*finding.sentences, *finding.caveats))
    if name != "expert-circuits":
        assert not any(said in text for text in asked.ask(whole).caveats)
