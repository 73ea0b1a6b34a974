"""Which file is a trace's model, and that another one is refused wherever it meets the trace."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from parts import in_parts
from traces import labelled_trace, model_facts, say_model, small_trace

import moetrace
from moetrace.__main__ import main
from moetrace.errors import InputError
from moetrace.findings import Subject, question
from moetrace.model.file import ModelFile
from moetrace.model.identity import differences, identify
from moetrace.synthetic import ARCHITECTURES, write_model

SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 64, "n_ff_expert": 32, "n_expert": 8, "n_expert_used": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("identity") / "m.gguf", "olmoe", **SIZES)


def other_models(folder: Path) -> dict[str, Path]:
    """Models that differ in one thing each, and what an error must say of it."""
    made = {
        "architecture": ("qwen3moe", {}),
        "layers": ("olmoe", {"n_layer": 4}),
        "width": ("olmoe", {"n_embd": 32}),
        "experts of layer 0": ("olmoe", {"n_expert": 16}),
    }
    return {
        what: write_model(folder / f"{i}.gguf", arch, **{**SIZES, **sizes})
        for i, (what, (arch, sizes)) in enumerate(made.items())
    }


def named(source: Path, path: Path, **strings: str) -> Path:
    """The same model with other texts in its metadata, such as ``general_name``; an empty text takes it out."""
    with ModelFile(source) as old:
        writer = gguf.GGUFWriter(path, old.architecture)
        for field in old.fields:
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            value = strings.get(field.name.replace(".", "_"), field.contents())
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            if value != "":
                writer.add_key_value(field.name, value, field.types[0], sub_type=sub)
        if "general_type" in strings:
            writer.add_string("general.type", strings["general_type"])
        for name in old.tensor_names:
            data, kind = old.stored(name)
            writer.add_tensor(name, np.array(data), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.n_expert])
def test_a_model_is_its_own(name: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", name)
    facts = model_facts(path)
    assert identify([path], facts) == str(path)
    with ModelFile(path) as file:
        assert differences(file, facts) == []


def test_the_file_that_fits_is_found(model: Path, tmp_path: Path) -> None:
    facts = model_facts(model)
    others = list(other_models(tmp_path).values())
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUFnonsense")
    projector = named(model, tmp_path / "mmproj.gguf", general_type="mmproj")
    adapter = named(model, tmp_path / "lora.gguf", general_type="adapter")
    vocabulary = tmp_path / "vocab.gguf"
    with ModelFile(model) as file:
        writer = gguf.GGUFWriter(vocabulary, file.architecture)
        for field in file.fields[4:]:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    dense = write_model(tmp_path / "dense.gguf", "llama-dense")
    crowd = [*others, broken, projector, adapter, vocabulary, dense, tmp_path / "gone.gguf", tmp_path]
    assert identify(crowd, facts) is None
    assert identify([*crowd, model], facts) == str(model)
    assert identify([], facts) is None
    assert identify([model], {}) is None


def test_two_that_fit_are_not_told_apart(model: Path, tmp_path: Path) -> None:
    facts = model_facts(model)
    copy = Path(shutil.copy(model, tmp_path / "copy.gguf"))
    assert identify([model, copy], facts) is None
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    hard = tmp_path / "hard.gguf"
    os.link(model, hard)
    assert identify([model, link, hard, model], facts) == str(model)
    finetuned = named(model, tmp_path / "tuned.gguf", general_name="another")
    nameless = named(model, tmp_path / "nameless.gguf", general_name="")
    assert identify([finetuned, nameless, model], facts) == str(model)
    assert identify([finetuned, nameless], facts) is None
    unnamed = {**facts, "model": {**facts["model"], "name": ""}}
    assert identify([finetuned, nameless, model], unnamed) == str(nameless)


def test_vocabulary_and_parameters_tell_where_they_are_known(model: Path, tmp_path: Path) -> None:
    facts = model_facts(model)
    smaller = write_model(tmp_path / "v.gguf", "olmoe", **SIZES, n_vocab=600)
    assert identify([model, smaller], facts) is None
    with ModelFile(model) as a, ModelFile(smaller) as b:
        assert a.n_vocab != b.n_vocab == 600 == len(b.vocabulary)
        vocabulary, parameters = {"n_vocab": a.n_vocab}, {"n_params": a.n_params}
    for more in (vocabulary, parameters):
        assert identify([model, smaller], {**facts, "model": {**facts["model"], **more}}) == str(model)
    with ModelFile(smaller) as file:
        assert "vocabulary" in differences(file, {"model": vocabulary})[0]
        assert differences(file, {"model": parameters}) == []


def test_parts_are_one_model_and_named_by_the_first(model: Path, tmp_path: Path) -> None:
    parts = in_parts(model, tmp_path / "parts", 9)
    assert len(parts) > 2
    assert identify(reversed(parts), model_facts(model)) == str(parts[0])


def test_long_names_are_cut_off_by_the_host(model: Path, tmp_path: Path) -> None:
    path = named(model, tmp_path / "long.gguf", general_name="n" * 300)
    facts = model_facts(model)
    facts["model"]["name"] = "n" * 255
    assert identify([path], facts) == str(path)
    facts["model"]["name"] = "n" * 254 + "m" * 10
    assert identify([path], facts) is None


def test_layers_that_predict_further_tokens_are_counted_or_not(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "olmoe", **SIZES)
    with ModelFile(path) as file:
        facts = model_facts(path)
        facts["model"]["n_layer"] = 2
        assert differences(file, facts) == ["layers: 3 in the file, 2 in the trace"]
    again = tmp_path / "mtp.gguf"
    writer = gguf.GGUFWriter(again, "olmoe")
    writer.add_block_count(3)
    writer.add_uint32("olmoe.nextn_predict_layers", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with ModelFile(again) as file:
        for n_layer, wrong in ((2, 0), (3, 0), (1, 1), (4, 1)):
            found = differences(file, {"model": {"architecture": "olmoe", "n_layer": n_layer}})
            assert len(found) == wrong


# -- a trace meets a file


def test_another_model_is_refused_wherever_it_meets_a_trace(model: Path, tmp_path: Path, capsys: Any) -> None:
    trace = say_model(small_trace(tmp_path / "t.moet"), model)
    for what, path in other_models(tmp_path).items():
        with moetrace.open(trace) as opened, pytest.raises(InputError, match="is not the model of") as error:
            Subject([opened], model=path)
        assert what in error.value.why
    for command in (
        ["analyze", "expert-cache", str(trace), "-m", str(path)],
        ["analyze", "expert-merging", str(trace), "-m", str(path)],
        ["analyze", "task-prediction", str(trace), "-m", str(path)],
        ["report", str(trace), "-m", str(path), "-o", str(tmp_path / "r")],
    ):
        assert main(command) == 1
        told = capsys.readouterr().err
        assert f"{path} is not the model of {trace}" in told
        assert "experts of layer 0: 16 in the file, 8 in the trace" in told
        assert "fix:" in told
    assert not (tmp_path / "r").exists()
    named_otherwise = named(model, tmp_path / "tuned.gguf", general_name="another")
    with moetrace.open(trace) as opened, pytest.raises(InputError, match="is not the model of") as error:
        Subject([opened], model=named_otherwise)
    assert error.value.why.startswith("name: another in the file")


def test_copies_requantised_or_in_parts_are_accepted(model: Path, tmp_path: Path) -> None:
    trace = say_model(small_trace(tmp_path / "t.moet"), model)
    copies = [
        Path(shutil.copy(model, tmp_path / "renamed.bin")),
        write_model(tmp_path / "q8.gguf", "olmoe", **SIZES, quantization="Q8_0"),
        named(model, tmp_path / "nameless.gguf", general_name=""),
        (parts := in_parts(model, tmp_path / "parts", 9))[1],
    ]
    for path in copies:
        with moetrace.open(trace) as opened:
            # llama.cpp loads a model by its first part
            assert Subject([opened], model=path).model == (parts[0] if path in parts else path)


def test_text_is_not_read_from_another_model(model: Path, tmp_path: Path) -> None:
    """GIVEN a trace without a vocabulary WHEN another model lies where its own did THEN it has no text."""
    trace = say_model(small_trace(tmp_path / "t.moet"), model, model_path=tmp_path / "m.gguf")
    shutil.copy(model, tmp_path / "m.gguf")
    with ModelFile(model) as file, moetrace.open(trace) as opened:
        assert opened.vocabulary == file.vocabulary
    write_model(tmp_path / "m.gguf", "qwen3moe", **SIZES)
    with moetrace.open(trace) as opened:
        assert opened.vocabulary is None


def test_sizes_in_bytes_are_of_all_parts(model: Path, tmp_path: Path) -> None:
    trace = say_model(labelled_trace(tmp_path / "t.moet"), model)
    tables = []
    for path in (model, in_parts(model, tmp_path / "parts", 9)[0]):
        with moetrace.open(trace) as opened:
            finding = question("expert-cache")().answer(Subject([opened], model=path))
        tables.append(finding.tables["cache"]["memory_bytes"].tolist())
    assert tables[0] == tables[1]
    assert max(tables[0]) == 3 * 8 * 3 * 64 * 32 * 4


def altered(source: Path, path: Path, tensor: str, kind: Any = None) -> Path:
    """The same model with one tensor's last value changed, or stored otherwise."""
    with ModelFile(source) as old:
        writer = gguf.GGUFWriter(path, old.architecture)
        for field in old.fields:
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        for name in old.tensor_names:
            data, stored = old.stored(name)
            data = np.array(data)
            if name == tensor and kind is not None:
                data, stored = gguf.quantize(np.array(old.tensor(name)), kind), kind
            elif name == tensor:
                data.reshape(-1)[-1] += 1
            writer.add_tensor(name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def test_fingerprints_tell_models_of_one_name_apart(model: Path, tmp_path: Path) -> None:
    """GIVEN files that differ in one thing WHEN digested THEN in that only; a trace of other routers is refused."""
    copy = tmp_path / "copy.gguf"
    shutil.copy(model, copy)
    router, expert = "blk.2.ffn_gate_inp.weight", "blk.1.ffn_down_exps.weight"
    made = {
        "copy": copy,
        "router": altered(model, tmp_path / "router.gguf", router),
        "quantised": altered(model, tmp_path / "quantised.gguf", expert, gguf.GGMLQuantizationType.Q8_0),
    }
    with ModelFile(model) as file:
        first = file.fingerprint
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in first.values())
    found = {}
    for what, path in made.items():
        with ModelFile(path) as file:
            found[what] = {key for key, digest in file.fingerprint.items() if digest != first[key]}
    assert found == {"copy": set(), "router": {"routers", "weights"}, "quantised": {"weights"}}
    facts = {**model_facts(model), "fingerprint": first}
    for what, path in made.items():
        with ModelFile(path) as file:
            told = differences(file, facts)
        assert [text.split(":")[0] for text in told] == (["routers' fingerprint"] if what == "router" else [])
