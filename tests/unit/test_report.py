"""The report: self-contained, small, escaped, and the same numbers as the findings."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import shlex
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import traces
from rings import make_layout

import moetrace
from moetrace.__main__ import main, make_parser
from moetrace.analysis.counts.counting import RoutingCounts
from moetrace.commands import report as report_command
from moetrace.errors import InputError
from moetrace.findings import QUESTIONS, Finding, Subject, ask_all, question
from moetrace.findings.wording import file_names
from moetrace.report.captured import captured
from moetrace.report.explorer import explorer, pack, unpack
from moetrace.report.files import figures_of, widget_tables
from moetrace.report.methods import linked, methods
from moetrace.report.page import MAX_BYTES, Report, render_page, write_report
from moetrace.report.short import in_short
from moetrace.report.summary import summary
from moetrace.report.texts import texts
from moetrace.trace.store import write_vocabulary

ASKED = [name for name, asked in QUESTIONS.items() if not asked.needs_model and not asked.compares]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{1}{2$ {{7*7}} \x1b[31m"


class Page(HTMLParser):
    """Elements and attributes of a page, and its text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def ids(self) -> list[str]:
        return [i for _, a in self.elements if (i := a.get("id"))]

    @property
    def data(self) -> bytes:
        return base64.b64decode(self.scripts[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A report of a small trace with loss, and what went into it."""
    folder = tmp_path_factory.mktemp("report")
    path = traces.labelled_trace(
        folder / "t.moet", ("code", "math", HOSTILE), n_decode=(12, 13), all_outputs=False, lose=(30, 31)
    )
    with moetrace.open(path) as trace:
        subject = Subject([trace], names=["t"])
        findings = [question(name)().ask(subject) for name in ASKED]
        report = write_report(subject, findings, folder / "out")
        counts = subject.counts
    text = report.page.read_text(encoding="utf-8")
    return SimpleNamespace(folder=folder / "out", report=report, text=text, page=Page(text), counts=counts)


def test_nothing_is_loaded_from_anywhere(small: SimpleNamespace) -> None:
    for tag, attributes in small.page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            if value is not None:
                assert re.match(r"#|data:image/|tables/|figures/", value), (tag, name, value)
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
    for target in re.findall(r"url\(([^)]*)\)", small.text):
        assert target.strip("'\"").startswith("#"), target
    assert "http://" not in small.text
    assert "https://" not in small.text
    assert "@import" not in small.text


def test_only_the_pages_own_script_may_run(small: SimpleNamespace) -> None:
    policy = next(a["content"] or "" for t, a in small.page.elements if "http-equiv" in a)
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(small.page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") for _, a in small.page.elements for name in a)


def test_labels_are_text_wherever_they_stand(small: SimpleNamespace) -> None:
    assert len(small.page.scripts) == 2
    assert "alert(1)" in small.page.text
    assert not any(a.get("onerror") or a.get("src") == "x" for _, a in small.page.elements)
    assert all(HOSTILE[:8] not in path.name for path in small.report.files)
    said = dataclasses.replace(small.report, findings=(Finding("x", "X", (f"Most by {HOSTILE}.",)),))
    told = summary(said, width=80)
    assert "alert(1)" in told
    assert "\x1b" not in told


def test_every_answer_has_its_section_and_every_table_its_file(small: SimpleNamespace) -> None:
    assert len(set(small.page.ids)) == len(small.page.ids)
    head, _ = unpack(small.page.data)
    for finding in small.report.answered:
        if finding.name != "overview":
            assert f"q-{finding.name}" in small.page.ids
            assert finding.sentences[0].split("\x1b")[0] in small.page.text
        for name, table in finding.tables.items():
            assert f"{finding.name}-{name}" in head["tables"]
            assert head["tables"][f"{finding.name}-{name}"]["rows"] == len(table)
            assert (small.folder / "tables" / f"{finding.name}-{name}.csv").is_file()
    files = [
        a["href"] for t, a in small.page.elements if t == "a" and (a["href"] or "").startswith("tables/")
    ]
    assert files
    assert all((small.folder / name).is_file() for name in files)
    anchors = [a["href"] for t, a in small.page.elements if t == "a" and (a["href"] or "").startswith("#")]
    assert {a[1:] for a in anchors if a} <= set(small.page.ids)


def test_figures_are_there_as_svg_and_png(small: SimpleNamespace) -> None:
    for finding in small.report.answered:
        for name in question(finding.name)().figures(finding):
            png, svg = (small.folder / "figures" / f"{finding.name}-{name}.{e}" for e in ("png", "svg"))
            assert png.read_bytes()[:4] == b"\x89PNG"
            assert svg.read_bytes()[:5] == b"<?xml"


def test_what_is_missing_is_listed_with_reason_and_fix(small: SimpleNamespace) -> None:
    assert "gate-distances" in [f.name for f in small.report.findings if f.not_answered]
    assert "missing" in small.page.ids
    assert "fix: capture it again with --capture experts,weights,gate_input" in small.page.text
    assert "fix: capture it again with --capture experts,weights,gate_input" in summary(
        small.report, width=120
    )


def test_loss_comes_first_and_loud(small: SimpleNamespace) -> None:
    about = small.report.captured
    assert about.completeness[0].weight == "bad"
    assert "Incomplete: 2 rows lost (0.93% of all entries)" in about.completeness[0].text
    classes = [a.get("class") or "" for _, a in small.page.elements]
    assert "remark bad" in classes
    assert classes.index("remark bad") < next(i for i, c in enumerate(classes) if c == "conclusions")
    assert summary(small.report, width=120).split("\n")[2].startswith("  ✕ Incomplete")
    gaps = about.gaps.set_index("layer")
    assert gaps.loc[2, "not_computed"] == 60
    assert gaps["lost"].tolist() == [2, 2, 2]


def test_the_page_holds_the_counts_and_the_findings_numbers(small: SimpleNamespace) -> None:
    head, arrays = unpack(small.page.data)
    counts = small.counts
    assert head["domains"] == sorted({str(x) for x in counts.labels})
    assert np.array_equal(arrays["count"][0], counts.included.sum(axis=0))
    math = np.asarray(counts.labels) == "math"
    d = head["domains"].index("math")
    assert np.array_equal(arrays["count"][d + 1], counts.included[math].sum(axis=0))
    assert np.array_equal(arrays["tokens"][d + 1], counts.tokens[math].sum(axis=0))
    tables = {f.name: f.tables for f in small.report.findings}
    lift = tables["specialists"]["domain_lift"].set_index(["domain", "layer", "expert"])
    for layer, expert in ((0, 0), (1, 5), (2, 7)):
        row = lift.loc[("math", layer, expert)]
        for name, column in (("low", "low"), ("high", "high"), ("p", "p_family")):
            np.testing.assert_allclose(arrays[name][d, layer, expert], row[column], rtol=1e-3)
    test = tables["domain-separation"]["domain_test"]
    np.testing.assert_allclose(arrays["separation"][0], test["jsd_bits"], rtol=1e-6)
    np.testing.assert_allclose(arrays["separation"][5], test["q_value"], rtol=1e-6)
    time = tables["persistence"]["persistence"]
    first = time[time["lag"] == 1]
    np.testing.assert_allclose(arrays["persistence"][0][:, 0], first["overlap"], rtol=1e-6)
    np.testing.assert_allclose(arrays["persistence"][6][:, 0], first["top1_shuffle"], rtol=1e-6)
    assert np.array_equal(arrays["steps"].sum(axis=2), arrays["steps_from"])
    assert np.array_equal(arrays["steps"], counts.transitions)


def test_packed_arrays_come_back_as_they_were() -> None:
    given = {
        "a": np.arange(6, dtype="<u4").reshape(2, 3) * 70000,
        "b": np.array([[1.5, np.nan]], dtype="<f2"),
        "c": np.array([], dtype="<f4"),
    }
    head, arrays = unpack(pack({"domains": ["</script>"]}, given))
    assert head == {"domains": ["</script>"]}
    for name, array in given.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_a_domain_without_tokens_in_a_layer_stays_missing(tmp_path: Path) -> None:
    path = traces.labelled_trace(tmp_path / "t.moet", n_decode=(4, 5), all_outputs=False)
    with moetrace.open(path) as trace:
        subject = Subject([trace], phase="prefill")
        _, arrays = explorer(subject, [])
        findings = [question("expert-frequency")().ask(subject)]
    # the last layer of a prompt is computed for one token; nowhere is a number made up
    assert arrays["tokens"][:, -1].tolist() == [12, 4, 4, 4]
    assert findings[0].not_answered is None


def test_one_prompt_per_domain_cannot_be_tested(tmp_path: Path) -> None:
    path = traces.labelled_trace(tmp_path / "t.moet", n_prompts=1, n_decode=(30, 31))
    with moetrace.open(path) as trace:
        subject = Subject([trace])
        findings = tuple(question(name)().ask(subject) for name in ASKED)
        about = captured(subject)
        page = Page(render_page(subject, findings, about))
    (tmp_path / "report.html").touch()
    report = Report(tmp_path / "report.html", (), about, findings)
    assert "cannot be tested: domain and prompt are the same thing" in about.limits[0]
    conclusions, _, limits = page.text.partition("What cannot")
    assert "cannot be tested" not in conclusions
    assert limits.count("cannot be tested") >= 3
    before, _, after = summary(report).partition("What cannot")
    assert "cannot be tested" not in before
    assert "cannot be tested" in after


def dense_counts(n_prompts: int = 40, n_layers: int = 92, n_expert: int = 160, k: int = 8) -> RoutingCounts:
    """Counts as of a long recording: a million tokens, every transition seen."""
    rng = np.random.default_rng(0)
    tokens = np.full((n_prompts, n_layers), 25_000)
    taste = rng.dirichlet(np.full(n_expert, 2.0), size=(5, n_layers))
    included = rng.poisson(taste[np.arange(n_prompts) % 5] * 25_000 * k)
    top1 = rng.poisson(taste[np.arange(n_prompts) % 5] * 25_000)
    steps = rng.poisson(1_000_000 * taste[0][:, :, None] * taste[1][:, None, :])
    lags = np.full((n_prompts, n_layers, 32), 24_900)
    return RoutingCounts(
        prompts=np.array([f"p{i:02}" for i in range(n_prompts)]),
        labels=np.array([f"domain{i % 5}" for i in range(n_prompts)]),
        n_prompts=np.ones(n_prompts, dtype=np.int64),
        layers=np.arange(n_layers),
        n_expert_used=np.full(n_layers, k),
        tokens=tokens,
        included=included,
        top1=top1,
        transitions=steps,
        lag_pairs=lags,
        lag_shared=rng.poisson(lags * 0.6),
        lag_top1=rng.poisson(lags * 0.02),
    )


def test_the_page_stays_below_5_mb_at_92_layers_of_160_experts(tmp_path: Path) -> None:
    counts = dense_counts()
    shape = (92, 5, 160)
    rng = np.random.default_rng(1)
    index = pd.MultiIndex.from_product(
        [range(92), [f"domain{i}" for i in range(5)], range(160)], names=["layer", "domain", "expert"]
    )
    lift = pd.DataFrame(
        {
            name: rng.lognormal(size=int(np.prod(shape)))
            for name in ("share", "lift", "low", "high", "p_family")
        },
        index=index,
    ).reset_index()
    time = moetrace.analysis.persistence(counts)
    names = ("jsd_bits", "jsd_null_q95", "jsd_jackknife", "jsd_low", "jsd_high", "q_value")
    separation = pd.DataFrame({"layer": range(92)} | {name: rng.random(92) for name in names})
    steps = pd.DataFrame({n: rng.integers(0, 160, 200_000) for n in ("layer", "from", "to", "count")})
    kinds = lift[lift["domain"] == "domain0"].assign(kind="specialist").reset_index(drop=True)
    entropy = moetrace.analysis.domain_entropy(counts.included, counts.labels)
    findings = [
        Finding("domain-separation", "Separation", ("s",), (), {"domain_test": separation}),
        Finding("specialists", "Specialists", ("s",), (), {"domain_lift": lift, "specialists": kinds}),
        Finding("domain-entropy", "Entropy", ("s",), (), {"domain_entropy": entropy}),
        Finding("persistence", "Persistence", ("s",), (), {"persistence": time}),
        *(Finding(f"other{i}", "Other", ("s",), (), {"rows": steps, "more": lift}) for i in range(25)),
    ]
    with moetrace.open(traces.small_trace(tmp_path / "t.moet")) as trace:
        subject = Subject([trace])
        about = captured(subject)
        stand_in = SimpleNamespace(
            counts=counts, prompt_counts=counts, n_expert=np.full(92, 160),
            phase_note="decode", seed=0, traces=(), table=None,
        )  # fmt: skip
        text = render_page(stand_in, findings, about)  # type: ignore[arg-type]
    assert len(text.encode()) <= MAX_BYTES
    head, arrays = unpack(Page(text).data)
    assert arrays["count"].shape == (6, 92, 160)
    assert arrays["steps"].shape[1] < 160
    kept = arrays["steps_expert"][3].astype(int)
    assert np.array_equal(arrays["steps"][3], counts.transitions[3][np.ix_(kept, kept)])
    assert head["tables"]["other0-rows"]["rows"] == 200_000


def test_findings_made_elsewhere_get_their_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: QUESTIONS[name] for name in ("overview", "load-balance")}
    monkeypatch.setattr(QUESTIONS, "_found", few)
    path = traces.labelled_trace(tmp_path / "t.moet")
    pairs = {"pairs": pd.DataFrame({"a": [1]})}
    made = Finding(
        "own-question", "Own", ("Two experts are alike.",), (), pairs, phase_note="Prompt tokens only."
    )
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "own-question.json").write_text(made.to_json(), encoding="utf-8")
    arguments = ["report", str(path), "-o", str(tmp_path / "out"), "--findings", str(tmp_path / "given")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Two experts are alike." in out
    assert f"Wrote {tmp_path / 'out' / 'report.html'}" in out
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "q-own-question" in page.ids
    assert "Two experts are alike." in page.text
    assert "Prompt tokens only." in page.text, "the page is of another phase"
    assert (tmp_path / "out" / "tables" / "own-question-pairs.csv").is_file()


def test_a_finding_that_lacks_its_tables_is_refused_by_name() -> None:
    made = Finding("load-balance", "Load", ("s",), (), {"other": pd.DataFrame({"a": [1]})})
    with pytest.raises(InputError, match="load-balance has no 'load_balance'"):
        figures_of(made)


def test_a_widget_is_drawn_of_the_table_of_the_question_that_declares_it() -> None:
    """Another question may have a table of the same columns, and come first."""
    mine, theirs = (
        pd.DataFrame({"layer": [0], "jsd_bits": [0.5]}),
        pd.DataFrame({"layer": [0], "jsd_bits": [9.0]}),
    )
    findings = [
        Finding("matched-separation", "Other", ("s",), (), {"domain_test": theirs}),
        Finding("domain-separation", "Separation", ("s",), (), {"other": theirs, "domain_test": mine}),
        Finding("specialists", "Specialists", not_answered="no domain"),
    ]
    assert widget_tables(findings) == {"separation": mine}
    with pytest.raises(InputError, match="specialists has no 'domain_lift'"):
        widget_tables([Finding("specialists", "Specialists", ("s",))])


@pytest.mark.parametrize(("concludes", "where"), [(True, "conclusions"), (False, "limits")])
def test_whether_an_answer_concludes_is_what_it_says_of_itself(
    tmp_path: Path, concludes: bool, where: str
) -> None:
    """Not what words it uses."""
    said = Finding("own", "Own", ("It cannot be said more plainly.",), concludes=concludes)
    with moetrace.open(traces.small_trace(tmp_path / "t.moet")) as trace:
        subject = Subject([trace])
        text = Page(render_page(subject, [said], captured(subject))).text
    conclusions, _, limits = text.partition("What cannot")
    sentence = said.sentences[0]
    assert {
        "conclusions": sentence in conclusions,
        "limits": sentence in limits.partition("Routing says which")[0],
    }[where]
    assert sentence not in (limits.partition("Routing says which")[0] if concludes else conclusions)


def test_report_refuses_what_holds_no_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = traces.small_trace(tmp_path / "t.moet")
    assert main(["report", str(path), "--findings", str(tmp_path)]) == 1
    assert "holds no findings" in capsys.readouterr().err
    monkeypatch.setenv("MOETRACE_FINDINGS", f"{tmp_path},{tmp_path / 'x.json'}")
    assert main(["report", str(path)]) == 1
    assert f"{tmp_path} holds no findings" in capsys.readouterr().err


def test_words_lead_to_their_method() -> None:
    text = linked("By the jackknife over prompts & <b>lift</b>; jackknife")
    assert text.count("<a ") == 3
    assert '<a class="method" href="#m-jackknife">jackknife</a>' in text
    assert "&lt;b&gt;" in text
    assert len({method.anchor for method in methods()}) == len(methods())


def test_every_question_says_how_its_number_is_made() -> None:
    for name in QUESTIONS:
        assert len((question(name).__doc__ or "").split("\n\n", 1)[-1].split()) > 15, name


def test_what_was_given_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("overview", "load-balance", "compare", "expert-merging")
    monkeypatch.setattr(QUESTIONS, "_found", {name: QUESTIONS[name] for name in names})
    given = Finding("load-balance", "Load", ("made before",))
    with moetrace.open(traces.small_trace(tmp_path / "t.moet")) as trace:
        findings = {finding.name: finding for finding in ask_all(Subject([trace]), given=[given])}
    assert list(findings) == ["overview", "load-balance", "expert-merging"]  # one trace: nothing to compare
    assert findings["load-balance"] is given
    assert "needs the model" in (findings["expert-merging"].not_answered or "")


def test_in_short_says_what_the_tables_say_and_nothing_that_is_not_certain() -> None:
    kinds = pd.DataFrame(
        {
            "layer": [3, 4, 5], "expert": [7, 1, 2], "kind": ["specialist", "specialist", "undecided"],
            "domain": ["code", "maths", "x"], "lift": [2.9, 9.0, 20.0],
            "low": [2.2, 1.1, 0.1], "high": [3.5, 30.0, 90.0],
        }
    )  # fmt: skip
    usage = pd.DataFrame(
        {"layer": [0, 0], "expert": [0, 1], "count": [9, 0], "percent_of_tokens": [90.0, 10.0]}
    )
    cache = pd.DataFrame(
        {
            "cache": "layer", "policy": ["lru", "pinned", "oracle"], "slots": 8, "memory": 0.25,
            "hit_rate": [0.4, 0.5, 0.9],
        }
    )  # fmt: skip
    found = [
        Finding("specialists", "S", ("s",), tables={"specialists": kinds}),
        Finding("expert-frequency", "F", ("s",), tables={"usage": usage}),
        Finding("expert-cache", "C", ("s",), tables={"cache": cache}),
    ]
    said = [line.text for line in in_short(found)]
    assert said[0].startswith(
        "Code uses expert 7 of layer 3 2.9 times as much as the domains do on average (2.2 to 3.5)"
    )
    assert "1 other expert has such" in said[0]
    assert "takes part in 90 % of tokens" in said[1]
    assert "1 expert of 2 never came up" in said[1]
    assert "50% of what tokens need is there already if the hottest are kept" in said[2]
    nothing = [
        Finding("specialists", "S", ("s",), tables={"specialists": kinds[2:].reset_index(drop=True)}),
        Finding("expert-frequency", "F", not_answered="no"),
    ]
    assert in_short(nothing) == ()
    unsure = [Finding("specialists", "S", ("s",), tables={"specialists": kinds}, concludes=False)]
    assert in_short(unsure) == ()
    q = pd.DataFrame({"layer": [0, 1], "q_value": [0.5, 0.06]})
    assert (
        "No layer shows"
        in in_short([Finding("domain-separation", "D", ("s",), tables={"domain_test": q})])[0].text
    )


def test_names_that_others_chose_as_names_of_files() -> None:
    assert file_names(["Code", "C++ code!", "c code", "///", "all", "a" * 60]) == [
        "code", "c-code", "c-code-2", "unnamed", "all-2", "a" * 40
    ]  # fmt: skip


def test_texts_of_the_page_are_rows_of_the_trace(tmp_path: Path) -> None:
    layout = make_layout(layers=(1, 4, 7))
    path = traces.labelled_trace(
        tmp_path / "t.moet", ("code", "math"), layout=layout, all_outputs=False, lose=(30,)
    )
    with moetrace.open(path) as trace:
        assert texts([trace], 100_000) == ({}, {})  # no words
    write_vocabulary(path, [f" w{i}".encode() for i in range(12)])
    with moetrace.open(path) as trace:
        head, arrays = texts([trace], 100_000)
        assert len(head["texts"]) == len(trace.requests)
        # the labels in turns; the one that lost a row comes after the whole ones of its label
        lossy = int(trace.requests.index[trace.requests["n_lost"] > 0][0])
        label = trace.requests.loc[lossy, "label"]
        order = [one["number"] for one in head["texts"] if one["name"].endswith(f" · {label}")]
        assert order[-1] == lossy
        assert {one["name"].split(" · ")[1] for one in head["texts"][:2]} == {"code", "math"}
        at = 0
        for one in head["texts"]:
            rows = trace.sel(request=one["number"])
            here = slice(at, at + one["n"])
            by_position = np.argsort(rows.positions, kind="stable")
            assert one["n"] == one["of"] == len(rows)
            assert arrays["text_position"][here].tolist() == rows.positions[by_position].tolist()
            assert head["pieces"][here] == [f" w{t}" for t in rows.token_ids[by_position]]
            expected = np.where(rows.present[..., None], rows.experts.astype(int), 65535)[by_position]
            np.testing.assert_array_equal(arrays["text_expert"][here], expected)
            at += one["n"]
        assert (arrays["text_expert"] == 65535).any()
        # less room: fewer and shorter ones, said so
        few, small = texts([trace], 60 * 3 * arrays["text_expert"].shape[2])
        assert len(small["text_position"]) <= 60
        assert sum(one["n"] for one in few["texts"]) == len(small["text_position"])
        assert texts([trace], 0) == ({}, {})
        subject = Subject([trace])
        about = captured(subject)
        assert "Token by token" in Page(render_page(subject, [], about)).text
        without = render_page(subject, [], about, with_texts=False)
        assert "Token by token" not in Page(without).text
        assert "pieces" not in unpack(Page(without).data)[0]


def test_what_an_answer_leads_to_is_a_command_that_there_is(small: SimpleNamespace) -> None:
    commands = [command for asked in QUESTIONS.values() for _, command in asked.actions]
    assert len(commands) >= 5
    for command in commands:
        program, *rest = shlex.split(command.format(trace="t.moet"))
        assert program == "moetrace"
        make_parser(rest[0]).parse_args(["3" if word == "N" else word for word in rest])
    said = re.sub(r"\s+", " ", small.page.text)
    assert "moetrace prune" in said


def test_each_phase_has_a_page_and_they_lead_to_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = traces.labelled_trace(tmp_path / "t.moet", ("code", "math"))
    asked = ["overview", "expert-frequency"]
    monkeypatch.setattr(report_command, "ask_each", partial(_ask_some, names=asked))
    assert main(["report", str(trace), "-o", str(tmp_path / "out"), "--phase", "each"]) == 0
    pages = [tmp_path / "out" / where / "report.html" for where in ("", "prompts")]
    texts_ = [Page(page.read_text()) for page in pages]
    assert "generated tokens (decode)" in texts_[0].text
    assert "prompt tokens (prefill)" in texts_[1].text
    for page, one in zip(pages, texts_, strict=True):
        (link,) = [
            e["href"] for tag, e in one.elements if tag == "a" and str(e.get("href")).endswith("report.html")
        ]
        assert (page.parent / str(link)).resolve() in [each.resolve() for each in pages if each != page]
    with moetrace.open(trace) as opened:
        for phase, one in zip(("decode", "prefill"), texts_, strict=True):
            _, arrays = unpack(one.data)
            assert arrays["tokens"][0, 0] == len(opened.sel(phase=phase))
    assert capsys.readouterr().out.count("Wrote") == 2


def _ask_some(subject: Subject, *, then: Any, names: list[str], **_: Any) -> list[tuple[Finding, Any]]:
    found = [question(name)().ask(subject) for name in names]
    return [(each, then(each)) for each in found]
