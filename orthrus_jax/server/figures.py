"""What /metrics reports, in Prometheus' words. Knows no requests beyond their figures."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from orthrus_jax.engine import Completion

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Figures:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and processor time, where /proc tells them
        counter = lambda name, text, *labels: Counter(
            f"orthrus_{name}", text, labels, registry=registry
        )
        histogram = lambda name, text, buckets: Histogram(
            f"orthrus_{name}", text, buckets=buckets, registry=registry
        )
        gauge = lambda name, text: Gauge(f"orthrus_{name}", text, registry=registry)
        self._requests = counter("requests", "HTTP requests", "path", "status")
        self._steps = counter("steps", "steps of the engine", "outcome")
        self._prompt = counter("prompt_tokens", "tokens of prompts")
        self._cached = counter("cached_prompt_tokens", "of them, tokens that a cache held")
        self._generated = counter("generated_tokens", "tokens of finished answers")
        self._accepted = counter("accepted_drafts", "drafts accepted in finished answers")
        self._cycles = counter("cycles", "cycles that finished answers needed")
        self._forwards = counter("forwards", "forwards that finished answers took part in")
        self._first = histogram("first_token_seconds", "from arrival to the first token", SECONDS)
        self._token = histogram("token_seconds", "per token after the first", TOKEN_SECONDS)
        self._whole = histogram("answer_seconds", "from arrival to the last token", SECONDS)
        self._running = gauge("running", "answers in a row")
        self._waiting = gauge("waiting", "answers in line")

    def responded(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def stepped(self, outcome: str) -> None:
        """Count a step of the engine, "ok" or "failed"."""
        self._steps.labels(outcome).inc()

    def answered(
        self, completion: Completion, prompt: int, first: float | None, seconds: float
    ) -> None:
        """Count a finished answer.

        Args:
          completion: the answer.
          prompt: tokens of its prompt.
          first: seconds from arrival to the first token.
          seconds: from arrival to the last.
        """
        self._prompt.inc(prompt)
        self._cached.inc(completion.cached_tokens)
        self._generated.inc(len(completion.tokens))
        self._accepted.inc(sum(completion.accepted))
        self._cycles.inc(completion.cycles)
        self._forwards.inc(completion.forwards)
        self._whole.observe(seconds)
        if first is not None:
            self._first.observe(first)
            if (rest := len(completion.tokens) - 1) > 0:
                self._token.observe((seconds - first) / rest)

    def text(self, running: int, waiting: int) -> bytes:
        """All figures in Prometheus' text format."""
        self._running.set(running)
        self._waiting.set(waiting)
        return generate_latest(self.registry)
