"""``moetrace show``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

import numpy as np

from moetrace.commands.options import add_option, use_color
from moetrace.commands.selecting import add_choice, open_chosen
from moetrace.errors import UsageError
from moetrace.printable import printable
from moetrace.trace.request_text import RequestText, decoding, request_number, request_text
from moetrace.trace.requests import Phase
from moetrace.trace.trace import open_trace

#: background colours (of 256) that black text is read on, in the order in which they are told apart
_COLOURS = (117, 215, 120, 218, 228, 147, 209, 158, 183, 180, 110, 150)
#: a single expert's tokens: where its weight is more than half of the token's largest, and where less
_MARK, _FAINT, _HALF = 215, 230, 0.5


class Show:
    """Show a request's text, each token coloured by the expert that it used most in a layer.

    The experts used most in the request have a colour each, all others none. With --expert one expert's tokens are
    marked, the more the more weight it had. What the model did not compute (the prompt cache) or what was lost is said
    where it would stand. Where there are no colours, a line for each token: its text, and its experts.

      moetrace show t.moet
      moetrace show t.moet --request code-07 --layer 12
      moetrace show t.moet --request 3 --layer 12 --expert 30
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_option(
            parser, "--request", metavar="ID", help="the client's id, or the number; default: the first"
        )
        add_option(parser, "--layer", type=int, metavar="N", help="default: the one in the middle")
        add_option(parser, "--expert", type=int, metavar="N", help="mark this expert's tokens")
        add_option(parser, "--json", action="store_true", help="print JSON: -1 where there is no expert")
        add_choice(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        with open_chosen(open_trace, args.trace, args) as trace:
            number = request_number(trace, args.request)
            layers = trace.layers.tolist()
            layer = layers[len(layers) // 2] if args.layer is None else args.layer
            text = request_text(trace, number, layer)
            n_expert = dict(zip(layers, trace.n_expert.tolist(), strict=True))[layer]
        if args.expert is not None and not 0 <= args.expert < n_expert:
            raise UsageError(f"there is no expert {args.expert}", fix=f"give 0 to {n_expert - 1}")
        if args.json:
            print(json.dumps(text.to_json()))
            return 0
        name = f"request {number}" + (f" ({printable(text.id)})" if text.id is not None else "")
        label = f", {printable(text.label)}" if text.label is not None else ""
        print(f"{name}{label}: layer {layer}, {len(text.pieces):,} tokens computed")
        if use_color(sys.stdout):
            self._coloured(text, args.expert)
        else:
            self._plain(text)
        return 0

    def _coloured(self, text: RequestText, expert: int | None) -> None:
        experts, present, first = text.chosen()[:, 0], text.present[:, 0], text.first()[:, 0]
        weights = None if text.weights is None else text.weights[:, 0]
        used, count = np.unique(first[first >= 0], return_counts=True)
        most = used[np.argsort(-count, kind="stable")][: len(_COLOURS)].tolist()
        colour = dict(zip(most, _COLOURS, strict=False))
        out: list[str] = []
        before, was_decoding = -1, False
        for i, (piece, position, generated) in enumerate(
            zip(text.pieces, text.positions.tolist(), decoding(text.phase).tolist(), strict=True)
        ):
            if position > before + 1:
                out.append(f"\x1b[2m[{position - before - 1:,} positions not computed or lost]\x1b[0m")
            if generated and not was_decoding:
                out.append("\x1b[2m▸\x1b[0m")
                was_decoding = True
            before = position
            shown = printable(piece, keep="\n")
            if not present[i]:
                out.append(f"\x1b[2;4m{shown}\x1b[0m")
            elif expert is not None:
                mine = np.flatnonzero(experts[i] == expert)
                weight = (
                    1.0 if weights is None or not mine.size else weights[i, mine[0]] / np.nanmax(weights[i])
                )
                out.append(_on(None if not mine.size else _MARK if weight > _HALF else _FAINT, shown))
            else:
                out.append(_on(colour.get(int(first[i])), shown))
        print("".join(out))
        print()
        if expert is None:
            part = dict(zip(used.tolist(), (count / max(count.sum(), 1)).tolist(), strict=True))
            print("  ".join(f"{_on(colour[e], f' {e} ')} {part[e]:.0%}" for e in most))
        else:
            n = int((experts == expert).any(axis=1).sum())
            print(f"{_on(_MARK, f' {expert} ')} used by {n:,} of {int(present.sum()):,} tokens")
        print("\x1b[2m▸ what follows was generated; underlined: not computed in this layer\x1b[0m")

    def _plain(self, text: RequestText) -> None:
        experts = text.chosen()[:, 0].tolist()
        width = min(60, shutil.get_terminal_size().columns // 2)
        for i, piece in enumerate(text.pieces):
            mine = [
                f"{e}" if text.weights is None else f"{e}:{text.weights[i, 0, j]:.3f}"
                for j, e in enumerate(experts[i])
                if e >= 0
            ]
            kind = Phase(min(int(text.phase[i]), 2)).name.lower()
            shown = printable(piece).replace("\t", "\\t")[:width]
            said = " ".join(mine) or "not computed or lost"
            print(f"{text.positions[i]}\t{kind}\t{shown}\t{said}")


def _on(colour: int | None, text: str) -> str:
    """A text on a background, each line by itself, so that no line is filled to its end."""
    if colour is None:
        return text
    lines = text.split("\n")
    return "\n".join(f"\x1b[48;5;{colour}m\x1b[30m{line}\x1b[0m" if line else "" for line in lines)
