"""Every synthetic model loads in llama.cpp, routes in a lively way and generates text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moetrace.synthetic import ARCHITECTURES, QUANTIZATIONS

pytestmark = pytest.mark.runtime

REFERENCE = Path(__file__).with_name("reference_routing.py")
TEXT = """\
A lighthouse keeper writes down the weather three times a day: wind, cloud, the height of the waves. In 40
years he has filled 112 books, and he says that no two pages in them are the same. "I could tell you," he
said, "what the sea did on any morning you like." Zwölf Möwen saßen auf der Mauer; 七 of them were asleep.

def area(width: float, height: float) -> float:
    if width < 0 or height < 0:
        raise ValueError(f"negative size: {width} x {height}")
    return width * height

for (size_t i = 0; i < n; ++i) { total += values[i] * weights[i]; }

Let f(x) = 3x^2 - 2x + 7. Then f'(x) = 6x - 2, which is zero at x = 1/3, so the smallest value is 20/3.
SELECT name, count(*) FROM visits WHERE year >= 1999 GROUP BY name ORDER BY 2 DESC;
"""


def run(model: Path, folder: Path, text: str = TEXT, n_generate: int = 24) -> dict[str, np.ndarray]:
    out = folder / "routing.npz"
    subprocess.run(
        [sys.executable, REFERENCE, model, out, str(n_generate)], input=text.encode(), check=True, timeout=120
    )
    with np.load(out) as saved:
        return dict(saved)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_routes_and_generates(name, runtime, model_file, tmp_path):
    arch = ARCHITECTURES[name]
    seen = run(model_file(name), tmp_path)
    n_tokens = len(seen["tokens"])
    assert 200 < n_tokens < 600
    assert seen["text"].tobytes().decode().removeprefix("<|bos|>") == TEXT

    layers = {int(key.removeprefix("order_")) for key in seen if key.startswith("order_")}
    assert layers == set(arch.moe_layers)
    for layer in arch.moe_layers:
        logits = seen[f"logits_{layer}"]
        assert logits.shape == seen[f"order_{layer}"].shape == (n_tokens, arch.n_expert)
        assert np.isfinite(logits).all()
        chosen = seen[f"order_{layer}"][:, : arch.n_expert_used]
        used = np.bincount(chosen.ravel(), minlength=arch.n_expert)
        assert used.min() > 0, f"layer {layer}: experts never used: {np.flatnonzero(used == 0)}"
        assert used.max() < 8 * used.mean()
        assert len({frozenset(row) for row in chosen.tolist()}) > min(20, n_tokens / 10)

    if arch.encoder:
        assert np.isfinite(seen["embeddings"]).all()
        assert seen["embeddings"].std(axis=0).min() > 0.1
    else:
        assert np.isfinite(seen["logits"]).all()
        assert len(seen["generated"]) == 24, "generation ended early"
        assert len(set(seen["generated"].tolist())) > 6
        assert seen["generated_text"].tobytes().decode("ascii")


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if not arch.encoder])
def test_text_depends_on_the_prompt(name, runtime, model_file, tmp_path):
    prompts = ("The tide was out when", "import numpy as np\n")
    texts = {run(model_file(name), tmp_path, prompt, 12)["generated_text"].tobytes() for prompt in prompts}
    assert len(texts) == len(prompts)


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name])
def test_quantised_experts_change_the_routing_little(quantization, runtime, model_file, tmp_path):
    sizes = {"n_layer": 2, "n_embd": 256, "n_ff_expert": 256, "n_expert": 8, "n_expert_used": 2}
    exact = run(model_file("gpt-oss", **sizes), tmp_path)
    packed = run(model_file("gpt-oss", **sizes, quantization=quantization), tmp_path)
    assert len(packed["generated"]) == 24
    agree = np.mean(packed["order_1"][:, 0] == exact["order_1"][:, 0])
    assert agree > 0.8  # chance is 1/8


def test_completion_tool_continues_a_prompt(runtime, model_file):
    prompt = "Why is the sky blue?"
    options = ["-n", "16", "-c", "256", "-t", "1", "--temp", "0"]
    result = subprocess.run(
        [runtime.tool("llama-completion"), "-m", model_file("gpt-oss"), *options, "-no-cnv", "-p", prompt],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert len(result.stdout.strip()) > len(prompt) + 16
