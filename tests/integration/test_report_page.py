"""The report in a real browser: headless Chromium, network blocked.

Skipped, saying so, where there is no Chromium (set MOETRACE_CHROMIUM to one).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_chromium

import moetrace
from moetrace.findings import QUESTIONS, Subject, question
from moetrace.report.captured import captured
from moetrace.report.page import render_page
from moetrace.trace.store import write_vocabulary

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import traces
from rings import make_layout

HOSTILE = "</script><script>document.title='owned'</script><b>\"'"
ASKED = (
    "overview",
    "domain-separation",
    "specialists",
    "persistence",
    "transitions",
    "expert-frequency",
    "gate-distances",
)
USAGE = '[data-widget="usage"]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found (set MOETRACE_CHROMIUM)")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("page")
    layout = make_layout(layers=tuple(range(5)), n_expert=16)
    path = traces.labelled_trace(
        folder / "t.moet", ("code", "math", HOSTILE), layout=layout, all_outputs=False, lose=(30,)
    )
    write_vocabulary(path, [f"{HOSTILE} {i}".encode() for i in range(12)])
    with moetrace.open(path) as trace:
        subject = Subject([trace])
        findings = [question(name)().ask(subject) for name in ASKED]
        (folder / "report.html").write_text(
            render_page(subject, findings, captured(subject)), encoding="utf-8"
        )
        counts = subject.counts
        lift = next(f for f in findings if f.name == "specialists").tables["domain_lift"]
    return SimpleNamespace(page=folder / "report.html", trace=path, counts=counts, lift=lift)


@pytest.fixture(scope="module")
def whole(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page of every question (see whole_report.py)."""
    folder = tmp_path_factory.mktemp("whole")
    script = Path(__file__).with_name("whole_report.py")
    made = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=250)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture
def page(browser: Browser, report: SimpleNamespace) -> Browser:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(report.page)
    return browser


def place_of(
    page: Browser, row: int, column: int, rows: int, columns: int, widget: str = USAGE
) -> tuple[float, float]:
    """The middle of a cell of a heatmap, scrolled into view, in the viewport."""
    page.value(f"document.querySelector('{widget} canvas').scrollIntoView({{block: 'center'}})")
    box = page.value(
        f"(() => {{ const c = document.querySelector('{widget} canvas'), b = c.getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height]; })()"
    )
    # the matrix reaches from the labels to 4 pixels from the right end, and from 4 to 34 above the lower one
    left = page.value(f"report.figures.{widget.split(chr(34))[1]}.geometry.left")
    cell = (box[2] - left - 4) / columns
    tall = (box[3] - 4 - 34) / rows
    return box[0] + left + (column + 0.5) * cell, box[1] + 4 + (row + 0.5) * tall


def picture(page: Browser, widget: str = USAGE) -> str:
    return str(page.value(f"document.querySelector('{widget} canvas').toDataURL()"))


def readout(page: Browser, widget: str = USAGE) -> str:
    return str(page.value(f"document.querySelector('{widget} .readout').textContent"))


def choose(page: Browser, name: str, value: str) -> None:
    page.value(
        f"(() => {{ const e = document.querySelector('{USAGE} [data-bind={name}]'); e.value = '{value}';"
        " e.dispatchEvent(new Event(e.type === 'range' ? 'input' : 'change')); })()"
    )


def test_it_loads_without_errors_and_without_a_network(page: Browser) -> None:
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.value("document.querySelectorAll('.widget:not([hidden])').length") == 7
    assert page.value("document.title") == "Routing report: t.moet"
    assert page.value("document.querySelectorAll('main b, main script').length - "
                      "document.querySelectorAll('.remark b, .tiles b, .how b, .act b').length") == 0  # fmt: skip


def test_what_is_not_the_pages_own_may_not_run_or_load(page: Browser) -> None:
    page.value(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))"
    )
    assert page.value("window.owned") is None
    assert page.value("fetch('https://example.org').then(() => 'loaded', () => 'refused')") == "refused"


