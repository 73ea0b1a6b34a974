"""The models that moetrace.synthetic writes, read back with the gguf package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from moetrace.errors import UsageError
from moetrace.synthetic import ARCHITECTURES, QUANTIZATIONS, Architecture, write_model
from moetrace.synthetic.quantise import pack
from moetrace.synthetic.tokenizer import N_VOCAB_MIN, vocabulary

MOE = [name for name, arch in ARCHITECTURES.items() if arch.n_expert]


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in tensor.shape[::-1]))


@pytest.mark.parametrize("name", MOE)
def test_metadata_names_the_router(name, model_file):
    arch = ARCHITECTURES[name]
    keys, tensors = read(model_file(name))
    assert keys["general.architecture"] == arch.gguf_name
    prefix = arch.gguf_name
    assert keys[f"{prefix}.block_count"] == arch.n_layer
    assert keys[f"{prefix}.expert_count"] == arch.n_expert
    assert keys[f"{prefix}.expert_used_count"] == arch.n_expert_used
    routers = {f"blk.{layer}.ffn_gate_inp.weight" for layer in arch.moe_layers}
    assert routers == {tensor for tensor in tensors if tensor.endswith("ffn_gate_inp.weight")}
    for router in routers:
        assert tuple(tensors[router].shape) == (arch.n_embd, arch.n_expert)
        assert tensors[router].tensor_type == gguf.GGMLQuantizationType.F32
    assert any("exp_probs_b" in tensor for tensor in tensors) == arch.selection_bias
    assert any("gate_up_exps" in tensor for tensor in tensors) == arch.fused_gate_up
    assert any("_shexp" in tensor for tensor in tensors) == bool(arch.n_expert_shared)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_call_writes_the_same_bytes(name, tmp_path):
    first, again, other = (
        write_model(tmp_path / f"{i}.gguf", name, seed=seed).read_bytes() for i, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert len(first) == len(other)
    assert first != other


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_weights_are_finite_and_only_the_output_has_zero_rows(name, model_file):
    _, tensors = read(model_file(name))
    for tensor in tensors.values():
        data = values(tensor)
        assert np.isfinite(data).all(), tensor.name
        if data.ndim > 1 and tensor.name != "output.weight":
            assert (np.abs(data).max(axis=-1) > 0).all(), tensor.name


def test_the_ends_of_text_are_never_likely(model_file):
    keys, tensors = read(model_file("olmoe"))
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == keys["olmoe.vocab_size"] == len(set(tokens))
    output = np.abs(values(tensors["output.weight"])).max(axis=1)
    for role in ("bos", "eos", "eot", "padding"):
        assert output[keys[f"tokenizer.ggml.{role}_token_id"]] == 0
    assert output[tokens.index("a")] > 0
    assert (output > 0).sum() > 500


def test_replacing_one_tensor_leaves_the_others_alone(model_file, tmp_path):
    name = "blk.2.ffn_gate_inp.weight"
    planted = np.zeros((16, 64), np.float64)
    planted[5] = 1.5
    _, before = read(model_file("qwen3moe"))
    _, by_name = read(write_model(tmp_path / "a.gguf", "qwen3moe", overrides={name: planted}))

    def hook(tensor: str, _: np.ndarray) -> np.ndarray | None:
        return planted if tensor == name else None

    _, by_hook = read(write_model(tmp_path / "b.gguf", "qwen3moe", overrides=hook))
    for after in (by_name, by_hook):
        assert np.array_equal(values(after[name]), planted)
        changed = {other for other in before if not np.array_equal(before[other].data, after[other].data)}
        assert changed == {name}


def test_a_hook_sees_what_would_be_written(tmp_path):
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, drawn: np.ndarray) -> None:
        seen[name] = drawn.copy()

    _, tensors = read(write_model(tmp_path / "a.gguf", "gpt-oss", overrides=keep))
    assert seen.keys() == tensors.keys()
    assert all(np.array_equal(seen[name], values(tensor)) for name, tensor in tensors.items())


@pytest.mark.parametrize("gain", [0.5, 4.0])
def test_router_gain_is_the_spread_of_the_logits(gain, tmp_path):
    _, tensors = read(write_model(tmp_path / "a.gguf", "olmoe", n_expert=64, router_gain=gain))
    normed = np.random.default_rng(0).standard_normal((500, 64))
    logits = normed @ values(tensors["blk.1.ffn_gate_inp.weight"]).T
    assert logits.std() == pytest.approx(gain, rel=0.1)


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name])
def test_quantised_experts_stay_close_to_the_drawn_weights(quantization, model_file):
    sizes = {"n_layer": 1, "n_embd": 256, "n_ff_expert": 256, "n_expert": 4}
    _, exact = read(model_file("gpt-oss", **sizes))
    _, packed = read(model_file("gpt-oss", **sizes, quantization=quantization))
    qtype = gguf.GGMLQuantizationType[quantization]
    # half a step of each type, relative to the range of a block, is below these
    tolerance = {"F16": 1e-3, "Q8_0": 0.01, "Q4_K": 0.08, "MXFP4": 0.15}[quantization]
    for name, tensor in exact.items():
        if name.endswith("_exps.weight"):
            assert packed[name].tensor_type == qtype
            error = values(packed[name]) - values(tensor)
            assert np.sqrt(np.mean(error**2)) < tolerance * values(tensor).std()
            assert np.sqrt(np.mean(error**2)) > 0
        elif len(tensor.shape) == 1 or "ffn_gate_inp" in name:
            assert packed[name].tensor_type == gguf.GGMLQuantizationType.F32


def test_q4_k_packs_the_extremes_of_a_block():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((6, 512)).astype(np.float32)
    rows[0] = 0
    rows[1] = 3.0
    rows[2] = -3.0
    rows[3, :32] *= 50
    rows[4] = np.abs(rows[4])
    packed = pack(rows, gguf.GGMLQuantizationType.Q4_K)
    assert packed.shape == (6, 2 * 144)
    back = dequantize(packed, gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(back[0], rows[0])
    # each value is off by at most half a step of its sub-block plus the rounding of scale and minimum,
    # which are sixty-thirds of the block's largest
    blocks = rows.reshape(6, 2, 8, 32)
    spans = blocks.max(-1, keepdims=True).clip(min=0) - blocks.min(-1, keepdims=True).clip(max=0)
    bound = spans / 30 + 0.02 * spans.max(axis=2, keepdims=True)
    assert (np.abs(back.reshape(blocks.shape) - blocks) <= bound).all()


def test_sizes_reach_the_file(tmp_path):
    sizes = {"n_layer": 3, "n_embd": 96, "n_head": 6, "n_head_kv": 3, "n_expert": 12, "n_expert_used": 5}
    sizes |= {"n_ff_expert": 40, "n_ctx_train": 777}
    path = write_model(tmp_path / "a.gguf", "qwen3moe", **sizes, n_vocab=1000)
    keys, tensors = read(path)
    assert keys["qwen3moe.context_length"] == 777
    assert keys["qwen3moe.attention.head_count"] == 6
    assert keys["qwen3moe.attention.head_count_kv"] == 3
    assert tuple(tensors["blk.2.ffn_down_exps.weight"].shape) == (40, 96, 12)
    assert tuple(tensors["token_embd.weight"].shape) == (96, 1000)


def test_an_architecture_can_be_varied_beyond_the_arguments(tmp_path):
    arch = dataclasses.replace(ARCHITECTURES["olmoe"], moe_every=2)
    _, tensors = read(write_model(tmp_path / "a.gguf", arch))
    assert arch.moe_layers == (1, 3)
    assert "blk.0.ffn_up.weight" in tensors
    assert "blk.1.ffn_up_exps.weight" in tensors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"architecture": "qwen3mo"}, "qwen3moe"),
        ({"quantization": "Q5"}, "Q"),
        ({"quantization": "Q4_K"}, "256"),
        ({"n_head": 5}, "multiple of n_head"),
        ({"n_expert_used": 17}, "n_expert_used"),
        ({"n_head_kv": 0}, "positive"),
        ({"architecture": "jamba", "n_layer": 2}, "no layer with attention"),
        ({"architecture": "deepseek2-v2", "n_layer": 27}, "26 or 27"),
        ({"architecture": "deepseek2-v3", "n_expert": 18}, "n_expert_groups"),
        ({"n_vocab": 12}, str(N_VOCAB_MIN)),
        ({"overrides": {"blk.0.ffn_gate_inq.weight": np.zeros(1)}}, "blk.0.ffn_gate_inp.weight"),
        ({"overrides": {"blk.0.ffn_gate_inp.weight": np.zeros((64, 16))}}, r"\(16, 64\)"),
        ({"overrides": {"blk.0.ffn_gate_inp.weight": np.full((16, 64), np.nan)}}, "finite"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        write_model(tmp_path / "a.gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write_model(tmp_path / "a.gguf", "llama")
    before = path.read_bytes()

    def fail(name: str, _: np.ndarray) -> None:
        if name.startswith("blk.2"):
            raise KeyError(name)

    with pytest.raises(KeyError):
        write_model(path, "llama", seed=9, overrides=fail)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("n_vocab", [N_VOCAB_MIN, 400, 768, 2000])
def test_vocabulary_has_every_byte_and_every_merge_makes_a_token(n_vocab):
    vocab = vocabulary(n_vocab)
    assert len(vocab.tokens) == len(vocab.types) == len(vocab.plain) == n_vocab == len(set(vocab.tokens))
    assert len({token for token in vocab.tokens[:256] if len(token) == 1}) == 256
    assert {merge.replace(" ", "") for merge in vocab.merges} <= set(vocab.tokens)


def test_every_architecture_has_experts_where_it_says():
    arch = Architecture("x", n_layer=6, n_layer_dense=1, moe_every=2)
    assert arch.moe_layers == (2, 4)
