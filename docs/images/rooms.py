"""Draws the rooms of the house for docs/architecture.md: ``python docs/images/rooms.py``.

Who imports whom is read from the source; tests/unit/test_architecture.py holds the picture against it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_name("rooms.svg")

#: from the top of the house to its ground: a room imports from those below it
ROOMS = {
    "commands": "one file per command of the command line",
    "live": "a recording while it goes on: metrics, page, terminal",
    "report": "findings as a page, as text, as files",
    "findings": "which rows, which analysis, what can be said",
    "plot": "figures, drawn from a finding's tables",
    "host": "whatever runs llama.cpp; the drain",
    "analysis": "pure functions of arrays",
    "trace": "the file format; requests, labels, loss",
    "model": "what a GGUF file says of its experts",
    "data": "the demo model, prompts",
    "synthetic": "small models for tests",
}
#: not drawn: single files that any room may use, and the package's own names
EVERYWHERE = ("_native", "errors", "numbers", "printable", "__version__")
#: where a record goes; csrc runs in the server's process
WALK = (
    ("csrc", "host", "ring"),
    ("host", "trace", "columns"),
    ("trace", "analysis", "arrays"),
    ("analysis", "findings", "tables"),
    ("findings", "plot", "figures"),
    ("plot", "report", "page"),
)
WIDTH, LEFT, BOX, HEIGHT, STEP, TOP = 860, 150, 420, 38, 54, 34
STYLE = """
text { fill: #1f2328 } .small { fill: #59636e; font-size: 12px } .sheet { fill: #ffffff }
.room rect { fill: #f6f8fa; stroke: #59636e } .ground { stroke: #818b98; stroke-dasharray: 5 4 }
.import { fill: none; stroke: #818b98; stroke-width: 1.2 } #grey path { fill: #818b98 }
.walk { fill: none; stroke: #0969da; stroke-width: 2.2 } #blue path { fill: #0969da }
.step { fill: #0969da; font-size: 12px; paint-order: stroke; stroke: #ffffff; stroke-width: 4px }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .small { fill: #9198a1 } .sheet { fill: #0d1117 } .room rect { fill: #151b23; stroke: #9198a1 }
.walk { stroke: #4493f8 } #blue path { fill: #4493f8 } .step { fill: #4493f8; stroke: #0d1117 } }
"""


def imports(package: Path = ROOT / "moetrace") -> Iterator[tuple[str, str]]:
    """Every import of one room from another, wherever in a file: (importer, imported)."""
    for path in package.glob("*/**/*.py"):
        room = path.relative_to(package).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                if parts[0] == "moetrace" and len(parts) > 1 and parts[1] != room:
                    yield room, parts[1]


def drawn() -> list[tuple[str, str]]:
    """Imports that are to be drawn, short ones first."""
    order = list(ROOMS)
    edges = {(a, b) for a, b in imports() if a in ROOMS and b in ROOMS}
    return sorted(edges, key=lambda edge: (order.index(edge[1]) - order.index(edge[0]), edge))


def top_of(room: str) -> int:
    """The upper end of a room's box; csrc lies below the ground, in another process."""
    return TOP + STEP * len(ROOMS) + 26 if room == "csrc" else TOP + STEP * list(ROOMS).index(room)


def arc(kind: str, start: str, end: str) -> str:
    """An arrow at the right (import) or left (walk) side of the boxes, from the middle of one to its end's side."""
    down = top_of(end) > top_of(start)
    y1, y2 = top_of(start) + HEIGHT / 2, top_of(end) + HEIGHT * (0.3 if down else 0.7)
    reach = abs(top_of(end) - top_of(start)) / STEP
    x, out = (LEFT + BOX, 26 + 34 * reach) if kind == "import" else (LEFT, -26 - 12 * reach)
    colour = "grey" if kind == "import" else "blue"
    curve = f"M{x} {y1:.1f}C{x + out:.1f} {y1:.1f} {x + out:.1f} {y2:.1f} {x} {y2:.1f}"
    title = f"<title>{start} → {end}</title>"
    return f'<path class="{kind}" marker-end="url(#{colour})" d="{curve}">{title}</path>'


def svg() -> str:
    """The picture."""
    height = top_of("csrc") + HEIGHT + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' role="img" font-family="system-ui, sans-serif" font-size="13">',
        "<title>The rooms of moetrace, what they import, and where a record goes</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="sheet" width="{WIDTH}" height="{height}"/>',
    ]
    for name in ("grey", "blue"):
        out.append(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
            ' markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8Z"/></marker>'
        )
    out.append(f'<text class="step" x="{LEFT - 12}" y="20" text-anchor="end">where a record goes</text>')
    out.append(f'<text class="small" x="{LEFT + BOX + 12}" y="20">what is imported</text>')
    out += [arc("import", start, end) for start, end in drawn()]
    out += [arc("walk", start, end) for start, end, _ in WALK]
    for number, (start, end, what) in enumerate(WALK, 1):
        reach = abs(top_of(end) - top_of(start)) / STEP
        x, y = LEFT - 25 - 9 * reach, (top_of(start) + top_of(end) + HEIGHT) / 2 + 4
        out.append(f'<text class="step" x="{x:.0f}" y="{y:.0f}" text-anchor="end">{number} {what}</text>')
    ground = top_of("csrc") - 18
    out.append(f'<line class="ground" x1="8" x2="{WIDTH - 8}" y1="{ground}" y2="{ground}"/>')
    out.append(
        f'<text class="small" x="{LEFT + BOX + 12}" y="{ground + 18}">in the process of llama.cpp</text>'
    )
    for room, says in {**ROOMS, "csrc": "hooks, collector and ring of the tracer"}.items():
        y = top_of(room)
        out += [
            f'<g class="room"><title>{room}</title><rect x="{LEFT}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6"/>',
            f'<text x="{LEFT + 12}" y="{y + 24}" font-weight="600">{room}</text>',
            f'<text class="small" x="{LEFT + 104}" y="{y + 24}">{escape(says)}</text></g>',
        ]
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
    print(f"Wrote {PICTURE}")
