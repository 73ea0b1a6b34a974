"""What a table of counts allows: the analyses of :mod:`from_trace`, as far as they need no tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.analysis.access.from_trace import Analysis
from moetrace.analysis.counts.counting import RoutingCounts
from moetrace.analysis.domains.domain import DomainTest
from moetrace.analysis.published import notebook as published
from moetrace.analysis.published.notebook import Activations, ExpertFrequency
from moetrace.analysis.statistics.shapes import layer_numbers
from moetrace.errors import UsageError

NO_PROMPTS = "cannot be tested: counts do not tell the prompts of a domain apart"


class TableAnalysis(Analysis):
    """Analyses of counts by domain, (D, L, E), as count tables and publications give them.

    A domain's counts stand where a single prompt's would: values can be given, but no interval and no test,
    for which prompts would have to be known. What needs tokens raises UsageError.
    """

    def __init__(
        self, counts: npt.ArrayLike, domains: Sequence[str], layers: npt.ArrayLike | None = None
    ) -> None:
        self._table = np.asarray(counts, dtype=np.int64)
        self._domain_names = [str(name) for name in domains]
        n_layers = self._table.shape[1]
        self._numbers = layer_numbers(layers, n_layers)
        self.phase = "unknown"
        self._traces = ()

    @property
    def layers(self) -> npt.NDArray[np.int64]:
        return self._numbers

    @property
    def n_expert(self) -> npt.NDArray[np.int64]:
        return np.full(self._numbers.size, self._table.shape[2])

    @property
    def _consumers(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def counts(self) -> RoutingCounts:
        """Each domain as one prompt; no tokens (0), no neighbours."""
        order = np.argsort(np.array(self._domain_names, dtype=np.str_))
        names = np.array(self._domain_names, dtype=np.str_)[order]
        n_layers, e = self._table.shape[1:]
        shape = (order.size, n_layers)
        return RoutingCounts(
            prompts=names,
            labels=names,
            layers=self._numbers,
            n_expert_used=np.zeros(n_layers, dtype=np.int64),
            tokens=np.zeros(shape, dtype=np.int64),
            included=self._table[order],
            top1=np.zeros((*shape, e), dtype=np.int64),
            transitions=np.zeros((n_layers, 0, 0), dtype=np.int64),
            lag_pairs=np.zeros((*shape, 0), dtype=np.int64),
            lag_shared=np.zeros((*shape, 0), dtype=np.int64),
            lag_top1=np.zeros((*shape, 0), dtype=np.int64),
        )

    def domain_test(self, **options: Any) -> DomainTest:
        return dataclasses.replace(super().domain_test(**options), verdict=NO_PROMPTS)

    def load_balance(self) -> pd.DataFrame:
        return super().load_balance().assign(tokens=np.nan, jain_low=np.nan, jain_high=np.nan)

    def published(self, top: int | None = None) -> Activations:
        """The counts as the notebook's table; ``top`` has no meaning here."""
        return published.Activations.from_counts(self._table, self._domain_names, layers=self._numbers)

    def published_frequency(self) -> ExpertFrequency:
        """Ties in order of expert ids: the order of the log is not known."""
        total = self._table.sum(axis=0)
        ids = np.arange(total.shape[1])
        return published.frequency_of_counts(total, self._numbers, np.broadcast_to(ids, total.shape), ids)

    def _no_tokens(self, *arguments: Any, **options: Any) -> NoReturn:
        raise UsageError(
            "a count table does not say which token chose what", fix="give a recording of tokens"
        )

    matched_separation = persistence = shuffle_test = transitions = _no_tokens
    gate_distances = gate_summary = agreement = pieces = request_column = _no_tokens
    text = vocabulary = predictions = property(_no_tokens)
