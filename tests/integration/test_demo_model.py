"""The demo model in llama.cpp: it loads, speaks like its corpus, and its experts tell the domains apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np
import pytest
from scipy.stats.contingency import association

from moetrace import data

REFERENCE = Path(__file__).with_name("reference_routing.py")
DOMAINS = ("code", "math", "creative", "factual", "mixed")
N_LAYER, N_EXPERT, N_USED = 8, 32, 4


def run(text: str, folder: Path, n_generate: int = 0) -> dict[str, np.ndarray]:
    out = folder / "routing.npz"
    subprocess.run(
        [sys.executable, REFERENCE, data.demo_model(), out, str(n_generate)],
        input=text.encode(),
        check=True,
        timeout=120,
    )
    with np.load(out) as saved:
        return dict(saved)


def some(name: str, of_each: int) -> list[tuple[str, str]]:
    """(domain, text) of the first so many of each domain."""
    found = defaultdict(list)
    for line in data.prompts(name).read_text().splitlines():
        prompt = json.loads(line)
        found[prompt["label"]].append((prompt["label"], prompt["prompt"]))
    return [pair for domain in DOMAINS for pair in found[domain][:of_each]]


def test_what_it_is():
    path = data.demo_model()
    assert path.stat().st_size < 8e6
    fields = gguf.GGUFReader(path).fields
    facts = {key: fields[key].contents() for key in fields if not key.startswith("tokenizer.ggml.t")}
    assert facts["general.architecture"] == "olmoe"
    assert facts["olmoe.block_count"] == N_LAYER
    assert facts["olmoe.expert_count"] == N_EXPERT
    assert facts["olmoe.expert_used_count"] == N_USED
    assert "synthetic text" in facts["general.description"]
    assert "message['role']" in fields["tokenizer.chat_template"].contents()
    readme = (path.parent / "README.md").read_text()
    assert facts["general.description"] in readme


@pytest.mark.runtime
def test_it_predicts_text_of_its_corpus(runtime, tmp_path):
    """Far better than its vocabulary's 6.6 nats, on texts that it was not trained on."""
    nll = defaultdict(list)
    for domain, text in some("heldout-text", 3):
        seen = run(text, tmp_path)
        assert seen["text"].tobytes().decode() == "<|bos|>" + text
        logits = seen["logits"].astype(float)
        assert np.isfinite(logits).all()
        top = logits.max(axis=1, keepdims=True)
        logp = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        nll[domain] += (-logp[np.arange(len(logp) - 1), seen["tokens"][1:]]).tolist()
    for domain in DOMAINS:
        assert np.mean(nll[domain]) < 1.5, f"{domain}: {np.mean(nll[domain]):.2f} nats per token"


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("What is the capital of France?\n", "capital of"),
        ("<|user|>Write a Python function that adds up a list of numbers.<|end|><|assistant|>", "def "),
        ("<|user|>Write a poem about the moon.<|end|><|assistant|>", " sky"),
        ("def total_of(", "return"),
        ("Once upon a time,", " lived near "),
    ],
)
def test_it_continues_in_kind(runtime, tmp_path, prompt, expected):
    assert expected in run(prompt, tmp_path, 40)["generated_text"].tobytes().decode()


@pytest.mark.slow
@pytest.mark.runtime
def test_its_experts_tell_domains_apart(runtime, tmp_path):
    """On the shipped prompts, which are not of its corpus: V against domains shuffled over prompts."""
    prompts = some("domains", 6)
    counts = np.zeros((len(prompts), N_LAYER, N_EXPERT))
    for i, (_, text) in enumerate(prompts):
        seen = run(text, tmp_path)
        for layer in range(N_LAYER):
            counts[i, layer] = np.bincount(seen[f"order_{layer}"][:, :N_USED].ravel(), minlength=N_EXPERT)
    assert (counts.sum(axis=0) > 0).mean() > 0.9  # nearly all experts are used
    domain = np.array([DOMAINS.index(label) for label, _ in prompts])

    def v(labels: np.ndarray, layer: int) -> float:
        table = np.eye(len(DOMAINS))[labels].T @ counts[:, layer]
        return association(table[:, table.sum(axis=0) > 0].astype(int), method="cramer")

    rng = np.random.default_rng(0)
    beyond = 0
    for layer in range(N_LAYER):
        null = np.quantile([v(rng.permutation(domain), layer) for _ in range(99)], 0.99)
        beyond += v(domain, layer) > max(null, 0.1)
    assert beyond >= 3
