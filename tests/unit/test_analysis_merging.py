"""Likeness of experts, grouping, merging; reading experts from model files and writing fewer."""

from __future__ import annotations

from functools import partial
from itertools import combinations, permutations
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cosine as scipy_cosine

import moetrace.analysis as m
from moetrace.analysis.experts import merging
from moetrace.analysis.experts.outputs import blocks_of_pairs, expert_output
from moetrace.errors import MoetraceError, UsageError
from moetrace.model import merged
from moetrace.model.experts import Expert, LayerExperts
from moetrace.model.file import ModelFile
from moetrace.model.grouping import Grouping
from moetrace.synthetic import write_model

N_EMBD, N_FF = 12, 7
write_merged = partial(merged.write_merged, merge=merging.merge)


def expert(rng: np.random.Generator, *, gate: bool = True, bias: bool = False) -> Expert:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return Expert(
        draw(N_FF, N_EMBD),
        draw(N_EMBD, N_FF),
        draw(N_FF, N_EMBD) if gate else None,
        draw(N_FF) if bias else None,
        draw(N_FF) if bias and gate else None,
        draw(N_EMBD) if bias else None,
    )


def reordered(e: Expert, order: np.ndarray, scale: np.ndarray | None = None) -> Expert:
    s = np.ones(len(order), np.float32) if scale is None else scale.astype(np.float32)
    return Expert(
        e.up[order] * s[:, None],
        e.down[:, order] / s,
        None if e.gate is None else e.gate[order],
        None if e.up_bias is None else e.up_bias[order] * s,
        None if e.gate_bias is None else e.gate_bias[order],
        e.down_bias,
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# -- neurons


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_neurons_in_another_order_are_the_same_expert(rng, gate, bias, activation):
    a = expert(rng, gate=gate, bias=bias)
    order = rng.permutation(N_FF)
    table = m.weight_similarity(
        [a, reordered(a, order), expert(rng, gate=gate, bias=bias)], activation, n_null=0
    )
    assert table["cosine_aligned"][0] == pytest.approx(1)
    assert abs(table["cosine"][0]) < 0.8
    assert table["cosine_aligned"][1:].max() < 0.95
    match = merging.align(merging.neurons(a, activation), merging.neurons(reordered(a, order), activation))
    assert order[match.order].tolist() == list(range(N_FF))


def test_scale_and_sign_of_up_and_down_are_the_same_expert_too(rng):
    a = expert(rng, bias=True)
    scale = rng.choice([-1, 1], N_FF) * rng.uniform(0.2, 5, N_FF)
    b = reordered(a, rng.permutation(N_FF), scale)
    x = rng.standard_normal((20, N_EMBD)).astype(np.float32)
    assert np.allclose(expert_output(a, x), expert_output(b, x), atol=1e-3)
    assert m.weight_similarity([a, b], n_null=0)["cosine_aligned"][0] == pytest.approx(1)
    # gpt-oss adds 1 to up: there the scale is no freedom, and the two are not equal
    assert not np.allclose(expert_output(a, x, "swiglu_oai"), expert_output(b, x, "swiglu_oai"), atol=1e-1)
    assert m.weight_similarity([a, b], "swiglu_oai", n_null=0)["cosine_aligned"][0] < 0.95


def test_the_matching_is_the_best_of_all(rng):
    """Against every permutation of few neurons, with the sign of each free."""
    a, b = (merging.neurons(expert(rng)) for _ in range(2))
    small = [merging.Neurons(p.fixed[:5], p.free[:5], p.scale[:5], p.n_up) for p in (a, b)]
    gain = small[0].fixed @ small[1].fixed.T + np.abs(small[0].free @ small[1].free.T)
    best = max(sum(gain[i, j] for i, j in enumerate(order)) for order in permutations(range(5)))
    norms = np.sqrt(np.prod([(p.fixed**2).sum() + (p.free**2).sum() for p in small]))
    assert merging.align(*small).cosine == pytest.approx(best / norms)


def test_cosines_as_they_lie_agree_with_scipy(rng):
    a, b = expert(rng), expert(rng)
    table = m.weight_similarity([a, b], n_null=0)
    whole = [np.concatenate([e.gate.ravel(), e.up.ravel(), e.down.ravel()]) for e in (a, b)]
    assert table["cosine"][0] == pytest.approx(1 - scipy_cosine(*whole), abs=1e-6)
    assert table["cosine_down"][0] == pytest.approx(
        1 - scipy_cosine(a.down.ravel(), b.down.ravel()), abs=1e-6
    )


def test_null_comparisons_unrelate_experts_and_keep_each_as_it_is(rng):
    a = expert(rng, bias=True)
    b = reordered(a, rng.permutation(N_FF))
    others = [expert(rng, bias=True) for _ in range(4)]
    table = m.weight_similarity([a, b, *others], n_null=39, seed=1)
    assert table["p_family"][0] == pytest.approx(1 / 40)
    assert table["p_family"][1:].min() > 0.05
    assert table["null_max"][0] < 0.95
    parts = merging.neurons(a)
    flipped = merging._flipped(parts, rng.choice([-1.0, 1.0], (2, N_EMBD)))
    assert np.allclose(np.abs(flipped.fixed), np.abs(parts.fixed))
    assert np.allclose(np.abs(flipped.free), np.abs(parts.free))
    # flipping both experts' dimensions alike changes nothing between them
    same = rng.choice([-1.0, 1.0], (2, N_EMBD))
    assert merging.align(
        *(merging._flipped(merging.neurons(e), same) for e in (a, b))
    ).cosine == pytest.approx(1)


def test_little_memory_changes_no_number(rng):
    experts = [expert(rng) for _ in range(9)]
    whole = m.weight_similarity(experts, n_null=3)
    piecewise = m.weight_similarity(experts, n_null=3, max_bytes=experts[0].n_bytes * 4 * 2 * 2)
    pd.testing.assert_frame_equal(whole, piecewise)


def test_few_experts_are_held_at_a_time(rng):
    class Counting(list):
        loads = 0

        def __getitem__(self, i):
            Counting.loads += isinstance(i, int)
            return super().__getitem__(i)

    experts = Counting([expert(rng) for _ in range(9)])
    pairs = np.array(list(combinations(range(9), 2)))
    most = seen = 0
    for held, mine in blocks_of_pairs(experts, pairs, experts[0].n_bytes * 2 * 3, factor=1):
        assert {int(e) for e in pairs[mine].ravel()} == set(held)
        most, seen = max(most, len(held)), seen + len(mine)
    assert seen == len(pairs)
    assert most <= 6
    assert Counting.loads < 9 * 3


# -- as published


def test_the_published_comparison_misses_reordered_neurons_and_compared_nothing(rng):
    a = expert(rng)
    experts = [a, reordered(a, np.roll(np.arange(N_FF), 1)), expert(rng)]
    table = m.as_published_similarity(experts)
    assert len(table) == 3
    assert not table["mergeable"].any()
    assert table["cosine"][0] == pytest.approx(
        1 - scipy_cosine(a.down.ravel(), experts[1].down.ravel()), abs=1e-6
    )
    assert m.as_published_similarity([a, a])["mergeable"].all()
    assert len(m.as_published_similarity([a, a], batched=True)) == 0  # what was published as "0 % mergeable"


# -- outputs, routing


def test_output_distance_is_0_for_equal_and_1_for_right_angles():
    x = np.zeros((4, 6, 5), np.float32)
    x[0, :, 0] = x[1, :, 0] = np.arange(1, 7)
    x[2, :, 1] = np.arange(1, 7)
    x[3, :, 0] = -np.arange(1, 7)
    table = m.output_similarity(x, [0, 0, 1, 1, 2, 2]).set_index(["expert_a", "expert_b"])
    distance = table["output_distance"]
    assert distance[0, 1] == 0
    assert distance[0, 2] == pytest.approx(1)
    assert distance[0, 3] == pytest.approx(2)
    assert table["cosine_mean_output"][0, 3] == pytest.approx(-1)
    assert (table["output_distance_low"] <= distance + 1e-12).all()
    assert m.output_similarity(x, [0] * 6)["output_distance_low"].isna().all()  # one prompt: no interval


def test_routing_similarity_counts_every_pair():
    """Rank-adjacent counting would miss experts 0 and 2, which are two ranks apart."""
    ids = np.array([[0, 1, 2], [0, 3, 2], [4, 5, 3], [0, 4, 2]])
    logits = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    table = m.routing_similarity(ids, 6, logits).set_index(["expert_a", "expert_b"])
    assert table["both"][0, 2] == 3
    assert table["coactivation"][0, 2] == pytest.approx(1)
    assert table["coactivation"][0, 5] == pytest.approx(-1)
    used = np.array([[e in row for e in range(6)] for row in ids], float)
    assert table["coactivation"][1, 4] == pytest.approx(np.corrcoef(used[:, 1], used[:, 4])[0, 1])
    assert table["logit_correlation"][1, 4] == pytest.approx(np.corrcoef(logits[:, 1], logits[:, 4])[0, 1])
    assert m.routing_similarity(ids, 6)["logit_correlation"].isna().all()
    assert m.routing_similarity(ids, 7).set_index(["expert_a", "expert_b"])["coactivation"].isna()[0, 6]


def test_candidates_are_near_by_an_interval_or_alike_beyond_chance():
    pairs = pd.DataFrame(
        {
            "expert_a": range(5),
            "expert_b": range(1, 6),
            "cosine_aligned": [0.95, 0.95, 0.2, 0.2, 0.9],
            "p_family": [0.02, 0.6, 0.9, 0.9, np.nan],
            "output_distance": [0.1, 0.9, 0.3, 0.45, 0.8],
            "output_distance_high": [0.2, 1.0, 0.4, 0.6, 0.9],
        }
    )
    found = m.merge_candidates(pairs)
    assert dict(zip(found["expert_a"], found["by"], strict=True)) == {0: "both", 2: "outputs", 4: "weights"}
    assert m.merge_candidates(pairs[["expert_a", "expert_b", "cosine_aligned"]])["expert_a"].tolist() == [
        0,
        1,
        4,
    ]


def test_all_pairs_are_in_the_table_also_those_not_compared(rng):
    experts = [expert(rng) for _ in range(4)]
    table = m.expert_merging(experts, pairs=[[0, 2]], n_null=2)
    assert len(table) == 6
    assert table["cosine_aligned"].notna().sum() == 1
    assert table["output_distance"].isna().all()


# -- grouping


def test_groups_are_as_many_as_asked_for_and_hold_what_is_near(rng):
    point = np.array([0.0, 10, 0.1, 20, 10.1, 0.2])
    distance = np.abs(point[:, None] - point)
    grouping = merging.group_experts(distance, 3, [1, 5, 2, 1, 1, 1])
    assert grouping.group.tolist() == [0, 1, 0, 2, 1, 0]
    assert grouping.n_expert == 3
    assert grouping.members(0).tolist() == [2, 0, 5]  # the most used one first
    assert grouping.shares(0).tolist() == [0.5, 0.25, 0.25]
    for n in range(1, 7):
        assert merging.group_experts(rng.random((6, 6)), n, np.zeros(6)).n_expert == n
    assert merging.group_experts(distance, 3, np.zeros(6)).shares(0).tolist() == [1 / 3] * 3


def test_equal_distances_still_give_the_number_asked_for():
    assert merging.group_experts(np.ones((8, 8)), 5, np.ones(8)).n_expert == 5
    assert merging.group_experts(np.full((8, 8), np.nan), 5, np.ones(8)).n_expert == 5


def test_blocks_stay_apart(rng):
    for grouping in (
        merging.group_experts(rng.random((8, 8)), 4, np.ones(8), n_blocks=2),
        merging.group_around_used(rng.random((8, 8)), 4, rng.random(8), n_blocks=2),
        merging.drop_experts(rng.random(8), 4, n_blocks=2),
    ):
        assert set(grouping.group[:4]) - {-1} == {0, 1}
        assert set(grouping.group[4:]) - {-1} == {2, 3}
    with pytest.raises(UsageError, match="groups of equal size"):
        merging.group_experts(rng.random((8, 8)), 3, np.ones(8), n_blocks=2)
    with pytest.raises(UsageError, match="cannot become 9"):
        merging.drop_experts(np.ones(8), 9)


def test_the_least_used_are_left_out_or_join_the_nearest():
    use = [5, 1, 9, 0, 3]
    assert merging.drop_experts(use, 3).group.tolist() == [0, -1, 1, -1, 2]
    distance = np.ones((5, 5))
    distance[1, 2] = distance[2, 1] = distance[3, 4] = distance[4, 3] = 0.1
    assert merging.group_around_used(distance, 3, use).group.tolist() == [0, 1, 1, 2, 2]


def test_criteria(rng):
    use = {0: [3, 1, 2, 9], 4: [1, 1, 1, 5]}
    distance = {layer: rng.random((4, 4)) for layer in use}
    for criterion in merging.CRITERIA:
        groups = m.group_layers(distance, use, 2, criterion=criterion)
        assert {layer: g.n_expert for layer, g in groups.items()} == {0: 2, 4: 2}


# -- merging


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_merging_equal_experts_gives_the_first_one_back(rng, gate, bias, activation):
    a = expert(rng, gate=gate, bias=bias)
    copies = [a, *(reordered(a, rng.permutation(N_FF)) for _ in range(2))]
    merged = m.merge(copies, [0.5, 0.3, 0.2], activation)
    for name, value in vars(a).items():
        got = getattr(merged, name)
        assert (got is None) == (value is None)
        if value is not None:
            assert got.dtype == np.float32
            assert np.allclose(got, value, atol=1e-5), name


def test_merging_is_an_average_by_shares_after_matching(rng):
    a = expert(rng, gate=False)
    near = Expert(a.up + 0.01, a.down)
    shuffled = reordered(near, rng.permutation(N_FF))
    merged = m.merge([a, shuffled], [0.75, 0.25])
    assert np.allclose(merged.up, a.up + 0.0025, atol=1e-5)
    assert np.allclose(m.merge([a], [1.0]).down, a.down)


# -- files


def test_experts_of_a_file_are_those_that_were_written(tmp_path):
    path = write_model(
        tmp_path / "g.gguf", "gpt-oss", n_layer=1, n_expert=4, n_expert_used=2, quantization="MXFP4"
    )
    with ModelFile(path) as model:
        experts = LayerExperts(model, 0)
        assert (len(experts), experts.activation, experts.reads_gate_input) == (4, "swiglu_oai", True)
        for name in ("up", "gate", "down"):
            whole = model.tensor(f"blk.0.ffn_{name}_exps.weight")
            bias = model.tensor(f"blk.0.ffn_{name}_exps.bias")
            for i, one in enumerate(experts):
                assert np.array_equal(getattr(one, name), whole[i])
                assert np.array_equal(getattr(one, f"{name}_bias"), bias[i])
        assert np.array_equal(experts[-1].up, experts[3].up)
        with pytest.raises(IndexError):
            experts[4]


def test_fused_matrices_are_taken_apart(tmp_path):
    path = write_model(tmp_path / "f.gguf", "deepseek2-v2-fused")
    with ModelFile(path) as model:
        layer = model.moe_layers[0]
        fused = model.tensor(f"blk.{layer}.ffn_gate_up_exps.weight")
        one = LayerExperts(model, layer)[2]
        assert np.array_equal(one.gate, fused[2, : one.n_neuron])
        assert np.array_equal(one.up, fused[2, one.n_neuron :])
        with pytest.raises(MoetraceError, match="no experts"):
            LayerExperts(model, 0)  # the dense layer


def test_experts_that_do_not_read_what_the_router_reads_are_known(tmp_path):
    with ModelFile(write_model(tmp_path / "s.gguf", "smallthinker")) as model:
        experts = LayerExperts(model, 0)
        assert not experts.reads_gate_input
        assert experts.activation == "relu"


def layers_of(path: Path) -> list[int]:
    with ModelFile(path) as model:
        return model.moe_layers


def grouped(path: Path, group: list[int], use: list[float]) -> dict[int, Grouping]:
    return {
        layer: Grouping(np.array(group, np.int64), np.array(use, np.float64)) for layer in layers_of(path)
    }


SMALL = {"n_layer": 2, "n_expert": 4, "n_expert_used": 2}
GROUP, USE = [0, 1, 0, 2], [3.0, 1.0, 1.0, 1.0]


def test_the_written_file_is_the_old_one_but_for_experts_and_routers(tmp_path):
    source = write_model(tmp_path / "a.gguf", "gpt-oss", **SMALL, quantization="Q8_0")
    made = write_merged(source, tmp_path / "b.gguf", grouped(source, GROUP, USE))
    assert (made.n_expert, made.types) == (3, {})
    assert made.n_bytes == (tmp_path / "b.gguf").stat().st_size < made.n_bytes_before
    assert not list(tmp_path.glob("*.partial"))
    with ModelFile(source) as old, ModelFile(made.path) as new:
        assert new.n_expert == 3
        assert old.tensor_names == new.tensor_names
        assert [f.name for f in old.fields if not f.name.startswith("GGUF")] == [
            f.name for f in new.fields if not f.name.startswith("GGUF")
        ]
        for field in old.fields:
            if field.name not in ("gpt-oss.expert_count", "general.name", "GGUF.kv_count"):
                again = new.field(field.name)
                assert again == field.contents(), field.name
        for name in old.tensor_names:
            before, kind = old.stored(name)
            after, kind_after = new.stored(name)
            assert kind == kind_after
            if "_exps" not in name and "gate_inp" not in name:
                assert np.array_equal(before, after), name
            elif "_exps" in name:  # who is alone keeps its bytes
                assert np.array_equal(after[1:], before[[1, 3]]), name
            else:
                mean = old.tensor(name, 0) * 0.75 + old.tensor(name, 2) * 0.25
                assert np.allclose(new.tensor(name, 0), mean, atol=1e-6)
                assert np.array_equal(after[1:], before[[1, 3]])
        merged = LayerExperts(new, 1)[0]
        was = LayerExperts(old, 1)
        expected = m.merge([was[0], was[2]], [0.75, 0.25], "swiglu_oai")
        step = np.abs(expected.up).max(axis=1, keepdims=True) / 127  # of Q8_0, at least
        assert (np.abs(merged.up - expected.up) <= step).all()
        assert np.allclose(merged.down_bias, expected.down_bias)


@pytest.mark.parametrize(
    ("architecture", "quantization", "kind"),
    [
        ("gpt-oss", "MXFP4", "MXFP4"),
        ("deepseek2-v2-fused", "F16", "F16"),
        ("qwen3moe", "Q8_0", "Q8_0"),
        ("qwen3moe", "Q4_K", "F16"),  # gguf-py cannot write Q4_K
        ("nomic-bert-moe", None, "F32"),
    ],
)
def test_types_are_kept_where_they_can_be_written(tmp_path, architecture, quantization, kind):
    sizes = {"n_embd": 256, "n_ff_expert": 256} if quantization == "Q4_K" else {}
    source = write_model(
        tmp_path / "a.gguf", architecture, n_expert=4, n_expert_used=2, quantization=quantization, **sizes
    )
    made = write_merged(source, tmp_path / "b.gguf", grouped(source, GROUP, USE))
    with ModelFile(made.path) as new:
        names = [name for name in new.tensor_names if name.endswith("_exps.weight")]
        assert {new.stored(name)[1].name for name in names} == {kind}
    changed = quantization == "Q4_K"
    assert set(made.types) == (set(names) if changed else set())
    if changed:
        assert set(made.types.values()) == {("Q4_K", "F16")}
    # leaving experts out merges nothing, so that every type can be kept
    pruned = write_merged(source, tmp_path / "c.gguf", grouped(source, [0, -1, 1, 2], USE))
    with ModelFile(source) as old, ModelFile(pruned.path) as new:
        assert pruned.types == {}
        for name in names:
            assert np.array_equal(new.stored(name)[0], old.stored(name)[0][[0, 2, 3]])


def test_in_place_every_member_gets_the_merged_expert_and_routers_stay(tmp_path):
    source = write_model(tmp_path / "a.gguf", "qwen3moe", **SMALL)
    made = write_merged(source, tmp_path / "b.gguf", grouped(source, GROUP, USE), keep_count=True)
    with ModelFile(source) as old, ModelFile(made.path) as new:
        assert new.n_expert == old.n_expert == made.n_expert
        assert np.array_equal(old.router(0).weight, new.router(0).weight)
        experts = LayerExperts(new, 0)
        assert np.array_equal(experts[0].up, experts[2].up)
        assert np.array_equal(experts[1].up, LayerExperts(old, 0)[1].up)


def test_groupings_that_do_not_fit_are_refused(tmp_path):
    source = write_model(tmp_path / "a.gguf", "qwen3moe", **SMALL)
    out = tmp_path / "b.gguf"
    groups = grouped(source, GROUP, USE)
    with pytest.raises(UsageError, match="uses 2"):
        write_merged(source, out, grouped(source, [0, 0, 0, 0], USE))
    with pytest.raises(UsageError, match="same number"):
        write_merged(source, out, {**groups, 1: Grouping(np.arange(4), np.ones(4))})
    with pytest.raises(UsageError, match="each layer"):
        write_merged(source, out, {0: groups[0]})
    with pytest.raises(UsageError, match="no place"):
        write_merged(source, out, grouped(source, [0, -1, 1, 2], USE), keep_count=True)
    dense = write_model(tmp_path / "d.gguf", "llama-dense")
    with pytest.raises(MoetraceError, match="dense"):
        write_merged(dense, out, {})
    assert not out.exists()
    grouped_model = write_model(tmp_path / "v3.gguf", "deepseek2-v3")
    with pytest.raises(UsageError, match="multiple of 4"):
        write_merged(
            grouped_model,
            out,
            {layer: merging.drop_experts(np.ones(16), 15) for layer in layers_of(grouped_model)},
        )


def test_tensors_that_go_with_experts_in_an_unknown_way_are_refused(tmp_path):
    source = write_model(tmp_path / "a.gguf", "qwen3moe", **SMALL)
    with ModelFile(source) as model:
        writer = gguf.GGUFWriter(tmp_path / "s.gguf", model.architecture)
        for field in model.fields:
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        for name in model.tensor_names:
            values, kind = model.stored(name)
            writer.add_tensor(name, np.array(values), raw_dtype=kind)
        writer.add_tensor("blk.0.ffn_up_exps.scale", np.full(4, 2, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with ModelFile(tmp_path / "s.gguf") as scaled, ModelFile(source) as plain:
        assert np.allclose(LayerExperts(scaled, 0)[1].up, 2 * LayerExperts(plain, 0)[1].up)
    with pytest.raises(MoetraceError, match="scale"):
        write_merged(tmp_path / "s.gguf", tmp_path / "b.gguf", grouped(source, GROUP, USE))


def test_the_frontier_is_what_nothing_beats() -> None:
    size = np.array([0.5, 0.5, 0.7, 0.9, 0.9, np.nan])
    loss = np.array([0.3, 0.4, 0.1, 0.1, 0.0, 0.0])
    assert merging.frontier(size, loss).tolist() == [True, False, True, False, True, False]
    assert merging.frontier([1.0, 1.0], [0.0, 0.0]).all(), "equal files beat nobody"
