"""Readers of foreign recordings, without a trace: what they read, what they refuse, and in how much
memory."""

import json
import tracemalloc

import numpy as np
import pytest
from recordings import SHARED, WARMUP, entry, olmoe_line, one_pass, real, token_file, write

from moetrace.errors import InputError
from moetrace.trace.importers import counts, logs, olmoe, token_json
from moetrace.trace.importers.source import DECODE, LOST, PREFILL, PRESENT, Tally


def stacked(pieces, name):
    return np.concatenate([getattr(p, name) for p in pieces])


# -- per-token JSON --------------------------------------------------------------------------------------


@pytest.fixture
def domains(tmp_path):
    for domain in ("code", "math"):
        token_file(tmp_path, domain, 0, WARMUP, one_pass([[5, 18, 9, 31], [1, 2, 3, 4]]))
        token_file(tmp_path, domain, 1, one_pass([[4, 3, 2, 1], [7, 6, 5, 0]]))
    return tmp_path


def read_json(source, **options):
    tally = Tally()
    return list(token_json.pieces(source, token_json.shape(source, 4), tally, **options)), tally


def test_token_json_drops_the_warm_up(domains):
    pieces, tally = read_json(domains)
    assert [p.label for p in pieces] == ["code", "code", "math", "math"]
    assert stacked(pieces, "experts")[:2].tolist() == [
        [[5, 18, 9, 31], [1, 2, 3, 4]],
        [[4, 3, 2, 1], [7, 6, 5, 0]],
    ]
    assert tally.rows_all_experts == 2
    assert (stacked(pieces, "phase") == 1).all()
    assert (stacked(pieces, "time_ns") == 5).all()
    assert (stacked(pieces, "token") == -1).all()
    assert (stacked(pieces, "position") == -1).all()


def test_token_json_as_published_is_what_the_notebook_loads(domains):
    """A plain transcription of the notebook's loop, on the same files."""
    expected = []
    for domain in ("code", "math"):
        for number in range(100):
            path = domains / domain / "traces" / f"token-{number:05d}.json"
            if not path.exists():
                continue
            for e in json.loads(path.read_text())["entries"]:
                if (
                    e["operation_type"] == "MUL_MAT_ID"
                    and e["expert_ids"]
                    and "ffn_moe_down" in e["dst_name"]
                ):
                    expected.append((domain, e["layer_id"], *e["expert_ids"][:4]))
    pieces, tally = read_json(domains, as_published=True)
    got = [
        (p.label, layer, *p.experts[row, i])
        for p in pieces
        for row in range(len(p.state))
        for i, layer in enumerate(p.layers)
    ]
    assert got == expected
    assert tally.rows_all_experts == 0


def test_token_json_one_decision_not_three(domains):
    pieces, _ = read_json(domains)
    assert sum(len(p.state) for p in pieces) == 4


@pytest.mark.parametrize("below", ["", "code", "code/traces"])
def test_token_json_is_found_at_every_level(domains, below):
    pieces, _ = read_json(domains / below)
    assert {p.label for p in pieces} == ({"code", "math"} if not below else {"code"})


def test_token_json_of_one_file(domains):
    pieces, _ = read_json(domains / "math" / "traces" / "token-00001.json")
    assert [p.label for p in pieces] == ["math"]


def test_token_json_missing_files_are_skipped_rows(domains):
    token_file(domains, "math", 4, one_pass([[4, 3, 2, 1], [7, 6, 5, 0]]))
    pieces, _ = read_json(domains / "math")
    assert [p.skipped for p in pieces] == [0, 0, 2]


