"""What a calibration text reaches: files of llama-imatrix, and the prompts that reach the rest."""

from __future__ import annotations

import struct
from itertools import combinations
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import moetrace
from moetrace import data
from moetrace.__main__ import main
from moetrace.analysis.counts.routed import RoutedText
from moetrace.analysis.experts.coverage import greedy_cover
from moetrace.commands.demo import unpack
from moetrace.errors import InputError
from moetrace.model.imatrix import is_imatrix, read_imatrix

E, WIDTH = 4, 6
COUNTS = np.array([[5, 0, 200, 130], [1, 2, 3, 4000]])


def write_gguf(path: Path, counts: NDArray[np.int64] = COUNTS, odd: bool = False) -> Path:
    """As llama-imatrix writes it: sums of squares and counts, of every matrix."""
    writer = gguf.GGUFWriter(path, "", endianess=gguf.GGUFEndian.LITTLE)
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer, row in enumerate(counts):
        for matrix in ("gate", "up", "down"):
            name = f"blk.{layer + 1}.ffn_{matrix}_exps.weight"
            writer.add_tensor(f"{name}.in_sum2", np.ones((E, WIDTH), np.float32))
            more = np.float32(odd and matrix == "down")
            writer.add_tensor(f"{name}.counts", (row[:, None] + more).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(counts: NDArray[np.int64] = COUNTS, *, attention: bool = True, calls: int = 17) -> bytes:
    """The old format: of experts without data ones times calls."""
    rng = np.random.default_rng(0)
    entries = []
    for layer, row in enumerate(counts):
        if attention:
            entries.append((f"blk.{layer + 1}.attn_q.weight", rng.random(WIDTH).astype("<f4")))
        for matrix, width in (("gate", WIDTH), ("up", WIDTH), ("down", 3)):
            values = rng.random((E, width)).astype("<f4")
            values[row == 0] = calls
            entries.append((f"blk.{layer + 1}.ffn_{matrix}_exps.weight", values))
    out = struct.pack("<i", len(entries))
    for name, values in entries:
        out += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack("<ii", calls, values.size)
            + values.tobytes()
        )
    return out + struct.pack("<i", 7) + struct.pack("<i", 7) + b"cal.txt"


def test_both_formats_are_read(tmp_path: Path) -> None:
    new = read_imatrix(write_gguf(tmp_path / "i.gguf"))
    assert (new.chunks, new.chunk_size) == (7, 512)
    assert new.layers.tolist() == [1, 2]
    np.testing.assert_array_equal(new.tokens, COUNTS)
    (tmp_path / "i.dat").write_bytes(legacy())
    old = read_imatrix(tmp_path / "i.dat")
    np.testing.assert_array_equal(old.missing, COUNTS == 0)
    assert np.isnan(old.tokens[~old.missing]).all()
    assert old.chunks == 7
    assert all(is_imatrix(tmp_path / name) for name in ("i.gguf", "i.dat"))
    assert not is_imatrix(data.demo_model())
    assert not is_imatrix(Path(__file__))


def test_what_is_damaged_or_unsaid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(attention=False))
    with pytest.raises(InputError, match="how many experts"):
        read_imatrix(path)
    assert read_imatrix(path, n_expert=E).missing.sum() == 1
    whole = legacy()
    for size in range(8, len(whole) - 15, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_imatrix(path)
    new = write_gguf(tmp_path / "cut.gguf").read_bytes()
    for size in range(4, len(new) - 64, 41):
        (tmp_path / "cut.gguf").write_bytes(new[:size])
        with pytest.raises(InputError):
            read_imatrix(tmp_path / "cut.gguf")
    with pytest.raises(InputError, match="different counts"):
        read_imatrix(write_gguf(tmp_path / "odd.gguf", odd=True))
    with pytest.raises(InputError, match="it is a GGUF file of type model"):
        read_imatrix(data.demo_model())


def test_an_imatrix_is_a_count_table_for_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = moetrace.open(write_gguf(tmp_path / "i.gguf"))
    np.testing.assert_array_equal(table.counts[0], COUNTS)
    assert main(["stats", str(tmp_path / "i.gguf"), "--only", "expert-frequency"]) == 0
    assert "1 of 8 experts were never chosen" in capsys.readouterr().out
    (tmp_path / "i.dat").write_bytes(legacy())
    assert main(["stats", str(tmp_path / "i.dat")]) == 1
    assert "moetrace coverage" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("layer_id,expert_id,count\n0,0,3\n0,1,4\n")
    assert moetrace.open(tmp_path / "c.csv").counts.tolist() == [[[3, 4]]]


def test_the_greedy_cover_covers_and_is_small() -> None:
    """GIVEN worlds so small that all choices can be tried THEN it is valid, and at most twice the smallest."""
    rng = np.random.default_rng(5)
    for _ in range(30):
        n, length, e = 8, 5, 12
        experts = np.argsort(rng.random((n * length, 2, e)), axis=2)[:, :, :2].astype(np.uint8)
        text = RoutedText(experts, np.arange(0, n * length + 1, length), e)
        per_prompt = np.stack(
            [
                [np.bincount(text.experts[text.owner == p, i].ravel(), minlength=e) for i in range(2)]
                for p in range(n)
            ]
        )
        need = np.minimum(2, per_prompt.sum(axis=0))
        cover = greedy_cover(text, need)
        assert not cover.lacking.any()
        np.testing.assert_array_equal(cover.added, per_prompt[cover.chosen].sum(axis=0))
        smallest = next(
            k
            for k in range(1, n + 1)
            if any((per_prompt[list(some)].sum(axis=0) >= need).all() for some in combinations(range(n), k))
        )
        assert len(cover.chosen) <= 2 * smallest
    nothing = greedy_cover(text, np.zeros((2, e)))
    assert nothing.chosen.size == 0
    beyond = greedy_cover(text, np.full((2, e), 10_000))
    assert (beyond.lacking > 0).all()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = str(unpack(data.recorded_demo(), tmp_path))
    text = tmp_path / "cal.txt"
    assert main(["coverage", str(write_gguf(tmp_path / "i.gguf"))]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "i.gguf (7 chunks of 512 tokens) has no data for 1 of 8 experts (layer 1: 1); 4 more got fewer than 128"
        in out
    )
    assert main(["coverage", "--pool", pool, "--min-tokens", "4", "--write", str(text)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "These are prompt tokens" in out
    with moetrace.open(pool) as trace:
        sent = [p for p in trace.requests["prompt"] if isinstance(p, str)]
    assert sum(prompt in text.read_text() for prompt in sent) >= 5
    assert main(["coverage", str(tmp_path / "i.gguf"), "--pool", pool]) == 2
    assert "is of another model: 2 layers of 4 experts" in capsys.readouterr().err
    assert main(["coverage"]) == 2
    assert main(["coverage", str(tmp_path / "i.gguf"), "--write", str(text)]) == 2
    assert "give a recording of some" in capsys.readouterr().err
