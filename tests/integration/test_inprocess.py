"""llama.cpp in the same process: order of loading, warm-up, several sequences, errors, a live ring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import TEXT, capture, python

import moetrace

pytestmark = pytest.mark.runtime


def test_capture_from_python_and_twice_in_one_process(runtime, model_file, tmp_path):
    code = """
        import sys, json, numpy as np, moetrace
        model, out = sys.argv[1:]
        a = moetrace.capture(model, ["One prompt here.", {"prompt": "Another", "label": "x", "n_predict": 3}],
                             out + "/a.moet", n_predict=5, n_parallel=2, n_threads=1)
        b = moetrace.capture(model, ["One prompt here."], n_predict=5, n_threads=1, channels=["weights", "logits"])
        first = a.sel(request=int(a.requests.index[a.requests["id"] == "0"][0]))
        same = np.array_equal(np.asarray(first.experts), np.asarray(b.experts))
        print(json.dumps([len(a), len(b), same, list(a.requests["label"]), list(b.channels), str(b.path)]))
    """
    result = python(code, model_file("qwen3moe"), tmp_path)
    assert result.returncode == 0, result.stderr
    n_a, n_b, same, labels, channels, path = json.loads(result.stdout)
    assert n_a > n_b > 5
    assert same  # what else is in the batch does not change a sequence's routing
    assert sorted(map(str, labels)) == ["None", "x"]
    assert channels == ["experts", "weights", "logits"]
    assert Path(path).is_dir()


def test_llama_cpp_imported_first_is_refused_with_the_fix(runtime, model_file, tmp_path):
    code = """
        import sys, llama_cpp, moetrace
        try:
            moetrace.capture(sys.argv[1], ["x"])
        except moetrace.MoetraceError as e:
            print(e)
    """
    result = python(code, model_file("qwen3moe"))
    assert "imported before" in result.stdout
    assert "LD_PRELOAD" in result.stdout


def test_warm_up_graphs_are_dropped(runtime, model_file, tmp_path):
    """llama_set_warmup makes llama.cpp run every expert: such routing is no routing."""
    code = """
        import sys, ctypes
        from pathlib import Path
        from moetrace.host import llama
        from moetrace.host.drain import Drain
        from moetrace.host.options import CaptureOptions
        from moetrace.trace.writer import TraceWriter
        trace = TraceWriter(sys.argv[2])
        llama.start(CaptureOptions().settings(trace.path))
        drain = Drain(trace)
        drain.start()
        with llama.Llama(sys.argv[1], n_ctx=64, n_threads=1) as model:
            tokens = model.tokenize("Some words to warm up with")
            for warm in (True, False):
                llama.tracer().llama_set_warmup(ctypes.c_void_p(model._ctx), ctypes.c_bool(warm))
                model.forget(0)
                # another length, since llama.cpp would take its warm-up graph again
                model.decode([(t, i, 0, False) for i, t in enumerate(tokens[warm:])])
        llama.stop()
        drain.stop()
        trace.close()
        print(len(tokens))
    """
    path = tmp_path / "t.moet"
    result = python(code, model_file("qwen3moe"), path)
    assert result.returncode == 0, result.stderr
    n = int(result.stdout)
    trace = moetrace.open(path)
    assert len(trace) == n
    assert trace.counters["rows_warmup"] == n - 1
    assert np.asarray(trace.experts).shape[2] == 4


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([{"tokens": [5, 100000]}], [], "not in the model's vocabulary"),
        ([{"prompt": TEXT}], ["-c", "64"], "does not fit"),
        ([{"prompt": "a", "tokens": [1]}], [], "exactly one"),
        ([{"prompt": "a"}], ["--capture", "experts,nonsense"], "nonsense"),
        ([{"prompt": "a"}], ["--layers", "17-20"], "layers"),
        ([{"prompt": "a"}], ["--collector", "tap", "--capture", "attention"], "callback"),
    ],
)
def test_bad_input_is_refused(prompts, options, says, runtime, model_file, tmp_path):
    error = capture(model_file("qwen3moe"), tmp_path / "t.moet", prompts, *options, ok=False)
    assert says in error
    assert "Traceback" not in error


def test_a_model_that_is_none(runtime, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    assert "cannot load" in capture(broken, tmp_path / "t.moet", [{"prompt": "a"}], ok=False)
    assert "no model" in capture(tmp_path / "none.gguf", tmp_path / "u.moet", [{"prompt": "a"}], ok=False)


def test_an_existing_trace_is_kept_without_force(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    capture(model_file("qwen3moe"), path, [{"prompt": "First"}])
    before = moetrace.open(path).requests["prompt"].tolist()
    error = capture(model_file("qwen3moe"), path, [{"prompt": "Second"}], ok=False)
    assert "--force" in error
    assert moetrace.open(path).requests["prompt"].tolist() == before == ["First"]
    capture(model_file("qwen3moe"), path, [{"prompt": "Second"}], "--force")
    assert moetrace.open(path).requests["prompt"].tolist() == ["Second"]


def test_chat_messages_and_token_ids(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    prompts = [
        {"id": "chat", "messages": [{"role": "user", "content": "Is it raining?"}]},
        {"id": "ids", "tokens": [70, 71, 72, 73]},
    ]
    capture(model_file("gpt-oss"), path, prompts)
    trace = moetrace.open(path)
    text = {r.id: "".join(trace.sel(request=int(n)).tokens["text"]) for n, r in trace.requests.iterrows()}
    assert text["chat"] == "<|im_start|>user\nIs it raining?<|im_end|>\n<|im_start|>assistant\n"
    (number,) = trace.requests.index[trace.requests["id"] == "ids"]
    assert list(trace.sel(request=int(number)).tokens["token_id"]) == [70, 71, 72, 73]


def test_sizes_for_which_llama_cpp_ends_the_process_are_refused(runtime, model_file, tmp_path):
    code = """
        import sys, json, moetrace
        def capture(**sizes):
            try:
                trace = moetrace.capture(sys.argv[1], ["One prompt here."] * 6, sys.argv[2], force=True,
                                         n_threads=1, **{"n_predict": 4, **sizes})
                return sorted(trace.requests["id"])
            except moetrace.MoetraceError as e:
                return [e.exit_code, str(e)]
        print(json.dumps([capture(**sizes) for sizes in json.loads(sys.argv[3])]))
    """
    refused = [
        {"n_parallel": 6, "n_batch": 4}, {"n_parallel": 3, "n_batch": 2}, {"n_parallel": 6, "n_ctx": 5},
        {"n_batch": -1}, {"n_batch": 1 << 40}, {"n_ubatch": 0}, {"n_ctx": -7},
        {"n_predict": 10**20}, {"n_predict": -3}, {"seed": -1},
    ]  # fmt: skip
    fine = [{"n_parallel": 6, "n_batch": 6}, {"n_parallel": 2, "n_batch": 2}, {"n_ctx": 9, "n_predict": 2}]
    result = python(code, model_file("qwen3moe"), tmp_path / "t.moet", json.dumps(refused + fine))
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(result.stdout)
    for sizes, (code, text) in zip(refused, answers[: len(refused)], strict=True):
        assert code == 2, (sizes, text)
        assert "fix:" in text
    assert answers[len(refused) :] == [list("012345")] * len(fine)


def test_a_prompts_own_keys_do_not_lead_labels_astray(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    own = [{"request": 1}, {"request": 0, "slot": "s"}, {"sequence": 5, "from_ns": 0, "to_ns": 1, "crc": 3}]
    prompts = [{"prompt": "The same prompt.", "label": "abc"[i], "n_predict": 3, **own[i]} for i in range(3)]
    capture(model_file("qwen3moe"), path, prompts, "-np", "2")
    trace = moetrace.open(path)
    requests = trace.requests.sort_values("id")
    assert list(requests["id"]) == ["0", "1", "2"]
    assert list(requests["label"]) == ["a", "b", "c"]
    assert list(requests["extra.request"])[:2] == [1, 0]
    assert list(requests["extra.slot"])[1] == "s"
    assert list(requests["sequence"])[2] == 5
    assert not requests["label_unsure"].any()
    # in the order in which they were begun
    assert list(requests.index) == sorted(requests.index)
