"""The prompt sets that are shipped: their form, and that length does not tell the domain."""

import argparse
import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import gguf
import numpy as np
import pytest

from moetrace import data
from moetrace.commands.prompting import add_prompts, prompts_of
from moetrace.errors import InputError, UsageError
from moetrace.host.prompts import read_files, read_prompts

DOMAINS = ("code", "math", "creative", "factual", "mixed")


def load(name):
    return [json.loads(line) for line in data.prompts(name).read_text().splitlines()]


@pytest.mark.parametrize("name", ["domains", "heldout", "heldout-text"])
def test_twelve_of_each_domain(name):
    prompts = load(name)
    assert Counter(p["label"] for p in prompts) == dict.fromkeys(DOMAINS, 12)
    assert all(p.keys() == {"id", "label", "prompt"} and p["prompt"].strip() for p in prompts)


@pytest.mark.parametrize(("name", "keys"), [("semantic", set()), ("questions", {"answer"})])
def test_twelve_of_each_of_four_kinds(name, keys):
    prompts = load(name)
    counts = Counter(p["label"] for p in prompts)
    assert len(counts) == 4
    assert set(counts.values()) == {12}
    assert all(p.keys() == {"id", "label", "prompt", *keys} and all(p.values()) for p in prompts)


def test_all_ids_and_prompts_differ():
    prompts = [p for name in data.PROMPT_SETS for p in load(name)]
    assert len({p["id"] for p in prompts}) == len({p["prompt"] for p in prompts}) == len(prompts)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("line", "key", "why"),
    [
        (r'{"prompt": "a\ud800"}', "prompt", r"\ud800"),
        (r'{"prompt": "a", "id": "\udfff"}', "id", r"\udfff"),
        (r'{"prompt": "a", "label": "\ud83d"}', "label", "surrogate"),
        (r'{"messages": [{"role": "user", "content": "\ude00\ud83d"}]}', "messages", "surrogate"),
        (r'{"prompt": "a", "note": {"x": ["\ud800"]}}', "note", "surrogate"),
        (r'{"prompt": "a", "\ud800": 1}', r"\ud800", "surrogate"),
        ('{"prompt": "a", "n_predict": 100000000000000000000}', "n_predict", "2147483647"),
        ('{"prompt": "a", "n_predict": 2147483648}', "n_predict", "2147483647"),
        ('{"prompt": "a", "n_predict": -1}', "n_predict", "whole number"),
        ('{"prompt": "a", "n_predict": 1.5}', "n_predict", "whole number"),
        ('{"prompt": "a", "n_predict": true}', "n_predict", "whole number"),
        ('{"tokens": [1, 100000000000000000000]}', "tokens", "no token id"),
        ('{"tokens": [2147483648]}', "tokens", "no token id"),
        ('{"tokens": [-1]}', "tokens", "no token id"),
        ('{"tokens": [1.0]}', "tokens", "no token id"),
        ('{"tokens": [false]}', "tokens", "no token id"),
        ('{"tokens": ["1"]}', "tokens", "no token id"),
        ('{"tokens": []}', "tokens", "list"),
        ('{"prompt": "a", "id": ["x"]}', "id", "neither"),
        ('{"prompt": "a", "id": 1.5}', "id", "neither"),
        ('{"prompt": "a", "weight": 1e999}', "weight", "no JSON"),
        ('{"prompt": "a", "weight": NaN}', "weight", "no JSON"),
        ('{"prompt": "a", "tree": ' + "[" * 150 + "]" * 150 + "}", "tree", "nested"),
    ],
)
def test_odd_values_are_refused_with_line_and_key(line, key, why, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError) as e:
        read_prompts(path)
    assert str(path) in e.value.what
    assert "line 3" in e.value.what
    assert f"`{key}`" in e.value.why
    assert why in e.value.why
    assert e.value.fix
    with pytest.raises(InputError, match="prompt 1"):
        read_prompts([{"prompt": "fine"}, json.loads(line)])


@pytest.mark.parametrize(
    "line",
    [
        f'{{"prompt": "a", "tree": {DEEP}}}'.encode(),
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xed\xa0\x80"}',
    ],
)
def test_what_cannot_be_parsed_is_refused_with_its_line(line, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError) as e:
        read_prompts(path)
    assert "line 2" in e.value.what
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    "item", [{"prompt": "a", "x": {1, 2}}, {"prompt": "a", 3: 4}, {"prompt": "a", "x": np.int64(3)}]
)
def test_what_no_label_line_can_keep_is_refused(item):
    with pytest.raises(InputError, match="prompt 0"):
        read_prompts([item])


