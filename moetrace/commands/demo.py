"""``moetrace demo``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrace import data
from moetrace.analysis.counts.chosen import Phase
from moetrace.commands.capturing import report_trace
from moetrace.commands.options import add_option, paint
from moetrace.commands.progress import progress_bar
from moetrace.commands.report import Report
from moetrace.errors import InputError
from moetrace.findings import Finding, Subject, question
from moetrace.findings.wording import not_computed, span
from moetrace.host.prompts import read_prompts
from moetrace.host.recording import record
from moetrace.host.runtime import find_tool
from moetrace.trace.storage import disk_error
from moetrace.trace.store import META_NAME
from moetrace.trace.trace import Trace, open_trace

#: positions per slot, as many as the demo model was trained on
_CONTEXT = 512


class Demo:
    """Record the shipped demo model from start to end: a server, prompts of five domains, a trace.

    Writes DIR/demo.moet, and prints how far apart the domains' experts are, layer by layer. The model is
    an OLMoE of 8 layers with 32 experts, trained on made-up text (moetrace/data/README.md). Needs
    llama-server; with --recorded nothing: a recording of the same is shipped, and its report is made at once.

      moetrace demo --recorded
      moetrace demo
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        add_option(parser, "-o", "--output", default="demo", metavar="DIR", help="folder to write to")
        add_option(
            parser,
            "--recorded",
            action="store_true",
            help="show what was recorded before, and make its report: needs neither llama-server nor a compiler",
        )
        add_option(parser, "-np", "--parallel", type=int, default=4, metavar="N", help="prompts at once")
        add_option(parser, "-n", "--n-predict", type=int, default=32, metavar="N", help="tokens to generate")
        add_option(parser, "-t", "--threads", type=int, metavar="N", help="threads of llama-server")

    def run(self, args: argparse.Namespace) -> int:
        """Run it."""
        folder = Path(args.output)
        if args.recorded:
            return self._show_recorded(folder)
        find_tool("llama-server")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "demo.moet"
        prompts = read_prompts(data.prompts("domains"))
        arguments = ["-np", str(args.parallel), "-c", str(_CONTEXT * args.parallel)]
        if args.threads:
            arguments += ["-t", str(args.threads)]
        say(f"Starting llama-server with the tracer loaded, {args.parallel} slots")
        say(f"Sending {len(prompts)} prompts of {len({p.label for p in prompts})} domains over HTTP")
        with progress_bar("prompts") as update:
            record(
                data.demo_model(),
                prompts,
                path,
                n_predict=args.n_predict,
                arguments=arguments,
                on_progress=update,
                force=True,
                channels=["experts", "weights", "logits"],
            )
        with open_trace(path) as trace:
            show(trace)
        report_trace(path, sys.stdout, following=("report", "stats"))
        return 0

    def _show_recorded(self, folder: Path) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        say("Unpacking what the demo model did with 60 prompts of 5 domains")
        path = unpack(data.recorded_demo(), folder)
        with open_trace(path) as trace:
            show(trace)
        report_trace(path, sys.stdout, following=())
        say("Making the report: every question that the recording can answer")
        parser = argparse.ArgumentParser()
        Report().prepare_parser(parser)
        return Report().run(parser.parse_args([str(path), "-o", str(folder / "report")]))


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a trace that is shipped into a folder, in place of one of its name; gives its path.

    Raises
    ------
    InputError
        If what is there is no trace.
    MoetraceError
        If the disk fails.
    """
    path = folder / "demo.moet"
    try:
        if path.exists():
            if not (path / META_NAME).is_file():
                raise InputError(f"{path} is in the way, and no trace", fix="give another folder: -o DIR")
            shutil.rmtree(path)
        with tarfile.open(archive) as packed:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4
                packed.extraction_filter = tarfile.data_filter
            packed.extractall(folder)
    except OSError as e:
        raise disk_error(path, e) from e
    return path


def say(text: str) -> None:
    """Say what is being done, on standard error."""
    print(paint("•", "1;36", sys.stderr), text, file=sys.stderr)


def show(trace: Trace) -> None:
    """Print how far apart domains are in each layer, in prompt and in generated tokens, and what that means."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    separation = {phase: _ask("domain-separation", trace, phase) for phase in phases}
    rows = {p: f.tables["domain_test"].set_index("layer").to_dict("index") for p, f in separation.items()}
    lines = [
        "",
        "How far apart the domains' experts are: Jensen-Shannon divergence in bits as seen, what prompts alone would",
        "show, the difference freed of that (jackknife, 95 % interval), and its false discovery rate q",
        "",
        f"{'':7}{'prompt tokens':<48}{'generated tokens':<48}",
        "layer  " + f"{'seen':<7}{'prompts':<9}{'domains':<24}{'q':<8}" * 2,
    ]
    for layer in rows["prefill"]:
        lines.append(f"{layer:>5}  " + "".join(_cells(rows[phase][layer]) for phase in phases))
    special, overview = _ask("specialists", trace, "prefill"), _ask("overview", trace, "prefill")
    lines.append("")
    for sentence in (
        *separation["prefill"].sentences[:1],
        *filter(None, [not_computed(overview.tables["layers"])]),
        *special.sentences[:3],
    ):
        lines.append(textwrap.fill(sentence, 110))
    print("\n".join(line.rstrip() for line in [*lines, ""]))


def _ask(name: str, trace: Trace, phase: Phase) -> Finding:
    return question(name)().answer(Subject([trace], phase=phase))


def _cells(row: Mapping[Any, Any]) -> str:
    jsd = span(row["jsd_jackknife"], row["jsd_low"], row["jsd_high"])
    return f"{row['jsd_bits']:<7.3f}{row['jsd_null_mean']:<9.3f}{jsd:<24}{row['q_value']:<8.3f}"
