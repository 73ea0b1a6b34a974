"""A client of llama-server's HTTP interface, and the driver that sends it prompt sets."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from moetrace.errors import MoetraceError, UsageError
from moetrace.host.prompts import MAX_TOKENS, Prompt
from moetrace.trace.labels import request_line


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
    model
        Which of its models is meant, where it has several (router mode): its name or an alias.

    Attributes
    ----------
    has_several
        Whether it is a router; known once :meth:`n_slots` was asked.

    Raises
    ------
    UsageError
        If the key cannot be sent.
    """

    def __init__(
        self, url: str, *, timeout: float = 600.0, api_key: str | None = None, model: str | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.model = model
        self.has_several = False
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                raise UsageError(
                    "the API key cannot be sent", why="it has characters that HTTP does not take in a header"
                )
            self._headers["Authorization"] = f"Bearer {api_key}"
        # no proxy: the server is this machine's, or named on purpose
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """POST ``body`` (or GET without one) to the model that is meant, and give the JSON of the answer.

        Raises
        ------
        MoetraceError
            If the server is not there, or answers with an error.
        """
        if self.model is not None and body is not None:
            body = {"model": self.model, **body}
        elif self.model is not None and path == "/props":
            path += "?" + urllib.parse.urlencode({"model": self.model})
        return self._send(path, body, timeout)

    def _send(self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        try:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
            with self._open(request, timeout=timeout or self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            text = e.read().decode("utf-8", "replace")[:500]
            raise MoetraceError(f"llama-server refused {path}: {e.code} {e.reason}", why=text) from None
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as e:
            raise MoetraceError(
                f"no answer from {self.url}{path}",
                why=str(getattr(e, "reason", e)),
                fix="check that llama-server runs there and that --url is right",
            ) from None

    def is_ready(self) -> bool:
        """Whether the server answers; one with a single model: whether that is loaded."""
        try:
            return bool(self.call("/health", timeout=5).get("status") == "ok")
        except MoetraceError:
            return False

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Give the token ids of a text, as the server sees a prompt."""
        answer = self.call("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})
        return [int(t) for t in answer["tokens"]]

    def n_slots(self) -> int:
        """Give the number of slots of the model that is meant; a router loads it for that.

        Raises
        ------
        UsageError
            If the server has several models and none is meant, or has not the one that is; names those it has.
        """
        self._check_model()
        props = self.call("/props")
        if type(n := props.get("total_slots")) is int and n > 0:
            return n
        raise MoetraceError(
            f"{self.url} does not say how many slots it has",
            why="its /props has no total_slots",
            fix="check that it is a llama-server that serves completions",
        )

    def _check_model(self) -> None:
        """Make :attr:`model` the server's own name for the model that is meant; refuse what it has not."""
        asked, props = self.model, self._send("/props")
        self.has_several = isinstance(props, dict) and props.get("role") == "router"
        if asked is None and not self.has_several:
            return
        listed = self._send("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = {
            str(entry["id"]): [str(entry["id"]), *map(str, entry.get("aliases") or [])]
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict) and "id" in entry
        }
        have = f"it has {', '.join(names) or 'none'}"
        if asked is None:
            raise UsageError(
                f"{self.url} serves several models, and none was named",
                why=have,
                fix="name one: --model NAME (in Python ServerClient(..., model=NAME))",
            )
        found = [name for name, also in names.items() if asked in also]
        # a server with a single model may call it by its file
        file = PurePath(asked)
        files = {asked, file.name, file.stem} if file.suffix == ".gguf" else {asked}
        found = found or [name for name in names if {PurePath(name).name, PurePath(name).stem} & files]
        if len(found) != 1:
            raise UsageError(
                f"{self.url} has no model {asked!r}", why=have, fix="name one of these with --model"
            )
        self.model = found[0]

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
        The slot that served it, its sequence id in the trace; None if the server does not say.
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
    model
        The model that was asked, if the server has several.
    """

    prompt: Prompt
    slot: int | None
    from_ns: int
    to_ns: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    n_generated: int
    text: str
    cached: int
    model: str | None = None

    def label_line(self) -> dict[str, Any]:
        """Give the line of labels.jsonl that ties the request to its prompt (docs/format.md)."""
        return request_line(
            sequence=self.slot,
            from_ns=self.from_ns,
            to_ns=self.to_ns,
            prompt_tokens=self.prompt_tokens,
            tokens=self.tokens if len(self.tokens) == self.n_generated else None,
            n_generated=self.n_generated,
            n_cached=self.cached,
            model=self.model,
            id=self.prompt.id,
            label=self.prompt.label,
            prompt=self.prompt.text,
            extra=self.prompt.extra,
        )


def drive(
    client: ServerClient,
    prompts: Sequence[Prompt],
    *,
    n_predict: int = 128,
    n_parallel: int | None = None,
    settings: Mapping[str, Any] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Send prompts, several at once; gives the answers in the order of the prompts.

    The server chooses the slots, as for any client: to name one would let it load a prompt's cached state into a slot
    that still answers somebody else.

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
    UsageError
        If the numbers make no sense, or the server has several models and the client names none of them.
    MoetraceError
        At the first request that fails; those under way are waited for.
    """
    if n_parallel is not None and n_parallel < 1:
        raise UsageError(f"{n_parallel} prompts at once", fix="give at least 1")
    if not -2 <= n_predict <= MAX_TOKENS:
        raise UsageError(f"{n_predict} tokens to generate", fix=f"give 0 to {MAX_TOKENS}, or -1 for no limit")
    slots = client.n_slots()
    n_workers = max(1, min(n_parallel or slots, slots, len(prompts)))
    answers: list[Answer | None] = [None] * len(prompts)
    waiting = iter(range(len(prompts)))
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        while not failed.is_set():
            with lock:
                i = next(waiting, None)
            if i is None:
                return
            try:
                answers[i] = answer = _ask(client, prompts[i], n_predict, settings or {"temperature": 0.0})
            except BaseException:
                failed.set()
                raise
            if on_answer is not None:
                on_answer(answer)

    with ThreadPoolExecutor(n_workers, thread_name_prefix="moetrace-drive") as pool:
        futures = [pool.submit(work) for _ in range(n_workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            failed.set()
            raise
    return [answer for answer in answers if answer is not None]


def _ask(client: ServerClient, prompt: Prompt, n_predict: int, settings: Mapping[str, Any]) -> Answer:
    tokens = client.prompt_tokens(prompt)
    body = {
        **settings,
        "prompt": tokens,
        "n_predict": n_predict if prompt.n_predict is None else prompt.n_predict,
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
    slot = answer.get("id_slot")
    return Answer(
        prompt=prompt,
        slot=slot if type(slot) is int and slot >= 0 else None,
        from_ns=start,
        to_ns=end,
        prompt_tokens=tuple(tokens),
        tokens=generated,
        n_generated=int(answer.get("tokens_predicted", len(generated))),
        text=str(answer.get("content", "")),
        cached=min(max(int(cached), 0), len(tokens)),
        model=client.model if client.has_several else None,
    )
