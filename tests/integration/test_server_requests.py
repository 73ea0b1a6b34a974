"""Requests of a real server whose story is told with gaps: lost events, pauses; and phases of what is no answer.

The referee is the HTTP client: it knows which tokens it sent and got.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from running import TEXT, child_of, start_run

import moetrace
from moetrace.host.client import ServerClient
from moetrace.host.resume import ResumedRecording
from moetrace.trace.ring import live_rings
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime


def body_of(prompt: str, n: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": n,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "id_slot": 0,
        "return_tokens": True,
        **more,
    }


def stream(client: ServerClient, body: dict[str, Any]) -> Iterator[list[int]]:
    """Give the tokens of an answer as they come."""
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=60)
    connection.request(
        "POST", "/completion", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    )
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            said = json.loads(line[6:])
            if not said.get("stop"):
                yield said["tokens"]
    connection.close()


def text_of(client: ServerClient, body: dict[str, Any], tokens: list[int]) -> list[int]:
    """What was computed for it: the last token is never decoded."""
    return [*client.tokenize(body["prompt"]), *tokens][:-1]


def check(trace: moetrace.Trace, texts: list[list[int]], n_prompts: list[int]) -> None:
    """Each request's rows are tokens of its text at their positions, and its phases those of the text.

    Nothing is a row of two of them: the texts differ everywhere that matters, from their first token on.
    """
    assert len(trace.requests) == len(texts)
    request, position, token = (trace.column(name) for name in ("request", "position", "token"))
    for number, text, n_prompt in zip(trace.requests.index, texts, n_prompts, strict=True):
        rows = request == number
        np.testing.assert_array_equal(token[rows], np.array(text)[position[rows]])
        np.testing.assert_array_equal(trace.phase[rows], position[rows] >= n_prompt)


@pytest.mark.parametrize("policy", ["block", "drop"])
def test_a_request_that_began_while_the_recorder_stood_still(policy, runtime, model_file, tmp_path):
    """GIVEN a ring that fills while nobody reads WHEN one request ends and another begins in its slot THEN the rows
    that are there are the right one's, and it is said what is not known.
    """
    path = tmp_path / "t.moet"
    options = ["--ring-size", "64KiB", "--on-full", policy, "--block-ms", "100"]
    run, client = start_run(runtime, model_file("qwen3moe"), path, *options)
    bodies = [body_of(TEXT[:60], 700), body_of("1 + 1 = 2. " + TEXT[200:240], 900), body_of("The end.", 5)]
    answers: list[list[int]] = []
    try:
        for i, body in enumerate(bodies):
            answers.append([])
            if i == 0:
                os.kill(run.pid, signal.SIGSTOP)  # the recorder alone: the server goes on
            for tokens in stream(client, body):
                answers[-1] += tokens
                if i == 1 and len(answers[1]) >= 100:
                    os.kill(run.pid, signal.SIGCONT)
        texts = [text_of(client, *pair) for pair in zip(bodies, answers, strict=True)]
        n_prompts = [len(client.tokenize(body["prompt"])) for body in bodies]
    finally:
        os.kill(run.pid, signal.SIGCONT)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    trace = moetrace.open(path)
    check(trace, texts, n_prompts)
    requests = trace.requests
    assert trace.loss.events_lost > 0
    assert not trace.loss.complete
    assert requests["n_events_lost"].tolist() == [0, trace.loss.events_lost, 0]
    assert requests["n_cached"].isna().tolist() == [False, True, False]
    assert requests["n_prompt"].isna().tolist() == [False, True, False]
    assert "events lost" in path.with_suffix(".err").read_text()
    result = verify(path)
    assert result.findings == ()
    assert "lost" in result.remarks[0]


def test_resuming_after_events_were_lost(runtime, model_file, tmp_path):
    """GIVEN a recorder that was killed, and a ring that then filled WHEN resumed in a later request THEN its rows are
    its own.
    """
    path = tmp_path / "t.moet"
    options = ["--ring-size", "64KiB", "--block-ms", "100"]
    run, client = start_run(runtime, model_file("qwen3moe"), path, *options)
    server = child_of(run.pid)
    bodies = [body_of(TEXT[:60], 1600), body_of("1 + 1 = 2. " + TEXT[200:240], 900)]
    answers: list[list[int]] = [[], []]
    resumed = None
    try:
        for tokens in stream(client, bodies[0]):
            if not answers[0]:
                run.kill()
                run.wait()
            answers[0] += tokens
        for tokens in stream(client, bodies[1]):
            if resumed is None:
                resumed = ResumedRecording(path)  # as `moetrace resume` does
            answers[1] += tokens
        texts = [text_of(client, *pair) for pair in zip(bodies, answers, strict=True)]
        n_prompts = [len(client.tokenize(body["prompt"])) for body in bodies]
    finally:
        os.kill(server, signal.SIGTERM)
    assert resumed is not None
    resumed.wait()
    resumed.finish()
    trace = moetrace.open(path)
    check(trace, texts, n_prompts)
    assert trace.requests["n_events_lost"].tolist()[0] == 0
    assert trace.requests["n_events_lost"].tolist()[1] == trace.loss.events_lost > 0
    assert verify(path).findings == ()


def test_recording_that_is_switched_on_within_a_request(runtime, model_file, tmp_path):
    """Of the first request the beginning is not recorded, of the second a piece in the middle; the third is whole."""
    path = tmp_path / "t.moet"
    run, client = start_run(runtime, model_file("qwen3moe"), path, "--paused")

    def pause(paused: bool) -> None:
        for ring in live_rings(path):
            ring.paused = paused

    bodies = [body_of(TEXT[:60], 900), body_of("1 + 1 = 2. " + TEXT[200:240], 900), body_of("The end.", 5)]
    answers: list[list[int]] = []
    try:
        for i, body in enumerate(bodies):
            answers.append([])
            for tokens in stream(client, body):
                if i == 0 and not answers[0]:
                    pause(False)
                if i == 1 and len(answers[1]) in (100, 200):
                    pause(len(answers[1]) == 100)
                answers[-1] += tokens
        texts = [text_of(client, *pair) for pair in zip(bodies, answers, strict=True)]
        n_prompts = [len(client.tokenize(body["prompt"])) for body in bodies]
    finally:
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    trace = moetrace.open(path)
    check(trace, texts, n_prompts)
    requests = trace.requests
    position, request = trace.column("position"), trace.column("request")
    assert requests["n_cached"].isna().tolist() == [True, False, False]
    assert requests["n_prompt"].isna().tolist() == [True, True, False]
    assert requests["n_prefill"].tolist() == [0, *n_prompts[1:]]
    skipped = [
        len(text) - np.count_nonzero(request == n) for n, text in zip(requests.index, texts, strict=True)
    ]
    assert requests["n_unrecorded"].tolist() == [0, skipped[1], 0]
    assert position[request == requests.index[0]].min() == skipped[0] > 0
    assert skipped[1] > 0
    assert not requests["n_events_lost"].any()
    assert trace.loss.complete  # what was not to be recorded is no loss
    assert verify(path).findings == ()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_prefill(pooling, runtime, model_file, tmp_path):
    """In several batches, and each row an output of its own."""
    path = tmp_path / "t.moet"
    batch = ["-b", "32", "-ub", "32"] if pooling == "last" else ["-b", "256", "-ub", "256"]
    with moetrace.serve(
        model_file("qwen3moe"),
        output=path,
        arguments=["-np", "1", "-c", "1024", "-t", "1", "--embeddings", "--pooling", pooling, *batch],
        program=str(runtime.tool("llama-server")),
    ) as server:
        sizes = []
        for n in (20, 300):
            tokens = server.client.tokenize(TEXT[:n])
            server.client.call("/embedding", {"content": tokens})
            sizes.append(len(tokens))
    requests = moetrace.open(path).requests
    assert requests[["n_prompt", "n_prefill", "n_decode"]].values.tolist() == [[n, n, 0] for n in sizes]


def test_prompts_of_outputs_are_prefill(model_file, tmp_path):
    """Captured with all outputs, in several batches: what was generated is decode, and nothing else."""
    script = (
        "import moetrace, sys\n"
        "moetrace.capture(sys.argv[1], [sys.argv[3], sys.argv[3][50:]], sys.argv[2], n_predict=4, n_batch=40,"
        " n_parallel=2, all_outputs=True, n_threads=1)\n"
    )
    path = tmp_path / "t.moet"
    subprocess.run([sys.executable, "-c", script, model_file("qwen3moe"), path, TEXT[:300]], check=True)
    trace = moetrace.open(path)
    requests = trace.requests
    assert (trace.column("flags") & 1).all()
    assert requests["n_prompt"].min() > 40
    assert requests["n_prefill"].tolist() == requests["n_prompt"].tolist()
    assert requests["n_decode"].tolist() == [3, 3]


@pytest.mark.parametrize("name", ["granitehybrid", "olmoe"])
def test_rejected_drafts_are_those_that_the_server_counts(name, runtime, model_file, tmp_path):
    """A hybrid model computes accepted drafts again, once its state is restored: they were not rejected."""
    path = tmp_path / "t.moet"
    ngram = ["--spec-type", "ngram-simple", "--spec-draft-n-max", "6"]
    sizes = ["--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "6"]
    said = []
    with moetrace.serve(
        model_file(name),
        output=path,
        arguments=["-np", "1", "-c", "2048", "-t", "1", *ngram, *sizes],
        program=str(runtime.tool("llama-server")),
    ) as server:
        for text in ("one two three " * 5, TEXT[:60] * 3, "def f(x): return x + 1\n" * 4):
            body = body_of(text, 60)
            answer = server.client.call("/completion", body)
            timings = answer["timings"]
            rejected = timings.get("draft_n", 0) - timings.get("draft_n_accepted", 0)
            said.append((text_of(server.client, body, answer["tokens"]), rejected))
    trace = moetrace.open(path)
    requests = trace.requests
    assert sum(rejected for _, rejected in said) > 0
    request, position, token = (trace.column(name) for name in ("request", "position", "token"))
    for number, (text, rejected) in zip(requests.index, said, strict=True):
        row = requests.loc[number]
        assert row["n_rejected"] + row["n_undecided"] == rejected
        rows = request == number
        assert rows.sum() == len(text) + rejected + row["n_recomputed"]
        last = dict(zip(position[rows].tolist(), token[rows].tolist(), strict=True))
        assert [last[p] for p in range(len(text))] == text
    assert (requests["n_recomputed"].sum() > 0) == (name == "granitehybrid")
    assert verify(path).findings == ()