def test_token_json_layers_of_a_pass_may_be_missing(domains):
    token_file(domains, "math", 2, one_pass([[4, 3, 2, 1]]))
    pieces, _ = read_json(domains / "math")
    assert pieces[-1].state.tolist() == [[PRESENT, LOST]]
    assert pieces[-1].experts[0, 1].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"expert_ids": [1, 2, "x", 4]}, r"entries\[0\].expert_ids: is no list of expert ids"),
        ({"expert_ids": [1, 2, True, 4]}, r"entries\[0\].expert_ids: is no list"),
        ({"expert_ids": [1, 2, -3, 4]}, r"entries\[0\].expert_ids: is no list"),
        ({"expert_ids": [1, 2]}, r"entries\[0\].expert_ids: has 2 ids where 4 are used"),
        ({"expert_ids": None}, r"entries\[0\].expert_ids"),
        ({"layer_id": None}, r"entries\[0\].layer_id: None is no layer"),
        ({"dst_name": "ffn_out-0"}, r"entries\[0\].dst_name: 'ffn_out-0' is none of"),
    ],
)
def test_token_json_malformed(tmp_path, change, field):
    path = token_file(tmp_path, "code", 0, [entry(0, "gate", [1, 2, 3, 4]) | change])
    with pytest.raises(InputError, match=rf"{path.name}: {field}"):
        read_json(tmp_path)


def test_token_json_components_must_agree(tmp_path):
    token_file(tmp_path, "code", 0, [entry(0, "gate", [1, 2, 3, 4]), entry(0, "up", [1, 2, 4, 3])])
    with pytest.raises(
        InputError, match=r"entries\[1\].expert_ids: differ from those of another component of layer 0"
    ):
        read_json(tmp_path)


def test_token_json_syntax_error_names_line(tmp_path):
    write(tmp_path / "code" / "traces" / "token-00000.json", "{", '"entries": [', "oops")
    with pytest.raises(InputError, match=r"token-00000.json:3: column 1: Expecting value"):
        read_json(tmp_path)


@real
def test_token_json_real_file_is_all_warm_up():
    """The shipped sample: two passes, both 32 wide, of which 16 ids were kept. Nothing in it is routing."""
    path = SHARED / "data" / "tensor_trace_token-00000.json"
    both = list(token_json.passes(path, 4))
    assert [len(p.experts) for p in both] == [24, 24]
    assert [p.wide for p in both] == [True, True]
    assert {len(ids) for p in both for ids in p.experts.values()} == {16}
    assert both[0].experts[0][:4] == [9, 5, 24, 3]  # the rows that the notebook prints
    assert [p.phase for p in both] == [0, 1]


# -- chosen experts --------------------------------------------------------------------------------------


def read_experts(path, k=None, **options):
    tally = Tally()
    return list(logs.expert_pieces(path, logs.expert_shape(path, k), tally, **options)), tally


def test_expert_log(tmp_path):
    path = write(
        tmp_path / "story.log",
        "layer_id,expert_ids",
        "3,52 40",
        "3,32 115",
        "4,1 2",
        "4,3 4",
        "3,9 8",
        "4,7 6",
    )
    pieces, tally = read_experts(path)
    assert [p.experts.tolist() for p in pieces] == [
        [[[52, 40], [1, 2]], [[32, 115], [3, 4]]],
        [[[9, 8], [7, 6]]],
    ]
    assert [p.row.tolist() for p in pieces] == [[0, 1], [0]]
    assert {p.label for p in pieces} == {"story"}
    assert pieces[0].layers.tolist() == [3, 4]
    assert (stacked(pieces, "phase") == 2).all()
    assert tally == Tally()


def test_expert_log_last_layer_of_a_prompt_is_not_guessed(tmp_path):
    path = write(
        tmp_path / "x.log", "layer_id,expert_ids", "0,1 2", "0,3 4", "0,5 6", "1,7 8", "0,1 2", "1,3 4"
    )
    pieces, tally = read_experts(path)
    assert pieces[0].state.tolist() == [[PRESENT, LOST]] * 3
    assert tally.records_unplaced == 1
    assert pieces[1].state.tolist() == [[PRESENT, PRESENT]]
    published, tally = read_experts(path, as_published=True)
    assert published[0].state.tolist() == [[PRESENT, LOST]] * 2 + [[PRESENT, PRESENT]]
    assert published[0].experts[2].tolist() == [[5, 6], [7, 8]]
    assert tally.records_unplaced == 0


