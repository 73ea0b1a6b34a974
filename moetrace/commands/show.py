"""``moetrace show``."""

from __future__ import annotations

import argparse
import codecs
import shutil
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moetrace.commands.options import add_option, use_color
from moetrace.commands.selecting import add_choice, open_chosen
from moetrace.errors import UsageError
from moetrace.printable import printable
from moetrace.trace.record import RowFlag
from moetrace.trace.requests import Phase
from moetrace.trace.trace import Trace, open_trace

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
        add_choice(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print it."""
        with open_chosen(open_trace, args.trace, args) as trace:
            number = self._number(trace, args.request)
            layers = trace.layers.tolist()
            layer = layers[len(layers) // 2] if args.layer is None else args.layer
            if layer not in layers:
                raise UsageError(
                    f"there is no layer {layer}", fix=f"choose among: {', '.join(map(str, layers))}"
                )
            at = layers.index(layer)
            if args.expert is not None and not 0 <= args.expert < int(trace.n_expert[at]):
                raise UsageError(
                    f"there is no expert {args.expert}", fix=f"give 0 to {int(trace.n_expert[at]) - 1}"
                )
            rows = trace.sel(request=number, layer=layer)
            keep = np.flatnonzero((np.asarray(rows.flags) & RowFlag.TRIAL) == 0)
            keep = keep[np.argsort(np.asarray(rows.positions)[keep], kind="stable")]
            experts, present = np.asarray(rows.experts)[keep, 0], rows.present[keep, 0]
            weights = np.asarray(rows.weights)[keep, 0] if "weights" in trace.channels else None
            pieces = list(_pieces(trace, np.asarray(rows.token_ids)[keep]))
            phase = np.asarray(rows.phase)[keep]
            positions = np.asarray(rows.positions)[keep]
            said = trace.requests.loc[number]
            name = f"request {number}" + (
                f" ({printable(str(said['id']))})" if said["id"] is not None else ""
            )
            label = f", {printable(str(said['label']))}" if said["label"] is not None else ""
            print(f"{name}{label}: layer {layer}, {len(keep):,} tokens computed")
            first = _first(experts, weights, present)
            if use_color(sys.stdout):
                self._coloured(pieces, first, experts, weights, present, phase, positions, args.expert)
            else:
                self._plain(pieces, experts, weights, present, phase, positions)
        return 0

    def _number(self, trace: Trace, asked: str | None) -> int:
        requests = trace.requests
        if not len(requests):
            raise UsageError(f"{trace.path} has no request", fix="capture something first")
        if asked is None:
            return int(requests.index[0])
        found = requests.index[requests["id"] == asked].tolist()
        if not found and asked.lstrip("-").isdigit() and int(asked) in requests.index:
            found = [int(asked)]
        if not found:
            trace.sel(request=asked)  # says which there are
        return int(found[0])

    def _coloured(
        self,
        pieces: list[str],
        first: NDArray[np.int64],
        experts: NDArray[np.integer],
        weights: NDArray[np.float32] | None,
        present: NDArray[np.bool_],
        phase: NDArray[np.uint8],
        positions: NDArray[np.int32],
        expert: int | None,
    ) -> None:
        used, count = np.unique(first[first >= 0], return_counts=True)
        most = used[np.argsort(-count, kind="stable")][: len(_COLOURS)].tolist()
        colour = dict(zip(most, _COLOURS, strict=False))
        out: list[str] = []
        before, decoding = -1, False
        for i, piece in enumerate(pieces):
            if positions[i] > before + 1:
                out.append(f"\x1b[2m[{positions[i] - before - 1:,} positions not computed or lost]\x1b[0m")
            if phase[i] == Phase.DECODE and not decoding:
                out.append("\x1b[2m▸\x1b[0m")
                decoding = True
            before = int(positions[i])
            shown = printable(piece, keep="\n")
            if not present[i]:
                out.append(f"\x1b[2;4m{shown}\x1b[0m")
            elif expert is not None:
                mine = np.flatnonzero(experts[i] == expert)
                weight = 1.0 if weights is None or not mine.size else weights[i, mine[0]] / weights[i].max()
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

    def _plain(
        self,
        pieces: list[str],
        experts: NDArray[np.integer],
        weights: NDArray[np.float32] | None,
        present: NDArray[np.bool_],
        phase: NDArray[np.uint8],
        positions: NDArray[np.int32],
    ) -> None:
        width = min(60, shutil.get_terminal_size().columns // 2)
        for i, piece in enumerate(pieces):
            if present[i]:
                mine = [
                    str(int(e)) + ("" if weights is None else f":{weights[i, j]:.3f}")
                    for j, e in enumerate(experts[i])
                    if weights is None or weights[i, j] == weights[i, j]
                ]
            else:
                mine = ["not computed or lost"]
            kind = Phase(min(int(phase[i]), 2)).name.lower()
            text = printable(piece).replace("\t", "\\t")[:width]
            print(f"{positions[i]}\t{kind}\t{text}\t{' '.join(mine)}")


def _on(colour: int | None, text: str) -> str:
    """A text on a background, each line by itself, so that no line is filled to its end."""
    if colour is None:
        return text
    lines = text.split("\n")
    return "\n".join(f"\x1b[48;5;{colour}m\x1b[30m{line}\x1b[0m" if line else "" for line in lines)


def _first(
    experts: NDArray[np.integer], weights: NDArray[np.float32] | None, present: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """(n,) the expert of the largest weight, else the router's first; -1 where there is none."""
    best = (
        np.zeros(len(experts), np.int64)
        if weights is None
        else np.nan_to_num(weights, nan=-1.0).argmax(axis=1)
    )
    chosen = np.take_along_axis(experts.astype(np.int64), best[:, None], axis=1)[:, 0]
    return np.where(present, chosen, -1)


def _pieces(trace: Trace, tokens: NDArray[np.int32]) -> Iterator[str]:
    """Each token's text; a character whose bytes are of several tokens stands at the last of them."""
    words = trace.vocabulary
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens.tolist():
        if words is None or not 0 <= token < len(words):
            yield f"<{token}>"
        else:
            yield decoder.decode(words[token])
