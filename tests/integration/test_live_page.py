"""The live page in a real browser, with names and words that others chose to harm.

Skipped, saying so, where there is no Chromium (set MOETRACE_CHROMIUM to one).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_chromium

import moetrace
from moetrace.trace.store import write_vocabulary

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import traces
from rings import make_layout

pytest.importorskip("moetrace.live.service")
from serving import Served

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found (set MOETRACE_CHROMIUM)")
    with Browser(executable, tmp_path_factory.mktemp("profile"), allowed=True) as started:
        yield started


def until(browser: Browser, expression: str) -> Any:
    """Wait until an expression is true; gives its value."""
    end = time.monotonic() + 30
    while not (value := browser.value(expression)):
        assert time.monotonic() < end, (expression, browser.errors)
        time.sleep(0.1)
    return value


@pytest.mark.parametrize("token", [None, "s3cret"])
def test_the_live_page_shows_a_recording(browser: Browser, tmp_path: Path, token: str | None) -> None:
    path = traces.labelled_trace(
        tmp_path / "t.moet", (HOSTILE, "math"), layout=make_layout(layers=tuple(range(4)), n_expert=16)
    )
    write_vocabulary(path, [f"{HOSTILE} {i}".encode() for i in range(12)])
    served = Served(path, token=token)
    browser.errors.clear()
    browser.requests.clear()
    try:
        browser.size(390, 900)  # a phone's
        address = f"http://127.0.0.1:{served.port}/" + (f"?token={token}" if token else "")
        browser.call("Page.navigate", url=address)
        until(browser, "Number(document.getElementById('total')?.textContent)")
        assert not any("/requests" in url for url in browser.requests)  # nobody asked to see one
        browser.value("document.querySelector('#texts summary').click()")
        until(browser, "document.querySelectorAll('#text [data-token]').length")
        assert browser.value("document.title") == "moetrace live"
        assert browser.value("document.querySelectorAll('img, main script, #text script').length") == 0
        assert HOSTILE in browser.value("document.getElementById('domains').textContent")
        assert browser.value("document.documentElement.scrollWidth") <= 390
        with moetrace.open(path) as trace:
            first = int(trace.requests.index[-1])  # the latest is listed first
            assert int(browser.value("document.getElementById('request').value")) == first
            real = len(trace)
            layer = int(trace.layers[2])
            rows = trace.sel(request=first, layer=layer)
            order = np.argsort(rows.positions, kind="stable")
            used = rows.experts[order, 0]
        assert browser.value("document.getElementById('total').textContent") == f"{real:,}"
        tokens = browser.value("document.querySelectorAll('#text [data-token]').length")
        assert tokens == len(used)
        browser.screenshot(tmp_path / "phone.png", whole=True)
        # one expert's tokens alone
        browser.value("document.querySelector('#text .legend button').click()")
        expert = int(browser.value("document.querySelector('#text .legend button').textContent"))
        marked = browser.value(
            "[...document.querySelectorAll('#text [data-token]')].map((e) => !!e.style.background)"
        )
        assert marked == (used == expert).any(axis=1).tolist()
    finally:
        browser.call("Page.navigate", url="about:blank")
        served.close()
    assert browser.errors == []
    asked = [url for url in browser.requests if not url.startswith(("about:", address.split("?")[0]))]
    assert asked == []
