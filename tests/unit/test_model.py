"""GGUF facts, against what the models were written with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from moetrace.errors import InputError
from moetrace.model.file import ModelFile
from moetrace.trace.store import read_vocabulary, write_vocabulary


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    weight, bias = rng.random((8, 32), np.float32), rng.random(8, np.float32)
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_name("toy")
    writer.add_block_count(3)
    writer.add_embedding_length(32)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", "Ġthe", "Ã", "©", "Ċ"])
    writer.add_token_types([3, 1, 1, 1, 1])
    writer.add_tensor("blk.1.ffn_gate_inp.weight", weight)
    writer.add_tensor("blk.1.ffn_gate_inp.bias", bias)
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.2.ffn_gate_inp.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weight, bias


def test_facts(model: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with ModelFile(model[0]) as file:
        assert (file.architecture, file.name, file.n_layer, file.n_embd) == ("gpt-oss", "toy", 3, 32)
        assert (file.n_expert, file.n_expert_used, file.moe_layers) == (8, 2, [1, 2])


def test_routers(model: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path, weight, bias = model
    with ModelFile(path) as file:
        router = file.router(1)
        np.testing.assert_array_equal(router.weight, weight)
        np.testing.assert_array_equal(router.bias, bias)
        assert router.selection_bias is None
        quantised = file.router(2)
        np.testing.assert_allclose(quantised.weight, weight, atol=1 / 127)
        assert quantised.bias is None
        with pytest.raises(InputError, match=r"blk\.0"):
            file.router(0)


def test_vocabulary_is_bytes(model: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    with ModelFile(model[0]) as file:
        assert file.vocabulary == [b"<|end|>", b" the", b"\xc3", b"\xa9", b"\n"]
        write_vocabulary(tmp_path, file.vocabulary)
        assert read_vocabulary(tmp_path) == file.vocabulary


def test_sentencepiece(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "<0xC3>", "▁the", "▁"])
    writer.add_token_types([2, 3, 6, 1, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with ModelFile(tmp_path / "m.gguf") as file:
        assert file.vocabulary == [b"<unk>", b"<s>", b"\xc3", b" the", b" "]
        assert file.n_expert == 0


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUFnonsense")
    for path in (tmp_path / "m.gguf", tmp_path / "nowhere"):
        with pytest.raises(InputError):
            ModelFile(path)
