"""Figures of many domains, long names and hundreds of experts: nothing outside, nothing on top of another."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib as mpl
import pytest
import traces
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from rings import make_layout

import moetrace
from moetrace.findings import Subject, question
from moetrace.plot import style
from moetrace.plot.names import shortened
from moetrace.report.files import figures_of
from moetrace.report.svg import inline_svg, svg

mpl.use("agg")

LONG = "{0:02d} customer-support conversations, line {0}"
ALIKE = "conversations with customers, support, english, level {0} of many"
ASKED = {
    "domain-entropy": {"permutations": 19},
    "specialists": {"permutations": 99, "resamples": 50},
    "deep-dive": {},
    "expert-frequency": {},
    "domain-separation": {"permutations": 19},
}


def world(path: Path, n_domains: int, name: str = LONG, n_expert: int = 8, k: int = 2) -> Subject:
    names = [name.format(i) for i in range(n_domains)]
    layout = make_layout(n_expert=n_expert, k=k)
    return Subject([moetrace.open(traces.labelled_trace(path / "t.moet", names, layout=layout, n_prompts=3))])


def texts(canvas: Canvas) -> list[Text]:
    found = []
    for ax in canvas.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        legend = ax.get_legend()
        found += [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]  # type: ignore[attr-defined]
        found += legend.get_texts() if legend else []
    return [text for text in found if text.get_text() and text.get_visible()]


def untidy(canvas: Canvas) -> list[str]:
    """What lies outside the figure or upon something else; one pixel is forgiven."""
    canvas.draw_without_rendering()
    box, said = canvas.bbox, []
    boxes: list[tuple[str, Bbox]] = [(t.get_text(), t.get_window_extent()) for t in texts(canvas)]
    for name, b in boxes:
        if b.x0 < box.x0 - 1 or b.y0 < box.y0 - 1 or b.x1 > box.x1 + 1 or b.y1 > box.y1 + 1:
            said.append(f"{name} is outside")
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        both = Bbox.intersection(a, b)
        if both is not None and both.width > 1 and both.height > 1:
            said.append(f"{one} lies upon {other}")
    main = canvas.axes[0].get_window_extent()
    legend = canvas.axes[0].get_legend()
    if legend is not None and legend.get_window_extent().y0 < main.y1 - 1:
        said.append("the legend lies upon the axes")
    if main.width < 0.4 * box.width or main.height < 0.35 * box.height:
        said.append(
            f"the axes are {main.width / box.width:.0%} x {main.height / box.height:.0%} of the figure"
        )
    return said


@pytest.mark.parametrize(
    ("n_domains", "name"), [(8, "d{0}"), (8, LONG), (30, LONG), (30, ALIKE), (100, ALIKE)]
)
def test_nothing_is_outside_or_upon_another(tmp_path: Path, n_domains: int, name: str) -> None:
    subject = world(tmp_path, n_domains, name)
    for asked, parameters in ASKED.items():
        figures = figures_of(question(asked)(**parameters).ask(subject))
        assert figures
        assert len(figures) <= 12
        for drawing, figure in list(figures.items())[:3]:  # maps of domains are alike
            with style():
                canvas = figure.canvas()
                assert untidy(canvas) == [], (asked, drawing)
            legend = canvas.axes[0].get_legend()
            if legend is not None:
                names = [text.get_text() for text in legend.get_texts()]
                assert len(set(names)) == len(names)


def test_experts_by_the_hundred(tmp_path: Path) -> None:
    subject = world(tmp_path, 3, "d{0}", n_expert=512, k=10)
    for asked in (*ASKED, "load-balance", "transitions", "cold-experts"):
        for drawing, figure in figures_of(question(asked)(**ASKED.get(asked, {})).ask(subject)).items():
            with style():
                assert untidy(figure.canvas()) == [], (asked, drawing)


def test_no_two_domains_share_a_colour(tmp_path: Path) -> None:
    subject = world(tmp_path, 30)
    with style():
        canvas = figures_of(question("domain-entropy")(permutations=19).ask(subject))["by_layer"].canvas()
    named = [line for line in canvas.axes[0].lines if "customer" in str(line.get_label())]
    assert len(named) == len({to_hex(line.get_color()) for line in named}) == 7
    assert sum("other domains" in str(line.get_label()) for line in canvas.axes[0].lines) == 1
    assert len(canvas.axes[0].lines) == 1 + 30


def test_a_cut_name_is_whole_under_the_pointer(tmp_path: Path) -> None:
    subject = world(tmp_path, 8, '<b>"{0}" & #0072B2 conversations of customers</b>')
    figure = figures_of(question("deep-dive")().ask(subject))["percent"]
    with style():
        text = str(inline_svg(svg(figure.canvas()), figure, "x-"))
    for i in range(8):
        whole = f'&lt;b&gt;"{i}" &amp; #0072B2 conversations of customers&lt;/b&gt;'
        assert f"<title>{whole}</title>" in text.replace("&quot;", '"')
    assert "<b>" not in text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from("abc…1 $"), max_size=30), max_size=12), st.integers(8, 24))
@example(["a" * 40 + "b", "a" * 40 + "c", "b" + "a" * 40], 10)
@example(["aaaaaaaaaa", "aaa…aaaa", "aaabaaaa x"], 8)
def test_names_stay_apart(names: list[str], at_most: int) -> None:
    short = shortened(names, at_most)
    assert set(short) == set(names)
    assert len(set(short.values())) == len(short)
    assert all(len(form) <= at_most + 3 for form in short.values())
    if len(names) == 1 and len(names[0]) <= at_most:
        assert short[names[0]] == " ".join(names[0].split())