def test_expert_log_drops_the_warm_up(tmp_path):
    warm = [f"{layer},3 1 0 2" for layer in (0, 1)]
    path = write(tmp_path / "x.log", "layer_id,expert_ids", *warm, "0,1 2", "1,3 0", *warm, "0,2 1", "1,0 3")
    pieces, tally = read_experts(path)
    assert stacked(pieces, "experts").tolist() == [[[1, 2], [3, 0]], [[2, 1], [0, 3]]]
    assert len(pieces) == 2
    assert tally.rows_all_experts == 2
    published, _ = read_experts(path, as_published=True)
    assert stacked(published, "experts")[0].tolist() == [[3, 1], [3, 1]]


def test_expert_log_of_one_layer_is_a_row_per_line(tmp_path):
    path = write(tmp_path / "x.log", "layer_id,expert_ids", *(f"7,{i} {i + 1}" for i in range(5)))
    pieces, _ = read_experts(path)
    assert [len(p.state) for p in pieces] == [1] * 5


@pytest.mark.parametrize("header", ["layer,expert\n", ""])
def test_lines_of_one_expert_each_are_tokens_of_k(tmp_path, header):
    """llama.cpp's moe-trace: a prompt of three tokens and two more, top-4 of 8 in two layers; the file twice."""
    rng = np.random.default_rng(0)
    tokens = np.array([[rng.permutation(8)[:4] for _ in range(2)] for _ in range(5)])  # token, layer, k
    assert tokens.max() == 7
    text = header
    for ubatch in (range(3), [3], [4]):
        for layer in range(2):
            text += "".join(f"{layer},{e}\n" for t in ubatch for e in tokens[t, layer])
    path = write(tmp_path / "moe.csv", text + text)
    with pytest.raises(InputError, match="does not say how many lines make a token") as refused:
        logs.expert_shape(path)
    assert "--n-expert-used K" in refused.value.fix
    shape = logs.expert_shape(path, 4)
    assert (shape.n_expert_used, shape.layers) == (4, (0, 1))
    pieces = list(logs.expert_pieces(path, shape, Tally()))
    experts = np.concatenate([piece.experts for piece in pieces])
    np.testing.assert_array_equal(experts, np.concatenate((tokens, tokens)))
    with pytest.raises(InputError, match=r"no tokens of 3 experts|name one expert twice"):
        list(logs.expert_pieces(path, logs.expert_shape(path, 3), Tally()))
    one = logs.expert_shape(path, 1)  # a model of top-1 says so
    assert sum(len(piece.experts) for piece in logs.expert_pieces(path, one, Tally())) == 40


def test_lines_of_one_expert_each_leave_the_warm_up_out(tmp_path):
    text = "".join(f"{layer},{e}\n" for layer in range(2) for _ in range(2) for e in range(8))
    text += "0,3\n0,7\n1,2\n1,0\n"
    tally = Tally()
    path = write(tmp_path / "moe.csv", "layer,expert\n" + text)
    (piece,) = logs.expert_pieces(path, logs.expert_shape(path, 2), tally)
    assert piece.experts.tolist() == [[[3, 7], [2, 0]]]
    assert tally.rows_all_experts == 2


def test_a_log_of_lists_may_have_lists_of_one(tmp_path):
    path = write(tmp_path / "one.log", "layer_id,expert_ids\n0,3\n0,5\n1,2\n1,2\n")
    shape = logs.expert_shape(path)
    (piece,) = logs.expert_pieces(path, shape, Tally())
    assert piece.experts.tolist() == [[[3], [2]], [[5], [2]]]


