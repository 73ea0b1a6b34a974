"""Several contexts, speculation, shifts, embeddings, saved slots: rows are right, or marked as what they are."""

from __future__ import annotations

import dataclasses
import subprocess

import numpy as np
import pytest
from identities import check_identity, last_tokens
from running import TEXT, ready_client

import moetrace
from moetrace.host.client import drive
from moetrace.host.prompts import Prompt
from moetrace.host.server import free_port
from moetrace.synthetic import ARCHITECTURES, write_model
from moetrace.trace.record import RowFlag
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def serving(runtime, model_file, tmp_path):
    """``serving(model, *arguments)``: a traced server; the trace is at ``tmp_path / "t.moet"``."""

    def serve(name: str, *arguments: str, channels: str = "experts,weights"):
        return moetrace.serve(
            model_file(name),
            output=tmp_path / "t.moet",
            channels=channels,
            arguments=["-t", "1", *arguments],
            program=str(runtime.tool("llama-server")),
        )

    yield serve
    assert verify(tmp_path / "t.moet").exit_code == 0


@pytest.mark.parametrize("draft", ["olmoe", "qwen3moe"])
def test_a_draft_model_is_a_context_of_its_own(draft, serving, model_file, tmp_path):
    arguments = ["-np", "2", "-c", "2048", "-md", str(model_file(draft)), "--spec-type", "draft-simple"]
    prompts = [Prompt(id=str(i), text=TEXT[90 * i : 90 * i + 80], n_predict=24) for i in range(6)]
    with serving("olmoe", *arguments, "--spec-draft-n-max", "4") as server:
        answers = drive(server.client, prompts, settings={**GREEDY, "cache_prompt": False})
        server.label([answer.label_line() for answer in answers])
    trace = moetrace.open(tmp_path / "t.moet")
    contexts = {trace.in_context(name).facts["role"]: trace.in_context(name) for name in trace.contexts}
    assert set(contexts) == {"main", "draft"}
    assert contexts["draft"].facts["model"]["architecture"] == ("olmoe" if draft == "olmoe" else "qwen3moe")
    assert trace.facts["role"] == "main"  # what `open` shows by default
    assert len(contexts["draft"]) > 0
    requests = trace.requests
    assert len(requests) == len(prompts)
    for answer in answers:
        (number,) = requests.index[requests["id"] == answer.prompt.id]
        tokens = [*answer.prompt_tokens, *answer.tokens]
        # with a draft the last batch may reach beyond what was asked for
        assert last_tokens(trace, number)[: len(tokens) - 1] == tokens[:-1]
    # a model drafting for itself is accepted, another one is mostly rejected, and either is counted
    rejected = requests["n_rejected"].sum()
    computed = requests["n_decode"].sum()
    if draft == "qwen3moe":
        assert rejected > computed / 3
    else:
        assert rejected < computed / 3


@pytest.mark.parametrize("warmup", [[], ["--no-warmup"]])
def test_multi_token_prediction_is_a_context_of_its_own(warmup, runtime, tmp_path):
    """The model's NextN layer drafts in a second context of the same model, whose token input has no name."""
    arch = dataclasses.replace(ARCHITECTURES["glm4moe"], n_layer_nextn=1)
    model = write_model(tmp_path / "mtp.gguf", arch)
    arguments = ["-t", "1", "-np", "2", "-c", "1024", "--spec-type", "draft-mtp", "--spec-draft-n-max", "3"]
    prompts = [Prompt(id=str(i), text=TEXT[90 * i : 90 * i + 80], n_predict=16) for i in range(6)]
    with moetrace.serve(
        model,
        output=tmp_path / "t.moet",
        arguments=[*arguments, *warmup],
        program=str(runtime.tool("llama-server")),
    ) as server:
        answers = drive(server.client, prompts, settings={**GREEDY, "cache_prompt": False})
        server.label([answer.label_line() for answer in answers])
    assert verify(tmp_path / "t.moet").exit_code == 0
    trace = moetrace.open(tmp_path / "t.moet")
    contexts = {trace.in_context(name).facts["role"]: trace.in_context(name) for name in trace.contexts}
    assert set(contexts) == {"main", "mtp"}
    assert contexts["main"].layers.tolist() == [1, 2, 3]
    assert contexts["mtp"].layers.tolist() == [arch.n_layer]
    for role, context in contexts.items():
        assert len(context.requests) == len(prompts)
        for answer in answers:
            (number,) = context.requests.index[context.requests["id"] == answer.prompt.id]
            tokens = [*answer.prompt_tokens, *answer.tokens]
            if role == "main":
                assert last_tokens(context, number)[: len(tokens) - 1] == tokens[:-1]
            else:  # drafts of the last step were never looked at
                known = last_tokens(context, number)[: len(answer.prompt_tokens)]
                assert known == list(answer.prompt_tokens)
    assert not (contexts["mtp"].column("flags") & RowFlag.SEQUENCE_UNCERTAIN).any()


