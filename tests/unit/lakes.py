"""The SQL of docs/lake.md, and what moetrace itself says to the same questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moetrace import analysis
from moetrace.analysis.counts.chosen import in_text
from moetrace.analysis.counts.from_trace import Routing
from moetrace.trace.lake import write_lake
from moetrace.trace.trace import open_trace

DOC = Path(__file__).parents[2] / "docs" / "lake.md"


def documented() -> dict[str, str]:
    """SQL by name: ``duckdb`` and ``spark`` are the views, the others the questions."""
    return dict(re.findall(r"```sql (\w+)\n(.*?)```", DOC.read_text(), re.DOTALL))


def statements(sql: str, lake: Path) -> list[str]:
    """Single statements, about this lake."""
    return [one.strip() for one in sql.replace("lake/entries", f"{lake}/entries").split(";") if one.strip()]


def fill(lake: Path, paths: Sequence[Path], **options: object) -> None:
    """Export these traces."""
    for path in paths:
        with open_trace(path, 0) as trace:
            write_lake(trace, lake, in_text=in_text, **options)  # type: ignore[arg-type]


def answers(routing: Routing) -> dict[str, pd.DataFrame]:
    """What the questions must give, out of moetrace's own counts; in the order of their keys."""
    counts = routing.counts
    labelled = counts.labelled()
    layers = counts.layers
    usage = analysis.expert_frequency(labelled.included, labelled.tokens, labelled.labels, layers)
    usage = usage[usage["count"] > 0].rename(columns={"domain": "label"})
    test = analysis.domain_test(labelled.included, labelled.labels, layers=layers, n_permutations=9).table
    bits = analysis.domain_entropy(labelled.included, labelled.labels, layers=layers)
    lag = analysis.persistence(counts)
    lag = lag[lag["lag"] == 1]
    total = counts.included.sum(axis=0)
    hot, top, covered, together = [], [], [], []
    by_domain = {
        str(d): labelled.included[labelled.labels == d].sum(axis=0) for d in np.unique(labelled.labels)
    }
    n_expert = routing.n_expert
    for i, layer in enumerate(layers.tolist()):
        order = np.lexsort((np.arange(total.shape[1]), -total[i]))
        share = np.cumsum(total[i][order])
        hot.append((layer, int((share - total[i][order] < 0.8 * share[-1])[total[i][order] > 0].sum())))
        top += [(layer, int(e), int(total[i][e]), p) for p, e in enumerate(order[:5], 1) if total[i][e] > 0]
        quarter = [e for p, e in enumerate(order, 1) if p <= n_expert[i] / 4 and total[i][e] > 0]
        covered += [(d, layer, c[i][quarter].sum() / c[i].sum()) for d, c in by_domain.items() if c[i].sum()]
    for chosen in routing.chosen:
        experts, state = np.asarray(chosen.trace.experts), np.asarray(chosen.trace.state)
        for row in chosen.order.rows.tolist():
            for i, layer in enumerate(layers.tolist()):
                mine = (
                    sorted(e for e in experts[row, i].tolist() if e < n_expert[i])
                    if state[row, i] == 1
                    else []
                )
                together += [(layer, a, b) for k, a in enumerate(mine) for b in mine[k + 1 :]]
    pairs = pd.DataFrame(together, columns=["layer", "expert", "other"])
    pairs = pairs.value_counts().rename("tokens").reset_index()
    return {
        "usage": usage[["label", "layer", "expert", "percent_of_tokens"]],
        "together": pairs,
        "persistence": lag[["layer", "pairs", "overlap"]],
        "divergence": test[["layer", "jsd_bits"]],
        "top": pd.DataFrame(top, columns=["layer", "expert", "tokens", "place"]),
        "entropy": bits.rename(columns={"domain": "label"})[["layer", "label", "entropy_bits"]],
        "hot": pd.DataFrame(hot, columns=["layer", "experts"]),
        "coverage": pd.DataFrame(covered, columns=["label", "layer", "covered"]),
    }


KEYS = {
    "usage": ["layer", "label", "expert"], "together": ["layer", "expert", "other"], "persistence": ["layer"],
    "divergence": ["layer"], "top": ["layer", "place"], "entropy": ["layer", "label"], "hot": ["layer"],
    "coverage": ["layer", "label"],
}  # fmt: skip


def check(ask: Callable[[str], pd.DataFrame], routing: Routing) -> None:
    """Ask every question; the answers must be moetrace's."""
    sql, expected = documented(), answers(routing)
    assert set(sql) - {"duckdb", "spark"} == set(expected) == set(KEYS)
    for name, want in expected.items():
        got = ask(sql[name])
        assert list(got.columns) == list(want.columns), name
        assert len(want) > 1, name
        want, got = (t.sort_values(KEYS[name], ignore_index=True) for t in (want, got))
        assert len(got) == len(want), name
        for column in want.columns:
            if column == "label":
                assert got[column].tolist() == want[column].tolist(), name
            else:
                np.testing.assert_allclose(
                    got[column].astype(float),
                    want[column].astype(float),
                    rtol=1e-9,
                    err_msg=f"{name}: {column}",
                )
