"""A client of llama-server's HTTP interface, and the driver that sends it prompt sets."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moetrace.errors import MoetraceError
from moetrace.host.prompts import Prompt


class ServerClient:
    """Speaks to one llama-server.

    Parameters
    ----------
    url
        For example ``http://127.0.0.1:8080``.
    timeout
        Seconds to wait for an answer.
    api_key
        Of ``llama-server --api-key``.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # no proxy: the server is this machine's, or named on purpose
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """POST ``body`` (or GET without one) and give the JSON of the answer.

        Raises
        ------
        MoetraceError
            If the server is not there, or answers with an error.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        try:
            with self._open(request, timeout=timeout or self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            text = e.read().decode("utf-8", "replace")[:500]
            raise MoetraceError(f"llama-server refused {path}: {e.code} {e.reason}", why=text) from None
        except (OSError, ValueError) as e:
            raise MoetraceError(
                f"no answer from {self.url}{path}",
                why=str(getattr(e, "reason", e)),
                fix="check that llama-server runs there and that --url is right",
            ) from None

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        try:
            return bool(self.call("/health", timeout=5).get("status") == "ok")
        except MoetraceError:
            return False

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Give the token ids of a text, as the server sees a prompt."""
        answer = self.call("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})
        return [int(t) for t in answer["tokens"]]

    def n_slots(self) -> int:
        """Give the number of slots."""
        return int(self.call("/props")["total_slots"])

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Give the token ids of a prompt, chat messages through the model's own template."""
        if prompt.tokens is not None:
            return list(prompt.tokens)
        if prompt.messages is not None:
            text = self.call("/apply-template", {"messages": [dict(m) for m in prompt.messages]})["prompt"]
            return self.tokenize(text)
        return self.tokenize(prompt.text or "")


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes
    ----------
    prompt
        The prompt.
    slot
        The slot that served it; its sequence id in the trace.
    from_ns, to_ns
        Monotonic time of sending and of the last byte, nanoseconds.
    prompt_tokens, tokens
        Token ids of the prompt and of the answer. A server before December 2024 does not give the answer's: none.
    n_generated
        Number of tokens in the answer.
    text
        The generated text.
    cached
        Prompt tokens that the server took from its cache.
    """

    prompt: Prompt
    slot: int
    from_ns: int
    to_ns: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    n_generated: int
    text: str
    cached: int

    def label_line(self) -> dict[str, Any]:
        """Give the line of labels.jsonl that ties the request to its prompt (docs/format.md)."""
        return {
            "sequence": self.slot,
            "from_ns": self.from_ns,
            "to_ns": self.to_ns,
            "id": self.prompt.id,
            "label": self.prompt.label,
            "prompt": self.prompt.text,
            "n_generated": self.n_generated,
            **self.prompt.extra,
        }


def drive(
    client: ServerClient,
    prompts: Sequence[Prompt],
    *,
    n_predict: int = 128,
    n_parallel: int | None = None,
    settings: Mapping[str, Any] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Send prompts, each pinned to a slot, several at once; gives the answers in the order of the prompts.

    Parameters
    ----------
    n_predict
        Tokens to generate for prompts that do not say.
    n_parallel
        Prompts at once; at most the server's slots, which is the default.
    settings
        Further fields of llama-server's ``/completion``, for example ``temperature``. Default: greedy.
    on_answer
        Called after each answer, in the thread that received it.

    Raises
    ------
    MoetraceError
        At the first request that fails; those under way are waited for.
    """
    slots = client.n_slots()
    n_workers = min(n_parallel or slots, slots, len(prompts))
    answers: list[Answer | None] = [None] * len(prompts)
    waiting = iter(range(len(prompts)))
    lock = threading.Lock()
    failed = threading.Event()

    def work(slot: int) -> None:
        while not failed.is_set():
            with lock:
                i = next(waiting, None)
            if i is None:
                return
            try:
                answers[i] = answer = _ask(
                    client, prompts[i], slot, n_predict, settings or {"temperature": 0.0}
                )
            except BaseException:
                failed.set()
                raise
            if on_answer is not None:
                on_answer(answer)

    with ThreadPoolExecutor(n_workers, thread_name_prefix="moetrace-drive") as pool:
        futures = [pool.submit(work, slot) for slot in range(n_workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            failed.set()
            raise
    return [answer for answer in answers if answer is not None]


def _ask(
    client: ServerClient, prompt: Prompt, slot: int, n_predict: int, settings: Mapping[str, Any]
) -> Answer:
    tokens = client.prompt_tokens(prompt)
    body = {
        **settings,
        "prompt": tokens,
        "n_predict": n_predict if prompt.n_predict is None else prompt.n_predict,
        "id_slot": slot,
        "return_tokens": True,
    }
    start = time.monotonic_ns()
    answer = client.call("/completion", body)
    end = time.monotonic_ns()
    generated = tuple(int(t) for t in answer.get("tokens", ()))
    timings = answer.get("timings", {})
    # releases before September 2025 say how much of the prompt they computed, not how much they had
    computed = timings.get("prompt_n", len(tokens))
    cached = timings.get("cache_n", answer.get("tokens_evaluated", len(tokens)) - computed)
    return Answer(
        prompt=prompt,
        slot=int(answer.get("id_slot", slot)),
        from_ns=start,
        to_ns=end,
        prompt_tokens=tuple(tokens),
        tokens=generated,
        n_generated=int(answer.get("tokens_predicted", len(generated))),
        text=str(answer.get("content", "")),
        cached=int(cached),
    )
