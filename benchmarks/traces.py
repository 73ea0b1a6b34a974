"""Traces at the size of real models: real routing where it is at hand, and worlds made for the purpose.

    python benchmarks/traces.py NAME FOLDER

A made world has skewed experts, domains that prefer some more the deeper the layer, words that do too, and tokens
that resemble the one before; lengths of prompts and answers are log-normal, and 16 slots are served at once.
"""

from __future__ import annotations

import heapq
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.trace.labels import append_labels
from moetrace.trace.record import COUNTERS, EventCode, Field, RowFlag
from moetrace.trace.rows import Layout
from moetrace.trace.store import write_vocabulary
from moetrace.trace.writer import TraceWriter

DOMAINS = ("chat", "code", "creative", "factual", "math", "translation")
SLOTS = 16
UBATCH = 512
WORDS = 997  # kinds of tokens that prefer experts of their own


@dataclass(frozen=True)
class Size:
    """A model's shape, and how much of it is recorded."""

    layers: int
    experts: int
    used: int
    tokens: int
    requests: int


SIZES = {
    "48x128": Size(48, 128, 8, 100_000, 1_000),
    "58x256": Size(58, 256, 8, 100_000, 1_000),
    "48x512": Size(48, 512, 10, 100_000, 1_000),
    "24x32": Size(24, 32, 4, 10_000_000, 100_000),
    "24x32-hour": Size(24, 32, 4, 1_000_000, 10_000),
}


