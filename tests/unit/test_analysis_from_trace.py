"""The adapter: which rows, which names, which domains; the statistics themselves are tested elsewhere."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recordings import olmoe_line, write

import moetrace
import moetrace.analysis as m
from moetrace.analysis import Routing, count_routing, domain_test, from_trace
from moetrace.analysis.dynamics.temporal import shuffle_chosen
from moetrace.analysis.experts import gate
from moetrace.analysis.published import notebook as published
from moetrace.errors import ChannelMissingError, UsageError
from moetrace.findings import ask as ask_question
from moetrace.trace.importers import import_trace

N_REQUESTS = 8


@dataclass
class FakeTrace:
    """Two domains, four prompts each; 10 prefill and 40 decode rows per request, then two rows of nobody."""

    seed: int = 0
    unlabelled: tuple[int, ...] = ()
    channels: tuple[str, ...] = ("weights",)
    requests: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        n = N_REQUESTS * 50 + 2
        effect = rng.normal(0, 1, (2, 3, 16))
        request = np.append(np.repeat(np.arange(N_REQUESTS), 50), [-1, -1])
        logits = effect[request % 2] + rng.normal(size=(n, 3, 16))
        self.experts = np.argsort(-logits, axis=2)[:, :, :2].astype(np.uint8)
        self._weights = rng.random((n, 3, 2)).astype(np.float32)
        self.state = np.ones((n, 3), dtype=np.uint8)
        self.request = request
        self.positions = np.append(np.tile(np.arange(50), N_REQUESTS), [0, 1]).astype(np.int32)
        self.token_ids = rng.integers(0, 30, n).astype(np.int32)
        self.phase = np.append(np.tile(np.repeat([0, 1], [10, 40]), N_REQUESTS), [2, 2]).astype(np.uint8)
        self.step = np.arange(n, dtype=np.uint32)
        self.row = np.zeros(n, dtype=np.uint32)
        self.layers = np.array([3, 4, 5])
        self.n_expert, self.n_expert_used = np.full(3, 16), np.full(3, 2)
        self.consumers = [["ffn_gate", "ffn_up", "ffn_down"]] * 3
        labels = [None if r in self.unlabelled else "ab"[r % 2] for r in range(N_REQUESTS)]
        self.requests = pd.DataFrame({"id": None, "label": labels, "n_shifts": 0}, index=range(N_REQUESTS))

    def _channel(self, name: str, column: Any) -> Any:
        if name not in self.channels:
            raise ChannelMissingError(f"no {name}", fix=f"capture it again with --capture {name}")
        return column

    @property
    def weights(self) -> Any:
        return self._channel("weights", self._weights)

    @property
    def gate_input(self) -> Any:
        x = np.random.default_rng(1).normal(size=(len(self.request), 3, 8))
        return self._channel("gate_input", x.astype(np.float32))

    @property
    def scores(self) -> Any:
        return self._channel("scores", None)

    @property
    def logits(self) -> Any:
        return self._channel("logits", None)


def domains_of(routing: Routing, **options: Any) -> m.DomainTest:
    counts = routing.counts.labelled()
    return domain_test(counts.included, counts.labels, layers=counts.layers, **options)


def test_phases_are_kept_apart() -> None:
    trace = FakeTrace()
    tokens = {
        p: from_trace(trace, phase=p).counts.tokens[:, 0].tolist() for p in ("prefill", "decode", "all")
    }
    assert tokens == {"prefill": [10] * 8, "decode": [40] * 8, "all": [50] * 8}
    assert from_trace(trace).phase == "decode"
    trace.phase[:] = 0
    with pytest.raises(UsageError, match="no decode rows") as error:
        from_trace(trace)
    assert "prefill" in error.value.fix


def test_a_trace_s_counts_are_those_of_its_columns() -> None:
    trace = FakeTrace()
    a = from_trace(trace)
    direct = count_routing(
        trace.experts,
        trace.request,
        trace.positions,
        n_expert=16,
        keep=trace.phase == 1,
        weights=trace.weights,
        labels=["a", "b"] * 4,
        layers=trace.layers,
    )
    assert np.array_equal(a.counts.included, direct.included)
    assert np.array_equal(a.counts.top1, direct.top1)
    assert not np.array_equal(from_trace(trace, top1="router").counts.top1, direct.top1)
    assert m.transitions(a.counts, 4).stay == pytest.approx(np.trace(direct.transitions[1]) / (8 * 39))


def test_analyses_run_on_a_trace() -> None:
    a = from_trace(FakeTrace(channels=("weights", "gate_input")))
    c = a.counts
    assert (domains_of(a, n_permutations=99).table["p_value"] < 0.05).all()
    assert len(m.domain_lift(c.included, c.labels, n_boot=20, n_permutations=9)) == 2 * 3 * 16
    assert (m.matched_separation(a.token_counts, n_permutations=99).table["p_value"] < 0.05).all()
    assert a.consumers == ("ffn_gate", "ffn_up", "ffn_down")
    assert m.depth_contrast(c.included, c.labels, layers=c.layers).early_layers == (3,)
    shuffled = shuffle_chosen(a.whole("a shuffle test"), n_permutations=9, max_lag=2)
    assert shuffled["layer"].tolist() == [3, 3, 4, 4, 5, 5]
    assert gate.distances_by_prompt(a.chosen, 1000)["prompt"].nunique() == 8
    assert set(gate.summary_by_prompt(a.chosen)["tokens"]) == {320}
    with pytest.raises(ChannelMissingError):
        gate.summary_by_prompt(from_trace(FakeTrace()).chosen)


def test_rows_that_were_removed_when_the_answer_ended_are_no_text() -> None:
    """Of a recording that was cut to other rows nothing is left out: its last row need not be a request's."""
    trace = FakeTrace()
    trace.requests = trace.requests.assign(
        n_prefill=10,
        n_decode=40,
        n_undecided=pd.array([3, 0, pd.NA, *[0] * (N_REQUESTS - 3)], "Int64"),
        n_shifts=pd.array([0, pd.NA, *[0] * (N_REQUESTS - 2)], "Int64"),
    )
    tokens = from_trace(trace).counts.tokens[:, 0]
    assert tokens.tolist() == [37, *[40] * (N_REQUESTS - 1)]
    trace.requests["n_decode"] = 41
    assert set(from_trace(trace).counts.tokens[:, 0].tolist()) == {40}


