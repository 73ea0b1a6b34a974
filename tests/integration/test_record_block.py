"""Recording one's own program: llama-cpp-python within a block, and the cells of a notebook."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from running import python

import moetrace
from moetrace.data import demo_model
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.runtime, pytest.mark.host("llama-cpp-python")]

PROMPTS = ["def main(): return", "Once upon a time there was a king who", "x", "one two three"]


def test_each_block_is_a_trace_of_what_it_computed(runtime, tmp_path):
    """The third prompt is one token beside what is cached: llama.cpp computes it with the graph of the last decode."""
    code = """
        import sys, json, moetrace
        model, folder, *prompts = sys.argv[1:]
        moetrace.watch_llama_cpp()
        moetrace.watch_llama_cpp()  # once is enough
        from llama_cpp import Llama
        llm = Llama(model, n_ctx=512, n_threads=1, verbose=False)
        said = []
        for i, prompt in enumerate(prompts):
            with moetrace.record(f"{folder}/{i}.moet", model=model, channels="experts,weights,logits") as recording:
                text = llm(prompt, max_tokens=5, temperature=0)["choices"][0]["text"]
            said.append(text)
            llm("between two recordings", max_tokens=2)  # is nobody's
            assert len(recording.trace.requests) == 1
        print(json.dumps(said))
    """
    ran = python(code, demo_model(), tmp_path, *PROMPTS)
    assert ran.returncode == 0, ran.stderr
    assert "not allocated" not in ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    for i, text in enumerate(said):
        result = verify(tmp_path / f"{i}.moet")
        assert (result.exit_code, result.findings) == (0, ())
        with moetrace.open(tmp_path / f"{i}.moet") as trace:
            (request,) = trace.requests.to_dict("records")
            assert request["slot"] == 0
            assert trace.loss.complete
            assert trace.positions.tolist() == list(
                range(request["n_cached"], request["n_cached"] + len(trace))
            )
            written = "".join(str(piece) for piece in trace.text(trace.token_ids))
            assert (PROMPTS[i] + text).startswith(written.removeprefix("<|bos|>"))
            # what another process computes of the same tokens, all at once
            if request["n_cached"]:
                continue
            again, tokens = tmp_path / f"again{i}.moet", trace.token_ids.tolist()
            check = """
                import sys, json, moetrace
                moetrace.capture(sys.argv[1], [{"tokens": json.loads(sys.argv[2])}], sys.argv[3], n_threads=1,
                                 channels="experts,weights,logits", all_outputs=True)
            """
            ran = python(check, demo_model(), json.dumps(tokens), again)
            assert ran.returncode == 0, ran.stderr
            with moetrace.open(again) as other:
                same = (trace.experts == other.experts) | ~trace.present[:, :, None]
                assert same.mean() > 0.99
                # a batch of another size may choose another expert where two scores are nearly equal; then all moves
                until = np.argmin(same.all(axis=(1, 2))) if not same.all() else len(same)
                assert until > 5
                there = trace.present[:until]
                np.testing.assert_allclose(
                    trace.logits[:until][there], other.logits[:until][there], atol=2e-2
                )
    # of the reused graph: choices follow from the scores that were captured with them
    with moetrace.open(tmp_path / "2.moet") as trace:
        best = np.sort(np.argsort(-trace.logits, axis=2)[:, :, :4], axis=2)
        np.testing.assert_array_equal(np.sort(trace.experts, axis=2), best)


def test_a_script_under_run_is_known_by_requests(runtime, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""import sys, moetrace
moetrace.watch_llama_cpp()
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=256, verbose=False)
print(llm("def main():", max_tokens=4)["choices"][0]["text"])
""")
    out = tmp_path / "t.moet"
    code = "import sys; from moetrace.__main__ import main; sys.exit(main(sys.argv[1:]))"
    ran = python(code, "run", "-o", out, "--", sys.executable, script, demo_model())
    assert ran.returncode == 0, ran.stderr
    assert "called past the tracer" not in ran.stderr
    with moetrace.open(out) as trace:
        (request,) = trace.requests.to_dict("records")
        assert (request["n_prefill"], request["n_decode"], request["n_cached"]) == (6, 3, 0)
        written = "".join(str(piece) for piece in trace.text(trace.token_ids))
        assert written.startswith("<|bos|>def main():")
        assert ran.stdout.startswith(written.removeprefix("<|bos|>def main():"))


def test_what_came_too_late_is_said(runtime, tmp_path):
    code = """
        import llama_cpp, moetrace
        moetrace.watch_llama_cpp()
    """
    ran = python(code)
    assert ran.returncode != 0
    assert "was imported before" in ran.stderr
    code = """
        import sys, moetrace
        with moetrace.record(sys.argv[1]) as recording:
            pass
        try:
            recording.trace
        except moetrace.TraceError as e:
            print(e.what)
    """
    ran = python(code, tmp_path / "none.moet")
    assert ran.stdout.strip() == "nothing was recorded"
    assert not (tmp_path / "none.moet").exists()


def test_cells_of_a_notebook(runtime, tmp_path):
    pytest.importorskip("IPython")
    code = """
        import sys, json
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        shell.run_line_magic("load_ext", "moetrace")
        run = shell.run_cell
        run(f"from llama_cpp import Llama; llm = Llama({sys.argv[1]!r}, n_ctx=512, verbose=False)")
        run("%%moetrace -v first\\nx = llm('def main():', max_tokens=4)")
        run(f"%%moetrace -o {sys.argv[2]}/second.moet --capture experts,logits\\nllm('one two', max_tokens=3); 1 / 0")
        run("%%moetrace --capture nothing\\n1")
        run("%%moetrace\\n1 + 1")
        space = shell.user_ns
        print()
        print(json.dumps([len(space["first"]), space["x"]["usage"]["total_tokens"], space["trace"].channels,
                          list(space["first"].text(space["first"].token_ids))]))
    """
    ran = python(code, demo_model(), tmp_path)
    assert ran.returncode == 0, ran.stderr
    n_rows, n_tokens, channels, words = json.loads(ran.stdout.splitlines()[-1])
    assert n_rows == n_tokens - 1  # the last token is not decoded
    assert channels == ["experts", "logits"]  # kept, although the cell failed
    assert "".join(words).startswith("<|bos|>def main():")
    assert "ZeroDivisionError" in ran.stdout
    assert "unknown channel 'nothing'" in ran.stdout
    assert "nothing was recorded" in ran.stdout
    with moetrace.open(tmp_path / "second.moet") as trace:
        assert len(trace) > 2
