"""A router through all the lives of its models, under eight clients, while its recording is switched.

Two models sleep and wake, one of them is unloaded and loaded again, in the midst of answers too. The clients are plain
HTTP and keep the token ids that they sent and got; one of them is `moetrace drive`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moetrace
from moetrace.errors import MoetraceError
from moetrace.host.server import free_port
from moetrace.trace.loss import LOST_COUNTERS, LOST_EVENT_COUNTERS
from moetrace.trace.record import RowFlag
from moetrace.trace.ring import live_rings
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.stress, pytest.mark.runtime, pytest.mark.timeout(3600)]

MODELS = {"one": "qwen3moe", "two": "granitehybrid"}  # `two` is unloaded, too
N_SLOTS, SLOT_CONTEXT, N_WORDS = 3, 512, 400  # words: token ids that prompts are made of
SLEEP_SECONDS = 1
#: in a shorter life, on a slow machine, not everything that happens at random need happen
ALL_OF_IT_S = 60
CYCLE = 8.0  # seconds; in each, each model is left alone for a while, and falls asleep
QUIET = {"one": (0.0, 2.5), "two": (4.0, 6.5)}
ARGUMENTS = [
    "-np", N_SLOTS, "-c", N_SLOTS * SLOT_CONTEXT, "-no-kvu", "-ub", 48, "-t", 1, "--cache-ram", 0,
    "--sleep-idle-seconds", SLEEP_SECONDS, "--host", "127.0.0.1",
]  # fmt: skip
ABLATED = (0, 1)
SLACK_NS = 3_000_000_000  # a server may notice that late that nobody listens any more


@dataclass
class Request:
    """What a client sent and got, and when."""

    model: str
    prompt: list[int]
    from_ns: int
    to_ns: int = 0
    tokens: list[int] = field(default_factory=list)  # what was generated, as far as it was heard
    answered: bool = False  # to the end; else `tokens` may lack some
    slot: int | None = None
    cached: int = 0
    id: str | None = None  # of a driven one
    question: int | None = None  # of one that is asked again and again
    text: str = ""

    @property
    def known(self) -> list[int]:
        """The tokens at its positions, from 0 on, as far as they are known; the last generated is not decoded."""
        return [*self.prompt, *(self.tokens[:-1] if self.answered else self.tokens)]


class GoneError(Exception):
    """The model was unloaded meanwhile."""


def send(port: int, path: str, body: Any = None, timeout: float = 120) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, text, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (http.client.HTTPException, ConnectionError) as e:
        raise GoneError(str(e)) from e
    finally:
        connection.close()


def call(port: int, path: str, body: Any = None) -> Any:
    status, text = send(port, path, body)
    if status >= 500 or b"model is not loaded" in text or b"not running" in text:
        raise GoneError(text)
    assert status == 200, text
    return json.loads(text)


def quiet(model: str, clock: float) -> bool:
    begin, end = QUIET[model]
    return begin <= clock % CYCLE < end


class Router:
    """A router that runs, with or without the tracer."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError, GoneError):
                if send(self.port, "/health")[0] == 200:
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def routing(command: list[object], log: Path, port: int) -> Iterator[Router]:
    with log.open("wb") as out:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out)
    router = Router(process, port, log)
    try:
        router.wait_ready()
        yield router
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        if process.poll() is None:
            process.kill()
            process.wait()


