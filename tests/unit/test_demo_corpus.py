"""What the demo model is trained on: reproducible, true where it can be checked, not the shipped prompts."""

import importlib
import json
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import gguf
import pytest

from moetrace import data

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
SEED = 1  # the default of train.py
N_TRAINED = 23_000  # it prints how many documents it took: 22,549


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("corpus")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return importlib.import_module("tokenizer")


def shipped(name):
    return [json.loads(line)["prompt"] for line in data.prompts(name).read_text().splitlines()]


def test_documents_are_fixed_by_the_seed(corpus):
    first, again, other = (list(corpus.documents(seed, 500)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_domains_have_equal_shares_of_text(corpus):
    size = Counter()
    for doc in corpus.documents(3, 5000):
        size[doc.domain] += sum(len(text) for _, text in doc.turns)
    assert set(size) == set(corpus.DOMAINS)
    assert max(size.values()) < 1.01 * min(size.values())


def sides(text):
    """The sides of each chain of equations between plain numbers in ``text``."""
    for match in re.finditer(r"[-0-9+*/()^ ]+(?:=[-0-9+*/()^ ]+)+", text):
        before = text[match.start() - 1] if match.start() else " "
        after = text[match.end()] if match.end() < len(text) else " "
        parts = [part.strip() for part in match[0].split("=")]
        if before.isalpha() or not parts[0]:
            parts = parts[1:]
        if after.isalpha() or not parts[-1]:
            parts = parts[:-1]
        if len(parts) > 1 and all(part and part.count("(") == part.count(")") for part in parts):
            yield parts


def value(side):
    return eval(re.sub(r"[0-9]+", r"Fraction(\g<0>)", side.replace("^", "**")), {"Fraction": Fraction})


def test_arithmetic_is_true(corpus):
    r = random.Random(0)
    n = 0
    for _ in range(4000):
        domain = r.choice(["math", "mixed"])
        _, answer = r.choice(corpus.GENERATORS[domain])(r)
        for parts in sides(answer):
            n += 1
            for a, b in pairwise(parts):
                assert value(a) == value(b), f"{a} = {b} in {answer!r}"
    assert n > 1000


def test_the_check_of_arithmetic_can_fail():
    assert [[value(p) for p in parts] for parts in sides("Hence 3x = 7 - 1 = 5.")] == [[6, 5]]


def test_code_is_python(corpus):
    """All of it compiles but SQL and fragments that stand in a function."""
    r = random.Random(0)
    n = Counter()
    for _ in range(1000):
        _, answer = r.choice(corpus.GENERATORS["code"])(r)
        if re.match("SELECT|DELETE", answer):
            continue
        body = "".join(f"    {line}\n" for line in answer.split("\n"))
        compile(f"def f():\n{body}", "corpus", "exec")
        n["compiled"] += 1
    assert n["compiled"] > 800


def test_shipped_prompts_are_not_trained_on(corpus):
    prompts = [*shipped("domains"), *shipped("heldout")]
    text = "\n".join(t for doc in corpus.documents(SEED, N_TRAINED) for _, t in doc.turns)
    assert not [p for p in prompts if p in text]
    held = set(shipped("heldout-text"))
    assert not held & {"\n\n".join(t for _, t in doc.turns) for doc in corpus.documents(SEED, N_TRAINED)}


def test_tokenizer(corpus, tokenizer):
    texts = [t for doc in corpus.documents(5, 300) for _, t in doc.turns]
    tok = tokenizer.Tokenizer.train(texts, 400)
    assert len(tok.tokens) == len(set(tok.tokens)) == 400
    for text in [*texts, "Zwölf Möwen  \n\t x=1", ""]:
        assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode("137")) == 3  # digits are never merged


def test_the_models_vocabulary_is_this_tokenizers(corpus, tokenizer):
    reader = gguf.GGUFReader(data.demo_model())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    texts = (t for doc in corpus.documents(SEED, 10_000) for _, t in doc.turns)
    assert tokenizer.Tokenizer.train(texts, len(tokens)).tokens == tokens
