"""Figures as SVG for the page: part of the document, in the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

from moetrace.findings import Figure
from moetrace.plot.names import HOVER
from moetrace.plot.style import LIGHT, OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Colours of the light style -> the page's variables, which know both themes.
_VARIABLES = {
    **{LIGHT[name].lower(): f"var(--{name})" for name in ("ink", "faint", "grid", "missing")},
    LIGHT["ground"].lower(): "var(--surface)",
    **{color.lower(): f"var(--c{i})" for i, color in enumerate(OKABE_ITO)},
}

# The group of a text that is cut; matplotlib takes the quotes that are not in its name.
_WHOLE = re.compile(f"<g id=(?:\"{HOVER}[^\"]*\"|'{HOVER}[^']*')>")


def svg(canvas: Canvas) -> str:
    """Give what is drawn on ``canvas`` as an SVG document, the same each time."""
    out = io.StringIO()
    canvas.savefig(out, format="svg", dpi=150, metadata={"Date": None})
    return out.getvalue()


def inline_svg(text: str, figure: Figure, prefix: str) -> Markup:
    """Give a figure, of which ``text`` is the SVG document in the light style, as an element of an HTML page.

    ``prefix`` goes before every id, which must be unique in the page. Namespaces and metadata, and with them
    every URL, are left out: HTML needs none.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">[^<]*</style>', "", text, count=1)
    width, height = (round(72 * side) for side in figure.size)
    head = (
        f'<svg class="static" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(figure.caption)}"'
        f' style="max-width: {1.45 * width:.0f}px">'
    )
    text = head + text[text.index(">") + 1 :]
    # text is what others may have written: only its tag is touched
    pieces = re.split(rf"(<text\b.*?</text>|{_WHOLE.pattern})", text, flags=re.DOTALL)
    return Markup("".join(_piece(piece, prefix) for piece in pieces))


def _piece(piece: str, prefix: str) -> str:
    if piece.startswith("<text"):
        return _text(piece, prefix)
    if found := _WHOLE.fullmatch(piece):
        # as an attribute is escaped, it can stand in an element, too
        return f"<g><title>{found[0][len('<g id=.') + len(HOVER) : -2]}</title>"
    return _shape(piece, prefix)


def _shape(piece: str, prefix: str) -> str:
    piece = re.sub(r"<!--.*?-->", "", piece, flags=re.DOTALL)
    piece = piece.replace("xlink:href=", "href=").replace('href="#', f'href="#{prefix}')
    piece = re.sub(r'<g id="[^"]*"', "<g", piece)
    piece = piece.replace(' id="', f' id="{prefix}').replace("url(#", f"url(#{prefix}")
    piece = re.sub(r"(\d\.\d\d)\d+", r"\1", piece)
    piece = re.sub(r"\s*\n\s*", " ", piece)
    return _themed(piece)


def _text(piece: str, prefix: str) -> str:
    end = piece.index(">")
    tag = re.sub(r"font-family: [^;\"]*;?", "", piece[:end])
    tag = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;\"]*;?", r"font-size: \1;", tag)
    return _themed(re.sub(r' id="', f' id="{prefix}', tag)) + piece[end:]


def _themed(piece: str) -> str:
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: _VARIABLES.get(found[0].lower(), found[0]), piece)
