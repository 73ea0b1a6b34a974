"""Drawings: axes that are labelled, and what is missing drawn as missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import traces
from matplotlib.axes import Axes

import moetrace
from moetrace import analysis, plot
from moetrace.findings import Finding, Subject, question

mpl.use("agg")


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = traces.labelled_trace(tmp_path_factory.mktemp("plot") / "t.moet", ("code", "math", "a $ b"))
    return Subject([moetrace.open(path)])


def of(function: Callable[..., Any], a: Subject, **options: Any) -> Any:
    """An analysis of the labelled prompts' counts."""
    return function(a.labelled.included, a.labelled.labels, layers=a.labelled.layers, **options)


def frequency(a: Subject) -> pd.DataFrame:
    c = a.labelled
    return analysis.expert_frequency(c.included, c.tokens, c.labels, c.layers)


def balance(a: Subject) -> pd.DataFrame:
    return analysis.load_balance(a.counts.included, a.counts.tokens, layers=a.counts.layers)


def matched(a: Subject) -> pd.DataFrame:
    return analysis.matched_separation(a.routing.token_counts).table


def steps(a: Subject) -> analysis.Transitions:
    return analysis.transitions(a.counts, 1)


def kinds(a: Subject) -> pd.DataFrame:
    return analysis.specialists(of(analysis.domain_lift, a, n_boot=50, n_permutations=99))


def lifts(a: Subject) -> pd.DataFrame:
    return of(analysis.domain_lift, a, n_boot=50, n_permutations=19)


def separated(a: Subject) -> pd.DataFrame:
    return a.domain_test(n_permutations=19).table


DRAWINGS: dict[str, tuple[Callable[[Subject], Axes], str, str]] = {
    "usage": (lambda a: plot.usage(frequency(a), "code"), "expert", "layer"),
    "usage_lift": (lambda a: plot.usage(lifts(a), "code", measure="lift"), "expert", "layer"),
    "separation": (lambda a: plot.separation(separated(a)), "layer", "bits"),
    "matched": (lambda a: plot.matched_separation(matched(a)), "layer", "bits"),
    "specialists": (lambda a: plot.specialists(kinds(a)), "lift", ""),
    "kinds": (lambda a: plot.kinds(kinds(a)), "layer", "experts"),
    "persistence": (lambda a: plot.persistence(analysis.persistence(a.counts)), "lag (tokens)", "experts shared"),
    "persistence_by_layer": (lambda a: plot.persistence_by_layer(analysis.persistence(a.counts)), "layer", "excess"),
    "entropy": (lambda a: plot.entropy(of(analysis.domain_entropy, a)), "layer", "bits"),
    "load_balance": (lambda a: plot.load_balance(balance(a)), "layer", "Jain"),
    "transitions": (lambda a: plot.transitions(steps(a)), "next", "first expert"),
    "transitions_lift": (lambda a: plot.transitions(steps(a), measure="lift"), "next", "first expert"),
    "depth_contrast": (lambda a: plot.depth_contrast(of(analysis.depth_contrast, a)), "bits", ""),
    "deep_dive": (lambda a: plot.heatmap(of(analysis.deep_dive, a).percent, label="%"), "expert", "domain"),
}  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", DRAWINGS)
def test_axes_are_labelled_in_both_themes(routed: Subject, name: str, theme: plot.Theme) -> None:
    draw, x, y = DRAWINGS[name]
    with plot.style(theme):
        ax = draw(routed)
        ax.figure.canvas.draw()
    assert x in ax.get_xlabel()
    assert y in ax.get_ylabel()


def test_a_drawing_goes_into_the_axes_it_is_given(routed: Subject) -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert plot.load_balance(balance(routed), ax=right) is right
    assert not left.lines


def test_missing_cells_are_seen_through_and_the_ground_is_hatched() -> None:
    values = pd.DataFrame([[0.0, np.nan], [2.0, 1.0]])
    ax = plot.heatmap(values, label="% of tokens")
    (image,) = ax.images
    colors = image.to_rgba(image.get_array())
    assert colors[0, 1, 3] == 0
    assert colors[0, 0, 3] == 1
    assert ax.patch.get_hatch()
    assert tuple(colors[0, 0, :3]) == pytest.approx(mpl.colormaps["cividis"](0.0)[:3])


def test_lines_stop_where_nothing_is_known(routed: Subject) -> None:
    table = routed.domain_test(n_permutations=19).table
    table.loc[1, ["jsd_jackknife", "jsd_low", "jsd_high", "jsd_bits", "q_value"]] = np.nan
    ax = plot.separation(table)
    line = next(line for line in ax.lines if "corrected" in str(line.get_label()))
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False]


def test_layers_that_cannot_be_tested_have_neither_null_nor_full_points(tmp_path: Path) -> None:
    with moetrace.open(traces.labelled_trace(tmp_path / "t.moet", n_prompts=1)) as trace:
        table = Subject([trace]).domain_test().table
    ax = plot.separation(table)
    assert "measured, cannot be tested" in [c.get_label() for c in ax.collections]
    assert not any("q ≤" in str(c.get_label()) for c in ax.collections)


def test_a_label_is_no_mathematics(routed: Subject) -> None:
    ax = plot.entropy(of(analysis.domain_entropy, routed))
    ax.figure.canvas.draw()
    legend = ax.get_legend()
    assert legend is not None
    (text,) = [text for text in legend.get_texts() if text.get_text() == "a $ b"]
    assert not text.get_parse_math()


def test_the_strongest_specialists_are_drawn_with_their_intervals() -> None:
    table = pd.DataFrame(
        {
            "layer": [0, 0, 1], "expert": [1, 2, 3], "kind": ["specialist", "undecided", "specialist"],
            "domain": ["code", "code", "math"], "lift": [2.0, 9.0, 3.0],
            "low": [1.5, 0.1, 2.0], "high": [2.5, 20.0, 4.0], "p_family": [0.01, 0.9, 0.02],
        }
    )  # fmt: skip
    ax = plot.specialists(table)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["layer 1, expert 3", "layer 0, expert 1"]
    spans = [
        segment[:, 0].tolist()
        for c in ax.collections
        if hasattr(c, "get_segments")
        for segment in c.get_segments()
    ]
    assert [1.5, 2.5] in spans
    assert [2.0, 4.0] in spans


@pytest.mark.parametrize(
    "name",
    ["domain-separation", "specialists", "persistence", "transitions", "expert-frequency", "deep-dive"],
)
def test_a_finding_from_json_draws_what_the_new_one_draws(routed: Subject, tmp_path: Path, name: str) -> None:
    with moetrace.open(traces.labelled_trace(tmp_path / "t.moet", n_prompts=1)) as trace:
        finding = question(name)().answer(Subject([trace]))
    again = Finding.from_json(finding.to_json())
    for figure, other in zip(
        question(name)().figures(finding).values(), question(name)().figures(again).values(), strict=True
    ):
        pictures = []
        for each in (figure, other):
            canvas = plt.figure(figsize=(4, 3), dpi=50)
            each.draw(canvas.add_subplot())
            canvas.canvas.draw()
            pictures.append(bytes(canvas.canvas.buffer_rgba()))  # type: ignore[attr-defined]
        assert pictures[0] == pictures[1]
