"""What a server counts, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Args:
        queue: :class:`~fairseq_smoe.serving.jobs.JobQueue`
        workers: :class:`~fairseq_smoe.serving.workers.Workers`
    """

    def __init__(self, queue, workers):
        self._registry = CollectorRegistry()
        own = {"namespace": "fairseq_smoe", "registry": self._registry}
        self._requests = Counter("requests", "Answered requests.", ["path", "status"], **own)
        self._seconds = Histogram(
            "translate_seconds", "Time of a translation request.", buckets=SECONDS, **own
        )
        self._characters = Counter("characters", "Characters that were translated.", **own)
        Gauge("queue_tokens", "Tokens that wait.", **own).set_function(lambda: queue.tokens)
        Gauge("workers_alive", "Processes that are ready.", **own).set_function(
            lambda: workers.alive
        )
        for name, text in (
            ("batches", "Batches that were translated."),
            ("sentences", "Sentences that were translated."),
            ("restarts", "Processes that died and were started again."),
        ):
            Gauge(f"worker_{name}", text, **own).set_function(
                lambda name=name: workers.counts[name]
            )

    def answered(self, path, status):
        self._requests.labels(path, str(status)).inc()

    def translated(self, characters, seconds):
        self._characters.inc(characters)
        self._seconds.observe(seconds)

    def text(self):
        return generate_latest(self._registry)
