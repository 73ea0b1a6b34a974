"""Interventions: what was asked for happens, nothing else does, and the trace says so."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from clients import moetrace_command
from router_math import choice, mixing_weights, scores_of
from running import TEXT, capture, python

import moetrace
from moetrace import data
from moetrace.errors import MoetraceError, UsageError
from moetrace.host.client import Answer, drive
from moetrace.host.prompts import Prompt
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.record import State
from moetrace.trace.verify import verify

pytestmark = pytest.mark.runtime

# every way of scoring and weighting that llama.cpp has, hybrid models, groups, a router that is its own score
QUICK = ("gpt-oss", "olmoe", "qwen3moe", "llama", "deepseek2-v3", "llama4")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, arch in ARCHITECTURES.items()
    if arch.n_expert and not arch.encoder
]
PROMPTS = [
    {"id": "a", "prompt": TEXT[:300], "n_predict": 10},
    {"id": "b", "prompt": TEXT[300:420], "n_predict": 10},
    {"id": "c", "prompt": TEXT[500:680], "n_predict": 10},
    {"id": "d", "prompt": TEXT[100:150], "n_predict": 10},
]
CHANNELS = "experts,weights,logits,scores"


def captured(model: Path, output: Path, *options: str) -> moetrace.Trace:
    capture(model, output, PROMPTS, "-np", "4", "--capture", CHANNELS, *options)
    assert verify(output).exit_code == 0
    return moetrace.open(output)


SEVERAL = """
    import sys, json, moetrace
    model, folder, prompts, runs = sys.argv[1:]
    for name, options in json.loads(runs).items():
        moetrace.capture(model, json.loads(prompts), f"{folder}/{name}.moet", n_parallel=4, n_threads=1,
                         channels="CHANNELS", **options)
""".replace("CHANNELS", CHANNELS)


def several(model: Path, folder: Path, **runs: dict) -> list[moetrace.Trace]:
    """Capture the prompts several times in one process, each with options of its own."""
    run = python(SEVERAL, model, folder, json.dumps(PROMPTS), json.dumps(runs))
    assert run.returncode == 0, run.stderr
    for name in runs:
        assert verify(folder / f"{name}.moet").exit_code == 0
    return [moetrace.open(folder / f"{name}.moet") for name in runs]


def request(trace: moetrace.Trace, identity: str):
    (number,) = trace.requests.index[trace.requests["id"] == identity]
    return trace.sel(request=int(number))


def same_rows(a, b, *columns: str) -> None:
    assert len(a) == len(b) > 0
    for name in columns or ("token_ids", "positions", "experts", "weights", "logits", "state"):
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert x.tobytes() == y.tobytes(), name


@pytest.fixture(scope="session")
def plain(runtime, model_file, tmp_path_factory):
    """``plain(architecture)``: the prompts captured without any intervention."""
    folder = tmp_path_factory.mktemp("plain")
    made: dict[str, Path] = {}

    def make(name: str) -> moetrace.Trace:
        if name not in made:
            made[name] = folder / f"{name}.moet"
            captured(model_file(name), made[name])
        return moetrace.open(made[name])

    return make


@pytest.mark.parametrize("name", NAMES)
def test_what_is_chosen_and_how_it_is_weighted_follows_in_numpy(name, plain, model_file, tmp_path):
    arch, model = ARCHITECTURES[name], model_file(name)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(model).tensors}
    layers = list(arch.moe_layers)
    ablated, forced, biased = 3, 5, 0
    specs = [f"ablate:*:{ablated}", f"force:{layers[-1]}:{forced}", f"bias:{layers[0]}:{biased}=+0.3"]
    trace = captured(model, tmp_path / "t.moet", *(x for spec in specs for x in ("--intervene", spec)))
    assert trace.intervened.all()
    assert not plain(name).intervened.any()
    seen_before = np.asarray(plain(name).experts)
    for i, layer in enumerate(layers):
        present = np.asarray(trace.state)[:, i] == State.PRESENT
        assert present.any()
        ids = np.asarray(trace.experts)[present, i].astype(int)
        logits = np.asarray(trace.logits)[present, i]
        assert (seen_before[:, i] == ablated).any()
        assert not (ids == ablated).any()
        if layer == layers[-1]:
            assert (ids == forced).any(axis=1).all()
            assert not (seen_before[:, i] == forced).any(axis=1).all()
        scores = scores_of(arch, logits) + stored.get(f"blk.{layer}.exp_probs_b.bias", 0)
        expected = choice(
            arch,
            scores,
            ablated=[ablated],
            forced=[forced] if layer == layers[-1] else [],
            bias=[(biased, 0.3)] if layer == layers[0] else [],
        )
        agree = (ids == expected).all(axis=1)
        assert agree.mean() > 0.97  # the order of near-ties is rounding
        weights = mixing_weights(arch, logits, ids)
        np.testing.assert_allclose(np.asarray(trace.weights)[present, i], weights, rtol=2e-4, atol=1e-6)
        # and the recorded scores are those that the choice was made on
        recorded = np.asarray(trace.scores)[present, i]
        top = -np.sort(-recorded, axis=1)[:, : arch.n_expert_used]
        np.testing.assert_array_equal(np.take_along_axis(recorded, ids, axis=1), top)
        if layer == layers[0] and not arch.n_expert_groups:
            more = (ids == biased).mean()
            assert more > (choice(arch, scores, ablated=[ablated]) == biased).mean()


@pytest.mark.parametrize("name", [*NAMES, "demo"])
def test_replaying_a_routing_reproduces_it(name, runtime, model_file, tmp_path):
    """A model's own routing changes nothing; that of an ablated run gives that run, without ablating anything."""
    base, own, changed, again = several(
        data.demo_model() if name == "demo" else model_file(name),
        tmp_path,
        base={},
        own={"intervene": f"replay:{tmp_path}/base.moet"},
        changed={"intervene": ["ablate:*:1", "ablate:*:2"]},
        again={"intervene": f"replay:{tmp_path}/changed.moet"},
    )
    for prompt in PROMPTS:
        identity = prompt["id"]
        same_rows(request(own, identity), request(base, identity))
        same_rows(request(again, identity), request(changed, identity))
    assert own.intervened.all()
    # the other routing is another one
    assert not np.array_equal(request(changed, "a").experts, request(base, "a").experts)


