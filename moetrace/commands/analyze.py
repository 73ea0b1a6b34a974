"""``moetrace analyze``."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moetrace import data
from moetrace.commands.options import add_option, add_subparser
from moetrace.commands.placement import add_placement, placement, server_arguments
from moetrace.commands.progress import progress_bar, progress_line
from moetrace.commands.prompting import add_prompts, prompts_of
from moetrace.commands.selecting import add_choice
from moetrace.commands.showing import RECORDINGS, add_leaving_out, add_showing, opened, show, subject_of
from moetrace.errors import UsageError
from moetrace.findings import QUESTIONS, Question, question
from moetrace.host.prompts import read_prompts
from moetrace.host.recording import record
from moetrace.trace.importers import CountTable
from moetrace.trace.trace import Trace, open_trace


class Analyze:
    """Ask one question about a model's routing.

    Of a trace, or of a model, which is then served and recorded first (what stands right of -- goes to
    llama-server only; the options below also hold where the question runs the model itself):

      moetrace analyze load-balance t.moet
      moetrace analyze load-balance -m model.gguf -f prompts.jsonl -n 64 -- -c 4096 -ngl 99

    Prints sentences and tables; with -o, writes them as JSON and CSV, with figures as SVG, PNG and PDF.
    """

    passthrough = True

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add a subparser for each question, with the question's parameters as options."""
        questions = parser.add_subparsers(dest="question", metavar="NAME", required=True)
        for name in QUESTIONS:
            asked = question(name)
            sub = add_subparser(questions, name, asked)
            sub.add_argument(
                "traces",
                nargs="*",
                metavar="T.moet",
                help=RECORDINGS,
            )
            sub.set_defaults(parser=sub)  # whose options are suggested
            _add_common(sub)
            group = sub.add_argument_group("parameters of this question")
            for field in dataclasses.fields(asked):
                _add_parameter(group, field)

    def run(self, args: argparse.Namespace) -> int:
        """Ask it."""
        asked = question(args.question)
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(asked)}
        with ExitStack() as stack:
            recordings = _recordings(args, asked, stack)
            with progress_line() as progress:
                subject = subject_of(recordings, args, args.model, placement(args), progress)
                finding = asked(**given).answer(subject)
            return show([finding], args)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "-m",
        "--model",
        metavar="FILE",
        help="GGUF file: recorded first if no trace is given; else it says which contexts to look at",
    )
    add_choice(parser, by_model=False)
    add_prompts(parser, otherwise="the shipped ones")
    add_option(parser, "-n", "--n-predict", type=int, default=64, metavar="N", help="tokens to generate")
    add_placement(parser)
    add_showing(parser)
    add_leaving_out(parser)


def _add_parameter(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    spec = dict(field.metadata)
    option = "--" + field.name.replace("_", "-")
    if isinstance(field.default, bool):
        add_option(group, option, action=argparse.BooleanOptionalAction, default=field.default, **spec)
    else:
        kind = type(field.default) if field.default is not None else spec.pop("type", str)
        spec.setdefault("metavar", None if "choices" in spec else {int: "N", float: "X"}.get(kind, "TEXT"))
        add_option(group, option, type=kind, default=field.default, dest=field.name, **spec)


def _recordings(
    args: argparse.Namespace, asked: type[Question], stack: ExitStack
) -> list[Trace | CountTable]:
    """The given recordings, or a trace recorded now."""
    if args.traces:
        if args.prompt or args.file or args.rest:
            raise UsageError(
                "a trace is given: nothing is recorded", fix="leave out -p, -f and what follows --"
            )
        return opened(args.traces, args, stack)
    if not args.model:
        raise UsageError("what should be analysed?", fix="give a trace, or a model to record: -m model.gguf")
    prompts = prompts_of(args) or read_prompts(data.prompts("domains"))
    folder = Path(tempfile.mkdtemp(prefix="moetrace-analyze-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    channels = ["experts", "weights", *asked.channels]
    arguments = [*server_arguments(args), *args.rest, *(["-fa", "off"] if "attention" in channels else [])]
    with progress_bar("prompts") as update:
        record(
            args.model,
            prompts,
            folder / "t.moet",
            n_predict=args.n_predict,
            arguments=arguments,
            on_progress=update,
            channels=channels,
        )
    return [stack.enter_context(open_trace(folder / "t.moet"))]