def test_unlabelled_requests_count_for_routing_and_not_for_domains() -> None:
    a = from_trace(FakeTrace(unlabelled=(0, 3)))
    assert a.counts.prompts.size == 8
    assert domains_of(a, n_permutations=9).n_prompts == 6
    assert a.token_counts.prompts.size == 6
    with pytest.raises(UsageError, match="has a domain"):
        published.activations(from_trace(FakeTrace(unlabelled=tuple(range(8)))))


def test_domains_of_no_row_are_said_and_tokens_too() -> None:
    """GIVEN labelled requests without a row of this phase THEN the error says that labels lack, and not ids."""
    trace = FakeTrace(unlabelled=tuple(range(1, 8)))
    trace.phase[trace.request == 0] = 0
    routing = from_trace(trace, phase="decode")
    for ask in (published.activations, lambda r: r.token_counts):
        with pytest.raises(UsageError, match="has a domain"):
            ask(routing)


def test_statistics_of_many_traces_equal_those_of_their_concatenation() -> None:
    one, two, both = FakeTrace(0), FakeTrace(1), FakeTrace(0)
    for name in ("experts", "_weights", "state", "positions", "token_ids", "phase"):
        setattr(both, name, np.concatenate((getattr(one, name), getattr(two, name))))
    both.request = np.concatenate((one.request, np.where(two.request < 0, -1, two.request + N_REQUESTS)))
    both.requests = pd.concat((one.requests, two.requests), ignore_index=True)
    names = [f"{t}-{r}" for t in "xy" for r in range(N_REQUESTS)]
    one.requests["id"], two.requests["id"], both.requests["id"] = names[:8], names[8:], names
    apart, together = from_trace(one, two), from_trace(both)
    for name, value in together.counts.to_arrays().items():
        assert np.array_equal(apart.counts.to_arrays()[name], value), name
    options = {"n_permutations": 29}
    pd.testing.assert_frame_equal(domains_of(apart, **options).table, domains_of(together, **options).table)
    left, right = (m.matched_separation(each.token_counts, **options) for each in (apart, together))
    pd.testing.assert_frame_equal(left.table, right.table)
    with pytest.raises(UsageError, match="one trace"):
        apart.whole("a shuffle test")


def test_the_same_prompt_twice_is_one_observation() -> None:
    trace = FakeTrace()
    trace.requests["id"] = ["p", "q", "p", "q", "r", "s", "r", "s"]
    assert domains_of(from_trace(trace), n_permutations=9).n_prompts == 4
    assert from_trace(trace, trace).counts.prompts.tolist() == ["p", "q", "r", "s"]


def test_request_numbers_need_not_begin_at_zero() -> None:
    trace = FakeTrace()
    trace.request = np.where(trace.request < 0, -1, trace.request + 5)
    trace.requests.index = trace.requests.index + 5
    assert domains_of(from_trace(trace), n_permutations=9).n_prompts == 8


def test_published_formulas_run_on_a_trace() -> None:
    a = published.activations(from_trace(FakeTrace(unlabelled=(0,))))
    seen = published.overview(a)
    assert seen.activations == 7 * 40 * 3 * 2 * 3
    assert a.components == ("ffn_gate", "ffn_up", "ffn_down")
    assert a.tokens_per_domain.tolist() == [120, 160]
    assert published.layer_separation(a)["layer_id"].tolist() == [3, 4, 5]
    assert published.lag1(a, "a", 3, n_expert=16).pairs == 119