def test_a_text_token_by_token(page: Browser, report: SimpleNamespace) -> None:
    text = "document.querySelector('[data-widget=text] .tokens')"
    assert page.value(f"{text}.querySelectorAll('script').length") == 0
    tokens = page.value(f"[...{text}.querySelectorAll('[data-token]')].map((e) => e.textContent)")
    assert set(tokens) <= {f"{HOSTILE} {i}" for i in range(12)}
    page.value(f"{text}.focus()")
    for _ in range(3):
        page.key("ArrowRight")
    with moetrace.open(report.trace) as trace:
        rows = trace.sel(request=int(page.value("report.data.texts[0].number")), layer=int(trace.layers[0]))
        assert len(rows) == len(tokens)
        order = np.argsort(rows.positions, kind="stable")
        page.value("report.set({layer: 0})")
        third = rows.experts[order[2], 0][np.argsort(-rows.weights[order[2], 0], kind="stable")]
    said = readout(page, '[data-widget="text"]')
    assert said.startswith("position 2, prompt:")
    assert re.findall(r"(\d+) \(0", said) == [str(e) for e in third]
    page.value("document.querySelector('[data-widget=text] .legend button').click()")
    assert page.value("report.state.expert") is not None
    assert "used by" in page.value("document.querySelector('[data-widget=text] .legend').textContent")


def test_hovering_a_cell_shows_the_number_in_the_data(page: Browser, report: SimpleNamespace) -> None:
    choose(page, "domain", "2")
    layer, expert = 3, 11
    page.mouse(*place_of(page, layer, expert, 5, 16))
    domains = sorted({str(x) for x in report.counts.labels})
    mine = np.asarray(report.counts.labels) == domains[1]
    count = int(report.counts.included[mine, layer, expert].sum())
    tokens = int(report.counts.tokens[mine, layer].sum())
    row = report.lift.set_index(["layer", "domain", "expert"]).loc[(layer, domains[1], expert)]
    tip = page.value("document.querySelector('#tip').textContent")
    assert page.value("!document.querySelector('#tip').hidden")
    for text in (tip.replace("\n", " · "), readout(page)):
        assert text.startswith(f"layer 3, expert 11, {domains[1]} · {count} of {tokens} tokens")
        assert f"{100 * count / tokens:.1f} %" in text
    said = float(tip.split("lift ")[1].split(" ")[0].rstrip(","))
    assert said == pytest.approx(row["lift"], rel=0.01, abs=0.01)


def test_choosing_changes_what_is_drawn(page: Browser) -> None:
    seen = [picture(page)]
    other = str((page.value("report.state.layer") + 1) % 5)
    for name, value in (
        ("domain", "1"),
        ("measure", "lift"),
        ("order", "layer"),
        ("layer", other),
        ("order", "each"),
    ):
        choose(page, name, value)
        seen.append(picture(page))
    assert len(set(seen)) == len(seen)
    assert f"layer={other}" in page.value("location.hash")


def test_a_click_chooses_the_layer_everywhere(page: Browser) -> None:
    before = picture(page, '[data-widget="transitions"]'), picture(page, '[data-widget="layer"]')
    page.mouse(*place_of(page, 1, 2, 5, 16), click=True)
    assert page.value("report.state.layer") == 1
    assert page.value("[...document.querySelectorAll('[data-bind=layer]')].every((e) => e.value === '1')")
    assert picture(page, '[data-widget="transitions"]') != before[0]
    assert picture(page, '[data-widget="layer"]') != before[1]
    assert "Layer 1" in page.value("document.querySelector('[data-widget=layer] h3').textContent")


