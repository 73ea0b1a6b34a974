"""What the stress tests share; see scale.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # traces.py, rings.py, plain_reader.py

from scale import Figures, Size, record, size_of


@pytest.fixture
def size() -> Size:
    """Return ``size(name)``: how much to do of it in this run."""
    return size_of


@pytest.fixture
def figures() -> Figures:
    """Return ``figures(item, **{label: figure})``: keeps a run's figures for the table."""
    return record