@pytest.mark.parametrize("name", ["olmoe", "deepseek2-v3"])
def test_replaying_another_prompts_routing_gives_exactly_these_ids(name, plain, model_file, tmp_path):
    base = plain(name)
    spec = f"replay:{base.path}#b@request=c"
    trace = captured(model_file(name), tmp_path / "t.moet", "--intervene", spec)
    source, target = request(base, "b"), request(trace, "c")
    n = min(len(source), len(target))
    both = (np.asarray(source.state)[:n] == State.PRESENT) & (np.asarray(target.state)[:n] == State.PRESENT)
    assert both.mean() > 0.6  # of the last layer only what both computed
    a, b = np.asarray(source.experts)[:n], np.asarray(target.experts)[:n]
    np.testing.assert_array_equal(a[both], b[both])
    assert not np.array_equal(np.asarray(request(base, "c").experts)[:n][both], a[both])
    # behind the recorded positions, and for the other requests, the model routes by itself
    assert target.intervened[:n].all()
    assert not target.intervened[n:].any()
    for other in "abd":
        same_rows(request(trace, other), request(base, other))


@pytest.mark.parametrize("target", ["@slot=1", "@request=b"])
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek2-v3", "granitehybrid"])
def test_others_in_the_batch_are_not_touched(name, target, plain, model_file, tmp_path):
    """Four sequences in every batch: three of them stay as they were, byte for byte."""
    base = plain(name)
    trace = captured(model_file(name), tmp_path / "t.moet", "--intervene", f"ablate:*:0,1{target}")
    steps = [len(set(trace.sequence[trace.step == step])) for step in np.unique(trace.step)]
    assert max(steps) == 4
    for identity in "acd":
        rows = request(trace, identity)
        assert not rows.intervened.any()
        same_rows(rows, request(base, identity))
    changed = request(trace, "b")
    assert changed.intervened.all()
    assert not np.isin(np.asarray(changed.experts), [0, 1]).any()
    assert np.isin(np.asarray(request(base, "b").experts), [0, 1]).any()


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek2-v3", "llama4"])
def test_both_collectors_record_the_same(name, runtime, model_file, tmp_path):
    specs = ["ablate:*:3"] if name == "llama4" else ["ablate:*:3", "force:*:5@slot=2"]
    traces = several(
        model_file(name),
        tmp_path,
        **{kind: {"intervene": specs, "collector": kind} for kind in ("tap", "callback")},
    )
    for column in set(traces[0].column_names) - {"time_ns"}:
        assert traces[0].column(column).tobytes() == traces[1].column(column).tobytes(), column