def test_captures_of_one_text_are_compared_token_by_token() -> None:
    one, two = FakeTrace(), FakeTrace()
    one.requests["id"] = two.requests["id"] = [f"p{i}" for i in range(N_REQUESTS)]
    two.experts = two.experts.copy()
    two.experts[:, 1] = two.experts[:, 1, ::-1]
    two.token_ids = two.token_ids.copy()
    two.token_ids[49] += 1
    found = m.compare_captures(*(from_trace(each).whole("a comparison") for each in (one, two)))
    table, report = found.by_layer(), found.texts
    mean = table.pivot(index="layer", columns="metric", values="mean")
    assert mean["overlap"].tolist() == [1, 1, 1]
    assert mean["top1"].tolist() == [1, 0, 1]
    assert mean["kendall_tau"].tolist() == [1, -1, 1]
    assert mean["coverage_k"].isna().all()
    assert report["matched"].tolist() == [39] + [40] * 7
    assert report["stopped_at"].tolist() == [49] + [-1] * 7


def test_traces_of_different_models_are_refused() -> None:
    other = FakeTrace()
    other.layers = np.array([0, 1, 2])
    with pytest.raises(UsageError, match="cannot be taken together"):
        from_trace(FakeTrace(), other)
    with pytest.raises(UsageError, match="no trace"):
        from_trace()


def test_memory_for_statistics_grows_by_row_and_not_by_activation(tmp_path: Path) -> None:
    """GIVEN columns on disk THEN three times the rows cost some index columns more, not copies of the routing.

    A row has 192 activations here, 1.5 KiB as 64-bit numbers.
    """
    peaks = []
    sizes = (20_000, 60_000)
    for n in sizes:
        rng = np.random.default_rng(0)
        long = FakeTrace()
        once = rng.permuted(np.tile(np.arange(32, dtype=np.uint8), (2_000, 24, 1)), axis=2)[:, :, :8]
        np.save(tmp_path / f"{n}.npy", np.tile(once, (n // 2_000, 1, 1)))
        np.save(tmp_path / f"{n}s.npy", np.ones((n, 24), dtype=np.uint8))
        long.experts = np.load(tmp_path / f"{n}.npy", mmap_mode="r")
        long.state = np.load(tmp_path / f"{n}s.npy", mmap_mode="r")
        long.channels = ()
        long.request = np.repeat(np.arange(N_REQUESTS), n // N_REQUESTS)
        long.positions = np.tile(np.arange(n // N_REQUESTS, dtype=np.int32), N_REQUESTS)
        long.token_ids = rng.integers(0, 50, n).astype(np.int32)
        long.phase = np.ones(n, dtype=np.uint8)
        long.step, long.row = np.arange(n, dtype=np.uint32), np.zeros(n, dtype=np.uint32)
        long.layers, long.n_expert, long.n_expert_used = np.arange(24), np.full(24, 32), np.full(24, 8)
        long.consumers = [["ffn_gate", "ffn_up", "ffn_down"]] * 24
        tracemalloc.start()
        a = from_trace(long)
        _ = a.counts
        _ = a.token_counts
        published.layer_separation(published.activations(a))
        published.frequency_of_rows(a)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    per_row = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    assert per_row < 120


def test_questions_of_order_leave_position_0_out(tmp_path: Path) -> None:
    """GIVEN tokens without memory, the first of each text routed to experts of its own WHEN neighbours are compared
    THEN they share no more than in random order; with the first token they would seem to.
    """
    rng = np.random.default_rng(4)
    lines = []
    for _ in range(150):
        n = int(rng.integers(8, 13))
        experts = np.stack([rng.choice(np.arange(2, 8), 2, replace=False) for _ in range(n)])[:, None]
        experts[0, 0] = [0, 1]
        lines.append(olmoe_line(experts.tolist(), input_ids=rng.integers(0, 999, n).tolist()))
    import_trace(write(tmp_path / "t.jsonl", *lines), tmp_path / "t.moet")
    with moetrace.open(tmp_path / "t.moet") as trace:
        routing = m.from_trace(trace, phase="prefill")
        assert routing.has_first
        with_it, without = (
            m.persistence(counts).query("lag == 1").iloc[0]
            for counts in (routing.prompt_counts, routing.order_counts)
        )
        assert routing.order_counts.tokens.sum() == routing.prompt_counts.tokens.sum() - 150
        assert with_it["overlap_low"] > 0
        assert without["overlap_low"] < 0 < without["overlap_high"]
        assert any(
            "Position 0 is left out" in caveat for caveat in ask_question("persistence", trace).caveats
        )