def test_expert_log_cut_off(tmp_path):
    path = write(
        tmp_path / "x.log",
        "layer_id,expert_ids",
        "0,1 2",
        "0,3 4",
        "1,1 2",
        "1,3 4",
        "0,5 6",
        "0,7 8",
        "1,0 1",
    )
    pieces, tally = read_experts(path)
    assert pieces[-1].state.tolist() == [[PRESENT, LOST]] * 2
    assert tally.records_unplaced == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,x 3", "expert_ids: 'x' is no whole number"),
        ("1,-1 3", "expert_ids: '-1' is no whole number"),
        ("1,", "expert_ids: is empty"),
        ("1", "expert_ids: is missing"),
        ("one,2 3", "layer_id: 'one' is no whole number"),
        ("1,2 2", "expert_ids: names one expert twice"),
        ("1,2 3 9", "expert_ids: has 3 ids where others have 2"),
        ("99999,2 3", "layer_id: 99999 is too large"),
        ("1,2 ²", "expert_ids: '²' is no whole number"),
    ],
)
def test_expert_log_malformed(tmp_path, line, message):
    path = write(tmp_path / "x.log", "layer_id,expert_ids", "0,1 2", line)
    with pytest.raises(InputError, match=f"x.log:3: {message}"):
        read_experts(path)


def test_expert_log_uneven_layers(tmp_path):
    path = write(tmp_path / "x.log", "0,1 2", "0,3 4", "1,1 2", "2,1 2", "2,3 4", "0,1 2", "1,1 2", "2,1 2")
    with pytest.raises(
        InputError, match=r"x\.log:3: layer_id: layer 1 has 1 rows in an ubatch where another layer has 2"
    ):
        read_experts(path)


def test_not_text(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"0,1 2\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"x\.log:2: line: is not UTF-8"):
        read_experts(path)


# -- gate inputs -----------------------------------------------------------------------------------------


def read_gates(path, **options):
    tally = Tally()
    return list(logs.gate_pieces(path, logs.gate_shape(path), tally, **options)), tally


def test_gate_log(tmp_path):
    path = write(
        tmp_path / "x.log",
        "gate_input,20,0,0.5 -1 2e-3",
        "gate_input,20,1,1 2 3",
        "gate_input,21,0,4 5 6",
        "gate_input,21,1,7 8 9",
        "gate_input,20,0,0 0 1",
        "gate_input,21,0,0 1 0",
    )
    pieces, tally = read_gates(path)
    assert pieces[0].gate_input[0, 0].tolist() == [0.5, -1, np.float32(2e-3)]
    assert pieces[0].gate_input[1].tolist() == [[1, 2, 3], [7, 8, 9]]
    assert [p.row.tolist() for p in pieces] == [
        [0, 1],
        [0],
    ]  # a prompt's rows are told from a generated token's
    assert pieces[0].experts is None
    assert tally.lines_left_out == 0


def test_mixed_log_is_read_by_kind(tmp_path):
    path = write(
        tmp_path / "x.log",
        "layer_id,expert_ids",
        "3,1 2",
        "gate_input,3,0,1 2",
        "4,0 2",
        "gate_input,4,0,3 4",
    )
    experts, tally = read_experts(path)
    assert experts[0].experts.tolist() == [[[1, 2], [0, 2]]]
    assert tally.lines_left_out == 2
    gates, tally = read_gates(path)
    assert gates[0].gate_input.tolist() == [[[1, 2], [3, 4]]]
    assert tally.lines_left_out == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gate_input,20,0,1 x", "values: could not convert string to float: 'x'"),
        ("gate_input,20,0,1", "values: has 1 numbers where the lines before have 2"),
        ("gate_input,20,0", "values: is missing"),
        ("gate_input,20", "token_id: is missing"),
        ("gate_input,20,0,", "values: is empty"),
        ("gate_input,a,0,1 2", "layer_id: 'a' is no whole number"),
        ("gate_input,20,b,1 2", "token_id: 'b' is no whole number"),
        ("gate_input,20,5,1 2", "token_id: is 5 where 1 follows in layer 20"),
        ("hello", "gate_input: a line begins with"),
    ],
)
def test_gate_log_malformed(tmp_path, line, message):
    path = write(tmp_path / "x.log", "gate_input,20,0,1 2", line)
    with pytest.raises(InputError, match=f"x.log:2: {message}"):
        read_gates(path)


