"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from reasonrec.recipes.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one server.

    Attributes:
        media_type: What `text` is.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "reasonrec_requests", "Requests answered", ("path", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "reasonrec_request_seconds", "Time of requests", ("path",), buckets=SECONDS, registry=self._registry
        )
        self._users = Histogram(
            "reasonrec_batch_users", "Users in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self._registry
        )
        self._batch = Histogram("reasonrec_batch_seconds", "Time of batches", buckets=SECONDS, registry=self._registry)
        self._open = Gauge("reasonrec_users_open", "Users that wait or are answered", registry=self._registry)
        self._remembered = Gauge(
            "reasonrec_remembered_bytes", "Lists kept for who asks the same again", registry=self._registry
        )
        self._found = Gauge("reasonrec_remembered_answers", "Users answered from such a list", registry=self._registry)

    def follow(self, engine: Engine) -> None:
        """Read an engine's gauges whenever the metrics are asked for."""
        self._open.set_function(lambda: engine.open)
        self._remembered.set_function(lambda: engine.remembered.bytes)
        self._found.set_function(lambda: engine.remembered.found)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            path: The template of its path, so that there are few.
            status: What it was answered with.
            seconds: How long that took; of a stream, until it began.
        """
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, users: int, seconds: float) -> None:
        """Count a batch of the engine."""
        self._users.observe(users)
        self._batch.observe(seconds)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class Counted:
    """Counts what an application answers.

    Args:
        app: The application.
        metrics: Where.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and see what becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.request(path, message["status"], time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, watched)
