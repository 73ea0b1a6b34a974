"""GGUF facts, against what the models were written with."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from parts import in_parts

import moetrace.model
from moetrace.analysis.experts.merging import drop_experts, merge
from moetrace.errors import InputError
from moetrace.host.intervene import model_routers
from moetrace.model.experts import LayerExperts
from moetrace.model.file import ModelFile
from moetrace.model.merged import write_merged
from moetrace.synthetic import write_model
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


def test_the_room_stands_below_all_others() -> None:
    for path in Path(moetrace.model.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                ours = name.startswith("moetrace")
                assert not ours or name.startswith(("moetrace.model", "moetrace.errors")), f"{path}: {name}"


# -- models in parts


@pytest.fixture(scope="module")
def whole_and_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A quantised model, and the same in parts that cut its layers' experts apart."""
    folder = tmp_path_factory.mktemp("split")
    sizes = {"n_layer": 2, "n_embd": 64, "n_ff_expert": 64, "n_expert": 8, "n_expert_used": 2}
    whole = write_model(folder / "m.gguf", "gpt-oss", quantization="Q8_0", **sizes)
    parts = in_parts(whole, folder / "parts", 7)
    assert len(parts) > 4
    return whole, parts


def test_any_part_stands_for_the_model(whole_and_parts: tuple[Path, list[Path]]) -> None:
    whole, parts = whole_and_parts
    with ModelFile(whole) as expected:
        for part in parts:
            with ModelFile(part) as file:
                assert file.parts == tuple(parts)
                assert (file.architecture, file.name) == (expected.architecture, expected.name)
                assert file.vocabulary == expected.vocabulary
                assert file.moe_layers == expected.moe_layers == [0, 1]
                assert file.tensor_names == expected.tensor_names
                assert [f.name for f in file.fields[3:]] == [f.name for f in expected.fields[3:]]
                for name in file.tensor_names:
                    assert file.stored(name)[1] == expected.stored(name)[1]
                    np.testing.assert_array_equal(file.stored(name)[0], expected.stored(name)[0])
                assert file.expert_bytes(1) == expected.expert_bytes(1) > 0
                np.testing.assert_array_equal(
                    LayerExperts(file, 1)[3].down, LayerExperts(expected, 1)[3].down
                )
                assert file.n_bytes == sum(p.stat().st_size for p in parts)
            assert model_routers(str(part)) == model_routers(str(whole))


def test_files_with_fewer_experts_are_written_from_parts(
    whole_and_parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    whole, parts = whole_and_parts
    groups = {layer: drop_experts(np.arange(8), 6) for layer in (0, 1)}
    write_merged(whole, tmp_path / "a.gguf", groups, merge=merge)
    made = write_merged(parts[2], tmp_path / "b.gguf", groups, merge=merge)
    assert made.n_bytes_before == sum(p.stat().st_size for p in parts)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_parts_that_are_missing_or_of_another_model(
    whole_and_parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    parts = [Path(shutil.copy(part, tmp_path)) for part in whole_and_parts[1]]
    third = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(InputError, match=f"{parts[2].name} is missing") as error:
        ModelFile(parts[0])
    assert "part 3 of" in error.value.why
    parts[2].write_bytes(b"GGUFnonsense")
    with pytest.raises(InputError, match=parts[2].name):
        ModelFile(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(InputError, match=f"{parts[2].name} is not part 3"):
        ModelFile(parts[0])
    parts[2].write_bytes(third)
    with ModelFile(parts[-1]) as file:
        assert len(file.parts) == len(parts)
    lone = tmp_path / "renamed.gguf"
    shutil.copy(parts[0], lone)
    with pytest.raises(InputError, match="name does not say where the others are"):
        ModelFile(lone)


def test_parts_of_two_models_are_not_mixed(whole_and_parts: tuple[Path, list[Path]], tmp_path: Path) -> None:
    parts = [Path(shutil.copy(part, tmp_path)) for part in whole_and_parts[1]]
    smaller = in_parts(write_model(tmp_path / "m.gguf", "olmoe", n_layer=3), tmp_path / "o", 7)
    assert len(smaller) == len(parts)
    shutil.copy(smaller[-1], parts[-1])
    with pytest.raises(InputError, match=r"do not belong together|another part"):
        ModelFile(parts[0])
