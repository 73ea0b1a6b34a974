"""Pages of the site that are made from the source: home, commands, questions with their pictures, and the API.

A hook of mkdocs (mkdocs.yml). Questions are drawn from the recording that is shipped.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from moetrace import data
from moetrace.__main__ import GROUPS, load, make_parser, summary
from moetrace.commands.demo import unpack
from moetrace.findings import QUESTIONS, Subject, ask_all
from moetrace.trace.trace import open_trace

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for name, text in {"index.md": home(), **commands(), **questions(), "api.md": api()}.items():
        files.append(File.generated(config, name, content=text))
    for name, (svg, _) in pictures().items():
        files.append(File.generated(config, f"questions/{name}.svg", content=svg))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links into the source tree, which the site does not hold, become names of files."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def shown(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        there = Path(os.path.normpath(folder / target))
        if there.is_relative_to(ROOT / "docs") or not there.exists():
            return match[0]
        return f"{text} (`{there.relative_to(ROOT)}`)" if text != target else f"`{there.relative_to(ROOT)}`"

    return _LINK.sub(shown, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Roles of docstrings (``:class:``) are not shown."""
    return re.sub(r":(?:class|func|meth|data|mod|attr):(?=<code>)", "", html)


def home() -> str:
    """The README, whose links into docs/ begin there."""
    return (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](").replace('"docs/', '"')


def commands() -> dict[str, str]:
    """A page for each command: what it does and its options, as ``--help`` says it; and a list of them."""
    os.environ["COLUMNS"] = "100"
    listed, out = ["# Commands", ""], {}
    for group, names in GROUPS.items():
        listed += [f"## {group.capitalize()}", "", "| command | what it does |", "| --- | --- |"]
        for name in names:
            listed.append(f"| [`moetrace {name}`]({name}.md) | {summary(name)} |")
            out[f"commands/{name}.md"] = command(name)
        listed.append("")
    return {"commands/index.md": "\n".join(listed), **out}


def command(name: str) -> str:
    """One command's page."""
    parser = make_parser(name)
    actions = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    mine = next(actions).choices[name]
    mine.description = None  # it stands above
    help_ = mine.format_help()
    text = inspect.cleandoc(load(name).__doc__ or "")
    return f"# moetrace {name}\n\n{indented(text)}\n\n## Options\n\n```text\n{help_.rstrip()}\n```\n"


def indented(docstring: str) -> str:
    """A docstring as Markdown: paragraphs, and what is indented as code."""
    out = []
    for part in docstring.split("\n\n"):
        lines = part.splitlines()
        if all(line.startswith("  ") for line in lines):
            out.append("```text\n" + inspect.cleandoc("\n" + part) + "\n```")
        else:
            out.append(" ".join(lines))
    return "\n\n".join(out)


def questions() -> dict[str, str]:
    """A page for each question: what it asks and how, its parameters, and its picture of the shipped recording."""
    listed = [
        "# Questions",
        "",
        "Each is asked by `moetrace analyze NAME t.moet`; all of them by `moetrace stats` and",
    ]
    listed += ["`moetrace report`.", "", "| question | asks |", "| --- | --- |"]
    out, drawn = {}, pictures()
    for name, asked in QUESTIONS.items():
        asks, _, how = inspect.cleandoc(asked.__doc__ or "").partition("\n")
        listed.append(f"| [`{name}`]({name}.md) | {asks} |")
        lines = [
            f"# {asked.title}",
            "",
            f"**{asks}**",
            "",
            how.strip(),
            "",
            f"`moetrace analyze {name} t.moet`",
            "",
        ]
        if asked.needs_model:
            lines += ["Needs the model, too: `-m model.gguf`.", ""]
        if asked.channels:
            lines += [
                f"Needs the channels {', '.join(asked.channels)} (`--capture`), for all that it can say.",
                "",
            ]
        for figure, (_, caption) in drawn.items():
            if figure.startswith(f"{name}--"):
                lines += [
                    f"![{caption}]({figure}.svg)",
                    "",
                    f"*{caption}* Of the recording that is shipped.",
                    "",
                ]
        fields = [f for f in asked.__dataclass_fields__.values() if "help" in f.metadata]
        if fields:
            lines += ["## Parameters", "", "| parameter | default | |", "| --- | --- | --- |"]
            lines += [
                f"| `--{f.name.replace('_', '-')}` | {f.default if f.default not in ('', None) else ''} |"
                f" {f.metadata['help']} |"
                for f in fields
            ]
        out[f"questions/{name}.md"] = "\n".join(lines) + "\n"
    return {"questions/index.md": "\n".join(listed) + "\n", **out}


_drawn: dict[str, tuple[str, str]] = {}


def pictures() -> dict[str, tuple[str, str]]:
    """Figures of the shipped recording: question--figure -> SVG, and caption; the first of each question."""
    if _drawn:
        return _drawn
    from moetrace import plot

    with (
        tempfile.TemporaryDirectory() as folder,
        open_trace(unpack(data.recorded_demo(), Path(folder))) as trace,
    ):
        for finding in ask_all(Subject([trace])):
            if finding.not_answered is not None:
                continue
            for name, figure in list(QUESTIONS[finding.name]().figures(finding).items())[:1]:
                text = io.StringIO()
                with plot.style():
                    figure.canvas().savefig(text, format="svg", metadata={"Date": None})
                _drawn[f"{finding.name}--{name}"] = text.getvalue(), figure.caption
    return _drawn


def api() -> str:
    """The public names, by room, from their docstrings."""
    import moetrace

    parts = ["# Python", "", "`import moetrace` has all of these.", "", "## moetrace", ""]
    rooms = ("findings", "analysis", "plot")
    parts += [f"::: moetrace.{name}\n" for name in moetrace.__all__ if name not in (*rooms, "__version__")]
    for room in rooms:
        module = importlib.import_module(f"moetrace.{room}")
        parts += [f"## moetrace.{room}", "", inspect.cleandoc(module.__doc__ or ""), ""]
        for name in module.__all__:
            path = f"moetrace.{room}.{name}"
            # a function that is called as its file
            parts.append(f"::: {path}.{name}\n" if path in sys.modules else f"::: {path}\n")
    return "\n".join(parts)
