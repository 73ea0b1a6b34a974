"""``moetrace doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from moetrace.commands.options import add_option, paint, red
from moetrace.errors import RuntimeMissingError, UsageError
from moetrace.host.linkage import Linkage, linkage
from moetrace.host.runtime import find_tool, loaded_libraries, preload_path, probe

#: functions without which nothing can be recorded, and what is lost without the others
_NEEDED = (
    "ggml_backend_sched_alloc_graph",
    "ggml_backend_sched_graph_compute_async",
    "ggml_backend_sched_set_eval_callback",
)
_USEFUL = {
    ("llama_process", "llama_decode"): "tokens have no sequence",
    (
        "llama_memory_seq_rm",
        "llama_kv_self_seq_rm",
        "llama_kv_cache_seq_rm",
    ): "requests are told apart by position only",
    ("llama_set_sampler",): "requests that continue each other in a slot may be taken for one",
}


class Doctor:
    """Say whether a llama.cpp program can be traced, before any model is loaded.

    moetrace doctor -- llama-server
    moetrace doctor --json -- llama-server
    """

    passthrough = True

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        add_option(parser, "--json", action="store_true", help="print JSON: what is found, by name")

    def run(self, args: argparse.Namespace) -> int:
        """Look."""
        if args.json:
            told: dict[str, list[str]] = {}
            self._look(args, lambda what, text: told.setdefault(what, []).append(text))
            print(json.dumps(told, indent=1))
        else:
            self._look(args, say)
        return 0

    def _look(self, args: argparse.Namespace, say: Callable[[str, str], None]) -> None:
        """Tell what is found. Raises MoetraceError if the program cannot be traced."""
        if len(args.rest) > 1:
            raise UsageError("doctor takes the program only", fix="moetrace doctor -- llama-server")
        program = find_tool(args.rest[0] if args.rest else "llama-server")
        say("tracer", str(preload_path()))
        say("program", str(program))
        how = linkage(program)
        if how is Linkage.STATIC:
            raise RuntimeMissingError(
                f"{program} cannot be traced",
                why=how.value,
                fix="build llama.cpp with -DBUILD_SHARED_LIBS=ON, or use another build of it",
            )
        if how in (Linkage.NONE, Linkage.SCRIPT):
            say("note", f"{how.value}; one that it loads, or starts, while it runs can be recorded")
            say("verdict", f"try: moetrace run -o t.moet -- {program}")
            return
        if how is Linkage.OWN:
            ggml = {f"{program.name} (llama)": str(program)}
        else:
            libraries = loaded_libraries(program)
            ggml = {name: path for name, path in libraries.items() if "ggml" in name or "llama" in name}
        missing = sorted(name for name, path in ggml.items() if not path)
        if missing:
            raise RuntimeMissingError(
                f"{program} does not find {', '.join(missing)}",
                why="the dynamic linker does not know where it is",
                fix="set LD_LIBRARY_PATH to the folder of llama.cpp's libraries",
            )
        found = probe(ggml)
        say("ggml", found.ggml)
        absent = [name for name in _NEEDED if not found.symbols.get(name)]
        if not found.attached or absent:
            raise RuntimeMissingError(
                f"this llama.cpp (ggml {found.ggml}) cannot be traced",
                why=found.error or f"it has no {', '.join(absent)}",
                fix="use a release that llama.cpp/README.md lists as supported",
            )
        say("tensors", "layout recognised")
        for names, consequence in _USEFUL.items():
            if not any(found.symbols.get(name) for name in names):
                say("note", f"without {names[0]}, {consequence}")
        say("verdict", "it can be traced")


def say(what: str, text: str) -> None:
    """Print one finding."""
    shown = red(text) if what == "note" else paint(text, "1;32") if text == "it can be traced" else text
    print(f"{what:<8} {shown}")
    sys.stdout.flush()
