"""Published formulas against a plain pandas transcription of the notebook and scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import notebook
import numpy as np
import pandas as pd
import pytest
from routing import shared_data

import moetrace
from moetrace.analysis import domain_test, from_trace
from moetrace.analysis.published import notebook as published
from moetrace.errors import UsageError
from moetrace.trace.importers import import_trace

DOMAINS = ["domain-1-code", "domain-2-math", "domain-3-creative", "domain-4-factual", "domain-5-mixed"]


def published_size(seed: int = 0, n_tokens: int = 101, n_layers: int = 24) -> pd.DataFrame:
    """145,440 rows as published: 5 domains × 101 tokens (0 twice) × 24 layers × 3 components × 4."""
    rng = np.random.default_rng(seed)
    frames = []
    for domain in DOMAINS:
        logits = rng.normal(0, 1, (1, n_layers, 32)) + rng.gumbel(size=(n_tokens, n_layers, 32))
        experts = np.argsort(-logits, axis=2)[:, :, :4]
        token, layer, component, rank = np.indices((n_tokens, n_layers, 3, 4)).reshape(4, -1)
        frames.append(
            pd.DataFrame(
                {
                    "domain": domain,
                    "token_id": np.maximum(token - 1, 0),
                    "layer_id": layer,
                    "component": np.array(["ffn_gate", "ffn_up", "ffn_down"])[component],
                    "expert_id": experts[token, layer, rank],
                    "position": rank,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def from_frame(df: pd.DataFrame) -> published.Activations:
    return published.Activations.from_columns(*(df[c].to_numpy() for c in df.columns))


def real_trace() -> pd.DataFrame:
    """One real file under two names, the second with experts renumbered, so that there are two domains."""
    df = notebook.load(shared_data("tensor_trace_token-00000.json"), "domain-1-code", 0)
    other = df.assign(domain="domain-2-math", expert_id=(df["expert_id"] * 7 + df["layer_id"]) % 32)
    return pd.concat((df, other), ignore_index=True)


@pytest.fixture(scope="module", params=["simulated", "few", "real"])
def pair(request: pytest.FixtureRequest) -> tuple[published.Activations, pd.DataFrame]:
    if request.param == "real":
        df = real_trace()
    elif request.param == "few":  # unused experts, and experts of one domain only
        df = published_size(1, n_tokens=9)
    else:
        df = published_size()
    return from_frame(df), df


def frames_equal(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        found, expected, rtol=1e-12, check_dtype=False, check_index_type=False, check_column_type=False
    )


def test_all_parts_of_the_notebook(pair: tuple[published.Activations, pd.DataFrame]) -> None:
    a, df = pair
    told = notebook.run_all(df, range(24))

    seen = published.overview(a)
    assert seen.activations == len(df)
    assert seen.n_domains == df["domain"].nunique()
    assert seen.n_experts == df["expert_id"].nunique()
    assert seen.expert_range == (df["expert_id"].min(), df["expert_id"].max())
    assert seen.tokens_per_domain == df.groupby("domain")["token_id"].nunique().iloc[0]
    assert seen.per_domain.to_dict() == told["overview"][0].to_dict()
    assert seen.per_layer.to_dict() == told["overview"][1].to_dict()
    assert list(seen.components) == list(told["overview"][2])
    assert seen.most == (told["overview"][1].max(), told["overview"][1].idxmax())

    table = published.frequency(a)
    frames_equal(table.percent, told["percent"])
    for row, (domain, experts, share) in zip(table.top.itertuples(), told["top"], strict=True):
        assert (row.Index, row.experts) == (domain, experts)
        assert row.percent == pytest.approx(share, rel=1e-12)

    test = published.chi_square(a)
    chi2, p, dof, expected = told["chi2"]
    assert (test.chi2, test.p_value) == pytest.approx((chi2, p), rel=1e-9)
    assert test.dof == dof
    assert test.expected == pytest.approx(expected)

    kinds = published.classification(a)
    variation, special, general, preferred = told["classes"]
    assert kinds.variation.to_numpy() == pytest.approx(variation.to_numpy(), rel=1e-14)
    assert (kinds.specialists, kinds.generalists) == (special, general)
    assert kinds.preferred[["expert_id", "domain"]].values.tolist() == [[e, d] for e, d, _ in preferred]
    assert kinds.preferred["percent"].to_numpy() == pytest.approx([s for *_, s in preferred])

    layers = published.layer_separation(a)
    pd.testing.assert_frame_equal(layers, told["separation"], rtol=1e-9, check_dtype=False)
    assert published.most_specific(layers) == told["best"]
    for component, frame in published.deep_dive(a).items():
        frames_equal(frame, told["dive"][component])
    assert published.entropy(a).to_dict() == pytest.approx(told["entropy"], rel=1e-12)

    lag = published.lag1(a, a.domains[0])
    sequence, same, pairs = told["lag1"]
    assert lag.sequence.tolist() == sequence.tolist()
    assert (lag.same, lag.pairs) == (same, pairs)
    assert lag.probability == same / pairs
    assert lag.sticky == (same / pairs > 0.2)
    assert lag.baseline == 1 / 32


def test_simulated_table_has_the_published_size() -> None:
    df = published_size()
    assert len(df) == 145_440
    assert published.overview(from_frame(df)).mean_per_layer == 6060


def test_early_and_late_layers_are_averages_of_part_six() -> None:
    a = from_frame(published_size())
    told = notebook.separation(published_size(), range(24)).set_index("layer_id")
    found = published.early_late(a).set_index("group")
    for group, layers in (("early", range(6)), ("late", range(18, 24))):
        part = told.loc[list(layers)]
        assert found.loc[group, "chi2"] == pytest.approx(part["chi2"].mean())
        assert found.loc[group, "avg_variance"] == pytest.approx(part["avg_variance"].mean())
        assert found.loc[group, "significant"] == part["significant"].sum()


def test_transition_matrix_is_pandas_crosstab() -> None:
    df = published_size()
    sequence = notebook.first_experts(df, DOMAINS[2], 5)
    told = pd.crosstab(sequence[:-1], sequence[1:], normalize="index")
    found = published.transition_matrix(from_frame(df), DOMAINS[2], 5)
    assert found.loc[told.index, told.columns].to_numpy() == pytest.approx(told.to_numpy())
    assert found.to_numpy().sum() == pytest.approx(len(told))


def test_rows_and_long_columns_give_the_same() -> None:
    """GIVEN a trace's rows WHEN each stands for three components THEN it is the notebook's table."""
    df = published_size()
    once = df[df["component"] == "ffn_gate"]
    experts = once["expert_id"].to_numpy().reshape(5 * 101, 24, 4).astype(np.uint8)
    domain, token = (once[c].to_numpy().reshape(505, -1)[:, 0] for c in ("domain", "token_id"))
    a = published.Activations.from_rows(experts, domain, token, n_expert=32, chunk=64)
    b = from_frame(df)
    assert np.array_equal(a.table, b.table)
    assert (a.domains, a.layers, a.components) == (b.domains, b.layers, b.components)
    assert a.tokens_per_domain.tolist() == b.tokens_per_domain.tolist() == [100] * 5
    for layer in (0, 23):
        one, two = (published.lag1(x, DOMAINS[1], layer) for x in (a, b))
        assert one.sequence.tolist() == two.sequence.tolist()


def test_the_real_file_is_a_warm_up_and_is_counted_all_the_same() -> None:
    """One token, two passes, three components, 24 layers: 576 entries, where routing has 96 at most."""
    df = notebook.load(shared_data("tensor_trace_token-00000.json"), "d", 0)
    seen = published.overview(from_frame(df))
    assert seen.activations == 576
    assert seen.tokens_per_domain == 1
    table = from_frame(df).table
    assert np.array_equal(table[0], table[1])
    assert np.array_equal(table[0], table[2])


def test_two_experts_and_two_domains_get_yates_correction() -> None:
    a = published.Activations.from_columns(
        ["a"] * 6 + ["b"] * 5,
        range(11),
        [0] * 11,
        ["ffn_down"] * 11,
        [0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1],
        [0] * 11,
    )
    chi2, p, _, _ = notebook.chi2_contingency([[4, 2], [1, 4]])
    found = published.chi_square(a)
    assert (found.chi2, found.p_value) == pytest.approx((chi2, p))


def test_expert_frequency_script() -> None:
    rng = np.random.default_rng(0)
    layer = rng.integers(3, 6, 200).tolist()
    ids = [rng.permutation(40)[:8].tolist() for _ in layer]
    told = notebook.frequency_script(layer, ids)
    found = published.expert_frequency(layer, ids)
    for number in (3, 4, 5):
        for name, part in (("top", told[number][:10]), ("bottom", told[number][-5:])):
            frame: pd.DataFrame = getattr(found, name).query("layer_id == @number")
            assert frame[["expert_id", "count"]].values.tolist() == [list(x) for x in part]
        total = sum(n for _, n in told[number])
        assert found.top.query("layer_id == @number")["percent"].iloc[0] == told[number][0][1] / total * 100
    assert found.world[["expert_id", "count"]].values.tolist() == [list(x) for x in told["all"][:10]]
    assert (found.world_selections, found.world_unique) == (1600, len(told["all"]))


def test_gate_input_script() -> None:
    """Three steps, the second without its last layer: shown are two, aggregated all pairs that exist."""
    rng = np.random.default_rng(1)
    entries: list[tuple[int, int]] = []
    for step in range(3):
        for layer in range(20, 25 - (step == 1)):
            entries += [(layer, 0), (layer, 1)]
    layer, token = (np.array(x) for x in zip(*entries, strict=True))
    x = rng.normal(size=(len(entries), 64))
    found = published.gate_input_analysis(layer, token, x)
    assert found.n_steps == 3
    assert sorted(set(found.steps["step"])) == [1, 3]
    vectors: list[dict[int, Any]] = [{}, {}, {}]
    step = -1
    for n, t, v in zip(layer, token, x, strict=True):
        step += (n == 20) & (t == 0)
        if t == 0:
            vectors[step][n] = v
    for row in found.steps.itertuples():
        told = notebook.distance_script(
            vectors[row.step - 1][row.layer], vectors[row.step - 1][row.next_layer]
        )
        for metric in ("cosine_similarity", "euclidean", "l2_normalized", "pearson_corr", "mean_abs_diff"):
            assert getattr(row, metric) == pytest.approx(told[metric], rel=1e-10)
    for row in found.aggregate.itertuples():
        told = [
            notebook.distance_script(v[row.layer], v[row.next_layer])[row.metric]
            for v in vectors
            if row.next_layer in v
        ]
        assert len(told) == (2 if row.next_layer == 24 else 3)
        assert (row.mean, row.std) == pytest.approx((np.mean(told), np.std(told)), rel=1e-9)
    assert len(found.aggregate) == 4 * 6


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_compare_gate_experts_script(noise: float) -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(60, 16))
    b = a + noise * rng.normal(size=a.shape)
    found = published.compare_gate_experts(a, b, k=3)
    for i in range(60):
        for metric, value in notebook.agreement_script(a[i], b[i], 3).items():
            assert found.samples.loc[i, metric] == pytest.approx(value), metric
    mean = found.aggregate.set_index("metric")["mean"]
    assert mean["precision"] == pytest.approx(found.samples["intersection_size"].mean() / 3)


def test_unknown_names_are_explained() -> None:
    a = from_frame(published_size(n_tokens=3))
    with pytest.raises(UsageError, match="no activations"):
        published.lag1(a, "domain-9")
    with pytest.raises(UsageError, match="layer 99"):
        published.chi_square(a, layer=99)


def test_imported_recordings_give_the_notebook_s_numbers(tmp_path: Path) -> None:
    """GIVEN real per-token files of two domains WHEN imported as published THEN a trace gives what pandas
    gives.
    """
    real = json.loads(shared_data("tensor_trace_token-00000.json").read_text())
    frames = []
    for d, domain in enumerate(("domain-1-code", "domain-2-math")):
        folder = tmp_path / "runs" / domain / "traces"
        folder.mkdir(parents=True)
        for token in range(3):
            mine = json.loads(json.dumps(real))
            for entry in mine["entries"]:
                entry["expert_ids"] = [(e * (2 * d + 1) + 5 * token) % 32 for e in entry["expert_ids"]]
            path = folder / f"token-{token:05d}.json"
            path.write_text(json.dumps(mine))
            frames.append(notebook.load(path, domain, token))
    told = notebook.run_all(pd.concat(frames, ignore_index=True), range(24))
    import_trace(tmp_path / "runs", tmp_path / "t.moet", as_published=True, n_expert=32)
    with moetrace.open(tmp_path / "t.moet") as trace:
        routing = from_trace(trace, phase="all")
        a = published.activations(routing)
        assert published.overview(a).per_domain.to_dict() == told["overview"][0].to_dict()
        frames_equal(published.frequency(a).percent, told["percent"])
        pd.testing.assert_frame_equal(
            published.layer_separation(a), told["separation"], rtol=1e-9, check_dtype=False
        )
        assert published.classification(a).specialists == told["classes"][1]
        assert published.entropy(a).to_dict() == pytest.approx(told["entropy"])
        assert published.lag1(a, "domain-1-code").sequence.tolist() == told["lag1"][0].tolist()
        test = domain_test(routing.counts.included, routing.counts.labels)
        assert test.verdict == "cannot be tested: domain and prompt are the same thing"
        assert test.table["chi2"].to_numpy() * 1.0 == pytest.approx(told["separation"]["chi2"].to_numpy())
