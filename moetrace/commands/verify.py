"""``moetrace verify``."""

from __future__ import annotations

import argparse
import dataclasses
import json

from moetrace.commands.options import add_option, paint, red, typed
from moetrace.commands.progress import progress_line
from moetrace.printable import printable
from moetrace.trace.verify import verify


class Verify:
    """Check that a trace holds what it promises.

    Every checksum, every sentinel and every count, of all contexts; that the experts are those with the highest
    scores, and that the scores follow from the router's logits, where these were captured. Exit code 0: fine; 1: it
    holds nothing; 3: something is wrong that `moetrace recover` can mend; 4: corrupt. A note is no damage.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_option(parser, "--json", action="store_true", help="print JSON")
        add_option(parser, "-q", "--quiet", action="store_true", help="print nothing if all is well")

    def run(self, args: argparse.Namespace) -> int:
        """Check, and print what is wrong."""
        with progress_line() as progress:
            result = verify(args.trace, progress)
        if args.json:
            shown = {**dataclasses.asdict(result), "path": str(result.path), "exit_code": result.exit_code}
            print(json.dumps(shown, indent=1))
            return result.exit_code
        for finding in result.findings:
            print(
                red("recoverable" if finding.recoverable else "corrupt")
                + printable(f"  {finding.where}: {finding.what}")
            )
        for text in result.remarks:
            print(f"{paint('note', '33')}  {printable(text)}")
        if result.exit_code == 3:
            print(f"Next: {typed()} recover {result.path}")
        elif result.empty:
            print(f"{red('empty')}  {result.path} holds nothing: {result.empty}")
        elif not result.findings and not args.quiet:
            now = ", and being recorded" if result.live else ""
            models = f" of {result.models} models" if result.models > 1 else ""
            several = f" in {result.contexts} contexts{models}" if result.contexts > 1 else ""
            print(f"{paint('fine', '32')}  {result.path}: {result.rows:,} rows{several}{now}")
        return result.exit_code
