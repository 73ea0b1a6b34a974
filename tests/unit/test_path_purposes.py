"""What paths through experts are taken for, and the types of token of cold experts."""

from __future__ import annotations

import numpy as np
import pandas as pd

import moetrace.analysis as m
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.placement.cold_experts import cold_types
from moetrace.analysis.text.path_purposes import path_domains, path_types, paths_as_experts
from moetrace.analysis.text.token_patterns import types_by_depth

N, LENGTH, E = 24, 40, 8
PATH = ((0, 6), (1, 7))
WORDS = [b" cat", b" dog", b" sun", b" 12", b" 7", b" the"]


def world(seed: int = 0) -> tuple[RoutedText, np.ndarray]:
    """Half of the prompts are of maths; numbers there go through expert 6 and then 7; nothing else does."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, len(WORDS), N * LENGTH)
    ids = np.argsort(-rng.gumbel(size=(N * LENGTH, 2, 6)), axis=2)[:, :, :2]
    maths = np.repeat(np.arange(N) % 2 == 0, LENGTH)
    on = maths & np.isin(tokens, (3, 4))
    ids[on, 0, 0], ids[on, 1, 0] = 6, 7
    labels = ["maths" if i % 2 == 0 else "prose" for i in range(N)]
    text = RoutedText(
        ids.astype(np.uint8), np.arange(0, N * LENGTH + 1, LENGTH), E, tokens=tokens, labels=labels
    )
    return text, on


def test_paths_are_experts_of_the_tokens_that_take_all_of_them() -> None:
    text, on = world()
    some = paths_as_experts(text, [PATH, ((0, 0), (1, 0))])
    np.testing.assert_array_equal((some.experts[:, 0] == 0).any(axis=1), on)
    both = (text.experts[:, 0] == 0).any(axis=1) & (text.experts[:, 1] == 0).any(axis=1)
    np.testing.assert_array_equal((some.experts[:, 0] == 1).any(axis=1), both)
    np.testing.assert_array_equal((some.experts[:, 0] == 2).any(axis=1), ~both & ~on)


def test_a_path_of_numbers_in_maths_is_found_for_both() -> None:
    text, on = world()
    paths, names = [PATH, ((0, 0), (1, 0))], ["numbers", "any"]
    domains = path_domains(text, paths, names)
    top = domains.iloc[0]
    assert (top["path"], top["domain"], top["tokens"]) == ("numbers", "maths", on.sum())
    assert top["p_family"] < 0.01
    assert domains[domains["path"] == "any"]["lift"].between(0.5, 1.5).all()
    typed = m.type_words(m.join_words([WORDS[t] for t in text.tokens], text.starts))
    types = path_types(text, paths, names, typed)
    top = types.iloc[0]
    assert (top["path"], top["pattern"], top["concentration"]) == ("numbers", "NUM", 1.0)
    assert top["p_family"] <= 0.05
    assert len(path_domains(text, [], [])) == 0
    assert len(path_types(text, [], [], typed)) == 0


def test_cold_experts_types_are_those_of_their_tokens() -> None:
    text, on = world()
    typed = m.type_words(m.join_words([WORDS[t] for t in text.tokens], text.starts))
    table = cold_types(text, [(0, 6), (1, 7)], typed.kind, typed.names).set_index("type")
    assert table.loc["NUM", "uses"] == 2 * on.sum()
    assert table.loc["NUM", "share"] == 1.0
    assert np.isclose(table.loc["NUM", "text_share"], np.isin(text.tokens, (3, 4)).mean())
    assert table.loc["NUM", "low"] > 1
    assert (table.drop("NUM")["uses"] == 0).all()
    assert np.isclose(table["text_share"].sum(), 1)


def test_types_by_depth_counts_specialists_beyond_words() -> None:
    types = pd.DataFrame({"layer": [0, 0, 5], "pattern": ["NUM", "NUM", "KW"], "lift": [2.0, 4.0, 3.0]})
    special = pd.DataFrame(
        {"layer": [0, 0, 5], "pattern": ["NUM", "NUM", "KW"], "of": "type", "kind": ["type", "word", "type"]}
    )
    table = types_by_depth(types, special, np.arange(6)).set_index(["third", "pattern"])
    assert table.loc[("early", "NUM"), "specialists"] == 1
    assert table.loc[("early", "NUM"), "median_lift"] == 4
    assert table.loc[("late", "KW"), "layers"] == "4-5"
    assert table["specialists"].sum() == 2
    assert np.isnan(table.loc[("middle", "KW"), "median_lift"])
