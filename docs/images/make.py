"""Makes the README's picture of a report: `make report-image`.

Runs ``moetrace report`` on a trace and photographs the page with headless Chromium: its beginning on the left,
the interactive figures on the right. Needs a Chromium (see tests/integration/browser.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "tests" / "integration"))

from browser import Browser, find_chromium

HERE = Path(__file__).parent
WIDTH, HEIGHT, GAP = 900, 1400, 24
AT_MOST = 400_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "report.png")
    args = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        sys.exit("no Chromium found: install one, or set MOETRACE_CHROMIUM")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "moetrace", "report", str(args.trace), "-o", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with Browser(executable, folder / "profile") as browser:
            page = folder / "report.html"
            browser.open(page, f"#domain=code&measure=lift&theme={args.theme}", width=WIDTH, height=4000)
            top = [photograph(browser, folder, 0)]
            start = "document.querySelector('#q-specialists').getBoundingClientRect().top + scrollY - 8"
            top.append(photograph(browser, folder, int(browser.value(start))))
    ground = top[0].getpixel((2, 2))
    picture = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT), ground)  # type: ignore[arg-type]
    for i, part in enumerate(top):
        picture.paste(part, (i * (WIDTH + GAP), 0))
    for colors in (None, 256, 128, 64):
        out = BytesIO()
        (picture.quantize(colors) if colors else picture).save(out, format="PNG", optimize=True)
        if len(out.getvalue()) <= AT_MOST:
            break
    args.output.write_bytes(out.getvalue())
    print(f"Wrote {args.output} ({len(out.getvalue()):,} bytes)")


def photograph(browser: Browser, folder: Path, top: int) -> Image.Image:
    """Give what stands from ``top`` on, one height of the picture."""
    browser.screenshot(folder / "page.png", whole=True)
    with Image.open(folder / "page.png") as whole:
        return whole.convert("RGB").crop((0, top, WIDTH, top + HEIGHT))


if __name__ == "__main__":
    main()
