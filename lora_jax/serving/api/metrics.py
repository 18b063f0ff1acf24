"""Metrics for Prometheus: a server's requests, and its engine's figures."""

import math
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Of an engine's figures, those that only grow; the others are gauges.
_COUNTERS = frozenset(
    ["steps", "prompt_tokens", "new_tokens", "shared_tokens", "finished", "cancelled", "preempted"]
)


class Metrics:
    """One server's figures. No label has a value from a request, so that their number is fixed.

    `stats()` returns an engine's figures by name.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, stats: Callable[[], Mapping[str, float]]):
        self._registry = CollectorRegistry()
        self._stats = stats
        self._requests = Counter(
            "lora_jax_http_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "lora_jax_prompt_tokens", "Tokens of prompts that were taken.", registry=self._registry
        )
        self._new_tokens = Counter(
            "lora_jax_generated_tokens", "Tokens of answers.", registry=self._registry
        )
        self._first = Histogram(
            "lora_jax_time_to_first_token_seconds",
            "From the body to the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "lora_jax_request_seconds",
            "From the body to the end of the answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def ended(self, seconds: float, prompt_tokens: int, new_tokens: int) -> None:
        self._whole.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._new_tokens.inc(new_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # what `collect` yields depends on the engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats().items():
            if not isinstance(value, int | float) or math.isnan(value):
                continue
            if name in _COUNTERS:
                yield CounterMetricFamily(f"lora_jax_engine_{name}", name, value=value)
            else:
                yield GaugeMetricFamily(f"lora_jax_engine_{name}", name, value=value)
