"""``moetrace drive``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path

from moetrace.commands.options import add_option
from moetrace.commands.progress import progress_bar
from moetrace.commands.prompting import add_prompts, needed_prompts
from moetrace.errors import UsageError
from moetrace.host.client import Answer, ServerClient, drive
from moetrace.trace.labels import append_labels
from moetrace.trace.writer import is_trace


class Drive:
    """Send a prompt set to a running llama-server, and label the requests in its trace.

    A line of a prompt file is a JSON object with prompt, messages or tokens, and optionally id, label and
    n_predict; other keys are kept with the label. Of any other text the whole file is a prompt. The server may have
    other clients: a label reaches the request that has its prompt's and its answer's tokens. The answers are
    greedy, and go to standard output as JSON lines. An API key that is not in the command is taken from the
    variable LLAMA_API_KEY, as llama-server does.

      moetrace drive -f prompts.jsonl --url http://127.0.0.1:8080 --trace t.moet -n 64
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        add_prompts(parser)
        add_option(parser, "--url", default="http://127.0.0.1:8080", help="the server")
        add_option(
            parser, "--trace", metavar="T.moet", help="the trace that moetrace run writes; gets the labels"
        )
        add_option(
            parser, "-np", "--parallel", type=int, metavar="N", help="prompts at once; default: all slots"
        )
        add_option(parser, "-n", "--n-predict", type=int, default=128, metavar="N", help="tokens to generate")
        add_option(
            parser, "--model", metavar="NAME", help="which model, of a server with several (router mode)"
        )
        add_option(
            parser, "--api-key", metavar="KEY", help="of llama-server --api-key; others can see it in ps"
        )
        add_option(parser, "--api-key-file", metavar="FILE", help="a file with the key in its first line")
        add_option(
            parser, "--timeout", type=float, default=600.0, metavar="S", help="seconds to wait for an answer"
        )
        add_option(parser, "-q", "--quiet", action="store_true", help="do not print the answers")

    def run(self, args: argparse.Namespace) -> int:
        """Send them."""
        trace = Path(args.trace) if args.trace else None
        if trace is not None and not is_trace(trace):
            raise UsageError(f"{trace} is no trace", fix="give the folder that `moetrace run -o` writes")
        prompts = needed_prompts(args)
        client = ServerClient(args.url, timeout=args.timeout, api_key=_api_key(args), model=args.model)
        lock = threading.Lock()
        done = 0
        with progress_bar("prompts") as update:

            def on_answer(answer: Answer) -> None:
                nonlocal done
                with lock:
                    if trace is not None:
                        append_labels(trace, [answer.label_line()])
                    done += 1
                    update(done, len(prompts))
                    if not args.quiet:
                        print(json.dumps(_answer_line(answer), ensure_ascii=False), flush=True)

            drive(client, prompts, n_predict=args.n_predict, n_parallel=args.parallel, on_answer=on_answer)
        print(f"{len(prompts)} prompts answered", file=sys.stderr)
        return 0


def _api_key(args: argparse.Namespace) -> str | None:
    if args.api_key:
        return str(args.api_key)
    if args.api_key_file:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8").split()
        except (OSError, ValueError) as e:
            raise UsageError(f"cannot read the API key from {args.api_key_file}", why=str(e)) from None
        if not lines:
            raise UsageError(f"{args.api_key_file} has no API key", fix="write it into the first line")
        return lines[0]
    # llama-server takes several, separated by commas
    return os.environ.get("LLAMA_API_KEY", "").split(",")[0] or None


def _answer_line(answer: Answer) -> dict[str, object]:
    return {
        "id": answer.prompt.id,
        "label": answer.prompt.label,
        "slot": answer.slot,
        "n_prompt": len(answer.prompt_tokens),
        "n_cached": answer.cached,
        "n_generated": answer.n_generated,
        # an old server does not say which
        "tokens": list(answer.tokens) if answer.tokens or answer.n_generated == 0 else None,
        "content": answer.text,
    }
