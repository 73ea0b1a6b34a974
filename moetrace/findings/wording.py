"""Numbers in sentences: intervals, layers, and rows to speak of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moetrace.numbers import number

if TYPE_CHECKING:
    from moetrace.trace.trace import Trace


def span(value: float, low: float, high: float, form: str = ".3f") -> str:
    """``0.054 (0.012 to 0.096)``; without an interval ``0.054 (no interval)``."""
    if np.isnan(value):
        return "not known"
    if np.isnan(low) or np.isnan(high):
        return f"{value:{form}} (no interval)"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def listed(names: Iterable[object], at_most: int = 10, sep: str = ", ") -> str:
    """``a, b, c``; of many ``a, b, c and 27 more``."""
    every = [str(name) for name in names]
    more = len(every) - at_most
    return sep.join(every[:at_most]) + (f" and {more:,} more" if more > 0 else "")


def file_names(names: Iterable[object]) -> list[str]:
    """Names that others chose as parts of file names: ``C++ code!`` is ``c-code``; alike ones get a number."""
    out: list[str] = []
    for name in names:
        stem = "-".join(re.findall(r"\w+", str(name).lower()))[:40].strip("-_") or "unnamed"
        found, n = stem, 1
        while found in out or found == "all":
            n += 1
            found = f"{stem}-{n}"
        out.append(found)
    return out


def events_lost(traces: Iterable[Trace]) -> str:
    """What it means that events were lost, a sentence; empty if none were."""
    lossy = [trace for trace in traces if trace.loss.events_lost]
    if not lossy:
        return ""
    n = sum(trace.loss.events_lost for trace in lossy)
    return f"{number(n, 'event')} of slots and their memory {'was' if n == 1 else 'were'} lost: " + (
        "where requests begin is known all the same, but counts of requests around them are not certain and"
        " left blank."
        if all(trace.layout.numbered for trace in lossy)
        else "this recording does not tell where, so tokens of one request may be counted to another."
    )


def not_computed(entries: pd.DataFrame) -> str:
    """Which layers lack entries that were not computed, a sentence; empty if none does.

    ``entries`` is of :func:`moetrace.analysis.counts.overview.layers`.
    """
    some = entries[entries["not_computed"] > 0]["layer"]
    return (
        f"Layer {layer_list(some)} lacks entries that llama.cpp did not compute, because no output was asked for"
        " there: its numbers rest on fewer tokens."
        if len(some)
        else ""
    )


def layer_list(layers: Iterable[Any]) -> str:
    """``0-5, 23``."""
    numbers = sorted(int(n) for n in layers)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def of_layers(layers: Iterable[Any], n: int) -> str:
    """``in layers 5-7 (3 of 8)``, ``in all 8 layers``, ``in none of the 8 layers``."""
    numbers = list(layers)
    if len(numbers) == n:
        return f"in all {n} layers" if n > 1 else "in the one layer"
    if not numbers:
        return f"in none of the {n} layers" if n > 1 else "not in the one layer"
    return f"in layer{'s' if len(numbers) > 1 else ''} {layer_list(numbers)} ({len(numbers)} of {n})"


def p_value(p: float) -> str:
    """``p = 0.032``, ``p = 0.001``."""
    return f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def best(table: pd.DataFrame, column: str, *, least: bool = False) -> dict[str, Any] | None:
    """The row of the largest (or least) value of a column, NaN left out; None if there is none."""
    values = table[column].to_numpy(dtype=np.float64)
    if np.isnan(values).all():
        return None
    where = int(np.nanargmin(values) if least else np.nanargmax(values))
    return {str(name): value for name, value in table.iloc[where].items()}
