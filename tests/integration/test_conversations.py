"""Turns of conversations on a real server: which requests are one observation. The client is plain HTTP."""

from __future__ import annotations

import http.client
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import start_run

import moetrace
from moetrace.analysis import from_trace
from moetrace.findings import ask

pytestmark = pytest.mark.runtime
WORDS = "stone river seven cloud paper engine violet quiet iron garden"


def post(url: str, body: dict[str, Any]) -> list[int]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    answer: list[int] = json.loads(connection.getresponse().read())["tokens"]
    connection.close()
    return answer


def converse(url: str, order: list[int], slot: int = 0) -> None:
    """Each number is a turn of that conversation: all that was said in it, and some new tokens."""
    rng = np.random.default_rng(5)
    said: dict[int, list[int]] = {}
    for which in order:
        text = said.setdefault(which, []) + rng.integers(20, 250, 24).tolist()
        settings = {
            "n_predict": 6,
            "temperature": 0.0,
            "cache_prompt": True,
            "id_slot": slot,
            "return_tokens": True,
        }
        said[which] = text + post(url, {"prompt": text, "ignore_eos": True, **settings})


@pytest.mark.parametrize("order", ["one by one", "by turns"])
def test_turns_of_a_conversation_are_one_observation(
    order: str, runtime: Any, model_file: Any, tmp_path: Path
) -> None:
    """GIVEN four conversations in one slot WHEN they follow each other THEN each is one observation; WHEN they take
    turns and the server loads what it put aside THEN it is said that it is not known whose text that was.
    """
    path = tmp_path / "t.moet"
    run, client = start_run(runtime, model_file("qwen3moe"), path)
    turns = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3] if order == "one by one" else [0, 1, 2, 3] * 3
    try:
        converse(client.url, turns)
    finally:
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    with moetrace.open(path) as trace:
        assert len(trace.requests) == len(turns)
        n_cached = trace.requests["n_cached"].tolist()
        restored = int((trace.events["event"] == "restore").sum())
        for phase in ("prefill", "decode"):
            routing = from_trace(trace, phase=phase)
            assert routing.n_prompts == len(turns)
            if order == "one by one":
                assert sum(n > 0 for n in n_cached) == 7
                assert len(routing.prompts) == 4
                assert routing.clusters.n_continued == 0
                assert routing.chosen[0].clusters == [routing.prompts[i] for i in turns]
            else:
                assert routing.clusters.n_continued == sum(n > 0 for n in n_cached) == restored > 0
                alone = [i for i, n in enumerate(n_cached) if n > 0]
                names = [routing.chosen[0].clusters[i] for i in alone]
                assert names == [routing.chosen[0].prompts[i] for i in alone]
            assert len(from_trace(trace, phase=phase, group_key="id").prompts) == len(turns)
        caveats = " ".join(ask("overview", trace).caveats)
        assert ("4 independent texts" in caveats) == (order == "one by one")
        assert ("does not say whose it was" in caveats) == (order == "by turns")
