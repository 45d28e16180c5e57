"""What the database knows, asked when somebody scrapes: every API process gives the same figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import structlog
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase
from app.jobs import repository as jobs
from app.webhooks import repository as webhooks

CACHE_SECONDS = 5.0
_PATIENCE_MILLISECONDS = 2000

log = structlog.get_logger(__name__)

Source = Callable[[Session, Sequence[str]], Iterable[Metric]]
"""Metrics of one domain; gets the GPU classes that jobs may name."""


def _job_metrics(session: Session, _gpu_classes: Sequence[str]) -> Iterator[Metric]:
    family = GaugeMetricFamily("orthokv_jobs_stored", "Jobs in the database.", labels=["status", "code"])
    for (status, code), count in jobs.count_jobs(session).items():
        family.add_metric([status, code], count)
    yield family


def _queue_metrics(session: Session, gpu_classes: Sequence[str]) -> Iterator[Metric]:
    waiting, running = jobs.waiting_by_class(session), jobs.running_by_class(session)
    depth = GaugeMetricFamily(
        "orthokv_queue_depth", "Steps that a worker could take now.", labels=["gpu_class"]
    )
    age = GaugeMetricFamily(
        "orthokv_queue_oldest_seconds",
        "How long the oldest of them has waited; 0 when there is none.",
        labels=["gpu_class"],
    )
    busy = GaugeMetricFamily("orthokv_steps_running", "Steps that workers hold.", labels=["gpu_class"])
    overdue = GaugeMetricFamily(
        "orthokv_leases_overdue", "Leases that ran out and that no reaper has ended yet."
    )
    # A class without a step is 0, not absent: an alert on it has something to look at.
    for name in sorted({*gpu_classes, *waiting, *running}):
        count, seconds = waiting.get(name, (0, 0.0))
        depth.add_metric([name], count)
        age.add_metric([name], seconds)
        busy.add_metric([name], running.get(name, 0))
    overdue.add_metric([], len(jobs.lost_steps(session)))
    yield from (depth, age, busy, overdue)


def _webhook_metrics(session: Session, _gpu_classes: Sequence[str]) -> Iterator[Metric]:
    count, seconds = webhooks.count_due(session)
    yield GaugeMetricFamily("orthokv_webhooks_due", "Webhook deliveries that a sender could send now.", count)
    yield GaugeMetricFamily(
        "orthokv_webhooks_oldest_seconds",
        "How long the oldest of them has waited; 0 when there is none.",
        seconds,
    )


SOURCES: tuple[Source, ...] = (_job_metrics, _queue_metrics, _webhook_metrics)
"""Each domain's; append one to have it read in the same transaction."""


class StoredMetrics:
    """A collector. Asks the database at most every `CACHE_SECONDS`, however many ask for it.

    Without an answer there are no figures, rather than old ones, and `orthokv_database_up` is 0.
    """

    def __init__(self, url: str, gpu_classes: Sequence[str]) -> None:
        self._database = SyncDatabase(url)
        self._gpu_classes = tuple(gpu_classes)
        self._guard = threading.Lock()
        self._metrics: list[Metric] = []
        self._fresh_until = float("-inf")

    def collect(self) -> Iterable[Metric]:
        with self._guard:
            if time.monotonic() >= self._fresh_until:
                self._metrics = self._read()
                self._fresh_until = time.monotonic() + CACHE_SECONDS
            return list(self._metrics)

    def close(self) -> None:
        self._database.close()

    def _read(self) -> list[Metric]:
        began = time.monotonic()
        try:
            found = self._database.read(self._ask)
            up = 1
        except SQLAlchemyError as error:
            log.warning("metrics.database_unavailable", error=str(error).partition("\n")[0])
            found, up = [], 0
        took = time.monotonic() - began
        return [
            GaugeMetricFamily("orthokv_database_up", "1 when the database answered the scrape.", up),
            GaugeMetricFamily("orthokv_database_scrape_seconds", "How long it took to.", took),
            *found,
        ]

    def _ask(self, session: Session) -> list[Metric]:
        if session.get_bind().dialect.name == "postgresql":
            # A scrape must not add to the trouble of a slow database.
            session.execute(text(f"SET LOCAL statement_timeout = {_PATIENCE_MILLISECONDS}"))
        return [metric for source in SOURCES for metric in source(session, self._gpu_classes)]
