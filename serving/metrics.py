"""What /metrics shows, for Prometheus; names as in text-embeddings-inference, where it has one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

disable_created_metrics()  # one more line for each metric

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        times = partial(Histogram, registry=self.registry, buckets=SECONDS)
        sizes = partial(Histogram, registry=self.registry, buckets=SIZES)
        self.requests = counter("te_request_count", "Requests", ["method"])
        self.successes = counter("te_request_success", "Requests answered", ["method"])
        self.failures = counter("te_request_failure", "Requests refused or failed", ["err"])
        self.texts = counter("te_model_texts", "Texts of each model", ["model"])
        self.duration = times("te_request_duration", "Seconds in all")
        self.queued = times("te_request_queue_duration", "Seconds of waiting")
        self.inference = times("te_request_inference_duration", "Seconds of computing")
        self.batch_size = sizes("te_batch_next_size", "Texts of a batch")
        self.batch_tokens = sizes("te_batch_next_tokens", "Tokens of a batch")
        self.queue_size = gauge("te_queue_size", "Texts that wait")
        self.served = gauge("te_models", "Models that are served")
        self.cached_bytes = gauge("te_prefix_cache_bytes", "Bytes of prefixes in memory")
        self.reads = gauge("te_prefix_reads", "Prefixes read from disk so far")

    @contextmanager
    def request(self, method: str) -> Iterator[float]:
        """Count and time a request, which is answered within the block; yields when it began."""
        began = time.perf_counter()
        self.requests.labels(method).inc()
        yield began
        self.successes.labels(method).inc()
        self.duration.observe(time.perf_counter() - began)
