"""A live recording as OpenMetrics: counts only, no text of anybody's prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moetrace.analysis.domains.layers import jain_index
from moetrace.live.tail import Snapshot

_SECONDS = {
    "hook_ns": ("moetrace_hook_seconds", "Time spent in the tracer's own code, in the server's process"),
    "sync_ns": ("moetrace_sync_seconds", "Time spent waiting for devices on the tracer's behalf"),
    "wait_ns": ("moetrace_wait_seconds", "Time the server waited because the recorder did not keep up"),
}


class Metrics(Collector):
    """What is known at each scrape.

    Parameters
    ----------
    look
        Gives it.
    experts
        Also tokens of each expert of each layer: layers × experts time series.
    domains
        Also tokens of each label: as many time series as clients give labels.
    """

    def __init__(self, look: Callable[[], Snapshot], *, experts: bool = False, domains: bool = False) -> None:
        self._look, self._experts, self._domains = look, experts, domains

    def collect(self) -> Iterator[Metric]:
        """Give the families."""
        now = self._look()
        tokens = CounterMetricFamily("moetrace_tokens", "Tokens recorded", labels=["phase"])
        for phase, n in sorted(now.tokens.items()):
            tokens.add_metric([phase], n)
        yield tokens
        entries = CounterMetricFamily(
            "moetrace_entries", "Entries (token, layer) by what became of them", labels=["state"]
        )
        for state, n in now.entries.items():
            entries.add_metric([state], n)
        yield entries
        yield CounterMetricFamily(
            "moetrace_cached_positions", "Positions served from the prompt cache", value=now.cached
        )
        yield from self._contexts(now)
        yield from self._layers(now)
        if self._domains:
            domains = CounterMetricFamily("moetrace_domain_tokens", "Tokens of each label", labels=["label"])
            for label, n in sorted(now.by_domain.items()):
                domains.add_metric([label], n)
            yield domains

    def _contexts(self, now: Snapshot) -> Iterator[Metric]:
        lost = CounterMetricFamily("moetrace_rows_lost", "Rows that were lost", labels=["context"])
        events = CounterMetricFamily("moetrace_events_lost", "Events that were lost", labels=["context"])
        fill = GaugeMetricFamily(
            "moetrace_ring_fill_ratio", "Share of the ring that waits", labels=["context"]
        )
        up = GaugeMetricFamily(
            "moetrace_recording", "1 while the context is recorded, 0 if paused or ended", labels=["context"]
        )
        force = GaugeMetricFamily(
            "moetrace_intervention", "Number of the intervention in force, 0 none", labels=["context"]
        )
        for context in now.contexts:
            lost.add_metric([context.name], context.lost)
            events.add_metric([context.name], context.events_lost)
            if not np.isnan(context.ring_fill):
                fill.add_metric([context.name], context.ring_fill)
            up.add_metric([context.name], float(context.state == "recording"))
            force.add_metric([context.name], context.intervention)
        yield from (lost, events, fill, up, force)
        for counter, (name, said) in _SECONDS.items():
            family = CounterMetricFamily(name, said, labels=["context"])
            for context in now.contexts:
                if counter in context.counters:
                    family.add_metric([context.name], context.counters[counter] / 1e9)
            yield family

    def _layers(self, now: Snapshot) -> Iterator[Metric]:
        even = GaugeMetricFamily(
            "moetrace_layer_jain", "Jain's index of a layer's load, 1 even", labels=["layer"]
        )
        hottest = GaugeMetricFamily(
            "moetrace_layer_hottest_share",
            "Share of the layer's picks that its hottest expert gets",
            labels=["layer"],
        )
        unused = GaugeMetricFamily(
            "moetrace_layer_unused_experts", "Experts of the layer that got no token", labels=["layer"]
        )
        experts = CounterMetricFamily(
            "moetrace_expert_tokens", "Tokens that an expert got", labels=["layer", "expert"]
        )
        for i, layer in enumerate(now.layers.tolist()):
            counts = now.counts[i, : int(now.n_expert[i])]
            total = int(counts.sum())
            if total:
                even.add_metric([str(layer)], float(jain_index(counts, counts.size)))
                hottest.add_metric([str(layer)], float(counts.max()) / total)
            unused.add_metric([str(layer)], int((counts == 0).sum()))
            for expert, n in enumerate(counts.tolist()) if self._experts else ():
                experts.add_metric([str(layer), str(expert)], n)
        yield from (even, hottest, unused, *([experts] if self._experts else []))