def write(
    path: Path,
    name: str,
    size: Size,
    request: NDArray[np.int64],
    within: NDArray[np.int64],
    step: NDArray[np.int64],
    n_prompt: NDArray[np.int64],
    choose: Any,
    labels: list[dict[str, Any]],
    vocabulary: list[bytes],
) -> None:
    """Write rows in the order in which a server computed them.

    ``request`` and ``within`` (N,) say whose token it is and which of its request, ``step`` (ascending) in which
    ubatch it was computed; the first ``n_prompt`` (R,) of each request are its prompt. ``choose(a, b)`` gives experts
    (b - a, L, k), weights or None, and token ids of rows a to b.
    """
    n, order = len(request), np.arange(len(request))
    first = np.full(len(n_prompt), n)
    np.minimum.at(first, request, order)
    last = np.zeros(len(n_prompt), np.int64)
    np.maximum.at(last, request, order)
    slot = _slots(first, last)
    dtype = "|u1" if size.experts < 256 else "<u2"
    fields = [Field("state", "|u1", (size.layers,), 64), Field("experts", dtype, (size.layers, size.used), 0)]
    weighted = choose(0, 1)[1] is not None
    if weighted:
        fields.append(Field("weights", "<f4", (size.layers, size.used), 0))
    numbers = tuple(range(size.layers))
    layout = Layout(numbers, (size.experts,) * size.layers, (size.used,) * size.layers, tuple(fields))
    trace = TraceWriter(path, command=["llama-server", "-m", f"{name}.gguf"], force=True)
    context = trace.add_context("ctx0", _meta(name, size, layout), layout, epoch_ns=1_700_000_000_000_000_000)
    events = np.sort(first)
    block = max(4096, (16 << 20) // (size.layers * size.used * (5 if weighted else 2)))
    for a in range(0, n, block):
        b = min(a + block, n)
        experts, weights, token = choose(a, b)
        generated = within[a:b] >= n_prompt[request[a:b]]
        output = within[a:b] >= n_prompt[request[a:b]] - 1
        rows = {
            "serial": order[a:b].astype(np.uint64),
            "time_ns": step[a:b] * 20_000_000,
            "step": step[a:b].astype(np.uint32),
            "batch": step[a:b].astype(np.uint32),
            "token": token.astype(np.int32),
            "position": within[a:b].astype(np.int32),
            "sequence": slot[request[a:b]].astype(np.int32),
            "n_sequences": np.ones(b - a, np.uint16),
            "flags": (output * RowFlag.OUTPUT + generated * RowFlag.GENERATED).astype(np.uint32),
            "row": (order[a:b] - np.searchsorted(step, step[a:b])).astype(np.uint32),
            "state": np.ones((b - a, size.layers), np.uint8),
            "experts": experts,
        }
        if weighted:
            rows["weights"] = weights
        mine = events[(events >= a) & (events < b)]
        context.append_columns(rows, _launches(mine, step[mine], slot[request[mine]]))
        context.seal()
    counters = dict.fromkeys(COUNTERS, 0)
    context.close(counters | {"rows_produced": n, "rows_committed": n, "events_committed": len(events)})
    write_vocabulary(path, vocabulary)
    rank = np.argsort(np.argsort(first))
    append_labels(path, [{"request": int(rank[i]), **label} for i, label in enumerate(labels)])
    trace.close(exit_code=0)


def _slots(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give each request a slot that is free while it is served."""
    free = list(range(len(first)))[::-1]
    ending: list[tuple[int, int]] = []
    slot = np.zeros(len(first), np.int64)
    for i in np.argsort(first).tolist():
        while ending and ending[0][0] < first[i]:
            free.append(heapq.heappop(ending)[1])
        slot[i] = free.pop()
        heapq.heappush(ending, (int(last[i]), int(slot[i])))
    return slot


def _launches(
    serial: NDArray[np.int64], step: NDArray[np.int64], slot: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    n = len(serial)
    return {
        "serial": serial.astype(np.uint64),
        "time_ns": step * 20_000_000,
        "code": np.full(n, EventCode.LAUNCH, np.int32),
        "sequence": slot.astype(np.int32),
        "p0": np.full(n, -1, np.int32),
        "p1": np.full(n, -1, np.int32),
        "arg": np.zeros(n, np.int32),
    }


def _meta(name: str, size: Size, layout: Layout) -> dict[str, Any]:
    return {
        "role": "main",
        "pid": 1,
        "collector": "tap",
        "channels": [field.name for field in layout.fields[1:]],
        "model": {
            "name": name,
            "architecture": "made",
            "n_layer": size.layers,
            "n_embd": 2048,
            "n_expert": size.experts,
            "n_expert_used": size.used,
            "n_ctx": 32768,
            "n_ubatch": UBATCH,
            "n_seq_max": SLOTS,
        },
        "consumers": [["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]] * size.layers,
        "routers": [[layer, size.experts, size.used, 0, 0, 1] for layer in range(size.layers)],
    }


class Routing:
    """Experts of a made world: a pool of tokens for each domain, of which requests take stretches."""

    def __init__(self, size: Size, rng: np.random.Generator, pool: int = 4096) -> None:
        self.pool = pool
        n_domains = len(DOMAINS)
        self.tokens = np.minimum(rng.zipf(1.3, (n_domains, pool)), 100_000).astype(np.int32)
        shape = (n_domains, pool, size.layers, size.used)
        self.experts = np.empty(shape, np.uint8 if size.experts < 256 else np.uint16)
        self.weights = np.empty(shape, np.float32)
        for layer in range(size.layers):
            skew = -0.4 * np.log1p(np.arange(size.experts))[rng.permutation(size.experts)]
            of_domain = rng.normal(0, 0.2 + 0.4 * layer / size.layers, (n_domains, size.experts))
            of_word = rng.normal(0, 0.6, (WORDS, size.experts))
            for domain in range(n_domains):
                noise = rng.standard_normal((pool, size.experts))
                noise[1:] = 0.85 * noise[1:] + 0.5 * noise[:-1]  # a token resembles the one before
                score = noise + skew + of_domain[domain] + of_word[self.tokens[domain] % WORDS]
                top = np.argsort(-score, axis=1)[:, : size.used]
                weight = np.exp(np.take_along_axis(score, top, 1))
                self.experts[domain, :, layer] = top
                self.weights[domain, :, layer] = weight / weight.sum(axis=1, keepdims=True)


def made(name: str, path: Path, seed: int = 0) -> None:
    """Write a made world of this size."""
    size = SIZES[name]
    rng = np.random.default_rng((seed, size.experts))
    n = rng.lognormal(0, 1, (2, size.requests))
    n_prompt, n_answer = np.maximum(1, n * size.tokens / 2 / n.sum(axis=1, keepdims=True)).astype(np.int64)
    domain = rng.integers(0, len(DOMAINS), size.requests)
    start = rng.integers(0, 4096, size.requests)
    # a prompt comes in ubatches, an answer token by token: when each token is computed
    total = n_prompt + n_answer
    request = np.repeat(np.arange(size.requests), total)
    within = np.arange(len(request)) - np.repeat(np.cumsum(total) - total, total)
    steps = -(-n_prompt // UBATCH) + n_answer
    queue = np.cumsum(steps) - steps
    prompt = n_prompt[request]
    step = queue[request] // SLOTS + np.where(
        within < prompt, within // UBATCH, -(-prompt // UBATCH) + within - prompt
    )
    order = np.lexsort((within, request, step))
    request, within, step = request[order], within[order], step[order]
    world = Routing(size, rng)

    def choose(a: int, b: int) -> tuple[Any, Any, Any]:
        who = request[a:b]
        at = (start[who] + within[a:b]) % world.pool
        d = domain[who]
        return world.experts[d, at], world.weights[d, at], world.tokens[d, at]

    labels = [{"id": f"r{seed}-{i}", "label": DOMAINS[d]} for i, d in enumerate(domain.tolist())]
    vocabulary = [b" w%d" % i if i % 3 else b"%d." % i for i in range(100_001)]
    write(path, name, size, request, within, step, n_prompt, choose, labels, vocabulary)


def mmlu(source: Path, path: Path) -> None:
    """Write what gpt-oss-20b generated in answer to 80 questions: a folder of DOMAIN.npz and vocabulary.json."""
    experts, tokens, lengths, labels = [], [], [], []
    for file in sorted(source.glob("*.npz")):
        with np.load(file) as data:
            experts.append(data["experts"])
            tokens.append(data["tokens"])
            lengths.append(data["lengths"])
            labels += [{"id": f"{file.stem}-{i}", "label": file.stem} for i in range(len(data["lengths"]))]
    all_experts, all_tokens, sizes = (np.concatenate(x) for x in (experts, tokens, lengths))
    request = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(request)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = Size(all_experts.shape[1], 32, all_experts.shape[2], len(request), len(sizes))
    vocabulary = [text.encode() for text in json.loads((source / "vocabulary.json").read_text("utf-8"))]

    def choose(a: int, b: int) -> tuple[Any, Any, Any]:
        return all_experts[a:b], None, all_tokens[a:b]

    nothing = np.zeros(len(sizes), np.int64)
    write(
        path,
        "gpt-oss-20b",
        size,
        request,
        within,
        np.arange(len(request)),
        nothing,
        choose,
        labels,
        vocabulary,
    )


def main(name: str, folder: str) -> None:
    """Write the trace of this name into the folder."""
    path = Path(folder) / f"{name}.moet"
    if name in SIZES:
        made(name, path)
    else:
        mmlu(Path(name), Path(folder) / f"{Path(name).name}.moet")


if __name__ == "__main__":
    main(*sys.argv[1:])