# -- OLMoE -----------------------------------------------------------------------------------------------


def read_olmoe(source, **options):
    tally = Tally()
    return list(olmoe.pieces(source, olmoe.shape(source), tally, **options))


def test_olmoe(tmp_path):
    first = [[[1, 2], [3, 4], [5, 6]], [[2, 1], [4, 3], [6, 5]]]
    path = write(tmp_path / "github.jsonl", olmoe_line(first), olmoe_line(first[:1], label="code"))
    pieces = read_olmoe(path)
    assert pieces[0].experts.tolist() == first
    assert pieces[0].token.tolist() == pieces[0].position.tolist() == [0, 1]
    assert pieces[0].predicted.tolist() == [1, 2]
    assert [p.label for p in pieces] == ["github", "code"]
    assert len({p.request for p in pieces}) == 2
    assert (stacked(pieces, "phase") == 0).all()  # read in one forward pass, not generated


def test_olmoe_lines_may_say_what_was_generated_and_that_a_token_is_not_known(tmp_path):
    line = olmoe_line([[[1, 2]], [[3, 0]], [[1, 3]]], input_ids=[5, -1, 7], n_prompt=2, group="g", score=[1])
    (piece,) = read_olmoe(write(tmp_path / "x.jsonl", line))
    assert piece.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert piece.token.tolist() == [5, -1, 7]
    assert piece.extra == {"group": "g"}


def test_olmoe_folder(tmp_path):
    for name in ("arxiv", "book"):
        write(tmp_path / f"{name}.jsonl", olmoe_line([[[1, 2]]]))
    assert [p.label for p in read_olmoe(tmp_path)] == ["arxiv", "book"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input_ids": [1]}', "exp_ids: is missing"),
        ('{"exp_ids": [[[1]]]}', "input_ids: is missing"),
        ('{"input_ids": [1], "exp_ids": [[[1, 2]], [[1, 2]]]}', "exp_ids: has 2 tokens, input_ids has 1"),
        ('{"input_ids": [1], "exp_ids": [[[1, 2], [3]]]}', "exp_ids: its lists are of unequal length"),
        ('{"input_ids": [1], "exp_ids": [[[1.5]]]}', "exp_ids: is no nested list"),
        ('{"input_ids": [1], "exp_ids": [[1]]}', "exp_ids: is no nested list"),
        ('{"input_ids": [-2], "exp_ids": [[[1]]]}', "input_ids: a number is not within -1"),
        ('{"input_ids": [1], "exp_ids": [[[1]]], "n_prompt": 2}', "n_prompt: 2 is no number"),
        ('{"input_ids": ["a"], "exp_ids": [[[1]]]}', "input_ids: is no list of whole numbers"),
        ('{"input_ids": [1], "exp_ids": [[[1], [1]]]}', "exp_ids: names one expert twice"),
        (
            '{"input_ids": [1], "exp_ids": [[[1]]], "predicted_token_ids": []}',
            "predicted_token_ids: has 0 tokens",
        ),
        ('{"input_ids": [1], "exp_ids": [[[1]]], "label": 3}', "label: is no text"),
        ("[1]", "line: is no JSON object"),
        ('{"input_ids": [1,', "column 18"),
        (
            '{"input_ids": [1], "exp_ids": [[[1, 2], [3, 4]]]}',
            r"exp_ids: has k, layers = \(2, 2\) where others have \(2, 1\)",
        ),
    ],
)
def test_olmoe_malformed(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", olmoe_line([[[1, 2]]]), line)
    with pytest.raises(InputError, match=f"x.jsonl:2: {message}"):
        read_olmoe(path)


# -- count tables ----------------------------------------------------------------------------------------


def test_counts(tmp_path):
    path = write(
        tmp_path / "c.csv", "layer_id,domain,expert_id,count", "7,b,2,5", "7,a,0,1", "9,b,0,3", "9,a,1,4"
    )
    table = counts.read_counts(path)
    assert table.domains == ("b", "a")
    assert table.layers.tolist() == [7, 9]
    assert table.counts.tolist() == [[[0, 0, 5], [3, 0, 0]], [[1, 0, 0], [0, 4, 0]]]
    assert counts.read_counts(path, n_expert=8).counts.shape == (2, 2, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,1,2", "line: has 3 fields where the header has 4"),
        ("a,1,0,3", "expert_id: a, layer 1, expert 0 came before"),
        ("a,1,9,3", "expert_id: 9 is too large"),
        ("a,1,1,many", "count: 'many' is no whole number"),
        ("a,1,1,-4", "count: '-4' is no whole number"),
        ("a,x,1,4", "layer_id: 'x' is no whole number"),
        (",1,1,4", "domain: is empty"),
    ],
)
def test_counts_malformed(tmp_path, line, message):
    path = write(tmp_path / "c.csv", "domain,layer_id,expert_id,count", "a,1,0,3", line)
    with pytest.raises(InputError, match=f"c.csv:3: {message}"):
        counts.read_counts(path, n_expert=8)


