"""A small HTTP service beside a recording: metrics, a live page, the routed experts of requests, interventions."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moetrace.errors import MoetraceError
from moetrace.host.intervene import switch
from moetrace.live.metrics import Metrics
from moetrace.live.tail import Tail
from moetrace.report.script import TEMPLATES
from moetrace.trace.request_text import called, request_text
from moetrace.trace.routed import RoutedExperts, routed_experts
from moetrace.trace.trace import Trace

_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/page.js": (_PAGE / "page.js", "text/javascript"),
    "/page.css": (_PAGE / "page.css", "text/css"),
    "/text.mjs": (TEMPLATES / "text.mjs", "text/javascript"),  # the report's own
}
#: nothing from elsewhere, and nothing inline
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_EVERY_S = 1.0  # how often the page is told
_POLL_S = 0.2
LONGEST_WAIT_S = 300.0
LONGEST_TEXT = 4000  # tokens that the page colours
_LISTED = 1000
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Service:
    """What is asked over HTTP, of one trace.

    Parameters
    ----------
    path, model
        As for :class:`~moetrace.live.tail.Tail`.
    token
        What clients must send as ``Authorization: Bearer TOKEN``; None: nothing, and interventions cannot be set.
    hosts
        Names by which it may be called (the Host header); ``*`` for all.
    experts, domains
        As for :class:`~moetrace.live.metrics.Metrics`.
    """

    def __init__(
        self,
        path: Path,
        model: str | None = None,
        *,
        token: str | None = None,
        hosts: list[str] | None = None,
        experts: bool = False,
        domains: bool = False,
    ) -> None:
        self._path, self._model, self._token = path, model, token
        self._tail = Tail(path, model)
        # one thread reads the trace: nobody waits for a lock, and memory is not spread over many threads' heaps
        self._reader = ThreadPoolExecutor(1, "moetrace-reader")
        self._registry = CollectorRegistry()
        self._registry.register(_Lazy(Metrics(self._tail.look, experts=experts, domains=domains)))
        routes = [
            Route("/", self._page),
            Route("/page.js", self._page),
            Route("/page.css", self._page),
            Route("/text.mjs", self._page),
            Route("/favicon.ico", self._no_icon),
            Route("/metrics", self._metrics),
            Route("/events", self._events),
            Route("/requests", self._requests),
            Route("/requests/{request}/experts", self._experts),
            Route("/requests/{request}/text", self._text),
            Route("/interventions", self._interventions, methods=["GET"]),
            Route("/interventions", self._set_intervention, methods=["POST"]),
        ]
        allowed = hosts or ["127.0.0.1", "localhost"]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)],
            exception_handlers={MoetraceError: _refused},
        )

    def close(self) -> None:
        """Let go of the trace."""
        self._reader.shutdown()
        self._tail.close()

    async def _read(self, what: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T:
        """Do it in the thread that reads the trace, one after the other."""
        work = functools.partial(what, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    # -- what is served

    async def _page(self, request: Request) -> Response:
        file, kind = _FILES.get(request.url.path, (_PAGE / "page.html", "text/html"))
        return Response(file.read_bytes(), media_type=kind, headers=_HEADERS)

    async def _no_icon(self, request: Request) -> Response:
        return Response(status_code=204, headers=_HEADERS)

    async def _metrics(self, request: Request) -> Response:
        self._allow(request)
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        said = await self._read(encode, self._registry)
        return Response(said, headers=_HEADERS | {"content-type": kind})

    async def _events(self, request: Request) -> Response:
        self._allow(request)

        async def told() -> AsyncIterator[str]:
            while not await request.is_disconnected():
                try:
                    said = (await self._read(self._tail.look)).to_json()
                except MoetraceError as e:
                    said = {"waiting": e.what}
                yield f"data: {json.dumps(said, allow_nan=False)}\n\n"
                await asyncio.sleep(_EVERY_S)

        return StreamingResponse(told(), media_type="text/event-stream", headers=_HEADERS)

    async def _requests(self, request: Request) -> Response:
        """Requests, the latest first: ``?slot=N``, ``?after=NS`` (``start_ns``), ``?id=ID``."""
        self._allow(request)
        return JSONResponse(await self._read(self._listed, request), headers=_HEADERS)

    def _listed(self, request: Request) -> list[dict[str, Any]]:
        table = self._fresh().requests
        for name, column in (("slot", "slot"), ("after", "start_ns")):
            value = request.query_params.get(name)
            if value is not None:
                wanted = _number(value, name)
                table = table[table[column] >= wanted] if name == "after" else table[table[column] == wanted]
        if (said := request.query_params.get("id")) is not None:
            table = table[table["id"] == said]
        columns = [
            "id",
            "label",
            "slot",
            "n_prompt",
            "n_cached",
            "n_prefill",
            "n_decode",
            "n_lost",
            "start_ns",
        ]
        rows = table[columns].iloc[::-1].head(_LISTED).reset_index().to_dict("records")
        return [{str(k): _plain(v) for k, v in row.items()} for row in rows]

    async def _experts(self, request: Request) -> Response:
        """One request's routed experts: JSON, or .npy (``Accept: application/x-npy`` or ``?format=npy``).

        ``?tokens=N&wait=SECONDS``: the request had N tokens, prompt and answer; answer when they are there.
        """
        self._allow(request)
        asked = request.path_params["request"]
        tokens = request.query_params.get("tokens")
        n_tokens = None if tokens is None else _number(tokens, "tokens")
        wait = min(float(_number(request.query_params.get("wait", "0"), "wait")), LONGEST_WAIT_S)
        ends = asyncio.get_running_loop().time() + wait
        while True:
            began = asyncio.get_running_loop().time()
            late = began >= ends
            try:
                found = await self._read(self._found, asked, n_tokens)
            except _NotThereError:  # yet
                if late:
                    raise
            else:
                if late or not found.running:
                    break
            took = asyncio.get_running_loop().time() - began
            await asyncio.sleep(max(_POLL_S, took))  # others ask, too
        npy = request.query_params.get("format") == "npy" or "x-npy" in request.headers.get("accept", "")
        if npy:
            more = {"x-moetrace-complete": str(found.complete).lower()}
            return Response(found.npy(), media_type="application/x-npy", headers=_HEADERS | more)
        return JSONResponse(found.to_json(), headers=_HEADERS)

    def _fresh(self) -> Trace:
        trace = self._tail.trace
        if trace.live:
            trace.refresh()
        return trace

    def _found(self, asked: str, n_tokens: int | None) -> RoutedExperts:
        trace = self._fresh()
        return routed_experts(trace, _one(trace, asked), n_tokens)

    async def _text(self, request: Request) -> Response:
        """One request's words and their experts in one layer, ``?layer=N``: what the page colours."""
        self._allow(request)
        asked, layer = request.path_params["request"], request.query_params.get("layer")
        return JSONResponse(await self._read(self._worded, asked, layer), headers=_HEADERS)

    def _worded(self, asked: str, layer: str | None) -> dict[str, Any]:
        trace = self._fresh()
        layers = trace.layers.tolist()
        wanted = layers[len(layers) // 2] if layer is None else _number(layer, "layer")
        return request_text(trace, _one(trace, asked), wanted, LONGEST_TEXT).to_json()

    async def _interventions(self, request: Request) -> Response:
        self._allow(request)
        now = await self._read(self._tail.look)
        return JSONResponse(
            {context.name: context.intervention for context in now.contexts}, headers=_HEADERS
        )

    async def _set_intervention(self, request: Request) -> Response:
        """``{"specs": ["ablate:7:3"]}``, as ``moetrace intervene`` takes them; an empty list: off."""
        if self._token is None:
            raise _ForbiddenError("interventions can be set only where there is a token")
        self._allow(request)
        try:
            specs = (await request.json())["specs"]
        except (ValueError, KeyError, TypeError):
            specs = None
        if not isinstance(specs, list) or not all(isinstance(one, str) for one in specs):
            return JSONResponse({"error": 'give {"specs": ["ablate:7:3"]}'}, 400, headers=_HEADERS)
        number = await asyncio.to_thread(switch, self._path, specs, model=self._model)
        return JSONResponse({"intervention": number}, headers=_HEADERS)

    def _allow(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        given = given or request.query_params.get("token", "")  # the page's own, which cannot send headers
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise _ForbiddenError("the token is not right")


class _Lazy:
    """A collector that is not asked when it is registered."""

    def __init__(self, metrics: Metrics) -> None:
        self.collect = metrics.collect

    def describe(self) -> list[Any]:
        """Nothing: names are known at the first scrape."""
        return []


class _ForbiddenError(MoetraceError):
    pass


class _NotThereError(MoetraceError):
    pass


_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
}


def _refused(request: Request, e: Exception) -> Response:
    code = 403 if isinstance(e, _ForbiddenError) else 404 if isinstance(e, _NotThereError) else 400
    told = {"error": getattr(e, "what", str(e)), "why": getattr(e, "why", ""), "fix": getattr(e, "fix", "")}
    return JSONResponse({k: v for k, v in told.items() if v}, code, headers=_HEADERS)


def _number(value: str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise MoetraceError(f"{name}={value!r} is no whole number") from None


def _one(trace: Trace, asked: str) -> int:
    found = called(trace, asked)
    if len(found) > 1:
        raise MoetraceError(f"{len(found)} requests are called {asked!r}", fix="ask by number: /requests?id=")
    if not found:
        raise _NotThereError(f"there is no request {asked!r}")
    return found[0]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    return value.item() if isinstance(value, np.generic) else value


def secret(path: str | None, environment: Callable[[str], str | None]) -> str | None:
    """The token: a file's first line, or ``MOETRACE_TOKEN``; None if neither is there. Raises MoetraceError."""
    if path is None:
        return environment("MOETRACE_TOKEN") or None
    try:
        token = Path(path).read_text(encoding="utf-8").split("\n")[0].strip()
    except OSError as e:
        raise MoetraceError(f"{path} cannot be read", why=e.strerror or str(e)) from e
    if not token:
        raise MoetraceError(f"{path} holds no token", fix="write one line, for example: openssl rand -hex 32")
    return token
