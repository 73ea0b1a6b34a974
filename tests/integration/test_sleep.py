"""A server whose model sleeps and wakes is one recording: its rows, its switches and its slots outlive a sleep.

The client is plain HTTP, and keeps the token ids that it sent and got.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import GREEDY, Request, ask, moetrace_command, rows_of, serving
from identities import last_tokens

import moetrace
from moetrace import data
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

SLEEPS = ["--sleep-idle-seconds", "1"]


@dataclass
class Sleeper:
    """A client of a server that falls asleep; each of its requests has tokens that no other has."""

    port: int
    sent: dict[str, Request] = field(default_factory=dict)
    n_lives: int = 1
    _random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def words(self, n: int) -> list[int]:
        return [int(t) for t in self._random.integers(3, 300, n)]

    def complete(self, name: str, prompt: list[int] | None = None, n: int = 6, **more: Any) -> Request:
        prompt = self.words(20) if prompt is None else prompt
        answer = ask(self.port, "/completion", {**GREEDY, "prompt": prompt, "n_predict": n, **more})
        one = Request(prompt, answer["tokens"], answer["id_slot"], answer["timings"]["cache_n"])
        self.sent[name] = one
        return one

    def sleep(self) -> None:
        """Wait until it has fallen asleep; what is asked for next wakes it."""
        deadline = time.monotonic() + 30
        while not ask(self.port, "/props")["is_sleeping"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.n_lives += 1


def hang_up(port: int, prompt: list[int]) -> None:
    """Ask a server that sleeps, and be gone before it is awake."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({**GREEDY, "prompt": prompt, "n_predict": 400, "stream": True})
    connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
    time.sleep(0.02)
    connection.close()


@pytest.fixture(scope="module")
def slept(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sleeper, moetrace.Trace]]:
    """A server that slept and woke while it was stopped, started and intervened on."""
    folder = tmp_path_factory.mktemp("sleep")
    path = folder / "t.moet"
    arguments = ["-m", data.demo_model(), "-np", "2", "-c", "512", "-no-kvu", "--context-shift", *SLEEPS]

    def tell(word: str, *more: str) -> None:
        result = moetrace_command(word, path, *more)
        assert result.returncode == 0, result.stderr

    with serving(runtime, path, *arguments, "--slot-save-path", folder) as port:
        client = Sleeper(port)
        saved = client.complete("first", id_slot=0)
        ask(port, "/slots/0?action=save", {"filename": "s.bin"})
        client.sleep()
        tell("stop")  # asleep
        client.complete("unrecorded 1")
        client.sleep()
        client.complete("unrecorded 2")
        tell("start")
        client.complete("recorded")
        tell("intervene", "ablate:*:0-3@slot=0")
        client.complete("intervened 1", id_slot=0, cache_prompt=False)
        client.sleep()
        ask(port, "/slots/1?action=restore", {"filename": "s.bin"})
        client.complete("restored", [*saved.prompt, *saved.tokens, *client.words(5)], id_slot=1)
        client.complete("intervened 2", id_slot=0, cache_prompt=False)
        client.sleep()
        tell("intervene", "off")  # asleep
        client.complete("alone", id_slot=0, cache_prompt=False)
        client.complete("shifted", n=300, id_slot=1)
        client.sleep()
        hang_up(port, client.words(30))
        client.complete("last")
    with moetrace.open(path) as trace:
        yield client, trace


def numbers_of(client: Sleeper, trace: moetrace.Trace) -> dict[str, int]:
    """The request of the trace that has exactly a request's rows, for each that has one."""
    rows = rows_of(trace)
    found = {}
    for name, one in client.sent.items():
        same = [n for n in rows if trace.requests.loc[n, "slot"] == one.slot and rows[n] == one.rows]
        assert len(same) <= 1, name
        if same:
            found[name] = same[0]
    return found