def without_expert(model: Path, out: Path, tensor: str, layer: int, expert: int) -> Path:
    """Copy a model, with a bias of its router that excludes an expert of a layer."""
    shutil.copyfile(model, out)
    out.chmod(0o600)
    reader = gguf.GGUFReader(out, "r+")
    (bias,) = [t for t in reader.tensors if t.name == f"blk.{layer}.{tensor}"]
    bias.data[expert] = -1e30
    reader.data.flush()
    return out


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gpt-oss", "ffn_gate_inp.bias"),
        ("deepseek2-v3", "exp_probs_b.bias"),
        ("glm4moe", "exp_probs_b.bias"),
        ("lfm2moe", "exp_probs_b.bias"),
    ],
)
def test_ablating_is_a_router_bias_that_excludes_the_expert(name, tensor, runtime, model_file, tmp_path):
    """The same likelihood, to the last bit, as a model file in which the expert cannot be chosen."""
    model, layer, expert = model_file(name), ARCHITECTURES[name].moe_layers[1], 6
    other = without_expert(model, tmp_path / "other.gguf", tensor, layer, expert)
    code = """
        import sys, numpy as np
        from moetrace.host.evaluate import Evaluator, evaluate
        model, other, spec, text, out = sys.argv[1:]
        with Evaluator(model, n_threads=1) as a, Evaluator(other, n_threads=1) as b:
            before = a.evaluate([text, text[200:400]])
            ablated = a.evaluate([text, text[200:400]], intervene=spec, logits=out + "/ablated.npy")
            excluded = b.evaluate([text, text[200:400]], logits=out + "/excluded.npy")
            after = a.evaluate([text, text[200:400]])
        again = evaluate(model, [text, text[200:400]], n_threads=1, intervene=[spec, spec])
        np.savez(out + "/out.npz", before=before.nll, ablated=ablated.nll, excluded=excluded.nll,
                 after=after.nll, again=again.nll)
    """
    run = python(code, model, other, f"ablate:{layer}:{expert}", TEXT, tmp_path)
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["ablated"], out["excluded"])
        np.testing.assert_array_equal(out["again"], out["ablated"])
        np.testing.assert_array_equal(out["before"], out["after"])  # it ends with the call
        assert (out["before"] != out["ablated"]).mean() > 0.5
    ablated, excluded = (np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("ablated", "excluded"))
    assert ablated.tobytes() == excluded.tobytes()


def test_evaluating_and_recording_what_was_intervened_on(runtime, model_file, tmp_path):
    code = """
        import sys, numpy as np
        from moetrace.host.evaluate import Evaluator
        model, text, out = sys.argv[1:]
        with Evaluator(model, n_threads=1, trace=out + "/t.moet") as e:
            texts = [text[:200], {"prompt": text[100:300], "id": "x"}]
            e.evaluate(texts)
            e.evaluate(texts, intervene="ablate:*:2@request=x")
    """
    run = python(code, model_file("olmoe"), TEXT, tmp_path)
    assert run.returncode == 0, run.stderr
    trace = moetrace.open(tmp_path / "t.moet")
    assert verify(trace.path).exit_code == 0
    assert list(trace.requests["id"]) == ["0", "x", "0", "x"]
    for number, is_ablated in zip(sorted(trace.requests.index), [False, False, False, True], strict=True):
        rows = trace.sel(request=int(number))
        assert (rows.intervened == is_ablated).all()
        assert (np.asarray(rows.experts) == 2).any() != is_ablated
    (row,) = trace.interventions.itertuples()
    assert row.rules == "ablate:*:2@slot=1"
    inside = trace.serial >= np.uint64(row.first_serial)
    np.testing.assert_array_equal(trace.intervened, inside & (trace.sequence == 1))


