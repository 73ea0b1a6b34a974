"""What different llama-servers answer, taken the same way."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from moetrace.__main__ import main
from moetrace.errors import UsageError
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

    def _send(self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
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


class Router(ServerClient):
    """A router of two models, or a server of one; without a server."""

    several = True

    def __init__(self, model: str | None = None) -> None:
        super().__init__("http://127.0.0.1:1", model=model)

    def _send(self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        if path == "/v1/models" and not self.several:
            return {"data": [{"id": "m.gguf"}]}
        if path == "/v1/models":
            return {"data": [{"id": "org/a:Q4", "aliases": ["small", "s"]}, {"id": "b"}]}
        if path == "/props" and self.several:
            return {"role": "router", "model_path": "none"}
        if path.startswith("/props"):
            return {"total_slots": 2}
        return {"content": "x", "id_slot": 0, "tokens_predicted": 1, "tokens": [5], "timings": {"cache_n": 0}}


@pytest.mark.parametrize("model", [None, "c", ""])
def test_a_router_names_its_models(model: str | None) -> None:
    with pytest.raises(UsageError) as e:
        drive(Router(model), [Prompt(id="a", tokens=(1, 2))])
    assert "org/a:Q4, b" in e.value.why
    assert "--model" in e.value.fix


@pytest.mark.parametrize(("model", "name"), [("small", "org/a:Q4"), ("org/a:Q4", "org/a:Q4"), ("b", "b")])
def test_a_label_names_the_model_as_the_router_does(model: str, name: str) -> None:
    (answer,) = drive(Router(model), [Prompt(id="a", tokens=(1, 2))])
    assert answer.label_line()["model"] == name


@pytest.mark.parametrize(
    "numbers", [{"n_parallel": 0}, {"n_parallel": -1}, {"n_predict": 10**20}, {"n_predict": -3}]
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        drive(OneServer(ANSWERS["May 2025"]), [Prompt(id="a", tokens=(1, 2))], **numbers)


@pytest.fixture
def real() -> Any:
    """A server that keeps the paths, headers and bodies it gets."""
    got: list[tuple[str, str | None, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            got.append((self.path, self.headers["Authorization"], body))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def test_every_call_that_takes_it_has_the_model(real: Any) -> None:
    url, got = real
    client = ServerClient(url, model="org/a b")
    for path in ("/completion", "/tokenize", "/apply-template"):
        client.call(path, {"x": 1})
    client.call("/props")
    client.call("/v1/models")
    assert [(path, body and body["model"]) for path, _, body in got] == [
        ("/completion", "org/a b"), ("/tokenize", "org/a b"), ("/apply-template", "org/a b"),
        ("/props?model=org%2Fa+b", None), ("/v1/models", None),
    ]  # fmt: skip


def test_an_api_key_need_not_be_in_the_command(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = real
    prompts, file = tmp_path / "p.jsonl", tmp_path / "key"
    prompts.write_text('{"prompt": "x"}\n')
    file.write_text("from-file\nanother\n")
    drive_it = ["drive", "-f", str(prompts), "--url", url]
    monkeypatch.setenv("LLAMA_API_KEY", "from-environment,another")
    for given, key in (
        ([], "from-environment"),
        (["--api-key-file", str(file)], "from-file"),
        (["--api-key", "given", "--api-key-file", str(file)], "given"),
    ):
        got.clear()
        assert main([*drive_it, *given]) == 1  # it has no slots
        assert {header for _, header, _ in got} == {f"Bearer {key}"}
    file.write_text("\n")
    assert main([*drive_it, "--api-key-file", str(file)]) == 2
    assert main([*drive_it, "--api-key-file", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("key", ["a\nb", "schl\u00fcssel"])
def test_a_key_that_no_header_takes_is_not_shown(key: str) -> None:
    with pytest.raises(UsageError) as e:
        ServerClient("http://127.0.0.1:1", api_key=key)
    assert key not in str(e.value)
