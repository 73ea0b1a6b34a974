"""`moetrace drive` beside other clients: every label is at its own request, and nobody else notices.

The other clients are plain HTTP, and keep the token ids that they sent and got.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from clients import GREEDY, Request, ask, moetrace_command, rows_of, serving

import moetrace
from moetrace import data
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

N_DRIVEN = 24
BEGINNING = "Once upon a time there was a king. "


class Clients:
    """Four threads that use a server until they are stopped, each in its own way."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[Request] = []
        self.texts: dict[int, set[str]] = {}
        self._stop = threading.Event()

    def prompt(self, text: str) -> list[int]:
        return ask(self.port, "/tokenize", {"content": text, "add_special": True})["tokens"]

    def greedy(self, i: int) -> str:
        """A question that does not hang on what was asked before."""
        prompt = self.prompt(f"def f{i}(x): return x + 1\n\ndef g(y):")
        body = {**GREEDY, "prompt": prompt, "n_predict": 40 + 20 * i, "cache_prompt": False}
        answer = ask(self.port, "/completion", body)
        self._keep(prompt, answer)
        return str(answer["content"])

    def like_ours(self, i: int) -> None:
        """Beginnings of driven prompts, and a driven prompt with another number of tokens to generate."""
        text = f"{BEGINNING}{i % N_DRIVEN} sons"[: 20 + 3 * (i % 9)] if i % 3 else driven(i % N_DRIVEN)
        prompt = self.prompt(text)
        self._keep(
            prompt, ask(self.port, "/completion", {**GREEDY, "prompt": prompt, "n_predict": 1 + i % 5})
        )

    def several(self, i: int) -> None:
        """Several prompts in a request, or several answers to one."""
        prompts = [self.prompt(f"{BEGINNING}{k}") for k in (i, i + 1)]
        body = {**GREEDY, "prompt": prompts, "n_predict": 4} if i % 2 else {
            "prompt": prompts[0], "n_predict": 5, "n_cmpl": 2, "temperature": 1.0, "return_tokens": True,
        }  # fmt: skip
        answers = ask(self.port, "/completion", body)
        if i % 2:
            for prompt, answer in zip(prompts, answers, strict=True):
                self._keep(prompt, answer)

    def impatient(self, i: int) -> None:
        """Hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = json.dumps({"prompt": driven(i % N_DRIVEN), "n_predict": 60, "stream": True})
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        connection.getresponse().read(60)
        connection.close()

    def _keep(self, prompt: list[int], answer: Any) -> None:
        one = Request(prompt, answer["tokens"], answer["id_slot"], answer["timings"]["cache_n"])
        self.requests.append(one)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        def usual(i: int) -> None:
            self.texts.setdefault(i % 4, set()).add(self.greedy(i % 4))

        def work(kind: Any) -> None:
            i = 0
            while not self._stop.is_set():
                kind(i)
                i += 1

        with ThreadPoolExecutor(4) as pool:
            futures = [
                pool.submit(work, kind) for kind in (usual, self.like_ours, self.several, self.impatient)
            ]
            try:
                yield
            finally:
                self._stop.set()
            for future in futures:
                future.result()


def driven(i: int) -> str:
    return f"{BEGINNING}He had {i} sons and {i + 1} horses."


@pytest.fixture(scope="module")
def shared(runtime, tmp_path_factory):
    """A server with four clients while prompts are driven: the clients, drive's answers, and the trace."""
    folder = tmp_path_factory.mktemp("shared")
    path, file = folder / "t.moet", folder / "prompts.jsonl"
    own = {"request": 0, "sequence": 1, "from_ns": 0, "to_ns": 1, "slot": "a", "note": "n"}
    lines = [
        {
            "id": f"d{i}",
            "label": "odd" if i % 2 else "even",
            "prompt": driven(i),
            "n_predict": 3 + i % 6,
            **own,
        }
        for i in range(N_DRIVEN)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["-m", data.demo_model(), "-np", "2", "-c", "2048", "--cache-ram", "64"]
    with serving(runtime, path, *arguments) as port:
        alone = Clients(port)
        before = {i: alone.greedy(i) for i in range(4)}
        clients = Clients(port)
        with clients.at_work():
            time.sleep(0.3)
            result = moetrace_command(
                "drive", "-f", file, "--url", f"http://127.0.0.1:{port}", "--trace", path
            )
        prompts = {f"d{i}": clients.prompt(driven(i)) for i in range(N_DRIVEN)}
    assert result.returncode == 0, result.stderr
    answers = {answer["id"]: answer for answer in map(json.loads, result.stdout.splitlines())}
    ours = {
        name: Request(prompts[name], answer["tokens"], answer["slot"], answer["n_cached"])
        for name, answer in answers.items()
    }
    with moetrace.open(path) as trace:
        yield clients, before, ours, trace


def test_every_driven_request_has_its_own_label(shared):
    _, _, ours, trace = shared
    requests, rows = trace.requests, rows_of(trace)
    assert len(ours) == N_DRIVEN
    assert sorted(requests["id"].dropna()) == sorted(ours)
    for name, one in ours.items():
        (number,) = requests.index[requests["id"] == name]
        said = requests.loc[number]
        assert rows[number] == one.rows
        assert (said["slot"], said["n_cached"]) == (one.slot, one.cached)
        assert said["label"] == ("odd" if int(name[1:]) % 2 else "even")
        assert said["prompt"] == driven(int(name[1:]))
        assert (said["extra.request"], said["extra.slot"], said["sequence"], said["note"]) == (0, "a", 1, "n")
    assert not requests["label_unsure"].any()
    result = verify(trace.path)
    assert (result.exit_code, result.remarks) == (0, ())


def test_nobody_elses_request_has_a_label(shared):
    clients, _, ours, trace = shared
    requests, rows = trace.requests, rows_of(trace)
    assert requests["slot"].nunique() == 2
    assert len(requests) > 2 * N_DRIVEN, "too few others to prove anything"
    mine = [(one.slot, one.rows) for one in ours.values()]
    unlabelled = [(said.slot, rows[said.Index]) for said in requests.itertuples() if said.id is None]
    theirs = [(one.slot, one.rows) for one in clients.requests]
    assert len(theirs) > N_DRIVEN
    for one in theirs:
        assert one in unlabelled or one in mine  # a twin's rows are alike
    assert sum(one not in mine for one in theirs) > N_DRIVEN
    # rows that are a driven prompt's beginning are there, too: of those who hung up, and of shorter answers
    assert requests["label"].isna().sum() == len(requests) - N_DRIVEN


def test_other_clients_get_the_answers_that_they_get_alone(shared):
    clients, before, _, _ = shared
    assert len(set(before.values())) == 4
    assert clients.texts == {i: {text} for i, text in before.items()}


# -- several models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(runtime, model_file, tmp_path_factory):
    """A router with two models, a prompt file driven to each of them, and interventions tried on it."""
    folder = tmp_path_factory.mktemp("router")
    models = folder / "models"
    models.mkdir()
    shutil.copy(data.demo_model(), models / "a.gguf")
    shutil.copy(model_file("qwen3moe"), models / "b.gguf")
    path, file = folder / "t.moet", folder / "prompts.jsonl"
    lines = [
        {"id": "text", "label": "x", "prompt": "Once upon a time"},
        {"id": "chat", "label": "y", "messages": [{"role": "user", "content": "Hello"}]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {}
    with serving(runtime, path, "--models-dir", models, "-np", "2", "-c", "1024") as port:
        drive = ["drive", "-f", file, "--url", f"http://127.0.0.1:{port}", "--trace", path, "-n", "5"]
        said["none"] = moetrace_command(*drive)
        said["unknown"] = moetrace_command(*drive, "--model", "c")
        for model in "ab":
            said[model] = moetrace_command(*drive, "--model", model)
        said["both"] = moetrace_command("intervene", path, "ablate:1:0-3")
        said["one"] = moetrace_command("intervene", path, "ablate:1:0-3", "--context", "ctx1")
        said["again"] = moetrace_command(*drive, "--model", "a")
        said["off"] = moetrace_command("intervene", path, "off")
        said["stop"] = moetrace_command("stop", path, "--context", "ctx0")
        said["status"] = moetrace_command("status", path)
        # wake nobody: both are asked to end
    with moetrace.open(path, context=0) as trace:
        yield said, trace


def test_a_router_wants_a_model_to_be_named(router):
    said, _ = router
    assert said["none"].returncode == said["unknown"].returncode == 2
    assert "serves several models" in said["none"].stderr
    assert "has no model 'c'" in said["unknown"].stderr
    for result in (said["none"], said["unknown"]):
        assert "it has a, b" in result.stderr
        assert "Traceback" not in result.stderr


def test_labels_stay_with_the_model_that_was_asked(router):
    said, trace = router
    for index, (model, n) in enumerate((("a", 2), ("b", 1))):
        assert said[model].returncode == 0, said[model].stderr
        answers = {one["id"]: one for one in map(json.loads, said[model].stdout.splitlines())}
        context = trace.in_context(index)
        requests = context.requests
        assert sorted(requests["id"]) == sorted(["chat", "text"] * n)
        for name, one in answers.items():
            number = requests.index[requests["id"] == name][0]
            assert (requests.loc[number, "slot"], requests.loc[number, "label"]) == (
                one["slot"], "x" if name == "text" else "y"
            )  # fmt: skip
            assert rows_of(context)[number][-4:] == one["tokens"][:-1]
    assert verify(trace.path).remarks == ()


def test_an_intervention_is_for_one_model(router):
    said, trace = router
    assert said["both"].returncode == 2
    assert "records several models" in said["both"].stderr
    assert "ctx0" in said["both"].stderr
    assert "ctx1" in said["both"].stderr
    assert (said["one"].returncode, said["off"].returncode) == (0, 0)
    # `again` ran on the other model meanwhile
    assert not trace.in_context(0).intervened.any()
    assert said["stop"].stdout == "ctx0: paused\n"
    assert "ctx0: paused" in said["status"].stdout
    assert "ctx1: recording" in said["status"].stdout
