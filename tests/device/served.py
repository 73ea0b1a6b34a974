"""What a server says, and what has to hold of its trace."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from identities import check_identity
from running import TEXT, ready_client

import moetrace
from moetrace.host.client import Answer, ServerClient
from moetrace.host.server import free_port
from moetrace.trace.record import State
from moetrace.trace.verify import verify

#: llama-server's words for checks.PLACEMENTS
SERVER_PLACEMENTS = {
    "all": ["-ngl", "99"],
    "part": ["-ngl", "2"],
    "cpu-moe": ["-ngl", "99", "--cpu-moe"],
    "some-experts": ["-ngl", "99", "--n-cpu-moe", "2"],
    "router": ["-ngl", "99", "-ot", r"ffn_gate_inp\.=CPU"],
}


def check_served(path: Path, answers: list[Answer]) -> moetrace.Trace:
    """Each row is its request's, none is lost, only the last layer may be left out, and verify agrees."""
    trace = moetrace.open(path)
    check_identity(trace, answers)
    assert verify(path).exit_code == 0
    assert trace.loss.rows_lost == trace.loss.lost == 0
    state = np.asarray(trace.state)
    assert (state[:, :-1] == State.PRESENT).all()
    left_out = state[:, -1] != State.PRESENT
    if left_out.any():
        np.testing.assert_array_equal(left_out, (np.asarray(trace.column("flags")) & 1) == 0)
    return trace


def check_overlap(trace: moetrace.Trace) -> None:
    """Ubatches had rows of several slots."""
    step, sequence = trace.column("step"), trace.column("sequence")
    assert max(len(set(sequence[step == s])) for s in np.unique(step)) > 1


def answers_of(client: ServerClient, n: int = 6) -> list[Any]:
    """To ``n`` prompts, one at a time, with the probabilities of the likeliest tokens, to the last digit."""
    asked = []
    for i in range(n):
        start, length = 50 * i % 700, 40 + 20 * (i % 7)
        body = {"prompt": TEXT[start : start + length], "n_predict": 8, "temperature": 0.0, "n_probs": 20}
        answer = client.call("/completion", {**body, "cache_prompt": False, "ignore_eos": True, "id_slot": 0})
        asked.append([answer["content"], answer["completion_probabilities"]])
    return asked


def untraced_answers(
    command: list[str | Path], environment: Mapping[str, str] | None = None, n: int = 6
) -> list[Any]:
    """Start the server without the tracer, and ask it."""
    port = free_port()
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return answers_of(ready_client(server, port), n)
    finally:
        server.terminate()
        server.wait(30)