def test_a_deep_link_shows_the_cell_that_it_names(browser: Browser, report: SimpleNamespace) -> None:
    browser.open(report.page, "#layer=2&domain=code&expert=7&measure=even")
    assert readout(browser).startswith("layer 2, expert 7, code · ")
    assert browser.value(f"document.querySelector('{USAGE} [data-bind=measure]').value") == "even"
    browser.open(report.page, "#layer=99&domain=nobody&expert=999&measure=what")
    assert browser.value("report.state.domain") == 0
    assert browser.errors == []


def test_the_keyboard_reaches_every_cell(page: Browser) -> None:
    page.value(f"document.querySelector('{USAGE} canvas').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.key(key)
    first = readout(page)
    assert first.startswith("layer 2, expert 2,")
    page.key("Enter")
    assert page.value("report.state.layer") == 2


def test_missing_cells_are_hatched_not_coloured(browser: Browser, tmp_path: Path) -> None:
    # of prompt rows without output the last layer is not computed; all others are lost
    lose = [n for n in range(96) if n % 16 >= 10]
    path = traces.labelled_trace(tmp_path / "t.moet", n_decode=(2, 3), all_outputs=False, lose=lose)
    with moetrace.open(path) as trace:
        subject = Subject([trace], phase="prefill")
        assert not subject.counts.tokens[:, -1].any()
        page = tmp_path / "report.html"
        page.write_text(
            render_page(subject, [question("overview")().ask(subject)], captured(subject)), encoding="utf-8"
        )
    browser.open(page, "#layer=2&expert=3")
    assert "missing: no token recorded" in readout(browser)
    colors = browser.value(
        "(() => { const f = report.figures.usage, g = f.geometry, c = f.canvas.getContext('2d');"
        " const count = (row) => {"
        " const d = c.getImageData(g.left + 2, g.top + row * g.tall + 2, g.cell - 4, g.tall - 4).data;"
        " return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 3).join())).size; };"
        " return [count(0), count(2)]; })()"
    )
    assert colors[0] == 1
    assert colors[1] > 1


def test_dark_and_light_follow_the_system_and_the_switch(browser: Browser, report: SimpleNamespace) -> None:
    ground = "getComputedStyle(document.querySelector('section')).backgroundColor"
    browser.open(report.page, dark=True)
    dark, drawn = browser.value(ground), picture(browser)
    assert (
        browser.value("getComputedStyle(document.querySelector('svg.static text')).fill")
        == "rgb(230, 237, 243)"
    )
    browser.dark(False)
    light = browser.value(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 24, 29)")
    for expected in (light, dark, light):  # auto -> light -> dark -> auto
        browser.value("document.querySelector('#theme').click()")
        assert browser.value(ground) == expected
    assert picture(browser) != drawn


def test_tables_open_and_sort(page: Browser) -> None:
    page.value("document.querySelector('[data-table=domain-separation-domain_test]').open = true")
    page.value("new Promise((done) => setTimeout(done, 100))")
    column = (
        "[...document.querySelectorAll('[data-table=domain-separation-domain_test] tbody tr')]"
        ".map((row) => Number(row.cells[1].textContent))"
    )
    assert len(page.value(column)) == 5
    for turn in (-1, 1):
        page.value(
            "document.querySelectorAll('[data-table=domain-separation-domain_test] thead button')[1].click()"
        )
        values = page.value(column)
        assert values == sorted(values, reverse=turn < 0)


#: opens all tables, and gives of a section what can be seen of it
SEEN = """(async (name) => {
  const section = document.getElementById(name);
  const drawn = "figure svg, .widget:not([hidden]) :is(canvas[tabindex], svg.chart)";
  for (const box of section.querySelectorAll("details")) box.open = true;
  await new Promise((done) => setTimeout(done, 20));
  const shown = (element) => element.getBoundingClientRect().width > 50 && element.getBoundingClientRect().height > 20;
  const tables = [...section.querySelectorAll("[data-table]")].map((box) => [box.dataset.table, {
    rows: box.querySelectorAll("tbody tr").length, columns: box.querySelectorAll("thead th").length,
    cells: [...box.querySelectorAll("td")].map((cell) => cell.textContent),
  }]);
  return {
    text: [...section.querySelectorAll("p, li, figcaption, svg text")].map((e) => e.textContent),
    sentences: section.querySelectorAll("p.lead").length,
    figures: [...section.querySelectorAll(drawn)].map(shown),
    tables: Object.fromEntries(tables),
  };
})"""
NO_NUMBER = {"nan", "nan%", "inf", "-inf", "undefined"}
NO_CELL = {*NO_NUMBER, "none", "null", "[object object]"}


def test_every_questions_section_is_whole(browser: Browser, whole: Path) -> None:
    """Sentences, figures and tables: there, as large as they were made, and without what is no number."""
    expected = json.loads((whole / "tables.json").read_text())
    assert list(expected) == list(QUESTIONS)
    browser.errors.clear()
    browser.open(whole / "report.html")
    assert browser.value("document.querySelector('#missing')?.textContent") is None
    problems: dict[str, Any] = {}
    for name, tables in expected.items():
        seen = browser.value(f"{SEEN}('{'captured' if name == 'overview' else f'q-{name}'}')")
        problems[f"{name}: sentence"] = name != "overview" and seen["sentences"] != 1
        problems[f"{name}: figures"] = not all(seen["figures"])
        words = " ".join(seen["text"]).replace("(", " ").replace(",", " ").lower().split()
        problems[f"{name}: words"] = NO_NUMBER & set(words)
        for table, (rows, columns) in tables.items():
            found = seen["tables"][f"{name}-{table}"]
            problems[f"{name}/{table}: cells"] = NO_CELL & {cell.lower() for cell in found["cells"]}
            size = [found["rows"], found["columns"]]
            problems[f"{name}/{table}: size"] = size != [min(rows, 50), columns] and size
    assert {what: found for what, found in problems.items() if found} == {}
    assert browser.errors == []
    for width in (360, 1400):
        browser.size(width, 900)
        assert browser.value("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_screen(browser: Browser, report: SimpleNamespace, width: int) -> None:
    browser.open(report.page, width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(f"document.querySelector('{USAGE} canvas').getBoundingClientRect().width") > 200


# texts of figures that reach beyond them, or lie upon another one
UNTIDY = """[...document.querySelectorAll('.figure, .plot svg')].flatMap((box) => {
  const around = box.getBoundingClientRect();
  const texts = [...box.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
  const outside = texts.filter(([, b]) => b.left < around.left - 1 || b.right > around.right + 1);
  const upon = texts.filter(([, a], i) => texts.slice(i + 1).some(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2));
  return [...outside, ...upon].map(([text]) => text);
})"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 30 domains with long names that are alike, and of 512 experts."""
    folder = tmp_path_factory.mktemp("many")
    names = [f"conversations with customers, support, english, level {i} of many" for i in range(30)]
    layout = make_layout(n_expert=512, k=10)
    with moetrace.open(traces.labelled_trace(folder / "t.moet", names, layout=layout, n_prompts=3)) as trace:
        subject = Subject([trace])
        asked = [*ASKED[:3], "domain-entropy", "deep-dive", "expert-frequency"]
        less = {"specialists": {"permutations": 99, "resamples": 50}}
        findings = [question(name)(**less.get(name, {})).ask(subject) for name in asked]
        page = render_page(subject, findings, captured(subject))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


@pytest.mark.parametrize("width", [768, 1300])
def test_figures_of_many_domains_are_tidy(browser: Browser, many: Path, width: int) -> None:
    browser.errors.clear()
    browser.open(many, width=width)
    assert browser.value(UNTIDY) == []
    assert browser.value("document.querySelectorAll('.figure text').length") > 100
    assert browser.value("document.querySelector('#explore .widget').getBoundingClientRect().top") < 500
    names = browser.value("[...document.querySelectorAll('.figure g > title')].map((t) => t.textContent)")
    assert "conversations with customers, support, english, level 7 of many" in names
    assert browser.errors == []
