"""The page's script: the modules of templates/, one after the other.

Each is an ES module of its own, to be read and tested alone. The page is one file under a content security policy
that allows one script by its hash, and a module in a page cannot be imported by another: so their imports and
exports are taken out, and they share the page's one scope.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
#: in the order in which they need each other
MODULES = ("text.mjs", "data.mjs", "charts.mjs", "widgets.mjs", "page.mjs")

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./[a-z]+\.mjs";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async function|function|class|const) )", re.MULTILINE)


def page_script(read: Callable[[str], str]) -> str:
    """Give the script as text; ``read(name)`` gives that of a module.

    Raises ValueError for an import or export that is written in another way than the modules write them.
    """
    parts = [_EXPORT.sub("", _IMPORT.sub("", read(name))) for name in MODULES]
    for name, part in zip(MODULES, parts, strict=True):
        if left := re.search(r"^\s*(?:import|export)\b.*", part, re.MULTILINE):
            raise ValueError(f"{name}: {left[0]!r} cannot be put into the page's one script")
    return "\n".join(('"use strict";', *parts))
