"""A few requests' texts with their experts, for the page's text view; :mod:`~moetrace.report.explorer` packs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd

from moetrace.report.explorer import Arrays
from moetrace.trace.request_text import RequestText, decoding, request_text
from moetrace.trace.trace import Trace

_MOST = 12
_LONGEST = 400  # tokens


def texts(traces: Sequence[Trace], max_entries: int) -> tuple[dict[str, Any], Arrays]:
    """Gather header and arrays; both empty where no words are known or nothing fits.

    Of the first trace whose words are known: requests of every label, one after the other, those of which nothing is
    lost first, as many as ``max_entries`` (tokens × layers × k) allow.

    The header's ``texts`` are number, name, the tokens shown (``n``) and all (``of``); ``pieces`` their tokens' texts.
    Arrays, of all tokens shown: ``text_expert`` (n, L, k) u2, 65535 where there is none; ``text_weight`` (n, L, k) f2,
    if known; ``text_position`` (n,) i4; ``text_generated`` (n,) u1.
    """
    trace = next((trace for trace in traces if trace.vocabulary is not None), None)
    if trace is None or not len(trace.layers):
        return {}, {}
    total = max_entries // (len(trace.layers) * int(trace.n_expert_used.max()))
    longest = min(_LONGEST, max(total // 6, 48))
    told: list[dict[str, Any]] = []
    pieces: list[str] = []
    parts: list[RequestText] = []
    computed = (trace.requests["n_prefill"] + trace.requests["n_decode"]).to_dict()
    for number in _chosen(trace.requests):
        if len(told) == _MOST or total < 1:
            break
        text = request_text(trace, number, max_tokens=min(longest, total))
        if not text.pieces:
            continue
        name = text.id or f"request {number}"
        told.append(
            {
                "number": number,
                "name": f"{name} · {text.label}" if text.label else name,
                "n": len(text.pieces),
                "of": int(computed[number]),
            }
        )
        pieces += text.pieces
        parts.append(text)
        total -= len(text.pieces)
    if not told:
        return {}, {}
    chosen = np.concatenate([part.chosen() for part in parts])
    arrays: Arrays = {
        "text_expert": np.where(chosen < 0, 65535, chosen).astype("<u2"),
        "text_position": np.concatenate([part.positions for part in parts]).astype("<i4"),
        "text_generated": np.concatenate([decoding(part.phase) for part in parts]).astype("u1"),
    }
    weights = [part.weights for part in parts if part.weights is not None]
    if len(weights) == len(parts):
        arrays["text_weight"] = np.concatenate(weights).astype("<f2")
    return {"texts": told, "pieces": pieces}, arrays


def _chosen(requests: pd.DataFrame) -> Iterator[int]:
    """Numbers of requests with rows, whole ones first, the labels in turns; of equal prompts one."""
    there = requests[(requests["n_prefill"] + requests["n_decode"]) > 0]
    known = there["prompt"].notna()
    there = there[~(known & there["prompt"].duplicated())]
    there = there.assign(lost=there["n_lost"].fillna(0) > 0).sort_values("lost", kind="stable")
    groups = [
        group.index[:_MOST].tolist() for _, group in there.groupby(there["label"].fillna(""), sort=True)
    ]
    for turn in zip_longest(*groups):
        yield from (int(number) for number in turn if number is not None)