class Clients:
    """Eight of them; what they sent and got is in :attr:`requests`."""

    def __init__(self, port: int, seconds: float, folder: Path, trace: Path | None) -> None:
        self.port = port
        self.began = time.monotonic()
        self.until = self.began + seconds
        self.folder = folder
        self.trace = trace
        self.requests: list[Request] = []
        self.n_gone = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        work: list[Callable[[np.random.Generator, int], None]] = [
            self.greedy("one", 0), self.greedy("two", 10), self.conversation("one"), self.conversation("two"),
            self.several, self.long, self.impatient, self.driven,
        ]  # fmt: skip
        with ThreadPoolExecutor(len(work)) as pool:
            futures = [pool.submit(self._repeat, i, one) for i, one in enumerate(work)]
            for future in futures:
                future.result()

    def _repeat(self, seed: int, one: Callable[[np.random.Generator, int], None]) -> None:
        random = np.random.default_rng(seed)
        number = 0
        while time.monotonic() < self.until:
            try:
                one(random, number)
            except GoneError:
                with self._lock:
                    self.n_gone += 1
                time.sleep(0.1)
            number += 1

    def _wait(self, model: str) -> None:
        """Leave the model alone while it is to fall asleep."""
        while quiet(model, time.monotonic() - self.began) and time.monotonic() < self.until:
            time.sleep(0.05)

    def _keep(self, request: Request) -> Request:
        with self._lock:
            self.requests.append(request)
        return request

    def words(self, random: np.random.Generator, n: int) -> list[int]:
        """A prompt that nobody else has."""
        return [int(t) for t in random.integers(3, N_WORDS, n)]

    def _complete(self, request: Request, **more: Any) -> Request:
        body = {
            "model": request.model, "prompt": request.prompt, "ignore_eos": True, "return_tokens": True, **more,
        }  # fmt: skip
        try:
            self._heard(request, call(self.port, "/completion", body))
        finally:
            request.to_ns = time.monotonic_ns()
        return request

    def _heard(self, request: Request, answer: Any) -> None:
        request.tokens, request.slot = answer["tokens"], answer["id_slot"]
        request.cached, request.text = answer["timings"]["cache_n"], answer["content"]
        request.answered = True

    def _request(self, model: str, prompt: list[int], **more: Any) -> Request:
        return self._keep(Request(model, prompt, time.monotonic_ns(), **more))

    def greedy(self, model: str, first: int) -> Callable[[np.random.Generator, int], None]:
        """Four questions, again and again, that do not hang on what was asked before."""

        def ask(random: np.random.Generator, number: int) -> None:
            self._wait(model)
            question = first + number % 4
            request = self._request(model, question_of(question), question=question)
            self._complete(request, temperature=0.0, n_predict=16 + 8 * (number % 4), cache_prompt=False)

        return ask

    def conversation(self, model: str) -> Callable[[np.random.Generator, int], None]:
        """Turns that go on where the last one stopped, from the prompt cache if it is still there."""
        said: list[int] = []

        def turn(random: np.random.Generator, number: int) -> None:
            nonlocal said
            self._wait(model)
            if len(said) > SLOT_CONTEXT - 120:
                said = []
            request = self._request(model, [*said, *self.words(random, int(random.integers(8, 60)))])
            said = []
            self._complete(request, temperature=1.0, n_predict=int(random.integers(1, 30)), seed=number)
            said = [*request.prompt, *request.tokens]

        return turn

    def several(self, random: np.random.Generator, number: int) -> None:
        """Several prompts at once."""
        model = list(MODELS)[number % 2]
        self._wait(model)
        prompts = [self.words(random, int(random.integers(6, 40))) for _ in range(int(random.integers(2, 5)))]
        requests = [self._request(model, prompt) for prompt in prompts]
        body = {"model": model, "prompt": prompts, "temperature": 1.0, "n_predict": 6, "return_tokens": True}
        try:
            for request, answer in zip(
                requests, call(self.port, "/completion", {**body, "ignore_eos": True}), strict=True
            ):
                self._heard(request, answer)
        finally:
            for request in requests:
                request.to_ns = time.monotonic_ns()

    def long(self, random: np.random.Generator, number: int) -> None:
        """Prompts of several ubatches, some of which begin alike."""
        model = list(MODELS)[int(random.integers(2))]
        self._wait(model)
        alike = question_of(100)[: 16 * int(random.integers(0, 5))]
        request = self._request(model, [*alike, *self.words(random, int(random.integers(20, 300)))])
        self._complete(request, temperature=0.0, n_predict=int(random.choice([1, 2, 60])))

    def impatient(self, random: np.random.Generator, number: int) -> None:
        """Hangs up: while the model wakes, before an answer, or in the midst of one."""
        model = list(MODELS)[number % 2]
        if number % 3:
            self._wait(model)
        else:  # wakes the model, or finds it just before it would sleep
            time.sleep(float(random.uniform(0.2, 1.0)))
        request = self._request(model, self.words(random, int(random.integers(6, 60))))
        body = {
            "model": model, "prompt": request.prompt, "n_predict": 120, "stream": True, "return_tokens": True,
            "ignore_eos": True, "temperature": 1.0,
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            n = int(random.integers(-2, 20))
            if n < 0:
                time.sleep(float(random.uniform(0, 0.1)))
                return
            for line in connection.getresponse():
                if line.startswith(b"data: {") and b'"tokens"' in line:
                    request.tokens += json.loads(line[6:])["tokens"]
                if len(request.tokens) > n:
                    break
        except (http.client.HTTPException, OSError) as e:
            raise GoneError(str(e)) from e
        finally:
            connection.close()
            request.to_ns = time.monotonic_ns() + SLACK_NS
            if number % 2:
                time.sleep(0.2)

    def driven(self, random: np.random.Generator, number: int) -> None:
        """`moetrace drive`, with a model's name and labels."""
        model = list(MODELS)[int(random.integers(2))]
        self._wait(model)
        requests = {}
        lines = []
        for i in range(int(random.integers(3, 10))):
            name = f"{number}-{i}"
            prompt = self.words(random, int(random.integers(6, 60)))
            requests[name] = Request(model, prompt, time.monotonic_ns(), id=name)
            lines.append(
                {"id": name, "label": f"label {i % 3}", "tokens": prompt, "n_predict": 1 + i, "request": i}
            )
        file = self.folder / "driven.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ["drive", "-f", file, "--url", f"http://127.0.0.1:{self.port}", "--model", model]
        result = tell(*command, *(["--trace", self.trace] if self.trace else []))
        end = time.monotonic_ns()
        assert "Traceback" not in result.stderr, result.stderr
        for answer in map(json.loads, result.stdout.splitlines()):
            request = requests[answer["id"]]
            request.tokens, request.slot, request.cached = (
                answer["tokens"], answer["slot"], answer["n_cached"],
            )  # fmt: skip
            request.answered = True
        for request in requests.values():
            request.to_ns = end
            self._keep(request)
        if result.returncode:
            raise GoneError(result.stderr)


def question_of(number: int) -> list[int]:
    random = np.random.default_rng(1000 + number)
    return [int(t) for t in random.integers(3, N_WORDS, 24 if number < 100 else 80)]


def tell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moetrace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@dataclass(frozen=True)
class Switched:
    """A command of the one who controls the recording; from_ns to to_ns it may have been in force or not."""

    word: str  # stop, start, ablate, off
    models: tuple[str, ...]
    from_ns: int
    to_ns: int


class Control:
    """Stops, starts and intervenes, for one model or for both; and unloads `two`."""

    def __init__(self, router: Router, trace: Path, clients: Clients) -> None:
        self.router, self.trace, self.clients = router, trace, clients
        self.done: list[Switched] = []
        self.n_unloaded = self.n_looks = 0
        self.refused: list[str] = []

    def switch(self, word: str, *arguments: str, models: tuple[str, ...]) -> None:
        begin = time.monotonic_ns()
        which = [] if len(models) == len(MODELS) else ["--model", models[0]]
        result = tell("intervene" if arguments else word, self.trace, *arguments, *which)
        assert "Traceback" not in result.stderr
        if result.returncode:
            self.refused.append(f"{word} {which}: {result.stderr}")
        else:
            self.done.append(Switched(word, models, begin, time.monotonic_ns()))

    def _sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self.clients.until - time.monotonic())))

    def run(self) -> None:
        random = np.random.default_rng(7)
        number = 0
        while time.monotonic() < self.clients.until - 2:
            some = [tuple(MODELS), ("one",), ("two",)][number % 3]
            kind = number % 2
            if kind == 0:
                self.switch("stop", models=some)
                self._sleep(float(random.uniform(0.2, 4)))
                self.switch("start", models=some)
            else:
                model = ("one", "two")[number // 2 % 2]
                rule = f"ablate:*:{ABLATED[0]}-{ABLATED[1]}@slot=0"
                self.switch("ablate", rule, models=(model,))
                self._sleep(float(random.uniform(0.2, 6)))
                self.switch("off", "off", models=(model,))
            number += 1
            self._sleep(float(random.uniform(0.5, 3)))
        for model in MODELS:
            if self.in_force("stop", "start", model):
                self.switch("start", models=(model,))

    def in_force(self, on: str, off: str, model: str) -> bool:
        words = [s.word for s in self.done if model in s.models and s.word in (on, off)]
        return bool(words) and words[-1] == on

    def look(self) -> None:
        """Look at the recording while it grows: nothing that is said of it may be wrong, or end in an error."""
        while time.monotonic() < self.clients.until - 2:
            for word in ("status", "info", "verify"):
                result = tell(word, self.trace)
                idle = word != "verify" and "there is no llama context" in result.stderr
                assert result.returncode == 0 or idle, f"{word}: {result.stdout} {result.stderr}"
                self.n_looks += 1
                self._sleep(1)

    def watch(self) -> None:
        """Unload `two` in every second cycle: in turn while it answers, and while it sleeps."""
        done = 0
        while time.monotonic() < self.clients.until:
            cycle, clock = divmod(time.monotonic() - self.clients.began, CYCLE)
            if cycle % 2 and cycle > done and clock > (3.0 if cycle % 4 == 1 else 6.2):
                done = int(cycle)
                assert call(self.router.port, "/models/unload", {"model": "two"}) == {"success": True}
                self.n_unloaded += 1
            time.sleep(0.1)


@dataclass
class Sample:
    """A process at a moment: bytes of its own that are in memory, and all; open files."""

    seconds: float
    own: int
    whole: int
    n_files: int


def processes(root: int) -> dict[int, str]:
    """The processes below one: pid -> ``drain``, ``router``, or the model that it serves."""
    (router,) = map(int, Path(f"/proc/{root}/task/{root}/children").read_text().split())
    found = {root: "drain", router: "router"}
    for task in Path(f"/proc/{router}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                alias = words[words.index(b"--alias") + 1].decode() if b"--alias" in words else "?"
                found[child] = alias
    return found


def sample(root: int, began: float, into: dict[str, list[Sample]]) -> None:
    for pid, name in processes(root).items():
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{pid}/status").read_text()
            own, whole = (1024 * int(status.partition(key)[2].split()[0]) for key in ("RssAnon:", "VmRSS:"))
            n_files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
            into.setdefault(name, []).append(Sample(time.monotonic() - began, own, whole, n_files))


def growth(samples: list[Sample]) -> tuple[float, int]:
    """From the third quarter of the time to the last: of a process's own memory, as a share of all that it has; and of
    the files that it has open at least.

    Models sleep: what a server takes when it is awake is near the most that it takes.
    """
    end = samples[-1].seconds
    third, last = (
        [s for s in samples if a * end < s.seconds <= b * end] for a, b in ((0.5, 0.75), (0.75, 1))
    )
    before, after = (float(np.quantile([s.own for s in part], 0.9)) for part in (third, last))
    files = min(s.n_files for s in last) - min(s.n_files for s in third)
    return (after - before) / float(np.quantile([s.whole for s in third], 0.9)), files


def answers_alone(port: int) -> dict[int, list[list[int]]]:
    """The greedy questions, one at a time: question -> the tokens for each number of tokens asked for."""
    clients = Clients(port, 0, Path(), None)
    out = {}
    for model, first in (("one", 0), ("two", 10)):
        for i in range(4):
            ask = Request(model, question_of(first + i), time.monotonic_ns())
            clients._complete(ask, temperature=0.0, n_predict=16 + 8 * i, cache_prompt=False)
            out[first + i] = ask.tokens
    return out


@dataclass
class Lived:
    """What everybody did, and what a plain server answers alone: question -> tokens."""

    path: Path
    clients: Clients
    control: Control
    samples: dict[str, list[Sample]]
    alone: dict[int, list[int]]


def lost(path: Path, names: Sequence[str]) -> int:
    """What the hosts that are there count of these."""
    with contextlib.suppress(MoetraceError):
        return sum(ring.counters.get(name, 0) for ring in live_rings(path) for name in names)
    return 0


def stall(recorder: int, path: Path, until: float) -> None:
    """Stop the recorder again and again until a small ring has lost rows and events; the server goes on."""
    while time.monotonic() < until:
        time.sleep(1.5)
        os.kill(recorder, signal.SIGSTOP)
        try:
            before = [lost(path, names) for names in (LOST_COUNTERS, LOST_EVENT_COUNTERS)]
            ends = min(time.monotonic() + 3, until)
            while time.monotonic() < ends:
                time.sleep(0.1)
                now = [lost(path, names) for names in (LOST_COUNTERS, LOST_EVENT_COUNTERS)]
                if all(b > a for a, b in zip(before, now, strict=True)):
                    time.sleep(0.6)  # some of a request, too
                    break
        finally:
            os.kill(recorder, signal.SIGCONT)


def live(
    seconds: float,
    runtime: Any,
    model_file: Any,
    folder: Path,
    options: Sequence[object] = (),
    *,
    stalls: bool = False,
) -> Lived:
    """Put a traced router through it."""
    models = folder / "models"
    models.mkdir(parents=True)
    for name, architecture in MODELS.items():
        shutil.copy(model_file(architecture), models / f"{name}.gguf")
    port = free_port()
    server = [runtime.tool("llama-server"), "--models-dir", models, "--port", port, *ARGUMENTS]
    with routing(server, folder / "plain.log", port) as router:
        alone = answers_alone(port)
        router.stop()

    path = folder / "t.moet"
    command = [sys.executable, "-m", "moetrace", "run", "-o", path, *options, "--", *server]
    samples: dict[str, list[Sample]] = {}
    with routing(command, folder / "traced.log", port) as router:
        clients = Clients(port, seconds, folder, path)
        control = Control(router, path, clients)
        work = [clients.run, control.run, control.watch, control.look]
        if stalls:
            work.append(partial(stall, router.process.pid, path, clients.until - 1))
        with ThreadPoolExecutor(len(work)) as pool:
            futures = [pool.submit(run) for run in work]
            while not all(f.done() for f in futures):
                sample(router.process.pid, clients.began, samples)
                time.sleep(0.2)
            for f in futures:
                f.result()
        router.stop()
    return Lived(path, clients, control, samples, alone)


class Referee:
    """Holds a model's part of a trace against what its clients sent and got.

    Attributes
    ----------
    faults
        What is wrong: a sentence each.
    seen
        How often what was checked.
    """

    def __init__(
        self, trace: moetrace.Trace, model: str, clients: Clients, control: Control, *, lossy: bool
    ) -> None:
        self.lossy = lossy
        self.faults: list[str] = []
        self.seen: Counter[str] = Counter()
        self.sent = [r for r in clients.requests if r.model == model]
        self.requests = trace.requests
        names = ("request", "token", "position", "sequence", "flags")
        self.column = {name: np.asarray(trace.column(name)) for name in names}
        self.intervened = np.asarray(trace.intervened)
        self.experts = np.asarray(trace.experts)
        order = np.argsort(self.column["request"], kind="stable")
        numbers = self.requests.index.to_numpy()
        edges = np.searchsorted(self.column["request"][order], [numbers, numbers + 1])
        self.rows = {n: order[a:b] for n, a, b in zip(numbers.tolist(), *edges.tolist(), strict=True)}
        self.paused = spans(control.done, model, "stop", "start")
        self.ablated = spans(control.done, model, "ablate", "off")

    def check(self) -> None:
        """Every request's rows are its tokens, every row somebody's, every label its own.

        Of a lossy trace what is missing may be missing: nothing may be anybody else's.
        """
        self.expect(self.requests.index.is_unique, "a number stands twice")
        owners: dict[int, list[Request]] = {}  # number in the trace -> requests that it may be
        exact: dict[int, Request] = {}
        by_start = self.requests.sort_values("start_ns")
        starts, slots = by_start["start_ns"].to_numpy(), by_start["slot"].to_numpy()
        for request in self.sent:
            a, b = np.searchsorted(starts, [request.from_ns, request.to_ns + 1])
            mine = slots[a:b] == request.slot if request.slot is not None else np.ones(b - a, bool)
            found = by_start.index[a:b][mine].tolist()
            for number in found:
                if self.fits(number, request):
                    owners.setdefault(number, []).append(request)
            if not request.answered:
                continue
            whole = [n for n in found if n not in exact and self.is_all_of(n, request)]
            if whole:
                exact[whole[0]] = request
            if within(self.paused, request):
                self.expect(not whole, f"recorded while paused: {request}")
                self.seen["paused"] += 1
            elif not touches(self.paused, request):
                if self.lossy and not whole:
                    self.seen["partial"] += 1
                    continue
                self.expect(len(whole) == 1, f"{len(whole)} requests have the rows of {request}")
                self.seen["exact"] += 1
                if whole:
                    self.check_exact(whole[0], request)
        for number, (request, *others) in owners.items():
            said = self.requests.loc[number]
            if request.answered and not others:  # what is said of it is so, however little of it is there
                known = {"n_cached": request.cached, "n_prompt": len(request.prompt), "slot": request.slot}
                for key, value in known.items():
                    self.expect(
                        said.isna()[key] or said[key] == value, f"{key} is not {value}: {said.to_dict()}"
                    )
        ids = self.requests["id"]
        for number, name in ids.items():
            self.expect(number in owners, f"nobody sent {self.describe(number)}")
            if name is not None:
                fit = [r.id for r in ([exact[number]] if number in exact else owners.get(number, []))]
                self.expect(name in fit, f"{name} is not {self.describe(number)}")
                self.seen["labels"] += 1
        self.expect(ids.dropna().is_unique, "an id stands twice")
        flags = self.column["flags"]
        unclear = RowFlag.SEQUENCE_UNCERTAIN | RowFlag.UNIDENTIFIED
        self.expect(not (flags & unclear).any(), f"{np.count_nonzero(flags & unclear)} rows are not clear")
        stray = (self.column["request"] < 0) != ((flags & RowFlag.TRIAL) != 0)
        self.expect(not stray.any(), f"{np.count_nonzero(stray)} rows of no request")

    def check_exact(self, number: int, request: Request) -> None:
        said, rows = self.requests.loc[number], self.rows[number]
        position = self.column["position"][rows]
        text = f"{said.to_dict()} of {request}"
        self.expect((position == np.arange(request.cached, len(request.known))).all(), f"positions: {text}")
        n_prefill = len(request.prompt) - request.cached
        wanted = {
            "slot": request.slot, "n_cached": request.cached, "n_prefill": n_prefill,
            "n_decode": len(rows) - n_prefill, "n_lost": 0, "n_rejected": 0, "n_shifts": 0, "n_unrecorded": 0,
        }  # fmt: skip
        blank = said.isna()
        for name, value in wanted.items():
            if not (self.lossy and blank[name]):
                self.expect(not blank[name] and said[name] == value, f"{name} is not {value}: {text}")
        if request.id != said["id"]:
            self.expect(self.lossy and said["id"] is None, f"label: {text}")
        intervened = self.intervened[rows]
        if request.slot != 0 or not touches(self.ablated, request):
            self.expect(not intervened.any(), f"intervened on: {text}")
        elif within(self.ablated, request):
            used = np.isin(self.experts[rows], ABLATED).any()
            self.expect(intervened.all() and not used, f"not intervened on: {text}")
            self.seen["intervened"] += 1

    def expect(self, condition: object, otherwise: str) -> None:
        if not condition:
            self.faults.append(otherwise)

    def fits(self, number: int, request: Request) -> bool:
        """Whether no row of it contradicts the request, as far as that is known."""
        position, token = (self.column[name][self.rows[number]] for name in ("position", "token"))
        known = np.array(request.known)
        inside = position < len(known)
        if not inside.any():  # recorded is only what came after the client hung up
            return not request.answered and (self.lossy or touches(self.paused, request))
        return bool(
            (token[inside] == known[position[inside]]).all()
            and (inside.all() or not request.answered)
            and position.min() >= request.cached
        )

    def is_all_of(self, number: int, request: Request) -> bool:
        return self.column["token"][self.rows[number]].tolist() == request.known[request.cached :]

    def describe(self, number: int) -> str:
        position, token = (self.column[name][self.rows[number]] for name in ("position", "token"))
        said = self.requests.loc[number].to_dict()
        return f"{said} with {list(zip(position.tolist(), token.tolist(), strict=True))[:30]}"


Span = tuple[int, int, int, int]  # something held: from, surely from, surely to, to


def spans(done: list[Switched], model: str, on: str, off: str) -> list[Span]:
    """Give when something was on for a model."""
    found, begun = [], None
    for switched in done:
        if model in switched.models and switched.word == on and begun is None:
            begun = switched
        elif model in switched.models and switched.word == off and begun is not None:
            found.append((begun.from_ns, begun.to_ns, switched.from_ns, switched.to_ns))
            begun = None
    return [*found, *([(begun.from_ns, begun.to_ns, 1 << 62, 1 << 62)] if begun is not None else [])]


def touches(held: list[Span], request: Request) -> bool:
    return any(a <= request.to_ns and request.from_ns <= d for a, _, _, d in held)


def within(held: list[Span], request: Request) -> bool:
    return any(b <= request.from_ns and request.to_ns <= c for _, b, c, _ in held)


def held_against(lived: Lived, *, lossy: bool = False) -> dict[str, Counter[str]]:
    """Hold a trace against what the clients know; gives, by model, how often what was seen."""
    result = verify(lived.path)
    assert (result.exit_code, result.findings) == (0, ())
    seen, faults = {}, []
    for model in MODELS:
        with moetrace.open(lived.path, model=model) as trace:
            referee = Referee(trace, model, lived.clients, lived.control, lossy=lossy)
            referee.check()
            loss = trace.loss
            referee.expect(lossy or loss.complete, f"lost: {loss}")
            referee.seen.update(
                {
                    "rows": loss.rows,
                    "rows lost": loss.rows_lost,
                    "events lost": loss.events_lost,
                    "contexts": trace.counters["contexts"],
                    "processes": len({part.facts["pid"] for part in trace.parts}),
                }
            )
            seen[model] = referee.seen
            faults += [f"{model}: {fault}" for fault in referee.faults]
    assert not faults, f"{len(faults)} faults: " + "\n".join(faults[:20])
    return seen


def check_texts(lived: Lived) -> int:
    """Nobody but who was intervened on gets another answer than alone from a plain server; gives their number."""
    ablated = {model: spans(lived.control.done, model, "ablate", "off") for model in MODELS}
    n = 0
    for request in lived.clients.requests:
        if request.question is None or not request.answered:
            continue
        if request.slot != 0 or not touches(ablated[request.model], request):
            assert request.tokens == lived.alone[request.question], request
            n += 1
    return n


def test_lives(
    size: Callable[[str], int], figures: Callable[..., None], runtime, model_file, tmp_path: Path
) -> None:
    """GIVEN a router whose models sleep, wake, end and begin again WHEN eight clients use it while its recording is
    switched THEN every row is its request's, every label its own, nobody else's answer changes, and nothing grows.
    """
    seconds = size("lives_seconds")
    lived = live(seconds, runtime, model_file, tmp_path)
    seen = held_against(lived)
    n_texts = check_texts(lived)
    one, two = (seen[model] for model in MODELS)
    control = lived.control
    assert one["processes"] == 1
    assert two["processes"] == 1 + control.n_unloaded > 1
    for model, counts in seen.items():
        assert counts["contexts"] > counts["processes"], f"{model} never woke"
        assert counts["exact"] > (seconds if seconds >= ALL_OF_IT_S else 0)
        assert counts["labels"] > 0
        assert counts["paused"] > 0 or seconds < ALL_OF_IT_S
    assert one["intervened"] > 0 or seconds < ALL_OF_IT_S
    assert n_texts > seconds

    changes = {name: growth(lived.samples[name]) for name in ("one", "drain")}
    whole = seconds >= 300
    if whole:
        changes["two"] = growth(lived.samples["two"])
    both = one + two
    figures(
        "lives",
        **{
            f"2 models, 8 clients for {seconds} s": f"slept and woke {both['contexts'] - both['processes']} times,"
            f" unloaded and loaded {control.n_unloaded} times; stopped, started and intervened on"
            f" {len(control.done)} times, looked at {control.n_looks} times",
            "rows checked": f"{both['rows']:,} of {both['exact']:,} requests, {both['labels']:,} of them labelled:"
            " each its own; none of what was sent while recording was off",
            "greedy answers of others": f"{n_texts:,}, the same as alone from a plain server",
            "growth over the second half": ", ".join(
                f"{'drain' if name == 'drain' else 'model ' + name} {share:+.2%}"
                for name, (share, _) in changes.items()
            ),
        },
    )
    for name, (share, files) in changes.items():
        assert share < (0.02 if whole else 0.1), name
        assert files <= 2, f"{name} keeps files open"


def test_lives_with_a_ring_that_is_too_small(
    size: Callable[[str], int], figures: Callable[..., None], runtime, model_file, tmp_path: Path
) -> None:
    """GIVEN rings that overflow again and again WHEN the same happens THEN what is missing is counted, and what is
    there is right.
    """
    seconds = size("lossy_lives_seconds")
    lived = live(
        seconds, runtime, model_file, tmp_path, ["--ring-size", "64KiB", "--on-full", "drop"], stalls=True
    )
    seen = held_against(lived, lossy=True)
    check_texts(lived)
    both = seen["one"] + seen["two"]
    assert both["rows lost"] > 0
    assert both["events lost"] > 0
    assert both["partial"] > 0 or seconds < ALL_OF_IT_S
    assert both["exact"] > (seconds if seconds >= ALL_OF_IT_S else 0)
    figures(
        "lives",
        **{
            f"rings of 64 KiB, for {seconds} s": f"{both['rows']:,} rows here, {both['rows lost']:,} rows and"
            f" {both['events lost']:,} events lost and counted; no row or label of another request"
        },
    )
