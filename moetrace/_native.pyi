"""Native helpers: atomic words of a mapped ring, a producer for tests (csrc/module.cpp), and loops (csrc/kernels)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def load_acquire(buffer: Buffer, offset: int) -> int: ...
def load_acquire32(buffer: Buffer, offset: int) -> int: ...
def store_release(buffer: Buffer, offset: int, value: int) -> None: ...
def store_release32(buffer: Buffer, offset: int, value: int) -> None: ...
def map_file(path: str, size: int) -> NDArray[np.uint8]: ...
def intervention_check(file: bytes, routers: Sequence[tuple[int, int, int, int, int, bool]]) -> str: ...
def set_default_threads(n: int) -> int: ...
def cache_hits(
    items: NDArray[np.int32],
    worth: NDArray[np.int32],
    slots: NDArray[np.int64],
    n_items: int,
    n_threads: int = 0,
) -> NDArray[np.bool_]: ...
def budget_hits(
    items: NDArray[np.int32],
    worth: NDArray[np.int32],
    groups: NDArray[np.int32],
    sizes: NDArray[np.int64],
    budgets: NDArray[np.int64],
    n_threads: int = 0,
) -> NDArray[np.bool_]: ...
def kind_counts(
    kinds: NDArray[np.int32],
    rows: NDArray[np.int32],
    experts: NDArray[np.uint16],
    order: NDArray[np.int32],
    n_kinds: int,
    n_expert: int,
    n_threads: int = 0,
) -> NDArray[np.int32]: ...
def group_sums(
    groups: NDArray[np.int32], values: NDArray[np.float64], n_groups: int, n_threads: int = 0
) -> NDArray[np.float64]: ...
def kind_moments(
    kinds: NDArray[np.int32],
    rows: NDArray[np.int32],
    groups: NDArray[np.int32],
    experts: NDArray[np.uint16],
    order: NDArray[np.int32],
    expected: NDArray[np.float64],
    n_threads: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def lag_agreement(
    words: NDArray[np.uint64],
    first: NDArray[np.uint16],
    lags: NDArray[np.int64],
    together: NDArray[np.bool_],
    order: NDArray[np.int32],
    n_expert: int,
    n_threads: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def pair_draws(
    a: NDArray[np.uint16],
    b: NDArray[np.uint16],
    first_a: NDArray[np.int64],
    first_b: NDArray[np.int64],
    order: NDArray[np.int32],
    expected: NDArray[np.float64],
    spread: NDArray[np.float64],
    score: NDArray[np.float64],
    eligible: NDArray[np.bool_],
    n_threads: int = 0,
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]: ...
def split_divergence(
    experts: NDArray[np.uint16],
    order: NDArray[np.int32],
    begin: NDArray[np.int64],
    n_expert: int,
    n_threads: int = 0,
) -> NDArray[np.float64]: ...
def top_hits(
    scores: NDArray[np.float32] | NDArray[np.float64],
    picks: NDArray[np.uint16],
    sizes: NDArray[np.int64],
    n_threads: int = 0,
) -> NDArray[np.int32]: ...
def layer_hits(
    scores: NDArray[np.float32],
    picks: NDArray[np.uint16],
    sizes: NDArray[np.int64],
    n_threads: int = 0,
) -> NDArray[np.int64]: ...
def pick_sums(
    features: NDArray[np.float32],
    picks: NDArray[np.uint16],
    group: NDArray[np.int32],
    n_groups: int,
    n_expert: int,
    n_threads: int = 0,
) -> NDArray[np.float32]: ...

class SignalWatch:
    """Takes over signals until it is closed, and tells which came; one at a time (csrc/signals.h)."""

    def __init__(self, numbers: Sequence[int]) -> None: ...
    def take(self) -> list[tuple[int, bool]]: ...
    def close(self) -> None: ...

class RingWriter:
    """The producer's end of a ring, as the host uses it; for tests."""

    def __init__(
        self,
        path: str,
        fields: Sequence[tuple[str, str, Sequence[int]]],
        meta: str = "{}",
        capacity: int = 1024,
        on_full: int = 0,
        block_ns: int = 10_000_000_000,
    ) -> None: ...
    def push(self, records: Buffer) -> int: ...
    def count(self, counter: int, n: int = 1) -> None: ...
    def close(self, status: str = "") -> None: ...
    @property
    def stride(self) -> int: ...
