"""``moetrace import``."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

from moetrace.errors import UsageError
from moetrace.trace.importers import FORMATS, Imported, import_trace
from moetrace.trace.store import META_NAME

_LEFT_OUT = {
    "rows_all_experts": "{n:,} rows left out: they ran every expert, as llama.cpp's warm-up does",
    "records_unplaced": "{n:,} records of the last layer left out: the source does not say whose they are",
    "lines_left_out": "{n:,} lines of another kind left out: import them with another --format",
}


class ImportCommand:
    """Turn a recording of another program into a trace.

    Reads per-token JSON (DOMAIN/traces/token-NNNNN.json), `layer_id,expert_ids` and `gate_input` logs,
    and OLMoE's JSON lines. What the source does not say is marked missing.
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("source", type=Path, metavar="SOURCE", help="the file or folder to read")
        parser.add_argument(
            "-o", "--output", type=Path, required=True, metavar="T.moet", help="the trace to make"
        )
        parser.add_argument("--force", action="store_true", help="replace a trace of that name")
        parser.add_argument(
            "--format",
            choices=[f for f in FORMATS if f != "counts"],
            help="default: found out from the source",
        )
        parser.add_argument(
            "--n-expert", type=int, metavar="N", help="experts of a layer (default: the highest id seen + 1)"
        )
        parser.add_argument(
            "--n-expert-used", type=int, metavar="K",
            help="experts per token (default: 4 for token-json, the fewest on a line for expert-log)",
        )  # fmt: skip
        parser.add_argument("--label", default="", help="domain of the requests (default: the file's name)")
        parser.add_argument(
            "--as-published", action="store_true",
            help="keep the warm-up's rows and guess as published analyses did (docs/import.md)",
        )  # fmt: skip

    def run(self, args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
        for name in ("n_expert", "n_expert_used"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: there is at least one")
        out: Path = args.output
        replaces = args.force and (out / META_NAME).exists()
        done = import_trace(
            args.source,
            out.with_name(f".{out.name}.{os.getpid()}") if replaces else out,
            format=args.format,
            n_expert=args.n_expert,
            n_expert_used=args.n_expert_used,
            label=args.label,
            as_published=args.as_published,
        )
        if replaces:  # only now that the new one is whole
            shutil.rmtree(out)
            done.path.rename(out)
        print(self.summary(replace(done, path=out)))
        return 0

    @staticmethod
    def summary(done: Imported) -> str:
        """What was read, what the source does not say, what was left out, and the next command."""
        lines = [
            f"Wrote {done.path}: {done.rows:,} tokens of {done.requests:,} requests, from {done.format}",
            f"Not in the source: {', '.join(done.missing)}",
        ]
        lines += [text.format(n=n) for name, text in _LEFT_OUT.items() if (n := getattr(done.tally, name))]
        return "\n".join([*lines, f"Next: moetrace report {done.path}"])