def test_good_ones_are_taken_as_they_are():
    names = [p.id for p in read_prompts(["a", {"prompt": "b", "id": None}, {"prompt": "c", "id": 7}])]
    assert names == ["0", "1", "7"]
    (one,) = read_prompts([{"prompt": "\U0001f600", "request": 3, "extra": {"a": [None]}, "n_predict": 0}])
    assert (one.text, one.extra, one.n_predict) == ("\U0001f600", {"request": 3, "extra": {"a": [None]}}, 0)


def test_unknown_set():
    with pytest.raises(UsageError, match="no prompt set 'poems'"):
        data.prompts("poems")


def bpe_lengths(prompts):
    """Tokens of each prompt by the demo model's own vocabulary, merged here from its table."""
    reader = gguf.GGUFReader(data.demo_model())
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: chr(b) for b in plain} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)
    }
    split = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
    lengths = []
    for text in prompts:
        n = 0
        for word in split.findall(text):
            parts = [letter[b] for b in word.encode()]
            while True:
                pairs = enumerate(itertools.pairwise(parts))
                known = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
                if not known:
                    break
                _, i = min(known)
                parts[i : i + 2] = ["".join(parts[i : i + 2])]
            n += len(parts)
        lengths.append(n)
    return lengths


@pytest.mark.parametrize("name", ["domains", "heldout"])
@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_domains_are_matched_in_length(name, unit):
    prompts = load(name)
    texts = [p["prompt"] for p in prompts]
    lengths = np.array([len(t) for t in texts] if unit == "characters" else bpe_lengths(texts), float)
    by_domain = defaultdict(list)
    for prompt, length in zip(prompts, lengths, strict=True):
        by_domain[prompt["label"]].append(length)
    means = np.array([np.mean(v) for v in by_domain.values()])
    assert np.abs(means / lengths.mean() - 1).max() < 0.05
    # no prompt is far from the rest either: a domain's mean must not be made by an outlier
    assert np.abs(lengths / lengths.mean() - 1).max() < (0.15 if unit == "characters" else 0.3)


@pytest.mark.parametrize("name", ["domains", "heldout"])
def test_a_domain_is_not_one_template(name):
    for domain in DOMAINS:
        starts = [p["prompt"].split()[0] for p in load(name) if p["label"] == domain]
        assert Counter(starts).most_common(1)[0][1] <= 3, f"{domain}: too many begin alike"
        assert len(set(starts)) >= 7


def test_prompts_are_ascii():
    """The demo model's vocabulary was learned from ASCII text."""
    assert all(p["prompt"].isascii() for name in data.PROMPT_SETS for p in load(name))


def test_texts_are_prompts_labelled_as_their_folders(tmp_path: Path) -> None:
    """GIVEN plain texts, alone or of folders, and JSON lines beside them THEN each text is one prompt, whole."""
    (tmp_path / "code").mkdir()
    (tmp_path / "prose").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "prose" / "a.txt").write_text("Once.\n\nTwice.")
    (tmp_path / "prose" / "b.txt").write_text("[1, 2]\n")
    (tmp_path / "lines.txt").write_text('\n{"prompt": "x"}\n{"prompt": "y", "id": "mine"}\n')
    one = read_files([tmp_path / "prose" / "a.txt"])
    assert [(p.id, p.text, p.label) for p in one] == [("a", "Once.\n\nTwice.", None)]
    names = ["code/a.py", "prose/a.txt", "prose/b.txt", "lines.txt"]
    found = read_files([tmp_path / name for name in names])
    assert [(p.id, p.label) for p in found] == [
        ("code/a", "code"), ("prose/a", "prose"), ("b", "prose"), ("lines.0", None), ("mine", None)
    ]  # fmt: skip
    assert found[0].text == "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "is empty"), (b"\xff\xfe", "no text in UTF-8"), (None, "cannot read")]
)
def test_texts_that_are_none(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=why):
        read_files([tmp_path / "a.txt"])


def test_prompts_on_the_command_line(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_prompts(parser)
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "0.txt").write_text("B")
    line = ["-f", str(tmp_path / "a.txt"), str(tmp_path / "0.txt"), "-p", "C", "-p", "D"]
    found = prompts_of(parser.parse_args(line))
    assert [(p.id, p.text) for p in found] == [("a", "A"), ("0", "B"), ("p0", "C"), ("1", "D")]
    assert prompts_of(parser.parse_args([])) == []
    assert read_prompts(found) == found
