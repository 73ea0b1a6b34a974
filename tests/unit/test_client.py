"""What different llama-servers answer, taken the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moetrace.host.client import ServerClient, drive
from moetrace.host.prompts import Prompt

#: the parts that differ, of answers to a prompt of 10 tokens of which 6 were cached, with 3 tokens generated
ANSWERS: dict[str, dict[str, Any]] = {
    "November 2024": {"timings": {"prompt_n": 4}, "tokens_evaluated": 10, "tokens_cached": 12},
    "May 2025": {
        "timings": {"prompt_n": 4},
        "tokens_evaluated": 10,
        "tokens_cached": 12,
        "tokens": [7, 8, 9],
    },
    "October 2026": {"timings": {"prompt_n": 4, "cache_n": 6}, "tokens_evaluated": 10, "tokens": [7, 8, 9]},
}


class OneServer(ServerClient):
    """Answers without a server."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__("http://127.0.0.1:1")
        self.answer = answer

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        if path == "/props":
            return {"total_slots": 2}
        assert path == "/completion"
        assert body is not None
        assert "id_slot" not in body, "a named slot may still be answering somebody else"
        return {"content": "xyz", "id_slot": 1, "tokens_predicted": 3, **self.answer}


@pytest.mark.parametrize("release", ANSWERS)
def test_answers_of_all_times(release: str) -> None:
    """GIVEN servers of two years WHEN each answers THEN cached and generated tokens are counted alike."""
    prompt = Prompt(id="a", tokens=tuple(range(10)))
    (answer,) = drive(OneServer(ANSWERS[release]), [prompt])
    assert (answer.cached, answer.n_generated, answer.slot) == (6, 3, 1)
    assert answer.tokens == ((7, 8, 9) if "tokens" in ANSWERS[release] else ())
    line = answer.label_line()
    assert (line["sequence"], line["n_prompt"], line["n_cached"], line["n_generated"]) == (1, 10, 6, 3)
    # what the trace has of it: not what was cached, and not the last token, which is never decoded
    assert line["tokens"] == [6, 7, 8, 9] + ([7, 8] if "tokens" in ANSWERS[release] else [])
