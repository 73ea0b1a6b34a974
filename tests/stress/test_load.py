"""A server under load: eight clients, requests cut short, context shifts, slots used again and again.

The same load goes to a plain server first: what its memory does is what the traced one's is held against.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from running import TEXT, ready_client

import moetrace
from moetrace.host.client import Answer, ServerClient, drive
from moetrace.host.prompts import Prompt
from moetrace.host.server import free_port
from moetrace.trace.labels import append_labels
from moetrace.trace.record import RowFlag
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.stress, pytest.mark.runtime, pytest.mark.timeout(3600)]

N_CLIENTS = 8
SLOT_CONTEXT = 256
ARGUMENTS = [
    "-np", str(N_CLIENTS), "-c", str(N_CLIENTS * SLOT_CONTEXT), "-no-kvu", "--context-shift", "-t", "1",
    "--cache-ram", "0",  # llama-server's own store of prompts grows by design
]  # fmt: skip
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@dataclass
class Load:
    """What the clients did."""

    answers: list[Answer] = field(default_factory=list)
    shifted: list[Answer] = field(default_factory=list)  # generated beyond their context
    n_cancelled: int = 0
    n_received: int = 0  # tokens of the cancelled
    memory: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)  # by process: see growth
    lock: threading.Lock = field(default_factory=threading.Lock)


def cancel(client: ServerClient, slot: int, text: str, n_tokens: int) -> int:
    """Ask for a long answer and hang up after so many of its tokens; gives how many came."""
    host, _, port = client.url.removeprefix("http://").partition(":")
    body = {**GREEDY, "prompt": text, "n_predict": 200, "id_slot": slot, "stream": True}
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    try:
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        n = 0
        if n_tokens:
            answer = connection.getresponse()
            assert answer.status == 200
            while n < n_tokens and (line := answer.readline()):
                n += line.startswith(b"data: ")
        return n
    finally:
        connection.close()


def wait_idle(client: ServerClient, slot: int) -> None:
    """Wait until the server has noticed that nobody listens: its task must not be taken for the next one."""
    deadline = time.monotonic() + 60
    while any(s["id"] == slot and s["is_processing"] for s in client.call("/slots")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def one_client(client: ServerClient, slot: int, until: float, load: Load) -> None:
    random = np.random.default_rng(slot)
    number = 0
    while time.monotonic() < until:
        number += 1
        start = int(random.integers(0, len(TEXT) - 220))
        text = ("The same beginning. " * (number % 3)) + TEXT[start : start + int(random.integers(5, 200))]
        kind = random.choice(["answer", "answer", "answer", "cancel", "cancel early", "shift"])
        if kind.startswith("cancel"):
            n = cancel(client, slot, text, int(random.integers(1, 40)) if kind == "cancel" else 0)
            with load.lock:
                load.n_cancelled += 1
                load.n_received += n
            if kind == "cancel early":
                time.sleep(0.02)  # it may not have been seen yet
            wait_idle(client, slot)
            continue
        n_predict = int(random.integers(1, 30)) if kind == "answer" else SLOT_CONTEXT + 60
        prompt = Prompt(id=f"{slot}-{number}", text=text, n_predict=n_predict)
        # pinned to the slot: `drive` with one client would take slot 0
        answer = ask(client, prompt, slot)
        with load.lock:
            (load.answers if kind == "answer" else load.shifted).append(answer)


def ask(client: ServerClient, prompt: Prompt, slot: int) -> Answer:
    tokens = client.prompt_tokens(prompt)
    body = {**GREEDY, "prompt": tokens, "n_predict": prompt.n_predict, "id_slot": slot, "return_tokens": True}
    begin = time.monotonic_ns()
    answer = client.call("/completion", body)
    end = time.monotonic_ns()
    generated = tuple(answer["tokens"])
    cached = answer["timings"]["cache_n"]
    return Answer(
        prompt, slot, begin, end, tuple(tokens), generated, len(generated), answer["content"], cached
    )


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process that are in memory: its own, and all. Pages of files come and go with the page cache."""
    status = Path(f"/proc/{pid}/status").read_text()
    own, whole = (1024 * int(status.partition(name)[2].split()[0]) for name in ("RssAnon:", "VmRSS:"))
    return own, whole


def put_under_load(client: ServerClient, seconds: float, pids: dict[str, int]) -> Load:
    load = Load()
    began = time.monotonic()
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        futures = [pool.submit(one_client, client, slot, began + seconds, load) for slot in range(N_CLIENTS)]
        while not all(f.done() for f in futures):
            for name, pid in pids.items():
                load.memory.setdefault(name, []).append((time.monotonic() - began, *resident(pid)))
            time.sleep(0.2)
        for f in futures:
            f.result()
    for slot in range(N_CLIENTS):
        wait_idle(client, slot)
    return load


def growth(samples: list[tuple[float, int, int]]) -> float:
    """How much larger the process itself made its resident size from the second quarter to the last, as a share.

    Samples are (seconds, own bytes, all bytes). The first quarter is for warming up.
    """
    seconds, own, whole = np.array(samples).T
    quarter = np.minimum((4 * seconds / seconds[-1]).astype(int), 3)
    before, after = (np.median(own[quarter == q]) for q in (1, 3))
    return float((after - before) / np.median(whole[quarter == 1]))


