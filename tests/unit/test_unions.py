"""Experts that tokens need together: against windows looked at one by one, and against drawing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace.__main__ import main
from moetrace.analysis import RoutedText
from moetrace.analysis.placement.unions import distinct_experts
from moetrace.errors import UsageError

E = 6


def text_of(experts: npt.NDArray[np.int64], starts: list[int], **more: object) -> RoutedText:
    return RoutedText(experts.astype(np.uint8), np.array(starts), E, **more)  # type: ignore[arg-type]


def one_by_one(text: RoutedText, layer: int, n: int) -> list[list[int]]:
    """Distinct experts of every window of n rows of each request that follow each other and have routing."""
    out: list[list[int]] = []
    for a, b in zip(text.starts[:-1].tolist(), text.starts[1:].tolist(), strict=True):
        mine = []
        for t in range(a, b - n + 1):
            rows = range(t, t + n)
            if len({int(text.runs[r]) for r in rows}) == 1 and all(
                text.experts[r, layer, 0] < E for r in rows
            ):
                mine.append(len({int(x) for r in rows for x in text.experts[r, layer] if x < E}))
        out.append(mine)
    return out


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_windows_are_those_looked_at_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((23, 2, E)), axis=2)[:, :, :2]
    experts[rng.random((23, 2)) < 0.1] = 255
    position = np.concatenate([np.arange(9) + 3 * (np.arange(9) > 4), np.arange(10), np.arange(4)])
    text = text_of(experts, [0, 9, 19, 23], positions=position)
    table = distinct_experts(text, [1, 2, 3, 5]).set_index(["layer", "n"])
    for layer in range(2):
        for n in (1, 2, 3, 5):
            told = [x for mine in one_by_one(text, layer, n) for x in mine]
            row = table.loc[(layer, n)]
            assert row["places"] == len(told)
            assert (
                row["consecutive"] == pytest.approx(np.mean(told)) if told else np.isnan(row["consecutive"])
            )


def test_the_null_of_order_is_the_mean_over_all_orders() -> None:
    experts = np.argsort(np.random.default_rng(0).random((7, 1, E)), axis=2)[:, :, :2]
    table = distinct_experts(text_of(experts, [0, 7]), [3]).set_index("layer")
    every = [len({int(x) for r in rows for x in experts[r, 0]}) for rows in combinations(range(7), 3)]
    assert table.loc[0, "shuffled"] == pytest.approx(np.mean(every))
    assert np.isnan(table.loc[0, "low"]), "one prompt has no interval"


def test_a_batch_is_one_token_of_each_text_drawn_at_random() -> None:
    rng = np.random.default_rng(1)
    experts = np.argsort(
        rng.gumbel(size=(60, 1, E)) + np.repeat(rng.normal(0, 2, (3, 1, E)), 20, axis=0), axis=2
    )[:, :, :2]
    text = text_of(experts, [0, 20, 40, 60])
    told = distinct_experts(text, [4], expert_bytes=[10.0]).set_index("layer").loc[0]
    draws = [
        len({int(x) for r in 20 * rng.integers(0, 3, 4) + rng.integers(0, 20, 4) for x in experts[r, 0]})
        for _ in range(20_000)
    ]
    assert told["batch"] == pytest.approx(np.mean(draws), abs=4 * np.std(draws) / np.sqrt(20_000))
    assert told["even"] == pytest.approx(E * (1 - (1 - 2 / E) ** 4))
    assert told["bytes_batch"] == pytest.approx(told["batch"] * 10 / 4)
    assert told["bytes_consecutive"] == pytest.approx(told["consecutive"] * 10 / 4)


def test_all_layers_together_are_their_sum() -> None:
    experts = np.argsort(np.random.default_rng(2).random((40, 3, E)), axis=2)[:, :, :2]
    table = distinct_experts(text_of(experts, [0, 10, 20, 30, 40]), [1, 4])
    for name in ("consecutive", "shuffled", "batch", "even", "experts"):
        by = table.pivot_table(index="n", columns="layer", values=name)
        np.testing.assert_allclose(by[-1], by[[0, 1, 2]].sum(axis=1))
    first = table[table["n"] == 1]
    np.testing.assert_allclose(first["consecutive"], first["even"])


def test_no_tokens_is_refused() -> None:
    with pytest.raises(UsageError):
        distinct_experts(text_of(np.zeros((3, 1, 1), np.int64), [0, 3]), [0])


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        f"p{i}": np.argsort(rng.random((12, 2, E)), axis=2)[:, :, :2].astype(np.int32) for i in range(4)
    }
    np.savez(tmp_path / "t.npz", **arrays)
    path = str(tmp_path / "t.npz")
    assert main(["analyze", "distinct-experts", path, "--sizes", "1,2,8,64", "-o", str(tmp_path / "o")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 consecutive tokens need" in out
    assert "for a batch of 8 texts" in out
    assert (tmp_path / "o" / "figures" / "distinct-experts-distinct.png").is_file()
    assert main(["analyze", "distinct-experts", path, "--sizes", "64"]) == 2
