"""Likelihood and divergence, held against llama-perplexity on the same text and model, and against numpy."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running import TEXT, python
from scipy.special import log_softmax, rel_entr, softmax

import moetrace
from moetrace import data
from moetrace.trace.record import State
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

CONTEXT = 128


def perplexity(runtime, model: Path, text: Path, *options: str | Path, until: str) -> str:
    command = [
        runtime.tool("llama-perplexity"),
        "-m",
        model,
        "-f",
        text,
        "-c",
        str(CONTEXT),
        "-b",
        str(CONTEXT),
    ]
    said = ""
    for _ in range(50):  # on a busy machine the tool may end before it has printed its last lines
        with (text.parent / "said").open("w+") as out:
            subprocess.run([*command, "-t", "1", *options], stdout=out, stderr=out, timeout=300, check=True)
            out.seek(0)
            said = out.read()
        if until in said:
            return said
    raise AssertionError(f"llama-perplexity never says {until!r}: {said[-500:]}")


def number(pattern: str, text: str) -> float:
    (found,) = re.findall(pattern, text)
    return float(found)


@pytest.mark.parametrize("name", ["gpt-oss", "olmoe", "deepseek2-v3", "llama", "demo"])
def test_equals_llama_perplexity(name, runtime, model_file, tmp_path):
    """To the digits that it prints: the perplexity, that of another number of experts, and the KL between them."""
    model = data.demo_model() if name == "demo" else model_file(name)
    text = tmp_path / "text.txt"
    if name == "demo":
        held_out = map(json.loads, data.prompts("heldout-text").read_text().splitlines())
        text.write_text("\n".join(line["prompt"] for line in held_out)[:6000])
    else:
        text.write_text(TEXT * 4)
    key = {"llama": "llama", "deepseek2-v3": "deepseek2", "demo": "olmoe"}.get(name, name)
    code = f"""
        import sys, json
        from moetrace.host.evaluate import evaluate, divergence
        model, text, out = sys.argv[1:]
        options = dict(chunks=True, context={CONTEXT}, n_batch={CONTEXT}, n_threads=1)
        texts = [open(text).read()]
        base = evaluate(model, texts, logits=out + "/base.npy", **options)
        other = evaluate(model, texts, logits=out + "/other.npy", n_expert_used=1, **options)
        d = divergence(base, other)
        print(json.dumps([base.n_tokens, base.perplexity, other.perplexity, d.change.mean(), d.kl.mean(),
                          d.kl.max(), d.same_top.mean()]))
    """
    run = python(code, model, text, tmp_path)
    assert run.returncode == 0, run.stderr
    n, base, other, change, kl, kl_max, same_top = json.loads(run.stdout)
    said = perplexity(runtime, model, text, "--kl-divergence-base", tmp_path / "logits", until="PPL =")
    assert n == (CONTEXT // 2 - 1) * len(re.findall(r"\[\d+\][\d.]+,", said))
    assert base == pytest.approx(number(r"PPL = ([\d.]+)", said), rel=1e-5, abs=6e-5)
    override = f"{key}.expert_used_count=int:1"
    said = perplexity(
        runtime, model, text, "--override-kv", override, "--kl-divergence-base", tmp_path / "logits",
        "--kl-divergence", until="Same top p:",
    )  # fmt: skip
    assert other == pytest.approx(number(r"Mean PPL\(Q\) +: +([\d.]+)", said), rel=1e-5)
    # it stores the base in 16 bits per token, and leaves out what is less likely than exp(-16)
    assert change == pytest.approx(number(r"Mean ln\(PPL\(Q\)/PPL\(base\)\) +: +(-?[\d.]+)", said), abs=1e-5)
    assert kl == pytest.approx(number(r"Mean +KLD: +([\d.]+)", said), rel=1e-4, abs=1e-5)
    assert kl_max == pytest.approx(number(r"Maximum KLD: +([\d.]+)", said), rel=1e-3)
    assert 100 * same_top == pytest.approx(number(r"Same top p: +([\d.]+)", said), abs=0.2)
    assert kl > 0.01
    assert same_top < 1


def test_texts_are_scored_by_themselves_and_recorded(runtime, model_file, tmp_path):
    """Packed together, cut into windows, recorded: the same as one text at a time from llama.cpp's logits."""
    texts = ["One prompt here.", TEXT, {"tokens": [70, 71, 72, 73, 74], "id": "ids", "label": "x"}]
    code = """
        import sys, json, numpy as np
        from moetrace.host.evaluate import Evaluator
        model, out, texts = sys.argv[1:]
        texts = json.loads(texts)
        with Evaluator(model, context=1024, n_batch=1024, n_threads=1, trace=out + "/t.moet") as e:
            together = e.evaluate(texts, logits=out + "/all.npy")
            alone = [e.evaluate([t]) for t in texts]
        with Evaluator(model, context=64, n_batch=32, n_threads=1) as e:
            cut = e.evaluate(texts, logits=out + "/cut.npy")
        np.savez(out + "/out.npz", alone=np.concatenate([a.nll for a in alone]), **{
            f"{name}_{key}": getattr(which, key) for name, which in [("all", together), ("cut", cut)]
            for key in ("nll", "token", "top", "text", "window", "position")})
    """
    run = python(code, model_file("qwen3moe"), tmp_path, json.dumps(texts))
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "out.npz") as saved:
        out = dict(saved)
    logits = np.load(tmp_path / "all.npy", mmap_mode="r")
    expected = -np.take_along_axis(
        log_softmax(np.float64(logits), axis=1), out["all_token"][:, None].astype(int), axis=1
    )[:, 0]
    np.testing.assert_allclose(out["all_nll"], expected, atol=1e-12)
    np.testing.assert_array_equal(out["all_top"], logits.argmax(axis=1))
    # what lies beside a sequence in the half-precision cache changes its rounding
    np.testing.assert_allclose(out["alone"], out["all_nll"], atol=0.02)

    trace = moetrace.open(tmp_path / "t.moet")
    assert verify(tmp_path / "t.moet").exit_code == 0
    assert (np.asarray(trace.state) == State.PRESENT).all()  # the last layer too
    assert list(trace.requests["id"]) == ["0", "1", "ids"] * 2 or set(trace.requests["id"]) == {
        "0",
        "1",
        "ids",
    }
    assert len(trace.requests) == 6
    # what was scored is the recorded text, each token after its first
    for text, identity in enumerate(["0", "1", "ids"]):
        first = int(trace.requests.index[trace.requests["id"] == identity][0])
        tokens = trace.sel(request=first).tokens["token_id"].to_numpy()
        mine = out["all_text"] == text
        np.testing.assert_array_equal(out["all_token"][mine], tokens[1:])
        np.testing.assert_array_equal(out["all_position"][mine], np.arange(1, len(tokens)))
        # cut into windows that overlap, every token is still scored once
        cut = out["cut_text"] == text
        np.testing.assert_array_equal(out["cut_token"][cut], tokens[1:])
        np.testing.assert_array_equal(out["cut_position"][cut], np.arange(1, len(tokens)))
        np.testing.assert_allclose(out["cut_nll"][cut][:60], out["all_nll"][mine][:60], atol=0.02)
    assert len(np.unique(out["cut_window"][out["cut_text"] == 1])) > 5
    # seen with less of a past, predictions differ
    assert np.abs(out["cut_nll"] - out["all_nll"]).max() > 1e-3


