"""What a server says, to the last digit: to compare one that is traced with one that is not."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from running import TEXT, ready_client

from moetrace.host.client import ServerClient
from moetrace.host.server import free_port


def answers_of(client: ServerClient, n: int = 6) -> list[Any]:
    """What the server says to ``n`` prompts, one at a time, with the probabilities of the likeliest tokens."""
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