LEAVES_TOO_FEW = ",".join(map(str, range(13)))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (f"ablate:1:{LEAVES_TOO_FEW}", "layer 1: leaves 3 experts, 4 are used"),
        ("force:1:1,2,3,4,5", "layer 1: 5 forced, 4 are used"),
        ("ablate:1:16", "layer 1 has no expert 16"),
        ("ablate:7:1", "layer 7 has no experts"),
        ("ablate:1:3 force:*:3", "layer 1: expert 3 ablated and forced"),
        ("ablate:1:3,3", "different numbers"),
        ("ablate:1", "no intervention"),
        ("bias:1:3", "a bias"),
        ("ablate:1:3=2", "a bias"),
        ("mute:1:3", "no kind 'mute'"),
        ("ablate:5-2:3", "backwards"),
        ("ablate:1:3@slot=x", "not a slot"),
        ("replay:none.moet", "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_happens(spec, says, runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    options = [x for one in spec.split() for x in ("--intervene", one)]
    error = capture(model_file("qwen3moe"), path, PROMPTS, *options, ok=False)
    assert says in error
    assert "Traceback" not in error
    assert not path.exists()


@pytest.mark.parametrize(("name", "why"), [("qwen3moe", "uses 4 experts, not 2"), ("llama", "leaves 1")])
def test_what_only_the_graph_tells_is_refused_by_the_host(name, why, runtime, model_file, tmp_path):
    """An override of the number of experts is not in the file: the host looks again, and leaves the routing alone."""
    base = tmp_path / "base.moet"
    capture(model_file("llama"), base, PROMPTS[:1])  # top-2 routing
    spec = f"replay:{base}" if name == "qwen3moe" else "ablate:1:0,1,2,3,4,5,6"
    code = """
        import sys
        from moetrace.host import intervene, inprocess
        from moetrace.errors import MoetraceError
        model, spec, out = sys.argv[1:]
        intervene.model_routers = lambda *a: None  # nothing is known beforehand
        try:
            inprocess.capture(model, ["Some words", "and others"], out, intervene=spec, n_threads=1)
        except MoetraceError as e:
            print(e)
    """
    run = python(code, model_file(name), spec, tmp_path / "t.moet")
    assert "did not take intervention 1" in run.stdout
    assert why in run.stdout
    assert "is refused" in run.stderr
    trace = moetrace.open(tmp_path / "t.moet")
    assert len(trace) > 0
    assert not trace.intervened.any()
    assert len(trace.interventions) == 0


#
# the server
#


def ask(server, slot: int, *, n_predict: int = 12, text: str = TEXT[:120], identity: str = "x") -> Answer:
    """One request, pinned to a slot; nothing from the prompt cache, whose tokens were routed before."""
    body = {
        "prompt": server.client.tokenize(text),
        "n_predict": n_predict,
        "id_slot": slot,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
    }
    start = time.monotonic_ns()
    answer = server.client.call("/completion", body)
    line = {"sequence": slot, "from_ns": start, "to_ns": time.monotonic_ns(), "id": identity}
    server.label([line])
    return answer["content"]


@pytest.mark.parametrize("collector", ["tap", "callback"])
def test_switching_while_the_server_runs(collector, runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    with moetrace.serve(
        model_file("gpt-oss"),
        output=path,
        arguments=["-np", "4", "-c", "4096", "-t", "1"],
        collector=collector,
        program=str(runtime.tool("llama-server")),
    ) as server:
        texts = [ask(server, 0, identity="before")]
        with server.intervene("ablate:*:3", "ablate:*:7@slot=1") as first:
            texts += [ask(server, slot, identity=f"in {slot}") for slot in (0, 1)]
            with server.intervene("ablate:*:4") as second:
                ask(server, 0, identity="inner")
            ask(server, 0, identity="outer")
        texts += [ask(server, slot, identity=f"after {slot}") for slot in (0, 1)]
        with pytest.raises(UsageError, match="has no expert 99"), server.intervene("ablate:1:99"):
            raise AssertionError("it was taken")
        with pytest.raises(UsageError, match="about a request"), server.intervene("ablate:1:9@request=x"):
            raise AssertionError("it was taken")
    assert (first, second) == (1, 2)
    assert texts[0] == texts[-1] == texts[-2]
    assert texts[1] != texts[0]
    assert verify(path).exit_code == 0
    trace = moetrace.open(path)
    missing = {
        "before": [],
        "in 0": [3],
        "in 1": [3, 7],
        "inner": [4],
        "outer": [3],
        "after 0": [],
        "after 1": [],
    }
    for identity, experts in missing.items():
        rows = request(trace, identity)
        assert (rows.intervened == bool(experts)).all(), identity
        used = set(np.unique(np.asarray(rows.experts))) - {255}
        assert not used & set(experts)
        assert {3, 4, 7} - set(experts) <= used
    assert list(trace.interventions["number"]) == [1, 2, 1]
    both = "ablate:*:3 ablate:*:7@slot=1"
    assert list(trace.interventions["rules"]) == [both, "ablate:*:4", both]
    same_rows(request(trace, "before"), request(trace, "after 0"), "token_ids", "experts", "weights")
    assert trace.counters["rows_intervened"] == trace.intervened.sum()


def test_switching_in_the_middle_of_a_request(runtime, model_file, tmp_path):
    """From the command line, while a slot generates: the rows between the two switches, and no others."""
    path = tmp_path / "t.moet"
    with moetrace.serve(
        model_file("qwen3moe"),
        output=path,
        arguments=["-np", "1", "-c", "16384", "-t", "1"],
        program=str(runtime.tool("llama-server")),
    ) as server:
        ask(server, 0, identity="short")
        asking = threading.Thread(
            target=ask, args=(server, 0), kwargs={"n_predict": 15000, "identity": "long"}
        )
        asking.start()
        try:
            wait_for(lambda: len(server.trace) > 300)
            on = moetrace_command("intervene", path, "ablate:*:3")
            wait_for(lambda: server.trace.intervened.sum() > 200)
            status = moetrace_command("status", path)
            off = moetrace_command("intervene", path, "off")
            n = len(server.trace)
            wait_for(lambda: len(server.trace) > n + 200)
        finally:
            asking.join(300)
    assert on.stdout == "intervention 1: ablate:*:3\n"
    assert off.stdout == "no intervention\n"
    assert "intervention 1 is in force" in status.stdout
    trace = moetrace.open(path)
    rows = request(trace, "long")
    (what,) = trace.interventions.itertuples()
    inside = (rows.serial >= what.first_serial) & (rows.serial < what.end_serial)
    np.testing.assert_array_equal(rows.intervened, inside)
    assert 200 < inside.sum() < len(rows) - 300
    uses = (np.asarray(rows.experts) == 3).any(axis=(1, 2))
    assert not uses[inside].any()
    assert uses[~inside].any()
    assert what.from_ns < what.to_ns


def wait_for(what, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_from_the_first_token_and_while_recording_is_paused(runtime, model_file, tmp_path):
    """What the server computes does not depend on whether it is recorded."""
    texts = []
    for paused in (False, True):
        path = tmp_path / f"{paused}.moet"
        with moetrace.serve(
            model_file("olmoe"),
            output=path,
            arguments=["-np", "1", "-c", "2048", "-t", "1"],
            program=str(runtime.tool("llama-server")),
            intervene=["ablate:*:3", "force:2:5"],
            paused=paused,
        ) as server:
            texts.append(ask(server, 0))
        trace = moetrace.open(path)
        assert trace.counters["rows_intervened"] > 20
        assert len(trace.interventions) == 1
        if not paused:
            rows = request(trace, "x")
            assert rows.intervened.all()
            assert not (np.asarray(rows.experts) == 3).any()
            trials = trace.column("flags") & 64 > 0
            assert trials.any()
            assert not trace.intervened[trials].any()  # llama.cpp's own warm-up
    assert texts[0] == texts[1]


def test_many_requests_at_once_with_one_slot_intervened_on(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    prompts = [Prompt(id=str(i), text=TEXT[9 * i : 9 * i + 40 + 7 * i], n_predict=8) for i in range(24)]
    with moetrace.serve(
        model_file("qwen3moe"),
        output=path,
        arguments=["-np", "4", "-c", "8192", "-ub", "32", "-t", "1"],
        program=str(runtime.tool("llama-server")),
        intervene="ablate:*:1,2@slot=2",
    ) as server:
        answers = drive(server.client, prompts, settings={"temperature": 0.0, "cache_prompt": False})
        server.label([answer.label_line() for answer in answers])
    trace = moetrace.open(path)
    mine = (trace.sequence == 2) & (trace.request >= 0)
    np.testing.assert_array_equal(trace.intervened[trace.request >= 0], mine[trace.request >= 0])
    uses = np.isin(np.asarray(trace.experts), [1, 2]).any(axis=(1, 2))
    assert mine.sum() > 100
    assert not uses[mine].any()
    assert uses[~mine].mean() > 0.3
    assert verify(path).exit_code == 0


def test_run_refuses_before_it_starts_anything(runtime, model_file, tmp_path):
    path = tmp_path / "t.moet"
    server = ["--", runtime.tool("llama-server"), "-m", model_file("qwen3moe"), "--port", "1"]
    for spec, says in [("ablate:1:77", "no expert 77"), ("ablate:1:7@request=x", "about a request")]:
        run = moetrace_command("run", "-o", path, "--intervene", spec, *server)
        assert run.returncode == 2
        assert says in run.stderr
        assert not path.exists()


def test_what_the_server_refuses_is_told(runtime, model_file, tmp_path):
    """The file says top-4 of 16, the server is told to use 8: too few are left, which only its graph shows."""
    model, program = model_file("qwen3moe"), runtime.tool("llama-server")
    arguments = ["-t", "1", "-c", "512", "--override-kv", "qwen3moe.expert_used_count=int:8"]
    spec = "ablate:1:0,1,2,3,4,5,6,7,8"
    with pytest.raises(MoetraceError, match="did not take intervention 1") as e:
        moetrace.serve(
            model, output=tmp_path / "t.moet", arguments=arguments, program=str(program), intervene=spec
        )
    assert e.value.why == "layer 1: leaves 7 experts, 8 are used"
    assert not moetrace.open(tmp_path / "t.moet").live


def test_a_trace_that_is_not_live(plain):
    run = moetrace_command("intervene", plain("qwen3moe").path, "ablate:1:2")
    assert run.returncode == 1
    assert "not being recorded" in run.stderr


def test_the_model_goes_on_by_itself_when_tracing_has_ended(runtime, model_file, tmp_path):
    """llama.cpp keeps the graph, and with it the callback, from before."""
    code = """
        import sys
        from pathlib import Path
        from moetrace.host import llama
        from moetrace.host.intervene import Interventions
        from moetrace.host.options import CaptureOptions
        model, out = sys.argv[1:]
        llama.start(CaptureOptions(collector="callback", on_full="drop").settings(Path(out)))
        with llama.Llama(model, n_ctx=64, n_threads=1) as loaded:
            tokens = loaded.tokenize("Some words to compute")
            def logits():
                loaded.forget(0)
                loaded.decode([(token, i, 0, True) for i, token in enumerate(tokens)])
                return loaded.outputs(len(tokens)).copy()
            plain = logits()
            Interventions(Path(out), "ablate:*:3,4,5", model).assign({})
            changed = logits()
            llama.stop()
            print((changed != plain).any(), (logits() == plain).all(), (logits() == plain).all())
    """
    run = python(code, model_file("olmoe"), tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"] * 3


def test_two_recordings_in_one_process_are_refused(runtime, model_file, tmp_path):
    code = """
        import sys, moetrace
        from moetrace.host.evaluate import Evaluator
        model, out = sys.argv[1:]
        with Evaluator(model, n_threads=1, trace=out + "/a.moet") as e:
            try:
                moetrace.capture(model, ["x"], out + "/b.moet")
            except moetrace.MoetraceError as error:
                print(error)
            e.evaluate(["Some words here"])
        print(len(e.trace))
    """
    run = python(code, model_file("qwen3moe"), tmp_path)
    assert run.returncode == 0, run.stderr
    assert "recording already" in run.stdout
    assert int(run.stdout.split()[-1]) > 3