def test_counts_header_and_holes(tmp_path):
    with pytest.raises(InputError, match=r"c\.csv:1: expert_id: is missing from the header"):
        counts.read_counts(write(tmp_path / "c.csv", "domain,layer_id,count", "a,1,3"))
    path = write(tmp_path / "d.csv", "domain,layer_id,expert_id,count", "a,1,0,3", "a,2,0,3", "b,1,0,3")
    with pytest.raises(InputError, match="b has no counts for layer 2"):
        counts.read_counts(path)


@real
def test_counts_of_olmoe():
    """Every domain and layer: 8 of 64 experts for each of 208,896 tokens."""
    table = counts.read_counts(SHARED / "data" / "olmoe_domain_expert_counts.csv")
    assert table.layers.tolist() == [0, 7, 15]
    assert table.counts.shape == (5, 3, 64)
    assert (table.counts.sum(2) == 8 * 208_896).all()
    assert table.counts[table.domains.index("github"), 0, 0] == 32_373


# -- memory ----------------------------------------------------------------------------------------------


def peak(read):
    tracemalloc.start()
    n = sum(len(piece.state) for piece in read())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return n, most


@pytest.mark.parametrize("kind", ["experts", "gates", "olmoe", "json"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    def source(n):
        if kind == "json":
            for i in range(n):
                token_file(tmp_path / str(n), "code", i, one_pass([[1, 2, 3, 4]] * 8))
            return tmp_path / str(n)
        line = {
            "experts": lambda: [f"{layer},1 2 3 4 5 6 7 8" for layer in range(4)],
            "gates": lambda: [f"gate_input,{layer},0," + "0.5 " * 50 for layer in range(4)],
            "olmoe": lambda: [olmoe_line([[[1, 2, 3, 4]] * 8] * 20)],
        }[kind]()
        return write(tmp_path / f"{n}.jsonl", *(line * n))

    def read(path):
        tally = Tally()
        if kind == "experts":
            yield from logs.expert_pieces(path, logs.expert_shape(path), tally)
        elif kind == "gates":
            yield from logs.gate_pieces(path, logs.gate_shape(path), tally)
        elif kind == "olmoe":
            yield from olmoe.pieces(path, olmoe.shape(path), tally)
        else:
            yield from token_json.pieces(path, token_json.shape(path, 4), tally)

    small, large = source(40), source(400)
    list(read(small))  # imports and caches
    (n_small, peak_small), (n_large, peak_large) = peak(lambda: read(small)), peak(lambda: read(large))
    assert n_large == 10 * n_small
    # the list of file names is the only thing that grows
    assert peak_large < peak_small + (400 * 1500 if kind == "json" else 20_000)