def test_context_shift_stays_one_request(serving, tmp_path):
    arguments = ["-np", "1", "-c", "256", "--context-shift"]
    with serving("qwen3moe", *arguments) as server:
        answers = drive(server.client, [Prompt(id="long", text=TEXT[:80], n_predict=400)], settings=GREEDY)
        server.label([answer.label_line() for answer in answers])
    trace = moetrace.open(tmp_path / "t.moet")
    (request,) = trace.requests.itertuples()
    assert request.n_shifts >= 1
    assert request.n_rejected == 0
    rows = np.flatnonzero(trace.column("request") == request.Index)
    expected = [*answers[0].prompt_tokens, *answers[0].tokens[:-1]]
    np.testing.assert_array_equal(trace.column("token")[rows], expected)
    assert trace.column("position").max() < 256
    assert (np.diff(trace.column("position")[rows]) < 0).sum() == request.n_shifts
    assert "seq_add" in set(trace.events["event"])


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_embedding_requests(pooling, serving, tmp_path):
    texts = [TEXT[60 * i : 60 * i + 50] for i in range(5)]
    arguments = ["-np", "2", "-c", "1024", "--embeddings", "--pooling", pooling]
    with serving("qwen3moe", *arguments) as server:
        lengths = []
        for text in texts:
            server.client.call("/embedding", {"content": text})
            lengths.append(len(server.client.tokenize(text)))
    trace = moetrace.open(tmp_path / "t.moet")
    assert sorted(trace.requests["n_prefill"]) == sorted(lengths)
    assert (trace.requests["n_decode"] == 0).all()


def test_an_encoder(serving, tmp_path):
    with serving("nomic-bert-moe", "-np", "1", "-c", "512", "--embeddings") as server:
        for i in range(3):
            server.client.call("/embedding", {"content": TEXT[50 * i : 50 * i + 40]})
        length = len(server.client.tokenize(TEXT[:40]))
    trace = moetrace.open(tmp_path / "t.moet")
    served = trace.column("request") >= 0
    assert len(trace.requests) == 3
    assert trace.requests["n_prefill"].iloc[0] == length
    assert ((trace.column("flags")[served] & 4) == 4).all()


def test_a_saved_and_restored_slot(serving, tmp_path):
    slots = tmp_path / "slots"
    slots.mkdir()
    arguments = ["-np", "1", "-c", "1024", "--slot-save-path", str(slots), "--cache-ram", "0"]
    first = Prompt(id="first", text=TEXT[:150], n_predict=4)
    other = Prompt(id="other", text="Something else", n_predict=4)
    again = Prompt(id="again", text=TEXT[:150] + " and on", n_predict=4)
    with serving("qwen3moe", *arguments) as server:
        answers = drive(server.client, [first], settings=GREEDY)
        server.client.call("/slots/0?action=save", {"filename": "s.bin"})
        answers += drive(server.client, [other], settings=GREEDY)
        server.client.call("/slots/0?action=restore", {"filename": "s.bin"})
        answers += drive(server.client, [again], settings=GREEDY)
        server.label([answer.label_line() for answer in answers])
    trace = moetrace.open(tmp_path / "t.moet")
    check_identity(trace, answers)
    assert answers[2].cached > 20  # served from what was restored, and no row of this request
    assert "restore" in set(trace.events["event"])
    assert trace.loss.cached == answers[1].cached + answers[2].cached


def test_a_conversation_in_one_slot(serving, tmp_path):
    """Each turn continues exactly where the last one stopped: only the server's launch tells them apart."""
    with serving("gpt-oss", "-np", "1", "-c", "1024") as server:
        tokens = server.client.tokenize(TEXT[:60])
        answers = []
        for turn in range(4):
            prompt = Prompt(id=str(turn), tokens=tuple(tokens), n_predict=6)
            answers += drive(server.client, [prompt], settings=GREEDY)
            tokens = [
                *tokens,
                *answers[-1].tokens,
                *server.client.tokenize(f" turn {turn}", add_special=False),
            ]
        server.label([answer.label_line() for answer in answers])
    trace = moetrace.open(tmp_path / "t.moet")
    check_identity(trace, answers)
    assert all(answer.cached > 0 for answer in answers[1:])


