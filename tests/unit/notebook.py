"""The published notebook and scripts, written down again with pandas alone: what ``published`` is held
against.

Kept apart from the package on purpose: it filters, pivots and loops as the notebook does, and takes its
statistics from scipy and pandas.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cosine, euclidean
from scipy.stats import chi2_contingency, entropy, pearsonr


def load(path: Path, domain: str, token_id: int) -> pd.DataFrame:
    """Part 1 for one file: every MUL_MAT_ID entry's first four ids."""
    rows = []
    for entry in json.loads(path.read_text())["entries"]:
        if entry["operation_type"] != "MUL_MAT_ID" or not entry["expert_ids"]:
            continue
        names = [c for c in ("down", "gate", "up") if f"ffn_moe_{c}" in entry["dst_name"]]
        for position, expert in enumerate(entry["expert_ids"][:4]):
            rows.append((domain, token_id, entry["layer_id"], f"ffn_{names[0]}", expert, position))
    columns = ["domain", "token_id", "layer_id", "component", "expert_id", "position"]
    return pd.DataFrame(rows, columns=columns)


def pivot(df: pd.DataFrame, layer: int, component: str) -> pd.DataFrame:
    chosen = df[(df["layer_id"] == layer) & (df["component"] == component)]
    return chosen.pivot_table(index="domain", columns="expert_id", aggfunc="size", fill_value=0)


def percent(table: pd.DataFrame) -> pd.DataFrame:
    return table.div(table.sum(axis=1), axis=0) * 100


def top_five(table: pd.DataFrame) -> list[tuple[str, list[int], float]]:
    out = []
    for domain in table.index:
        best = percent(table).loc[domain].nlargest(5)
        out.append((domain, best.index.tolist(), best.values.sum()))
    return out


def classify(table: pd.DataFrame) -> tuple[pd.Series, list[int], list[int], list[tuple[int, str, float]]]:
    variation = table.std(axis=0) / (table.mean(axis=0) + 1e-10)
    special = variation[variation > variation.quantile(0.75)].index.tolist()
    general = variation[variation < variation.quantile(0.25)].index.tolist()
    preferred = []
    for expert in special:
        domain = table[expert].idxmax()
        preferred.append((expert, domain, percent(table).loc[domain, expert]))
    return variation, special, general, preferred


def separation(df: pd.DataFrame, layers: range) -> pd.DataFrame:
    out = []
    for layer in layers:
        if df[(df["layer_id"] == layer) & (df["component"] == "ffn_down")].empty:
            continue
        table = pivot(df, layer, "ffn_down")
        chi2, p, _, _ = chi2_contingency(table)
        spread = table.div(table.sum(axis=1), axis=0).var(axis=0).mean()
        out.append((layer, chi2, p, spread, p < 0.001))
    return pd.DataFrame(out, columns=["layer_id", "chi2", "p_value", "avg_variance", "significant"])


def entropies(df: pd.DataFrame, layer: int) -> dict[str, float]:
    chosen = df[(df["layer_id"] == layer) & (df["component"] == "ffn_down")]
    return {
        domain: entropy(chosen[chosen["domain"] == domain]["expert_id"].value_counts(normalize=True), base=2)
        for domain in sorted(df["domain"].unique())
    }


def first_experts(df: pd.DataFrame, domain: str, layer: int) -> np.ndarray[Any, Any]:
    chosen = df[
        (df["domain"] == domain)
        & (df["layer_id"] == layer)
        & (df["component"] == "ffn_down")
        & (df["position"] == 0)
    ]
    return chosen.sort_values("token_id")["expert_id"].values


def run_all(df: pd.DataFrame, layers: range) -> dict[str, Any]:
    """Parts 2 to 9 as the notebook runs them, without printing and drawing."""
    domains = sorted(df["domain"].unique())
    sep = separation(df, layers)
    best = sep.nlargest(5, "chi2")["layer_id"].tolist()
    table = pivot(df, layers[0], "ffn_down")
    sequence = first_experts(df, domains[0], layers[0])
    same = sum(sequence[i] == sequence[i + 1] for i in range(len(sequence) - 1))
    return {
        "overview": (df.groupby("domain").size(), df.groupby("layer_id").size(), df["component"].unique()),
        "percent": percent(table),
        "top": top_five(table),
        "chi2": chi2_contingency(table),
        "classes": classify(table),
        "separation": sep,
        "best": best,
        "dive": {c: percent(pivot(df, best[0], c)) for c in ("ffn_down", "ffn_gate", "ffn_up")},
        "entropy": entropies(df, layers[0]),
        "lag1": (sequence, same, len(sequence) - 1),
    }


def frequency_script(layer_id: list[int], ids: list[list[int]]) -> dict[Any, list[tuple[int, int]]]:
    """``expert_frequency.py``: Counter's order per layer, and over all layers under "all"."""
    out: dict[Any, list[tuple[int, int]]] = {}
    for layer in sorted(set(layer_id)):
        mine = [e for n, row in zip(layer_id, ids, strict=True) if n == layer for e in row]
        out[layer] = Counter(mine).most_common()
    out["all"] = Counter(e for row in ids for e in row).most_common()
    return out


def distance_script(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> dict[str, float]:
    """``gate_input_analysis.py``: distances of two vectors."""
    return {
        "cosine_similarity": 1 - cosine(a, b),
        "cosine_distance": cosine(a, b),
        "euclidean": euclidean(a, b),
        "l1": np.sum(np.abs(a - b)),
        "l2_normalized": np.linalg.norm(a - b) / np.sqrt(len(a)),
        "pearson_corr": pearsonr(a, b)[0],
        "max_abs_diff": np.max(np.abs(a - b)),
        "mean_abs_diff": np.mean(np.abs(a - b)),
    }


def agreement_script(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], k: int) -> dict[str, float]:
    """``compare_gate_experts.py``: agreement of the top k of two logit vectors."""
    order_a, order_b = list(np.argsort(a)[::-1]), list(np.argsort(b)[::-1])
    top_a, top_b = order_a[:k], order_b[:k]
    common = set(top_a) & set(top_b)
    signs = []
    for i, x in enumerate(sorted(common)):
        for y in sorted(common)[i + 1 :]:
            agree = (top_a.index(x) < top_a.index(y)) == (top_b.index(x) < top_b.index(y))
            signs.append(1 if agree else -1)
    return {
        "exact_match": float(set(top_a) == set(top_b)),
        "top1_match": float(top_a[0] == top_b[0]),
        "kendall_tau": sum(signs) / len(signs) if signs else float(len(common)),
        "intersection_size": len(common),
        "coverage_k": next(n for n in range(k, len(a) + 1) if set(top_a) <= set(order_b[:n])),
    }
