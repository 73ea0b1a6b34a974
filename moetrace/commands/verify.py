"""``moetrace verify``."""

from __future__ import annotations

import argparse

from moetrace.commands.options import add_option, paint, red
from moetrace.commands.progress import progress_line
from moetrace.printable import printable
from moetrace.trace.verify import verify


class Verify:
    """Check that a trace holds what it promises.

    Every checksum, every sentinel and every count. Exit code 0: fine; 3: something is wrong that
    `moetrace recover` can mend; 4: corrupt.
    """

    passthrough = False

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""
        parser.add_argument("trace", help="a trace folder")
        add_option(parser, "-q", "--quiet", action="store_true", help="print nothing if all is well")

    def run(self, args: argparse.Namespace) -> int:
        """Check, and print what is wrong."""
        with progress_line() as progress:
            result = verify(args.trace, progress)
        for finding in result.findings:
            print(
                red("recoverable" if finding.recoverable else "corrupt")
                + printable(f"  {finding.where}: {finding.what}")
            )
        for text in result.remarks:
            print(f"{paint('note', '33')}  {printable(text)}")
        if result.exit_code == 3:
            print(f"Next: moetrace recover {result.path}")
        elif not result.findings and not args.quiet:
            now = ", and being recorded" if result.live else ""
            print(f"{paint('fine', '32')}  {result.path}: {result.rows:,} rows{now}")
        return result.exit_code
