"""How a program comes by llama.cpp, which decides whether its calls can be taken over."""

from __future__ import annotations

import contextlib
import mmap
from enum import Enum
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_DT_FLAGS
from elftools.elf.sections import Section, SymbolTableSection

from moetrace.errors import RuntimeMissingError
from moetrace.host.runtime import loaded_libraries


class Linkage(Enum):
    """How a program comes by llama.cpp."""

    LIBRARY = "it links llama.cpp's libraries"
    OWN = "it is a library that has llama.cpp inside, and calls it through the dynamic linker"
    STATIC = "llama.cpp is linked into it statically, so that its calls cannot be taken over"
    SCRIPT = "it is a script"
    NONE = "it links no llama.cpp"


def linkage(program: Path) -> Linkage:
    """Say how a program, or a library, comes by llama.cpp.

    Raises
    ------
    RuntimeMissingError
        If the file cannot be read.
    """
    if any("ggml" in name or "llama" in name for name in loaded_libraries(program)):
        return Linkage.LIBRARY
    name = "ggml_backend_sched_graph_compute_async"
    try:
        with program.open("rb") as file:
            if file.read(2) == b"#!":
                return Linkage.SCRIPT
            file.seek(0)
            with contextlib.suppress(ELFError):
                elf = ELFFile(file)
                symbols, dynamic = elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".dynamic")
                if isinstance(symbols, SymbolTableSection) and symbols.get_symbol_by_name(name):
                    return Linkage.STATIC if _binds_itself(dynamic) else Linkage.OWN
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                # the name stands in messages of ggml, also where symbols were stripped
                return Linkage.STATIC if text.find(b"ggml_backend_sched") >= 0 else Linkage.NONE
    except (OSError, ValueError) as e:
        raise RuntimeMissingError(f"{program} cannot be read", why=str(e), fix="check the path") from e


def _binds_itself(dynamic: Section | None) -> bool:
    """Whether a library was linked with -Bsymbolic: its own functions come first for it."""
    if not isinstance(dynamic, DynamicSection):
        return False
    tags = {tag.entry.d_tag: tag.entry.d_val for tag in dynamic.iter_tags()}
    return "DT_SYMBOLIC" in tags or bool(tags.get("DT_FLAGS", 0) & ENUM_DT_FLAGS["DF_SYMBOLIC"])