def test_each_request_has_its_rows_in_one_story(slept: tuple[Sleeper, moetrace.Trace]) -> None:
    client, trace = slept
    found = numbers_of(client, trace)
    stopped = {"unrecorded 1", "unrecorded 2"}
    assert set(client.sent) - set(found) <= {*stopped, "shifted"}
    assert not stopped & set(found)
    assert trace.contexts == ("ctx0",)
    assert (
        0 <= trace.counters["contexts"] - client.n_lives <= 2
    )  # a busy machine may let it fall asleep once more
    assert trace.requests.index.tolist() == list(range(len(trace.requests)))
    for name, number in found.items():
        one, said = client.sent[name], trace.requests.loc[number]
        assert (said["n_cached"], said["n_prefill"]) == (one.cached, len(one.prompt) - one.cached), name
        assert (said["n_lost"], said["n_rejected"], said["n_shifts"]) == (0, 0, 0), name
    assert client.sent["restored"].cached > 20
    result = verify(trace.path)
    assert (result.exit_code, result.remarks) == (0, ())


def test_what_was_not_to_be_recorded_is_not_here(slept: tuple[Sleeper, moetrace.Trace]) -> None:
    client, trace = slept
    token = trace.token_ids.tolist()
    for name in ("unrecorded 1", "unrecorded 2"):
        prompt = client.sent[name].prompt
        assert not any(token[i : i + 5] == prompt[:5] for i in range(len(token)))
    assert trace.loss.complete


def test_an_intervention_outlives_a_sleep_and_ends_in_one(slept: tuple[Sleeper, moetrace.Trace]) -> None:
    client, trace = slept
    request, experts = np.asarray(trace.request), np.asarray(trace.experts)
    for name, number in numbers_of(client, trace).items():
        mine = request == number
        assert (
            trace.intervened[mine].all() == trace.intervened[mine].any() == name.startswith("intervened")
        ), name
        assert not (name.startswith("intervened") and (experts[mine] < 4).any()), name
    assert len(trace.interventions) == 1


def test_shifts_after_waking_are_counted(slept: tuple[Sleeper, moetrace.Trace]) -> None:
    client, trace = slept
    requests = trace.requests
    (number,) = requests.index[requests["n_decode"] == 299]
    assert requests.loc[number, "n_shifts"] > 0
    assert requests["n_shifts"].sum() == requests.loc[number, "n_shifts"]
    one = client.sent["shifted"]
    assert rows_of(trace)[number] != one.rows  # positions moved under it
    assert trace.token_ids[np.asarray(trace.request) == number].tolist() == one.rows


@pytest.mark.parametrize("draft", ["olmoe", "qwen3moe"])
def test_drafts_after_waking_belong_to_their_requests(
    draft: str, runtime: Any, model_file: Any, tmp_path: Path
) -> None:
    """The draft model's context goes with the main one's, and comes back with it."""
    path = tmp_path / "t.moet"
    arguments = ["-m", model_file("olmoe"), "-np", "2", "-c", "2048", "--spec-draft-n-max", "4"]
    arguments += ["-md", model_file(draft), "--spec-type", "draft-simple", *SLEEPS]
    with serving(runtime, path, *arguments) as port:
        client = Sleeper(port)
        for life in range(3):
            names = [f"{life} {i}" for i in range(3)]
            threads = [
                threading.Thread(target=client.complete, args=(name, client.words(25), 16)) for name in names
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if life < 2:
                client.sleep()
    assert verify(path).exit_code == 0
    with moetrace.open(path) as trace:
        parts = {trace.in_context(name).facts["role"]: trace.in_context(name) for name in trace.contexts}
        assert set(parts) == {"main", "draft"}
        for part in parts.values():
            assert part.counters["contexts"] == 3
            assert len(part.requests) == len(client.sent) == 9
        main = parts["main"]
        texts = [tuple(last_tokens(main, n)) for n in main.requests.index]
        for one in client.sent.values():
            # the last batch may reach beyond what was asked for
            assert sum(text[: len(one.rows)] == tuple(one.rows) for text in texts) == 1
        drafted = parts["draft"].requests
        assert (drafted["n_shifts"] == 0).all()
        prompts = {tuple(one.prompt) for one in client.sent.values()}
        assert {tuple(last_tokens(parts["draft"], n)[:25]) for n in drafted.index} == prompts
