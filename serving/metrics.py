"""What /metrics shows, for Prometheus; names as in text-embeddings-inference, where it has one."""

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
MOST_MODELS = 100  # with a label of their own; more would make /metrics too long
OTHERS = "others"


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.models: set[str] = set()

        def make(kind: type, name: str, text: str, **options):
            return kind(name, text, registry=self.registry, **options)

        self.requests = make(Counter, "te_request_count", "Requests", labelnames=["method"])
        self.successes = make(
            Counter, "te_request_success", "Requests answered", labelnames=["method"]
        )
        self.failures = make(
            Counter, "te_request_failure", "Requests refused or failed", labelnames=["err"]
        )
        self.texts = make(
            Counter,
            "te_model_texts",
            "Texts of each model, or of others",
            labelnames=["model"],
        )
        times = {"buckets": SECONDS}
        self.duration = make(Histogram, "te_request_duration", "Seconds in all", **times)
        self.queued = make(Histogram, "te_request_queue_duration", "Seconds of waiting", **times)
        self.inference = make(
            Histogram, "te_request_inference_duration", "Seconds of computing", **times
        )
        self.batch_size = make(Histogram, "te_batch_next_size", "Texts of a batch", buckets=SIZES)
        self.batch_tokens = make(
            Histogram, "te_batch_next_tokens", "Tokens of a batch", buckets=SIZES
        )
        self.queue_size = make(Gauge, "te_queue_size", "Texts that wait")
        self.served = make(Gauge, "te_models", "Models that are served")
        self.cached_bytes = make(Gauge, "te_prefix_cache_bytes", "Bytes of prefixes in memory")
        self.reads = make(Gauge, "te_prefix_reads", "Prefixes read from disk so far")

    def count_texts(self, model: str, count: int) -> None:
        """Count the texts of a model."""
        if len(self.models) < MOST_MODELS:
            self.models.add(model)
        self.texts.labels(model if model in self.models else OTHERS).inc(count)
