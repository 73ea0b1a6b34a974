"""Patterns, cold experts, circuits, dynamics: the functions against plain recomputation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import moetrace.analysis as m
from moetrace.analysis.circuits import path_test
from moetrace.analysis.counts.routed import exchange, rotation
from moetrace.analysis.dynamics.generation import answers_match
from moetrace.analysis.placement.cold_experts import candidate_tokens, tokens_needed
from moetrace.analysis.text.lexicon import SEMANTIC_TYPES, semantic_type
from moetrace.analysis.text.token_patterns import repeated
from moetrace.errors import UsageError


def routed(seed: int = 0, sizes: tuple[int, ...] = (9, 14, 7, 11), n_layers: int = 3, e: int = 8, k: int = 2):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((sum(sizes), n_layers, e))
    top = np.argsort(-logits, axis=2)[:, :, :k]
    weights = rng.random(top.shape).astype(np.float32)  # not in the router's order, as with biased selection
    return m.RoutedText(
        top.astype(np.uint8),
        np.concatenate(([0], np.cumsum(sizes))),
        e,
        weights=weights,
        tokens=rng.integers(0, 6, sum(sizes)).astype(np.int32),
    )


def test_the_first_expert_is_the_heaviest_and_missing_cells_have_none() -> None:
    text = routed()
    for row in range(5):
        for layer in range(3):
            heaviest = text.experts[row, layer][text.weights[row, layer].argmax()]
            assert text.first[row, layer] == heaviest
    gone = text.experts.copy()
    gone[2, 1] = 255
    partly = m.RoutedText(gone, text.starts, 8, weights=text.weights)
    assert partly.first[2, 1] == -1
    assert not partly.known(1)[2]
    assert partly.member(1)[2].sum() == 0
    assert partly.of([1]).experts.shape[0] == 14
    with pytest.raises(UsageError, match="prompts has 1 entries, not 4"):
        m.RoutedText(gone, text.starts, 8, prompts=["a"])


def test_rows_that_are_taken_keep_their_request_run_and_place() -> None:
    text = routed()  # requests of 9, 14, 7 and 11 rows
    part = text.take(np.array([1, 2, 4, 23, 40]))
    assert part.starts.tolist() == [0, 3, 3, 4, 5]
    assert part.owner.tolist() == part.runs.tolist() == [0, 0, 0, 2, 3]
    assert part.rows.tolist() == [1, 2, 4, 23, 40]
    assert part.positions.tolist() == [1, 2, 4, 0, 10]
    assert part.prompts == text.prompts
    np.testing.assert_array_equal(part.weights, text.weights[part.rows])
    masked = text.take(np.isin(np.arange(len(text)), part.rows))
    np.testing.assert_array_equal(masked.experts, part.experts)
    assert part.of([3, 0]).rows.tolist() == [40, 1, 2, 4]
    assert part.of([3, 0]).owner.tolist() == [0, 1, 1, 1]


def test_requests_are_drawn_whole() -> None:
    text = m.RoutedText(np.zeros((200, 1, 1), np.uint8), np.arange(0, 201, 10), 4)
    assert text.some(200, 0) is text
    some = text.some(85, 0)
    assert np.diff(some.starts).tolist() == [10] * 8
    assert len(set(some.prompts)) == 8
    assert (some.positions == np.tile(np.arange(10), 8)).all()


def test_of_long_requests_stretches_are_drawn() -> None:
    """GIVEN few requests, each longer than there is room for THEN each has its share, and none is left out."""
    text = m.RoutedText(np.zeros((50, 1, 1), np.uint8), np.arange(0, 51, 10), 4)
    some = text.some(25, 0)
    assert np.diff(some.starts).tolist() == [5] * 5
    assert some.prompts == text.prompts
    assert (np.diff(some.rows.reshape(5, 5), axis=1) == 1).all()
    assert len({tuple(p) for p in some.positions.reshape(5, 5).tolist()}) > 1, "not all from the beginning"
    assert (text.some(25, 0, "beginning").positions.reshape(5, 5) == np.arange(5)).all()
    assert len(text.some(25, 0, None)) == 20  # whole ones
    assert len(text.some(5, 0, None)) == 10  # at least one
    alone = text.take(text.owner == 3).some(5, 0)
    assert alone.prompts == ("3",)  # a request without rows is not drawn
    assert len(alone) == 5


def test_a_run_ends_where_positions_do_not_rise_by_one() -> None:
    positions = np.array([3, 4, 6, -1, -1, 9, 1, 2])
    text = m.RoutedText(np.zeros((8, 1, 1), np.uint8), np.array([0, 6, 8]), 4, positions=positions)
    assert text.runs.tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    with pytest.raises(UsageError, match="requests have 8 rows, not 9"):
        m.RoutedText(np.zeros((9, 1, 1), np.uint8), np.array([0, 6, 8]), 4)


def test_rotations_keep_each_text_and_are_uniform() -> None:
    starts = np.array([0, 4, 9])
    rng = np.random.default_rng(0)
    seen = np.zeros((2, 5))
    for _ in range(2000):
        rows = rotation(starts, rng)
        assert sorted(rows[:4]) == [0, 1, 2, 3]
        assert all((b - a) % 5 == 1 for a, b in pairwise(rows[4:] - 4))
        seen[0, rows[0]] += 1
        seen[1, rows[4] - 4] += 1
    np.testing.assert_allclose(seen[0, :4] / 2000, 0.25, atol=0.04)
    np.testing.assert_allclose(seen[1] / 2000, 0.2, atol=0.04)


def test_an_exchange_keeps_places_and_counts_the_rest_from_the_end() -> None:
    starts = np.array([0, 4, 10])  # texts of 4 and of 6
    for seed in range(8):
        rows = exchange(starts, np.random.default_rng(seed))
        if rows[0] == 0:
            assert rows.tolist() == list(range(10))
        else:
            assert rows.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 2, 3]


def test_expected_edges_are_the_mean_over_all_rotations() -> None:
    text = routed(sizes=(9,), n_layers=2)
    found = m.expert_circuits(text, min_support=1, n_permutations=5)
    a, b = text.member(0), text.member(1)
    every = np.mean([a.T @ np.roll(b, -turn, axis=0) for turn in range(9)], axis=0)
    for row in found.edges.itertuples():
        assert row.expected == pytest.approx(every[row.expert, row.to_expert])
        assert row.tokens == int((a[:, row.expert] * b[:, row.to_expert]).sum())
        rate = b[:, row.to_expert].mean()
        assert row.lift == pytest.approx(row.tokens / a[:, row.expert].sum() / rate)


def test_mutual_information_is_what_its_definition_says() -> None:
    text = routed(sizes=(30, 40))
    found = m.expert_circuits(text, n_permutations=3).layers
    for i, (a, b) in enumerate(((0, 1), (1, 2))):
        joint = np.zeros((8, 8))
        np.add.at(joint, (text.first[:, a], text.first[:, b]), 1 / 70)
        outer = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        inside = joint > 0
        bits = (joint[inside] * np.log2(joint[inside] / outer[inside])).sum()
        assert found["mi_bits"].iloc[i] == pytest.approx(bits)
        kinds = [(joint.sum(axis=axis) > 0).sum() - 1 for axis in (0, 1)]
        assert found["mi_corrected_bits"].iloc[i] == pytest.approx(
            bits - kinds[0] * kinds[1] / (140 * np.log(2))
        )


def test_paths_are_counted_and_untestable_ones_are_not_significant() -> None:
    text = routed(sizes=(20, 25))
    path = ((0, 1), (1, 2), (2, 3))
    table = path_test(text, [path], n_permutations=19)
    uses = [(text.experts[:, layer] == expert).any(axis=1) for layer, expert in path]
    assert table["tokens"].iloc[0] == (uses[0] & uses[1] & uses[2]).sum()
    assert table["path"].iloc[0] == "L0-E1 → L1-E2 → L2-E3"
    assert path_test(text, []).empty
    with pytest.raises(UsageError, match="two layers"):
        m.expert_circuits(routed(n_layers=1))


def test_published_circuits_are_those_of_the_published_loops() -> None:
    text = routed(3, sizes=(6,), n_layers=4, e=10, k=3)
    found = m.as_published_circuits(text.experts, text.weights, 10)
    profile = np.zeros((4, 6, 10))
    for t in range(6):
        for layer in range(4):
            profile[layer, t, text.experts[t, layer]] = text.weights[t, layer]

    def r(layer: int, a: int, b: int) -> float:
        x, y = profile[layer][:, a], profile[layer + 1][:, b]
        return 0.0 if min(x.std(), y.std()) < 1e-10 else float(np.corrcoef(x, y)[0, 1])

    scores = []
    for layer in range(3):
        ranked = sorted(((r(layer, a, b), a, b) for a in range(10) for b in range(10)), reverse=True)
        used_a, used_b, matched = set(), set(), []
        for value, a, b in ranked:
            if value > 0.3 and a not in used_a and b not in used_b:
                used_a.add(a)
                used_b.add(b)
                matched.append(value)
        scores.append(np.mean(matched) if matched else 0.0)
    np.testing.assert_allclose(found.alignment["alignment"], scores)
    assert found.global_consistency == pytest.approx(np.mean(scores))
    lengths = []
    for start in range(10):
        path = [start]
        for layer in range(3):
            best = max(range(10), key=lambda b: r(layer, path[-1], b))
            if profile[layer][:, path[-1]].std() < 1e-10 or r(layer, path[-1], best) < 0.3:
                break
            path.append(best)
        lengths += [len(path)] if len(path) / 4 >= 0.3 else []
    assert sorted(found.pipelines["layers"]) == sorted(lengths)


def test_handoffs_are_counted_pair_by_pair() -> None:
    text = routed()
    counts = m.count_routing(
        text.experts, text.owner, np.asarray(text.positions), n_expert=8, weights=text.weights, max_lag=1
    )
    table = m.handoffs(counts)
    changed = pairs = 0
    for a, b in pairwise(text.starts.tolist()):
        changed += (text.first[a + 1 : b] != text.first[a : b - 1]).sum()
        pairs += b - a - 1
    assert table["layer"].tolist() == [0, 1, 2, -1]
    assert table["handoffs"].iloc[-1] == pytest.approx(changed / pairs)
    assert table["pairs"].iloc[-1] == pairs
    with pytest.raises(UsageError, match="without neighbours"):
        m.handoffs(m.count_routing(text.experts, text.owner, text.positions, n_expert=8, max_lag=0))


def test_published_dynamics_are_those_of_the_published_loops() -> None:
    text = routed(5, sizes=(8, 12))
    found = m.as_published_dynamics(text)
    consistency, handoffs, boundaries = [], 0, 0
    for a, b in pairwise(text.starts.tolist()):
        sets = [[set(ids.tolist()) for ids in row] for row in text.experts[a:b]]
        shared = sum(len(x & y) for one, two in pairwise(sets) for x, y in zip(one, two, strict=True))
        consistency.append(shared / (2 * 3 * (b - a - 1)))
        handoffs += (text.experts[a + 1 : b, :, 0] != text.experts[a : b - 1, :, 0]).sum()
        for t in range(2, b - a):
            apart = []
            for layer in range(3):
                window = set().union(*(sets[s][layer] for s in range(max(0, t - 3), t)))
                apart.append(1 - len(sets[t][layer] & window) / len(sets[t][layer] | window))
            boundaries += np.mean(apart) > 0.5
    assert found.consistency == pytest.approx(np.mean(consistency))
    assert found.handoffs_per_token == pytest.approx(handoffs / 20)
    assert len(found.boundaries) == boundaries
    assert found.boundary_rate == pytest.approx(boundaries / 16)


def test_a_change_of_usage_is_found_where_it_is() -> None:
    text = routed(1, sizes=(40,) * 6)
    experts = text.experts.copy() // 2
    late = np.asarray(text.positions) >= 23
    experts[late] += 4
    found = m.generation_phases(m.RoutedText(experts, text.starts, 8), n_permutations=39)
    assert found.common["change"].iloc[0] == 23
    assert found.common["p_value"].iloc[0] <= 0.05  # of six prompts: 1/32 at least
    assert (found.curve["jsd_bits"] > found.curve["null_q95"]).any()
    short = m.generation_phases(routed(sizes=(9, 9)), n_permutations=3)
    assert short.common["p_value"].isna().all()


def drawn(seed: int, logits: np.ndarray, n_prompts: int = 24) -> np.ndarray:
    """Top-2 of logits (n_prompts, T, L, E) with noise: rows of all prompts, (n_prompts * T, L, 2)."""
    noisy = logits + np.random.default_rng(seed).gumbel(size=(n_prompts, *logits.shape[1:]))
    return np.argsort(-noisy, axis=-1)[..., :2].reshape(-1, *logits.shape[2:-1], 2).astype(np.uint8)


@pytest.mark.parametrize("world", ["change", "drift", "change of a third", "nothing"])
def test_a_change_is_told_from_a_drift_and_from_one_of_few_prompts(world: str) -> None:
    """What is said of 8 made-up recordings of 24 prompts: none is called what it is not."""
    said, places, shares = [], [], []
    for seed in range(8):
        rng = np.random.default_rng((1, seed))
        logits = np.zeros((24, 45, 2, 16)) + rng.normal(0, 0.5, (24, 1, 2, 16))
        effect, step = rng.normal(0, 2, (2, 16)), np.arange(45)[None, :, None, None]
        if world == "drift":
            logits = logits + effect * step / 45
        elif world != "nothing":
            of = np.arange(24)[:, None, None, None] < (8 if world == "change of a third" else 24)
            logits = logits + np.where(of & (step >= 20), effect, 0)
        text = m.RoutedText(drawn(seed, logits), np.arange(25) * 45, 16)
        first = m.generation_phases(text, n_permutations=99, seed=seed).common.iloc[0]
        if first["p_value"] <= 0.05:
            said.append(first["fits"])
            places.append(first["low"] <= 20 <= first["high"])
            shares.append((first["share_low"], first["share"], first["share_high"]))
    if world == "nothing":
        assert len(said) <= 2
        return
    assert len(said) == 8
    if world == "drift":
        assert set(said) == {"drift"}
        return
    assert "drift" not in said
    assert sum(places) >= 7
    low, share, high = np.array(shares).T
    truth = 1 / 3 if world == "change of a third" else 1.0
    assert ((low <= truth) & (truth <= high)).sum() >= 7
    assert share.mean() == pytest.approx(truth, abs=0.15)
    assert world == "change of a third" or set(said) == {"change"}


def test_prefill_and_decode_are_compared_prompt_by_prompt_at_equal_length() -> None:
    one, two = routed(1, sizes=(30,) * 8), routed(2, sizes=(12,) * 8)
    table = m.phase_comparison(one, two, n_permutations=99)
    assert table["tokens"].tolist() == [96] * 3
    experts = two.experts.copy()
    experts[:, 1] = np.array([0, 1])
    table = m.phase_comparison(one, m.RoutedText(experts, two.starts, 8), n_permutations=199)
    assert table["p_family"].iloc[1] <= 0.01
    assert table["hottest_decode"].iloc[1] in (0, 1)
    alone = m.phase_comparison(one, two.of([0]), n_permutations=9)
    assert alone["p_value"].isna().all()


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        ("x = 312", 12, False),
        ("so it is 12.", "12", True),
        ("it is 12.5", 12, False),
        ("a = -12", "12", True),
        ("The capital is  PARIS!", "paris", True),
        ("Parisian", "Paris", False),
        ("anything", "", False),
        ("f(x) = (a + b)", "(a + b)", True),
    ],
)
def test_an_answer_must_stand_by_itself(output: str, answer: object, right: bool) -> None:
    assert answers_match(output, answer) is right


def test_correctness_needs_two_of_each_kind() -> None:
    text = routed()
    counts = m.count_routing(text.experts, text.owner, text.positions, n_expert=8, max_lag=1)
    with pytest.raises(UsageError, match="3 of 4 outputs are right"):
        m.correctness_features(counts, [True, True, True, False])
    table = m.correctness_features(counts, [True, True, False, False], n_permutations=19)
    assert table["feature"].tolist() == ["persistence", "overlap", "entropy_bits", "tokens"]
    assert table["difference"].iloc[3] == pytest.approx((9 + 14) / 2 - (7 + 11) / 2)


def test_cold_is_only_what_the_upper_bound_says() -> None:
    n = tokens_needed(8, 2, 1) + 1
    counts = np.zeros((1, 1, 8), dtype=int)
    for tokens, verdict in ((n, "cold"), (n // 3, "undecided")):
        counts[0, 0, :4] = tokens // 2
        table = m.cold_experts(counts, [[tokens]], n_expert_used=2).set_index("expert")
        assert table.loc[7, "verdict"] == verdict
        assert table.loc[0, "verdict"] == "in use"
    # one prompt that holds all its uses: the tokens are worth less
    grouped = np.zeros((10, 1, 8), dtype=int)
    grouped[0, 0, 1] = 40
    grouped[:, 0, 0] = 50
    table = m.cold_experts(grouped, np.full((10, 1), 50), n_expert_used=2).set_index("expert")
    assert table.loc[1, "cluster_high"] > 2 * table.loc[1, "high"]
    assert table.loc[1, "effective_tokens"] < 100
    with pytest.raises(UsageError, match="do not fit"):
        m.cold_experts(grouped, np.full((3, 1), 50), n_expert_used=2)


def test_published_cold_experts_take_unseen_for_prunable() -> None:
    counts = np.zeros((1, 1, 4), dtype=int)
    counts[0, 0] = [100, 99, 1, 0]
    table = m.as_published_cold_experts(counts, [[100]])
    assert table["cold"].tolist() == [False, False, False, True]
    assert table["prune"].tolist() == [False, False, False, True]


def test_triggers_come_with_their_context() -> None:
    text = routed()
    vocabulary = [b"a", b" b", b"c", b" d", b"e", b" \xc3"]
    table = m.trigger_tokens(text, [(1, 3)], vocabulary, at_most=3, context=2)
    uses = (text.experts[:, 1] == 3).any(axis=1)
    assert len(table) == min(3, uses.sum())
    for row in table.itertuples():
        at = int(text.starts[int(row.prompt)]) + int(row.position)
        assert uses[at]
        assert row.piece == vocabulary[row.token].decode("utf-8", "replace")
        assert f"⟦{row.piece}⟧" in row.context
        same = np.asarray(text.tokens) == row.token
        assert row.token_share == pytest.approx(uses[same].mean())
    assert table["weight"].is_monotonic_decreasing
    assert m.trigger_tokens(text, [(1, 3)])["context"].isna().all()
    best = candidate_tokens(text, [(1, 3)])[1, 3]
    shares = [uses[np.asarray(text.tokens) == t].mean() for t in best]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    "pieces",
    [
        # byte-level BPE and sentencepiece, as the vocabulary's bytes have them
        [b"def", b" count", b"_wo", b"rds", b"(x", b"):", b"\n", b"    ", b"return", b" 12", b".", b"5"],
        [b" def", b" ", b"count", b"_words", b"(", b"x", b")", b":", b"\n    ", b"return", b" 1", b"2.5"],
    ],
)
def test_sub_word_tokens_are_joined_to_words(pieces: list[bytes]) -> None:
    joined = m.join_words(pieces, [0, len(pieces)])
    solid = [w for w in joined.words if w.strip()]
    assert solid == ["def", "count_words", "(", "x", ")", ":", "return", "12.5"]
    assert joined.words[joined.first[-1]] == "12.5"
    typed = m.type_words(joined)
    at = next(i for i, piece in enumerate(pieces) if b"wo" in piece)
    assert typed.trigram_name(typed.trigram[at]).endswith("CW→BR")


def test_words_of_several_texts_do_not_run_into_each_other() -> None:
    pieces = [b"The", b" end", b"ing", b" The", b" caf", b"\xc3", b"\xa9", b"<|im_end|>"]
    joined = m.join_words(pieces, [0, 3, 8])
    typed = m.type_words(joined)
    names = [typed.trigram_name(code) for code in typed.trigram]
    assert names == [
        "^→FW→CW",
        "FW→CW→$",
        "FW→CW→$",
        "^→FW→CW",
        *["FW→CW→CTL"] * 3,
        "CW→CTL→$",
    ]
    assert joined.words[joined.first[5]] == "café"
    bad = m.join_words([b"\xff\xfe", b" ok"], [0, 2])
    assert bad.words[-1] == "ok"
    assert m.join_words([], [0, 0]).words == (" ",)


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("42", "NUM"), ("-3.14", "NUM"), ("def", "KW"), ("SELECT", "KW"), ("for", "KW"), ("()", "BR"), ("+", "OP"),
        ("==", "OP"), ("=>", "OP"), (";", "PN"), ("...", "PN"), ("the", "FW"), ("The", "FW"), ("Janet", "CAP"),
        ("x", "VAR"), ("X", "CAP"), ("apple", "CW"), ("\n  ", "WS"), ("<|bos|>", "CTL"), ("don't", "CW"),
    ],
)  # fmt: skip
def test_types_follow_the_published_rules(word: str, kind: str) -> None:
    assert m.token_type(word) == kind


def test_semantic_types() -> None:
    found = {
        word: semantic_type(word) for word in ("same", "opposite", "as", "to", "5", "+", "hot", "king", "of")
    }
    assert list(found.values()) == ["SYN", "ANT", "AS", "TO", "NUM", "OP", "ADJ", "NOUN", "FUNC"]
    assert set(found.values()) | {"WS", "OTHER"} == set(SEMANTIC_TYPES)


def test_repetition_is_of_the_ids_up_to_the_token() -> None:
    tokens = np.array([1, 2, 3, 1, 2, 3, 9, 1, 2])
    text = m.RoutedText(np.zeros((9, 1, 1), np.uint8), np.array([0, 7, 9]), 4, tokens=tokens)
    assert repeated(text, 1).tolist() == [False, False, False, True, True, True, False, False, False]
    assert repeated(text, 2).tolist() == [False] * 4 + [True, True, False, False, False]
    assert repeated(text, 3).tolist() == [False] * 5 + [True, False, False, False]


def test_co_occurrence_counts_all_pairs_and_the_published_one_neighbours_only() -> None:
    experts = np.array([[[0, 1, 2]], [[0, 1, 2]], [[2, 0, 1]], [[3, 0, 1]]] * 3, dtype=np.uint8)
    text = m.RoutedText(experts, np.array([0, 6, 12]), 4)
    table = m.co_occurrence(text, min_expected=0.1).pairs.set_index(["expert", "other"])
    assert table.loc[(0, 1), "share"] == 1.0
    assert table.loc[(0, 2), "share"] == pytest.approx(9 / 12)
    assert table.loc[(1, 2), "share_other"] == 1.0
    old = m.as_published_coactivation(text).set_index(["expert", "other"])
    assert old.loc[(0, 1), "share"] == 1.0
    assert old.loc[(0, 2), "share"] == pytest.approx(3 / 12)  # only where ranks 0 and 1 are 2 and 0


def test_an_expert_of_one_type_is_found_with_its_numbers() -> None:
    rng = np.random.default_rng(0)
    words = [b" 1", b" 22", b" 3", b" 44", b" cat", b" dog", b" sun", b" sea", b" the", b" of"]
    tokens = rng.integers(0, 10, 20 * 30)
    experts = rng.integers(0, 7, (600, 1, 1)).astype(np.uint8)
    experts[tokens < 4] = 7
    text = m.RoutedText(experts, np.arange(0, 601, 30), 8, tokens=tokens.astype(np.int32))
    typed = m.type_words(m.join_words([words[t] for t in tokens], text.starts))
    found = m.pattern_summary(text, typed, n_permutations=99)
    types = found.specialists[found.specialists["of"] == "type"]
    # the other experts share the other words, so they prefer those a little
    assert types["lift"].iloc[1:].max() < 2.1
    row = types.iloc[0]
    assert (row["layer"], row["expert"], row["pattern"]) == (0, 7, "NUM")
    assert row["concentration"] == 1.0
    assert row["lift"] == pytest.approx(600 / (tokens < 4).sum())
    assert row["low"] < row["lift"] < row["high"]
    assert row["words"] == 4
    assert found.tested[0] == 8 * 3
    few = m.pattern_summary(text, typed, n_permutations=19, min_activity=10**6)
    assert few.tested == (0, 0)
    assert few.specialists.empty
    high = m.pattern_summary(text, typed, n_permutations=19, specialist_threshold=1.1)
    assert high.specialists.empty
    both = m.combined_analysis(type=types.head(2), trigram=found.trigrams.head(3))
    assert both["aspects"].max() <= 2
    assert set(both.columns) == {"layer", "expert", "type", "trigram", "aspects"}