def test_divergence_is_that_of_scipy(runtime):
    from moetrace.host.evaluate import kl_divergence, token_nll

    rng = np.random.default_rng(5)
    p, q = rng.normal(0, 6, (2, 40, 1000)).astype(np.float32)
    p[:, :10] = -np.inf  # impossible under the base: adds nothing
    expected = rel_entr(softmax(np.float64(p), axis=1), softmax(np.float64(q), axis=1)).sum(axis=1)
    np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-9)
    np.testing.assert_array_equal(kl_divergence(q, q), 0)
    token = rng.integers(10, 1000, 40).astype(np.int32)
    np.testing.assert_allclose(token_nll(q, token), -log_softmax(np.float64(q), axis=1)[range(40), token])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("evaluate(model, ['a b c'], chunks=True)", "no token to score"),
        ("evaluate(model, [{'tokens': [5]}])", "no token to score"),
        ("evaluate(model, ['a b c'], n_expert_used=17)", "1 to 16"),
        ("evaluate(model, ['a b c'], n_expert_used=0)", "1 to 16"),
        ("evaluate(model + 'x', ['a'])", "no model"),
        (
            "divergence(evaluate(model, ['a b c d']), evaluate(model, ['a b c e']))",
            "do not score the same tokens",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, says, runtime, model_file):
    code = f"""
        import sys
        from moetrace.errors import MoetraceError
        from moetrace.host.evaluate import evaluate, divergence
        model = sys.argv[1]
        try:
            {call}
        except MoetraceError as e:
            print(e)
    """
    run = python(code, model_file("qwen3moe"))
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