def test_several_completions_of_one_prompt(serving, tmp_path):
    """The server copies the prompt's state to the other slots: their prompt is cached, not computed."""
    with serving("qwen3moe", "-np", "3", "-c", "1536") as server:
        body = {"prompt": TEXT[:100], "n_predict": 5, "n_cmpl": 3, "temperature": 1.0, "return_tokens": True}
        answer = server.client.call("/completion", body)
        n_prompt = len(server.client.tokenize(TEXT[:100]))
    assert len(answer) == 3
    trace = moetrace.open(tmp_path / "t.moet")
    requests = trace.requests
    assert len(requests) == 3
    assert sorted(requests["n_prefill"])[-1] == n_prompt
    said = sorted(tuple(one["tokens"][:-1]) for one in answer)
    request, phase, token = trace.column("request"), trace.column("phase"), trace.column("token")
    ours = sorted(tuple(token[(request == number) & (phase == 1)].tolist()) for number in requests.index)
    assert ours == said


def test_sampling_within_the_graph_is_left_alone(serving, runtime, model_file, tmp_path):
    """With --backend-sampling the graph holds every slot's sampler, and computes those of the slots in the ubatch."""
    arguments = ["-np", "4", "-c", "4096", "--backend-sampling", "-t", "1"]
    prompts = [Prompt(id=str(i), text=TEXT[15 * i : 15 * i + 40 + i], n_predict=4 + i) for i in range(16)]
    settings = {"temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    port = free_port()
    command = [runtime.tool("llama-server"), "-m", model_file("olmoe"), "--port", str(port), *arguments]
    log = tmp_path / "plain.log"
    with log.open("wb") as stream:
        plain = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        alone = drive(ready_client(plain, port, log), prompts, settings=settings, n_parallel=1)
    finally:
        plain.terminate()
        plain.wait(60)
    with serving("olmoe", *arguments) as server:
        answers = drive(server.client, prompts, settings=settings)
        server.label([answer.label_line() for answer in answers])
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    with moetrace.open(tmp_path / "t.moet") as trace:
        check_identity(trace, answers)


@pytest.mark.parametrize(("name", "cache"), [("qwen3moe", "-kvu"), ("granitehybrid", "-no-kvu")])
def test_rows_that_look_alike_have_their_own_routing(name, cache, serving, tmp_path):
    """GIVEN the same token at the same position in six slots at once, after different beginnings WHEN served THEN each
    row has the router's output of its own history: that of the same prompt alone.
    """
    n = 6
    with serving(
        name, "-np", str(n), "-c", "2048", cache, "-ub", "10", "-b", "32", channels="experts,logits"
    ) as server:
        tail = server.client.tokenize(TEXT[:150], add_special=False)
        prompts = [
            Prompt(id=str(i), tokens=(20 + 7 * i, 30 + 5 * i, *tail[: 30 + i]), n_predict=5) for i in range(n)
        ]
        settings = {**GREEDY, "cache_prompt": False}
        alone = drive(server.client, prompts, n_parallel=1, settings=settings)
        together = [drive(server.client, prompts, settings=settings) for _ in range(3)]
    with moetrace.open(tmp_path / "t.moet") as trace:
        requests, request, position = trace.requests, trace.request, trace.column("position")
        step, sequence = trace.column("step"), trace.column("sequence")
        layer = len(trace.layers) - 2  # the last one that is computed for every token

        def logits_of(answer):
            began = (requests["start_ns"] >= answer.from_ns) & (requests["start_ns"] <= answer.to_ns)
            (number,) = requests.index[began & (requests["slot"] == answer.slot)]
            rows = np.flatnonzero(request == number)
            rows = rows[np.argsort(position[rows], kind="stable")]
            return np.asarray(trace.logits)[rows, layer][: 2 + 30]

        own = [logits_of(answer) for answer in alone]
        for answers in together:
            for i, answer in enumerate(answers):
                seen = logits_of(answer)
                distance = np.array([np.abs(seen - other).max(axis=1) for other in own])
                assert (distance.argmin(axis=0) == i).all()
        shared = max(len(set(sequence[step == s])) for s in np.unique(step))
    assert shared > 3