def answers_alone(client: ServerClient) -> list[str]:
    """Greedy answers one at a time, in a KV cache that is as empty as at the start."""
    for slot in range(N_CLIENTS):
        client.call(f"/slots/{slot}?action=erase", {})
    prompts = [Prompt(id=f"alone{i}", text=TEXT[40 * i : 40 * i + 30 + 7 * i]) for i in range(12)]
    settings = {**GREEDY, "cache_prompt": False}
    return [a.text for a in drive(client, prompts, n_predict=24, n_parallel=1, settings=settings)]


@contextlib.contextmanager
def running(
    command: list[str | Path], log: Path, port: int
) -> Iterator[tuple[subprocess.Popen[bytes], ServerClient]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield process, ready_client(process, port, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_load(
    size: Callable[[str], int], figures: Callable[..., None], runtime, model_file, tmp_path: Path
) -> None:
    """GIVEN eight busy clients WHEN a server is traced THEN every row is counted and its memory stays as it is."""
    seconds = size("load_seconds")
    port = free_port()
    server = [runtime.tool("llama-server"), "-m", model_file("qwen3moe"), "--port", str(port), *ARGUMENTS]
    server += ["--slot-save-path", tmp_path]  # or slots cannot be erased

    with running(server, tmp_path / "plain.log", port) as (process, client):
        texts = answers_alone(client)
        plain = put_under_load(client, seconds, {"server": process.pid})
        assert answers_alone(client) == texts
    assert len(set(texts)) > 10

    path = tmp_path / "t.moet"
    command = [sys.executable, "-m", "moetrace", "run", "-o", path, "--", *server]
    with running(command, tmp_path / "traced.log", port) as (process, client):
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert answers_alone(client) == texts
        first = time.monotonic_ns()
        load = put_under_load(client, seconds, {"server": int(child), "drain": process.pid})
        last = time.monotonic_ns()
        assert answers_alone(client) == texts
        append_labels(path, [answer.label_line() for answer in load.answers + load.shifted])
    assert process.returncode == 0

    check_counts(path, load, first, last)
    changes = {name: growth(samples) for name, samples in load.memory.items()}
    before = growth(plain.memory["server"])
    figures(
        "load",
        **{
            f"{N_CLIENTS} clients for {seconds} s": f"{len(load.answers):,} requests answered,"
            f" {len(load.shifted):,} beyond their context, {load.n_cancelled:,} cut off; rows exact, text the same",
            "growth of memory": f"server {changes['server']:+.2%} (untraced {before:+.2%}),"
            f" drain {changes['drain']:+.2%}",
        },
    )
    assert changes["server"] - max(before, 0) < 0.02
    assert changes["drain"] < 0.02


def check_counts(path: Path, load: Load, first: int, last: int) -> None:
    """Every answered request has exactly its rows, every other one was cancelled, and the ledger adds up."""
    assert verify(path).exit_code == 0
    with moetrace.open(path) as trace:
        assert trace.loss.rows_lost == trace.loss.lost == 0
        assert trace.loss.rows == trace.loss.rows_produced
        flags = trace.column("flags")
        assert not (flags & (RowFlag.SEQUENCE_UNCERTAIN | RowFlag.UNIDENTIFIED)).any()
        requests = trace.requests
        during = requests[(requests["start_ns"] >= first) & (requests["start_ns"] <= last)]
        answered = load.answers + load.shifted
        assert set(during["id"].dropna()) == {answer.prompt.id for answer in answered}
        request, token, position = (trace.column(name) for name in ("request", "token", "position"))
        order = np.argsort(request, kind="stable")
        starts = np.searchsorted(request[order], np.arange(len(requests) + 1))
        numbers: dict[str, int] = {}
        for answer in answered:
            tokens = [*answer.prompt_tokens, *answer.tokens][answer.cached : -1]
            # a task whose client hung up at once may be taken by the server late, while the slot's next client waits
            candidates = during.index[during["id"] == answer.prompt.id]
            assert len(candidates)
            rows_of = {n: order[starts[n] : starts[n + 1]] for n in candidates}
            (number,) = (n for n, rows in rows_of.items() if token[rows].tolist() == tokens)
            numbers[answer.prompt.id] = number
            rows = rows_of[number]
            said = requests.loc[number]
            assert (said["slot"], said["n_cached"]) == (answer.slot, answer.cached)
            n_ahead = len(answer.prompt_tokens) + answer.n_generated - 1
            if n_ahead <= SLOT_CONTEXT:
                np.testing.assert_array_equal(position[rows], np.arange(answer.cached, n_ahead))
                assert said["n_shifts"] == 0
            else:
                assert said["n_shifts"] > 0
                assert position[rows].max() < SLOT_CONTEXT
        cancelled = during[~during.index.isin(numbers.values())]
        assert len(cancelled) <= load.n_cancelled
        assert cancelled["n_decode"].sum() >= load.n_received - len(
            cancelled
        )  # the last token is not decoded
        assert requests.loc[[numbers[a.prompt.id] for a in load.shifted], "n_shifts"].min() > 0
        # nothing but requests and what llama.cpp runs for itself
        assert (request < 0).sum() == ((flags & RowFlag.TRIAL) != 0).sum()
