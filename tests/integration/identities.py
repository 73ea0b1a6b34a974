"""Whether every row of a served trace is its request's, held against what the client sent and got."""

from __future__ import annotations

import numpy as np
from running import TEXT

import moetrace
from moetrace.host.client import Answer
from moetrace.host.prompts import Prompt
from moetrace.trace.record import RowFlag


def prompts_of_mixed_length(n: int, seed: int = 0) -> list[Prompt]:
    """Short and long ones, some the same, some beginning alike, with different numbers of tokens to generate."""
    random = np.random.default_rng(seed)
    prompts = []
    for i in range(n):
        start = int(random.integers(0, len(TEXT) - 10))
        length = int(random.choice([5, 40, 200, 600]))
        text = "The same beginning. " * (i % 3) + TEXT[start : start + length]
        if i % 4 == 3:
            text = "Exactly the same prompt in several slots at once."
        prompts.append(
            Prompt(id=f"p{i}", text=text, label="abc"[i % 3], n_predict=int(random.integers(1, 20)))
        )
    return prompts


def check_identity(trace: moetrace.Trace, answers: list[Answer]) -> None:
    """For every request, the rows in position order are exactly the tokens that the server reports."""
    requests = trace.requests
    token, position = trace.column("token"), trace.column("position")
    request, sequence, phase = trace.column("request"), trace.column("sequence"), trace.column("phase")
    flags = trace.column("flags")
    assert not (flags & (RowFlag.SEQUENCE_UNCERTAIN | RowFlag.UNIDENTIFIED)).any()
    assert sorted(requests["id"].dropna()) == sorted(answer.prompt.id for answer in answers)
    assert len(requests) == len(answers), "rows of something that was no request"
    for answer in answers:
        (number,) = requests.index[requests["id"] == answer.prompt.id]
        said = requests.loc[number]
        rows = np.flatnonzero(request == number)
        rows = rows[np.argsort(position[rows], kind="stable")]
        # the last generated token is never decoded
        expected = [*answer.prompt_tokens, *answer.tokens[:-1]]
        assert said["n_cached"] == answer.cached
        np.testing.assert_array_equal(position[rows], np.arange(answer.cached, len(expected)))
        np.testing.assert_array_equal(token[rows], expected[answer.cached :])
        assert (sequence[rows] == answer.slot).all()
        assert said["slot"] == answer.slot
        assert said["n_prompt"] == len(answer.prompt_tokens)
        assert said["n_generated"] == answer.n_generated == len(answer.tokens)
        assert said["label"] == answer.prompt.label
        np.testing.assert_array_equal(phase[rows], (position[rows] >= len(answer.prompt_tokens)).astype(int))


def last_tokens(trace: moetrace.Trace, number: int) -> list[int]:
    """The tokens that stand at the end of a request: of several rows at one position the last one counts."""
    rows = np.flatnonzero(trace.column("request") == number)
    token, position = trace.column("token")[rows], trace.column("position")[rows]
    standing = dict(zip(position.tolist(), token.tolist(), strict=True))
    return [standing[p] for p in sorted(standing)]
